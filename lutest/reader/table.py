"""LatencyTable: a whole table, which finds entries and searches among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lutest.reader.arguments import key_values
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Figures, Key, Quality
from lutest.reader.lengths import Lengths, lengths_by_workload
from lutest.reader.search import (
    By,
    Option,
    PromptTokens,
    Request,
    best_of,
    fitting,
    front_of,
    given_qualities,
    held_qualities,
    with_latency,
)
from lutest.reader.unknown_key import named_key, not_measured

if TYPE_CHECKING:
    import torch

    from lutest.reader.batch import Batch
    from lutest.reader.torch_module import LatencyModule

__all__ = ["LatencyTable", "Missing"]

Missing = Literal["error", "interpolate"]

_FILLED_AT_MOST = 4096  # filled-in entries that are kept: a policy may ask for anything


class LatencyTable:
    """Latency quantiles of all measured configurations: immutable, picklable, fork- and thread-safe.

    Attributes
    ----------
    keys : tuple of tuple
        The measured configurations, in order.
    key_columns : tuple of str
        What a configuration is made of.
    quantiles : tuple of float
        Levels that the table holds; 0.5 and 0.95 are among them.
    output_lengths : mapping
        workload → ((output_tokens, n), …).
    meta : mapping
        What the table is and what it was built from.
    path : str
        The file that it was read from; empty for one that was made in memory.
    figures : Figures
        Everything as plain values.
    batch : Batch
        The verbs of entries over arrays.
    """

    keys: tuple[Key, ...]
    key_columns: tuple[str, ...]
    quantiles: tuple[float, ...]
    output_lengths: Mapping[str, tuple[tuple[int, int], ...]]
    meta: Mapping[str, str]
    path: str
    figures: Figures
    _entries: dict[Key, Entry]
    _lengths: dict[str | None, Lengths]
    _missing: Missing

    def __init__(self, figures: Figures, path: str = "", missing: Missing = "error") -> None:
        if missing not in ("error", "interpolate"):
            raise ArgumentError(f"missing is {missing!r}; allowed: 'error', 'interpolate'")
        lengths = lengths_by_workload(figures.output_lengths)
        entries = {held.key: Entry(held, figures.quantiles, figures.key_columns, lengths) for held in figures.keys}
        self.__dict__.update(
            keys=tuple(entries),
            key_columns=tuple(column.name for column in figures.key_columns),
            quantiles=figures.quantiles,
            output_lengths=MappingProxyType(figures.output_lengths),
            meta=MappingProxyType(figures.meta),
            path=path,
            figures=figures,
            _entries=entries,
            _lengths=lengths,
            _missing=missing,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a LatencyTable cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a LatencyTable cannot be changed: {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return LatencyTable, (self.figures, self.path, self._missing)

    def __repr__(self) -> str:
        device = self.meta.get("device")
        return (
            f"<LatencyTable {self.path or 'in memory'}: {len(self)} configurations of {', '.join(self.key_columns)}, "
            f"quantiles {', '.join(map(str, self.quantiles))}{f', device {device}' if device else ''}>"
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __contains__(self, key: object) -> bool:
        held = self._entries.get(key if isinstance(key, tuple) else (key,))
        return held is not None and held.n > 0

    def __getitem__(self, key: Any) -> Entry:
        return self.lookup(*key) if isinstance(key, tuple) else self.lookup(key)

    def lookup(self, *key: Any, **named: Any) -> Entry:
        """The entry of a configuration.

        Parameters
        ----------
        *key, **named : str, int or float
            A value for each of the table's key columns, in their order or by their names.

        Returns
        -------
        Entry

        Raises
        ------
        UnknownKeyError
            Not measured, and the table was not loaded with ``missing="interpolate"``; or an unknown category.
        ArgumentError
            Too few or too many values: naming the key columns.
        """
        try:
            return self._entries[key]
        except (KeyError, TypeError):
            return self._find(key, named)

    @property
    def batch(self) -> Batch:
        """The verbs of entries over arrays."""
        held = self.__dict__.get("_batch")
        if held is None:
            from lutest.reader.batch import Batch  # here, so that `import lutest` does without NumPy

            held = self.__dict__.setdefault("_batch", Batch(self.figures))
        found: Batch = held
        return found

    def feasible(
        self,
        budget_ms: float,
        prompt_tokens: PromptTokens | None = None,
        output_tokens: int | None = None,
        prefill_share: float = 0.8,
        q: float | None = None,
        margin: float = 0.0,
        *,
        p_at_least: float | None = None,
        by: By | None = None,
        workload: str | None = None,
    ) -> list[Key]:
        """Measured configurations that fit a budget.

        Parameters
        ----------
        budget_ms : float
            Finite, above 0.
        prompt_tokens : int, mapping or callable, optional
            One request has another prompt length in every configuration: a number for all; a mapping from the values of
            one key column, such as ``{"low": 150, "high": 510}``, or from keys; a callable of the key. Where the
            values are found in two columns, name one: ``{"users": {1: 150, 64: 150}}``. Left out: each configuration's
            own prefill quantiles.
        output_tokens : int, optional
            Given: the total must fit. Left out: prefill must fit its share.
        prefill_share : float
            Part of the budget that prefill may take, above 0 and at most 1.
        q : float, optional
            One of the table's quantiles; 0.95 if left out.
        margin : float
            0 or more; with 0.1, the estimate times 1.1 must fit.
        p_at_least : float, optional
            With the output length unknown: the probability of staying within the budget, over the table's output
            lengths, must be at least this (see `Entry.p_within`).
        by : {"expected"}, optional
            With the output length unknown: the expected total must fit (see `Entry.expected_total_ms`).
        workload : str, optional
            Whose output lengths to take for these two; left out: those of all together.

        Returns
        -------
        list of tuple
            In the order of `keys`. One without decode figures is left out where they are needed.

        Raises
        ------
        ArgumentError
            Also where `p_at_least`, `by` and `q` or `output_tokens` stand beside each other, and where a mapping of
            prompt lengths misses a measured value.
        """
        request = self._request(prompt_tokens, output_tokens, q, p_at_least, by, workload)
        return list(fitting(self._measured(), request, budget_ms, prefill_share, margin))

    def best(
        self,
        budget_ms: float,
        prompt_tokens: PromptTokens | None = None,
        output_tokens: int | None = None,
        prefill_share: float = 0.8,
        q: float | None = None,
        margin: float = 0.0,
        quality: Mapping[Any, float] | None = None,
        workload: str | None = None,
        *,
        p_at_least: float | None = None,
        by: By | None = None,
    ) -> Option | None:
        """The configuration of the highest quality that fits a budget; of equals, the fastest.

        Parameters
        ----------
        budget_ms, prompt_tokens, output_tokens, prefill_share, q, margin, p_at_least, by
            As in `feasible`.
        quality : mapping, optional
            Key → number, higher is better; only these configurations are looked at. Left out: the table's own
            accuracies.
        workload : str, optional
            Whose accuracies to take, and whose output lengths where they are unknown; needed where the table holds
            accuracies of several workloads.

        Returns
        -------
        Option or None
            None where nothing that has a quality fits: never a configuration that breaks the budget.

        Raises
        ------
        ArgumentError
            Also where there is no quality to go by.
        UnknownKeyError
            A configuration of `quality` was not measured.
        """
        request = self._request(prompt_tokens, output_tokens, q, p_at_least, by, workload)
        latencies = fitting(self._measured(), request, budget_ms, prefill_share, margin)
        return best_of(latencies, self._qualities(quality, workload, request))

    def frontier(
        self,
        prompt_tokens: PromptTokens | None = None,
        output_tokens: int | None = None,
        q: float | None = None,
        quality: Mapping[Any, float] | None = None,
        workload: str | None = None,
        *,
        by: By | None = None,
    ) -> list[Option]:
        """The configurations that are worth choosing: no other is as fast and better, or faster and as good.

        Parameters, errors
            As in `best`. Latency is prefill where nothing is said of the output, else the total.

        Returns
        -------
        list of Option
            By rising latency, and so by rising quality.
        """
        request = self._request(prompt_tokens, output_tokens, q, None, by, workload)
        latencies = {entry.key: ms for entry, ms in with_latency(self._measured(), request)}
        return front_of(latencies, self._qualities(quality, workload, request))

    def to_torch(self, device: str | torch.device = "cpu", q: float = 0.95) -> LatencyModule:
        """The table as a `torch.nn.Module` on a device; see `lutest.reader.torch_module.LatencyModule`.

        Parameters
        ----------
        device : str or torch.device
            Where it lives; what it is given has to be there too.
        q : float
            The quantile that ``forward`` answers at, one of the table's.
        """
        from lutest.reader.torch_module import LatencyModule

        module: LatencyModule = LatencyModule(self.figures, q).to(device)
        return module

    def _request(
        self,
        prompt_tokens: PromptTokens | None,
        output_tokens: int | None,
        q: float | None,
        p_at_least: float | None,
        by: By | None,
        workload: str | None,
    ) -> Request:
        columns = self.figures.key_columns
        return Request(columns, self.keys, self.quantiles, prompt_tokens, output_tokens, q, p_at_least, by, workload)

    def _measured(self) -> Iterator[Entry]:
        return map(self._entries.__getitem__, self.keys)

    def _qualities(
        self, quality: Mapping[Any, float] | None, workload: str | None, request: Request
    ) -> dict[Key, Quality]:
        if quality is None:
            return held_qualities(self.figures.qualities, workload)
        if workload is not None and (request.of_prefill or request.output_tokens is not None):
            raise ArgumentError(f"workload is {workload!r} beside a quality of your own; allowed: one of the two")
        return given_qualities(quality, self._measured_key)

    def _measured_key(self, given: Any) -> Key:
        values = given if isinstance(given, tuple) else (given,)
        key = named_key(self.figures, key_values(self.figures.key_columns, values, {}))
        if key not in self:
            raise not_measured(self.figures, key)
        return self._entries[key].key

    def _find(self, values: Sequence[Any], named: Mapping[str, Any]) -> Entry:
        key = named_key(self.figures, key_values(self.figures.key_columns, values, named))
        entry = self._entries.get(key)
        if entry is not None:
            return entry
        if self._missing == "error":
            raise not_measured(self.figures, key)
        from lutest.reader.missing import interpolate_key

        figures = self.figures
        filled = interpolate_key(figures, key)
        entry = Entry(filled, figures.quantiles, figures.key_columns, self._lengths)
        if len(self._entries) < len(self.keys) + _FILLED_AT_MOST:
            # setdefault is atomic: two threads may both compute it, and both get the same entry
            entry = self._entries.setdefault(key, entry)
        return entry
