"""Tables from their files: `load`, a handle that follows a file, and the table of the module-level `lookup`."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal, overload

from lutest.reader.entry import Entry
from lutest.reader.errors import TableError
from lutest.reader.figures import Key
from lutest.reader.file import read_figures
from lutest.reader.names import refuse_unfinished
from lutest.reader.table import LatencyTable, Missing

CHECK_EVERY_S = 0.5

_Stamp = tuple[int, ...]


@overload
def load(path: str | os.PathLike[str], *, missing: Missing = ..., reload: Literal[False] = ...) -> LatencyTable: ...
@overload
def load(path: str | os.PathLike[str], *, missing: Missing = ..., reload: Literal[True]) -> ReloadingTable: ...
def load(
    path: str | os.PathLike[str], *, missing: Missing = "error", reload: bool = False
) -> LatencyTable | ReloadingTable:
    """Read a table.

    Parameters
    ----------
    path : str or path-like
        A file that `lutest build` wrote, or a JSON file of `lutest export`.
    missing : {"error", "interpolate"}
        What a configuration that was not measured gets: an error, or an entry from its neighbours that says so.
    reload : bool
        Give a handle that reads the file anew when it was rebuilt; see `ReloadingTable`.

    Returns
    -------
    LatencyTable or ReloadingTable
        All in memory: no file and no connection stays open.

    Raises
    ------
    TableError
        No such file, not a table, of another version, or damaged. `lutest.verify` checks a file as a whole.

    Examples
    --------
    >>> table = lutest.load("tables/mine.duckdb")  # doctest: +SKIP
    >>> table["low", 8, 16].total_ms(prompt_tokens=150, output_tokens=32, q=0.95)  # doctest: +SKIP
    >>> table.feasible(1500, text_tokens=40, output_tokens=16)  # doctest: +SKIP
    """
    if reload:
        return ReloadingTable(path, missing)
    refuse_unfinished(path)
    return LatencyTable(read_figures(path), os.fspath(path), missing)


class ReloadingTable:
    """A table that follows its file: everything that `LatencyTable` has, from the newest one that could be read.

    At most every half a second, a call looks at the file (inode, size, times), and reads it anew if it is another one;
    calls in other threads are answered from the old table meanwhile. A call is answered from one table as a whole;
    two calls may be answered from two. To hold on to one, take `current`; its entries stay as they are, too.

    A new file that cannot be read (gone, damaged, half written) changes nothing: the old table goes on, with one
    `RuntimeWarning` per file, until the file changes again.

    Pickles with the table that it holds, without locks, threads or open files: where a path means nothing on the
    other side, it goes on with that.

    Raises
    ------
    TableError
        The first table cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], missing: Missing = "error", table: LatencyTable | None = None
    ) -> None:
        self._path, self._missing = os.path.abspath(path), missing
        # looked at before it is read: one replaced in between is read once more, never missed
        stamp: _Stamp | None = () if table else _stamp(self._path)
        # swapped as a whole: the table, the stamp of the file when it was last looked at, and when that was
        self._state = table or self._read(), stamp, -math.inf if table else time.monotonic()
        self._claims: dict[int, object] = {}

    @property
    def current(self) -> LatencyTable:
        """The newest table that could be read: immutable, no handle."""
        table, _, checked_s = self._state
        if time.monotonic() - checked_s < CHECK_EVERY_S:
            return table
        # one thread looks, the others go on; by process, so that no fork inherits another thread's claim
        process, claim = os.getpid(), object()
        if self._claims.setdefault(process, claim) is not claim:
            return table
        try:
            return self._look()
        finally:
            del self._claims[process]

    def _look(self) -> LatencyTable:
        """Read the file anew if it is another one."""
        table, seen, _ = self._state
        stamp, problem = _stamp(self._path), None
        if stamp is None:
            problem = "it is gone"
        elif stamp != seen:
            try:
                table = self._read()
            except (TableError, OSError) as error:
                problem = str(error)
        self._state = table, stamp, time.monotonic()
        if problem is not None and stamp != seen:
            warnings.warn(
                f"{self._path}: not read anew, the old table goes on: {problem}", RuntimeWarning, stacklevel=3
            )
        return table

    def _read(self) -> LatencyTable:
        return load(self._path, missing=self._missing)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.current, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in dir(self.current) if not name.startswith("_"))})

    def __getitem__(self, key: Any) -> Entry:
        return self.current[key]

    def __len__(self) -> int:
        return len(self.current)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.current)

    def __contains__(self, key: object) -> bool:
        return key in self.current

    def __repr__(self) -> str:
        return f"<reloading {self.current!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return ReloadingTable, (self._path, self._missing, self._state[0])


def _stamp(path: str) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


_current: LatencyTable | ReloadingTable | None = None
_current_entries: dict[Key, Entry] = {}


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


def lookup(*key: Any, **named: Any) -> Entry:
    """`LatencyTable.lookup` on the table of `use`, or else on the one that $LUTEST_TABLE names.

    Raises
    ------
    TableError
        Neither is set, or the table cannot be read.
    UnknownKeyError, ArgumentError
        As `LatencyTable.lookup`.
    """
    try:
        return _current_entries[key]
    except (KeyError, TypeError):
        pass
    return chosen_table().lookup(*key, **named)


def chosen_table() -> LatencyTable | ReloadingTable:
    """The table of `use`, or else the one that $LUTEST_TABLE names.

    Raises
    ------
    TableError
        Neither is set, or the table cannot be read.
    """
    if _current is not None:
        return _current
    path = os.environ.get("LUTEST_TABLE")
    if not path:
        raise TableError("no table to look up in: call lutest.use(path) or set $LUTEST_TABLE to the path of a table")
    return use(path)
