"""LatencyTable: a whole table, its lookup, and the table behind the module-level lookup."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, cast

from lutest.arguments import positive_ms, quantile_index, whole_number
from lutest.errors import ArgumentError, NoDecodeDataError, TableError, UnknownKeyError
from lutest.estimate import Entry
from lutest.explanation import Explanation
from lutest.figures import Figures, Key, KeyFigures
from lutest.integrity import refuse_unfinished
from lutest.pieces import key_pieces
from lutest.reader import read_figures

if TYPE_CHECKING:
    from lutest.batch import Batch
    from lutest.grid import Floats

__all__ = ["LatencyTable", "load", "lookup", "use"]

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
        "_missing",
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
    _missing: Missing

    def __init__(
        self,
        figures: Figures,
        path: str = "",
        missing: Missing = "error",
        grid: Floats | None = None,
        filled: Sequence[KeyFigures] = (),
    ) -> None:
        from lutest.batch import Batch  # here, so that `import lutest` does without NumPy
        from lutest.grid import build_grid, entry_views

        if missing not in ("error", "interpolate"):
            raise ArgumentError(f"missing is {missing!r}; allowed: 'error', 'interpolate'")
        median = figures.quantiles.index(0.5)
        pieces = [key_pieces(key, median) for key in figures.keys]
        grid = build_grid(figures, pieces) if grid is None else grid
        grid.flags.writeable = False
        entries: dict[tuple[Tier, int, int], Entry] = {}
        for number, (key, held) in enumerate(zip(figures.keys, pieces, strict=True)):
            views = entry_views(grid, len(figures.quantiles), number)
            _enter(entries, figures, Entry(key, figures.quantiles, views, held))
        for key in filled:
            _enter(entries, figures, Entry(key, figures.quantiles))
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
            ("_missing", missing),
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
            entry = self._entries[tier, top_k, num_blocks]
            if prompt_tokens is None:
                return entry._own_prefill[q]
            if prompt_tokens >= 0:
                return entry._prefill_views[q][prompt_tokens]
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
        try:
            entry = self._entries[tier, top_k, num_blocks]
        except (KeyError, TypeError):
            entry = self._find(tier, top_k, num_blocks)
        return entry.total_ms(prompt_tokens, output_tokens, q)

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
        budget = positive_ms("budget_ms", budget_ms)
        quantile_index(self.quantiles, q)
        if prompt_tokens is not None:
            whole_number("prompt_tokens", prompt_tokens, 0)
        if output_tokens is not None:
            whole_number("output_tokens", output_tokens, 1)
        if not 0.0 < prefill_share <= 1.0:
            raise ArgumentError(f"prefill_share is {prefill_share!r}; allowed: above 0 and at most 1")
        if not 0.0 <= margin < math.inf:
            raise ArgumentError(f"margin is {margin!r}; allowed: finite, 0 or more")
        limit = budget if output_tokens is not None else prefill_share * budget
        fitting = []
        for key in self.keys:
            entry = self._entries[key]
            try:
                if output_tokens is None:
                    estimate = entry.prefill_ms(prompt_tokens, q)
                else:
                    estimate = entry.total_ms(prompt_tokens, output_tokens, q)
            except NoDecodeDataError:
                continue  # nobody can say that it fits
            if estimate * (1.0 + margin) <= limit:
                fitting.append(key)
        return fitting

    def _find(self, tier: Tier, top_k: int, num_blocks: int) -> Entry:
        key = self._wanted(tier, top_k, num_blocks)
        entry = self._entries.get(key)
        if entry is not None:
            return entry
        if self._missing == "error":
            near = "; ".join(f"{k.tier!r}, {k.top_k}, {k.num_blocks}" for k in self._nearest(key))
            raise UnknownKeyError(
                f"tier={key.tier!r}, top_k={key.top_k}, num_blocks={key.num_blocks} was not measured; "
                f"nearest measured (tier, top_k, num_blocks): {near}; load(path, missing='interpolate') fills it in"
            )
        from lutest.interpolate import interpolate_key

        entry = Entry(interpolate_key(self.figures, key), self.quantiles)
        if len(self._entries) - 2 * len(self.keys) < 2 * _FILLED_AT_MOST:
            # setdefault is atomic: two threads may both compute it, and both get the same entry
            entry = self._entries.setdefault(key, entry)
            self._entries.setdefault((self.tiers.index(key.tier), key.top_k, key.num_blocks), entry)
        return entry

    def _wanted(self, tier: object, top_k: object, num_blocks: object) -> Key:
        numbers = [_index("top_k", top_k), _index("num_blocks", num_blocks)]
        if isinstance(tier, str):
            if tier in self.tiers:
                return Key(str(tier), *numbers)
        else:
            try:
                place = operator.index(cast(SupportsIndex, tier))
            except TypeError:
                place = -1
            if 0 <= place < len(self.tiers):
                return Key(self.tiers[place], *numbers)
        names = ", ".join(f"{name!r} ({place})" for place, name in enumerate(self.tiers))
        raise UnknownKeyError(f"tier {tier!r} is not in the table, which holds {names}")

    def _nearest(self, key: Key) -> list[Key]:
        tier = self.tiers.index(key.tier)
        return sorted(
            self.keys,
            key=lambda k: (
                (self.tiers.index(k.tier) - tier) ** 2
                + (k.top_k - key.top_k) ** 2
                + (k.num_blocks - key.num_blocks) ** 2
            ),
        )[:3]


def _index(name: str, value: object) -> int:
    try:
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise UnknownKeyError(f"{name} is {value!r}; allowed: a whole number") from None


def _enter(entries: dict[tuple[Tier, int, int], Entry], figures: Figures, entry: Entry) -> None:
    key = entry.key
    entries[key] = entry
    entries[figures.tiers.index(key.tier), key.top_k, key.num_blocks] = entry


def load(path: str | os.PathLike[str], *, missing: Missing = "error", verify: bool = False) -> LatencyTable:
    """Read a table.

    Parameters
    ----------
    path : str or path-like
        A file that `lutest build` wrote.
    missing : {"error", "interpolate"}
        What a configuration that was not measured gets: an error, or an entry from its neighbours that says so.
    verify : bool
        Also check every byte of the file against its seal, and every row against the content hash.

    Returns
    -------
    LatencyTable
        All in memory: no file and no connection stays open.

    Raises
    ------
    TableError
        No such file, not a table, of another version, or damaged; with `verify`, also changed since it was built.
    """
    refuse_unfinished(path)
    if verify:
        from lutest.verify import read_verified

        return LatencyTable(read_verified(path), os.fspath(path), missing)
    return LatencyTable(read_figures(path), os.fspath(path), missing)


_current: LatencyTable | None = None
_current_entries: dict[tuple[Tier, int, int], Entry] = {}


def use(table: LatencyTable | str | os.PathLike[str]) -> LatencyTable:
    """Make a table, or the one at a path, the table of the module-level `lookup`, and return it.

    Raises
    ------
    TableError
        As `load`.
    """
    global _current, _current_entries
    chosen = table if isinstance(table, LatencyTable) else load(table)
    _current, _current_entries = chosen, chosen._entries
    return chosen


def lookup(tier: Tier, top_k: int, num_blocks: int) -> Entry:
    """`LatencyTable.lookup` on the table of `use`, or else on the one that $LUTEST_TABLE names.

    Raises
    ------
    TableError
        Neither is set, or the table cannot be read.
    UnknownKeyError
        As `LatencyTable.lookup`.
    """
    try:
        return _current_entries[tier, top_k, num_blocks]
    except (KeyError, TypeError):
        pass
    table = _current
    if table is None:
        path = os.environ.get("LUTEST_TABLE")
        if not path:
            raise TableError(
                "no table to look up in: call lutest.use(path) or set $LUTEST_TABLE to the path of a table"
            )
        table = use(path)
    return table.lookup(tier, top_k, num_blocks)
