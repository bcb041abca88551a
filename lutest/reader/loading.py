"""Reading a table from its file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, overload

from lutest.reader.file import read_figures
from lutest.reader.names import refuse_unfinished
from lutest.reader.table import LatencyTable, Missing

if TYPE_CHECKING:
    from lutest.reader.reloading import ReloadingTable

__all__ = ["load"]


@overload
def load(
    path: str | os.PathLike[str], *, missing: Missing = ..., verify: bool = ..., reload: Literal[False] = ...
) -> LatencyTable: ...
@overload
def load(
    path: str | os.PathLike[str], *, missing: Missing = ..., verify: bool = ..., reload: Literal[True]
) -> ReloadingTable: ...
def load(
    path: str | os.PathLike[str], *, missing: Missing = "error", verify: bool = False, reload: bool = False
) -> LatencyTable | ReloadingTable:
    """Read a table.

    Parameters
    ----------
    path : str or path-like
        A file that `lutest build` wrote.
    missing : {"error", "interpolate"}
        What a configuration that was not measured gets: an error, or an entry from its neighbours that says so.
    verify : bool
        Also check every byte of the file against its seal, and every row against the content hash.
    reload : bool
        Give a handle that reads the file anew when it was rebuilt; see `lutest.reloading.ReloadingTable`.

    Returns
    -------
    LatencyTable or ReloadingTable
        All in memory: no file and no connection stays open.

    Raises
    ------
    TableError
        No such file, not a table, of another version, or damaged; with `verify`, also changed since it was built.
    """
    if reload:
        from lutest.reader.reloading import ReloadingTable

        return ReloadingTable(path, missing, verify)
    refuse_unfinished(path)
    if verify:
        from lutest.tablefile.verify import read_verified

        return LatencyTable(read_verified(path), os.fspath(path), missing)
    return LatencyTable(read_figures(path), os.fspath(path), missing)
