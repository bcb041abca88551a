"""LatencyTable: a whole table, which finds entries and searches among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lutest.reader.arguments import named_key, not_measured
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Figures, Key, Unchanging
from lutest.reader.lengths import lengths_by_workload
from lutest.reader.search import best, feasible, frontier

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from lutest.reader.batch import Batch
    from lutest.reader.torch_module import LatencyModule

Missing = Literal["error", "interpolate"]

_FILLED_AT_MOST = 4096  # filled-in entries that are kept: a policy may ask for anything


class LatencyTable(Unchanging):
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

    def __init__(self, figures: Figures, path: str = "", missing: Missing = "error") -> None:
        if missing not in ("error", "interpolate"):
            raise ArgumentError(f"missing is {missing!r}; allowed: 'error', 'interpolate'")
        lengths = lengths_by_workload(figures.output_lengths)
        entries = {held.key: Entry(held, figures.quantiles, figures.key_columns, lengths) for held in figures.keys}
        self.figures, self.path, self.quantiles = figures, path, figures.quantiles
        self.keys = tuple(entries)
        self.key_columns = tuple(column.name for column in figures.key_columns)
        self.output_lengths, self.meta = MappingProxyType(figures.output_lengths), MappingProxyType(figures.meta)
        self._entries, self._lengths, self._missing = entries, lengths, missing
        self._made = True

    def __reduce__(self) -> tuple[Any, ...]:
        return LatencyTable, (self.figures, self.path, self._missing)

    def __repr__(self) -> str:
        device = self.meta.get("device")
        return (
            f"<LatencyTable {self.path or 'in memory'}: {len(self)} configurations of {', '.join(self.key_columns)}, "
            f"quantiles {', '.join(map(str, self.quantiles))}{f', device {device}' if device else ''}>"
        )

    def _repr_html_(self) -> str:
        from lutest.reader.rows import config_rows, html_table

        return html_table(repr(self).strip("<>"), config_rows(self.figures))

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

    feasible, best, frontier = feasible, best, frontier

    @property
    def batch(self) -> Batch:
        """The verbs of entries over arrays."""
        held = self.__dict__.get("_batch")
        if held is None:
            from lutest.reader.batch import Batch  # here, so that `import lutest` does without NumPy

            held = self.__dict__.setdefault("_batch", Batch(self.figures))
        found: Batch = held
        return found

    def to_pandas(self) -> pd.DataFrame:
        """One row per configuration: sample sizes, and quantiles of prefill and of a decode step in milliseconds."""
        import pandas as pd

        from lutest.reader.rows import config_rows

        return pd.DataFrame(config_rows(self.figures))

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

    def _find(self, values: Sequence[Any], named: Mapping[str, Any]) -> Entry:
        key = named_key(self.figures, values, named)
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
