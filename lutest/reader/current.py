"""The table behind `lutest.lookup`: the one of `lutest.use`, or else that of $LUTEST_TABLE."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, overload

from lutest.reader.entry import Entry
from lutest.reader.errors import TableError
from lutest.reader.loading import load
from lutest.reader.table import LatencyTable, Tier

if TYPE_CHECKING:
    from lutest.reader.reloading import ReloadingTable

__all__ = ["lookup", "use"]

_current: LatencyTable | ReloadingTable | None = None
_current_entries: dict[tuple[Tier, int, int], Entry] = {}


@overload
def use(table: LatencyTable | str | os.PathLike[str]) -> LatencyTable: ...
@overload
def use(table: ReloadingTable) -> ReloadingTable: ...
def use(table: LatencyTable | ReloadingTable | str | os.PathLike[str]) -> LatencyTable | ReloadingTable:
    """Make a table, or the one at a path, the table of the module-level `lookup`, and return it.

    Raises
    ------
    TableError
        As `load`.
    """
    global _current, _current_entries
    chosen = load(table) if isinstance(table, (str, os.PathLike)) else table
    # the entries of one that reloads are not to be held on to
    _current, _current_entries = chosen, chosen._entries if isinstance(chosen, LatencyTable) else {}
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
