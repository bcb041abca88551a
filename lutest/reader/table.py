"""LatencyTable: a whole table, its verbs and its lookup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lutest.reader.curves import key_pieces
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError
from lutest.reader.explanation import Explanation
from lutest.reader.figures import Figures, Key, KeyFigures, Quality
from lutest.reader.lengths import Lengths, lengths_by_workload
from lutest.reader.rows import most_rows
from lutest.reader.search import Option, Request, best_of, fitting, front_of, given_qualities, held_qualities
from lutest.reader.unknown_keys import named_key, not_measured

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

    from lutest.reader.batch import Batch
    from lutest.reader.grid import Floats, Ints
    from lutest.reader.rows import TotalRows
    from lutest.reader.torch_module import LatencyModule

__all__ = ["LatencyTable", "Missing", "Tier"]

Missing = Literal["error", "interpolate"]
Tier = str | int

_FILLED_AT_MOST = 4096  # filled-in entries that are kept: a policy may ask for anything


class LatencyTable:
    """Latency quantiles of all measured configurations: immutable, picklable, fork- and thread-safe.

    Attributes
    ----------
    keys : tuple of Key
        The measured configurations, ordered by tier, top_k, num_blocks.
    tiers : tuple of str
        Tiers by increasing median prompt length.
    quantiles : tuple of float
        Levels that the table holds.
    output_lengths : mapping
        workload → ((output_tokens, n), …).
    meta : mapping
        What the table is and what it was built from.
    path : str
        The file that it was read from; empty for one that was made in memory.
    figures : Figures
        Everything as plain values.
    batch : Batch
        The verbs over arrays.
    """

    __slots__ = (
        "_entries",
        "_grid",
        "_ids",
        "_lengths",
        "_missing",
        "_p50_views",
        "_p95_rows",
        "_p95_views",
        "batch",
        "figures",
        "keys",
        "meta",
        "output_lengths",
        "path",
        "quantiles",
        "tiers",
    )

    keys: tuple[Key, ...]
    tiers: tuple[str, ...]
    quantiles: tuple[float, ...]
    output_lengths: Mapping[str, tuple[tuple[int, int], ...]]
    meta: Mapping[str, str]
    path: str
    figures: Figures
    batch: Batch
    _entries: dict[tuple[Tier, int, int], Entry]
    _ids: dict[tuple[str, int, int], int]
    _grid: Floats
    _lengths: dict[str | None, Lengths]
    _missing: Missing
    _p50_views: dict[tuple[Tier, int, int], memoryview[float]]
    _p95_views: dict[tuple[Tier, int, int], memoryview[float]]
    _p95_rows: dict[tuple[Tier, int, int], TotalRows]

    def __init__(
        self,
        figures: Figures,
        path: str = "",
        missing: Missing = "error",
        grid: Floats | None = None,
        filled: Sequence[KeyFigures] = (),
    ) -> None:
        from lutest.reader.batch import Batch  # here, so that `import lutest` does without NumPy
        from lutest.reader.grid import build_grid, entry_views

        if missing not in ("error", "interpolate"):
            raise ArgumentError(f"missing is {missing!r}; allowed: 'error', 'interpolate'")
        median = figures.quantiles.index(0.5)
        pieces = [key_pieces(key, median) for key in figures.keys]
        grid = build_grid(figures, pieces) if grid is None else grid
        grid.flags.writeable = False
        lengths = lengths_by_workload(figures.output_lengths)
        rows = most_rows(figures.keys)
        entries: dict[tuple[Tier, int, int], Entry] = {}
        for number, (key, held) in enumerate(zip(figures.keys, pieces, strict=True)):
            views = entry_views(grid, len(figures.quantiles), number)
            _enter(entries, figures, Entry(key, figures.quantiles, views, held, lengths, rows))
        # what is asked for most, one step nearer than in the entries
        p50_views = {key: entry._prefill_views[0.5] for key, entry in entries.items()}
        p95_views = {key: e._prefill_views[0.95] for key, e in entries.items() if 0.95 in figures.quantiles}
        p95_rows = {key: entry._p95_rows for key, entry in entries.items()}
        for key in filled:
            _enter(entries, figures, Entry(key, figures.quantiles, lengths=lengths))
        keys = tuple(key.key for key in figures.keys)
        for name, value in (
            ("keys", keys),
            ("tiers", figures.tiers),
            ("quantiles", figures.quantiles),
            ("output_lengths", MappingProxyType(figures.output_lengths)),
            ("meta", MappingProxyType(figures.meta)),
            ("path", path),
            ("figures", figures),
            ("batch", Batch(figures, pieces, grid)),
            ("_entries", entries),
            ("_ids", {key: number for number, key in enumerate(keys)}),
            ("_grid", grid),
            ("_lengths", lengths),
            ("_missing", missing),
            ("_p50_views", p50_views),
            ("_p95_views", p95_views),
            ("_p95_rows", p95_rows),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a LatencyTable cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a LatencyTable cannot be changed: {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        filled = {id(e): e._figures for e in tuple(self._entries.values()) if e.key not in self._ids}
        return LatencyTable, (self.figures, self.path, self._missing, self._grid, tuple(filled.values()))

    def __repr__(self) -> str:
        device = self.meta.get("device")
        return (
            f"<LatencyTable {self.path or 'in memory'}: {len(self)} configurations, tiers {', '.join(self.tiers)}, "
            f"quantiles {', '.join(map(str, self.quantiles))}{f', device {device}' if device else ''}>"
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key in self._ids

    def __getitem__(self, key: tuple[Tier, int, int]) -> Entry:
        return self.lookup(*key)

    def lookup(self, tier: Tier, top_k: int, num_blocks: int) -> Entry:
        """The entry of a configuration.

        Parameters
        ----------
        tier : str or int
            Name, or index in `tiers`.
        top_k, num_blocks : int
            Experts per token and active blocks.

        Returns
        -------
        Entry

        Raises
        ------
        UnknownKeyError
            Not measured, and the table was not loaded with ``missing="interpolate"``; or an unknown tier.
        """
        try:
            return self._entries[tier, top_k, num_blocks]
        except (KeyError, TypeError):
            return self._find(tier, top_k, num_blocks)

    def prefill_ms(
        self, tier: Tier, top_k: int, num_blocks: int, prompt_tokens: int | None = None, q: float = 0.5
    ) -> float:
        """`Entry.prefill_ms` of a configuration, in milliseconds."""
        try:  # what Entry.prefill_ms would do, without the call
            if prompt_tokens is None:
                return self._entries[tier, top_k, num_blocks]._own_prefill[q]
            if prompt_tokens >= 0:
                if q == 0.5:
                    return self._p50_views[tier, top_k, num_blocks][prompt_tokens]
                if q == 0.95:
                    return self._p95_views[tier, top_k, num_blocks][prompt_tokens]
        except (IndexError, KeyError, TypeError):
            pass
        return self.lookup(tier, top_k, num_blocks).prefill_ms(prompt_tokens, q)

    def decode_step_ms(self, tier: Tier, top_k: int, num_blocks: int, kv_len: int, q: float = 0.5) -> float:
        """`Entry.decode_step_ms` of a configuration, in milliseconds."""
        return self.lookup(tier, top_k, num_blocks).decode_step_ms(kv_len, q)

    def decode_ms(
        self, tier: Tier, top_k: int, num_blocks: int, prompt_tokens: int | None, output_tokens: int, q: float = 0.5
    ) -> float:
        """`Entry.decode_ms` of a configuration, in milliseconds."""
        return self.lookup(tier, top_k, num_blocks).decode_ms(prompt_tokens, output_tokens, q)

    def total_ms(
        self, tier: Tier, top_k: int, num_blocks: int, prompt_tokens: int | None, output_tokens: int, q: float = 0.5
    ) -> float:
        """`Entry.total_ms` of a configuration, in milliseconds."""
        try:  # what Entry.total_ms would do, without the call
            if prompt_tokens is not None and 0 <= prompt_tokens < (end := prompt_tokens + output_tokens):
                at_prompt, sums_before, at_tokens = self._p95_rows[tier, top_k, num_blocks]
                p50, start, u, v = at_prompt[prompt_tokens]
                ratio, spread = at_tokens[output_tokens]
                steps_ms = sums_before[end] - start
                if q == 0.95:
                    shared = steps_ms * spread + u
                    return p50 + steps_ms * ratio + sqrt(shared * shared + v)
                if q == 0.5:
                    return p50 + steps_ms * ratio
        except (IndexError, KeyError, TypeError, ValueError):
            pass
        return self.lookup(tier, top_k, num_blocks)._total_anywhere(prompt_tokens, output_tokens, q)

    def max_output_tokens(
        self,
        tier: Tier,
        top_k: int,
        num_blocks: int,
        budget_ms: float,
        prompt_tokens: int | None = None,
        q: float = 0.5,
    ) -> int:
        """`Entry.max_output_tokens` of a configuration: the largest number of tokens whose total fits, 0 if none."""
        return self.lookup(tier, top_k, num_blocks).max_output_tokens(budget_ms, prompt_tokens, q)

    def p_within(
        self,
        tier: Tier,
        top_k: int,
        num_blocks: int,
        budget_ms: float,
        prompt_tokens: int | None = None,
        workload: str | None = None,
    ) -> float:
        """`Entry.p_within` of a configuration: the probability that a run of unknown length stays within a budget."""
        return self.lookup(tier, top_k, num_blocks).p_within(budget_ms, prompt_tokens, workload)

    def expected_total_ms(
        self,
        tier: Tier,
        top_k: int,
        num_blocks: int,
        prompt_tokens: int | None = None,
        workload: str | None = None,
    ) -> float:
        """`Entry.expected_total_ms` of a configuration: expected latency of a run of unknown length."""
        return self.lookup(tier, top_k, num_blocks).expected_total_ms(prompt_tokens, workload)

    def explain(
        self, tier: Tier, top_k: int, num_blocks: int, prompt_tokens: int | None, output_tokens: int, q: float = 0.5
    ) -> Explanation:
        """`Entry.explain` of a configuration: every part with its n, source and bounds."""
        return self.lookup(tier, top_k, num_blocks).explain(prompt_tokens, output_tokens, q)

    def feasible(
        self,
        budget_ms: float,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
        prefill_share: float = 0.8,
        q: float = 0.95,
        margin: float = 0.0,
    ) -> list[Key]:
        """Measured configurations that fit a budget.

        Parameters
        ----------
        budget_ms : float
            Finite, above 0.
        prompt_tokens : int, optional
            Left out: each configuration's own prefill quantiles.
        output_tokens : int, optional
            Given: the total must fit. Left out: prefill must fit its share.
        prefill_share : float
            Part of the budget that prefill may take, above 0 and at most 1.
        q : float
            One of the table's quantiles.
        margin : float
            0 or more; with 0.1, the estimate times 1.1 must fit.

        Returns
        -------
        list of Key
            In the order of `keys`. One without decode figures is left out where `output_tokens` is 2 or more.

        Raises
        ------
        ArgumentError
        """
        request = Request(self.quantiles, prompt_tokens, output_tokens, q)
        return list(fitting(self._measured(), request, budget_ms, prefill_share, margin))

    def best(
        self,
        budget_ms: float,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
        prefill_share: float = 0.8,
        q: float = 0.95,
        margin: float = 0.0,
        quality: Mapping[Any, float] | None = None,
        workload: str | None = None,
    ) -> Option | None:
        """The configuration of the highest quality that fits a budget; of equals, the fastest.

        Parameters
        ----------
        budget_ms, prompt_tokens, output_tokens, prefill_share, q, margin
            As in `feasible`.
        quality : mapping, optional
            (tier, top_k, num_blocks) → number, higher is better; only these configurations are looked at. Left out: the
            table's own accuracies.
        workload : str, optional
            Whose accuracies to take; needed where the table holds those of several workloads.

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
        request = Request(self.quantiles, prompt_tokens, output_tokens, q)
        latencies = fitting(self._measured(), request, budget_ms, prefill_share, margin)
        return best_of(latencies, self._qualities(quality, workload))

    def frontier(
        self,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
        q: float = 0.95,
        quality: Mapping[Any, float] | None = None,
        workload: str | None = None,
    ) -> list[Option]:
        """The configurations that are worth choosing: no other is as fast and better, or faster and as good.

        Parameters, errors
            As in `best`. Latency is prefill where `output_tokens` is left out, else the total.

        Returns
        -------
        list of Option
            By rising latency, and so by rising quality.
        """
        request = Request(self.quantiles, prompt_tokens, output_tokens, q)
        latencies = {entry.key: ms for entry in self._measured() if (ms := request.latency_ms(entry)) is not None}
        return front_of(latencies, self._qualities(quality, workload))

    def key_ids(
        self, tiers: ArrayLike, top_ks: ArrayLike, num_blocks: ArrayLike, missing: Literal["error", "nan"] = "error"
    ) -> Ints:
        """`Batch.key_ids`: ids of configurations, for `batch` and for the module of `to_torch`."""
        return self.batch.key_ids(tiers, top_ks, num_blocks, missing)

    def to_torch(self, device: str | torch.device = "cpu", q: float = 0.95) -> LatencyModule:
        """The table as a `torch.nn.Module` on a device; see `lutest.torch_module.LatencyModule`.

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

    def _measured(self) -> Iterator[Entry]:
        return map(self._entries.__getitem__, self.keys)

    def _qualities(self, quality: Mapping[Any, float] | None, workload: str | None) -> dict[Key, Quality]:
        if quality is None:
            return held_qualities(self.figures.qualities, workload)
        if workload is not None:
            raise ArgumentError(f"workload is {workload!r} beside a quality of your own; allowed: one of the two")
        return given_qualities(quality, self._measured_key)

    def _measured_key(self, tier: Tier, top_k: int, num_blocks: int) -> Key:
        key = named_key(self.tiers, tier, top_k, num_blocks)
        if key not in self._ids:
            raise not_measured(self.keys, self.tiers, key)
        return key

    def _find(self, tier: Tier, top_k: int, num_blocks: int) -> Entry:
        key = named_key(self.tiers, tier, top_k, num_blocks)
        entry = self._entries.get(key)
        if entry is not None:
            return entry
        if self._missing == "error":
            raise not_measured(self.keys, self.tiers, key)
        from lutest.reader.interpolate import interpolate_key

        entry = Entry(interpolate_key(self.figures, key), self.quantiles, lengths=self._lengths)
        if len(self._entries) - 2 * len(self.keys) < 2 * _FILLED_AT_MOST:
            # setdefault is atomic: two threads may both compute it, and both get the same entry
            entry = self._entries.setdefault(key, entry)
            self._entries.setdefault((self.tiers.index(key.tier), key.top_k, key.num_blocks), entry)
        return entry


def _enter(entries: dict[tuple[Tier, int, int], Entry], figures: Figures, entry: Entry) -> None:
    key = entry.key
    entries[key] = entry
    entries[figures.tiers.index(key.tier), key.top_k, key.num_blocks] = entry
