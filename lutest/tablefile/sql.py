"""Opening a table file for SQL: read-only, and closed to everything outside of it unless asked otherwise."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutest.reader.errors import ArgumentError, LutestError, TableError
from lutest.reader.names import refuse_other_files, refuse_unfinished

if TYPE_CHECKING:
    import duckdb

# No files but the table, no extensions but those built in, no spilling beside the table, no way to undo this.
_LOCKED = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "allow_community_extensions": "false",
    "temp_directory": "",
    "lock_configuration": "true",
}


def connect(
    path: str | os.PathLike[str],
    *,
    unsafe: bool = False,
    memory_limit: str | None = None,
    threads: int | None = None,
) -> duckdb.DuckDBPyConnection:
    """Open a table file read-only.

    Parameters
    ----------
    path : path
        The table file.
    unsafe : bool
        Let SQL reach other files, the network and extensions. The table stays read-only.
    memory_limit : str, optional
        The most memory that queries may use, such as ``"500MB"``.
    threads : int, optional
        The most threads that queries may use, at least 1.

    Returns
    -------
    duckdb connection
        To be closed by the caller; usable in a ``with`` statement.

    Raises
    ------
    TableError
        The file does not exist, is no DuckDB file, or has the name of one that a build left unfinished.
    ArgumentError
        A limit is not valid.
    """
    import duckdb

    path = Path(path)
    refuse_unfinished(path)
    if not path.is_file():
        reason = "is a folder, not a table file" if path.is_dir() else "no such table; build one with `lutest build`"
        raise TableError(f"{path}: {reason}")
    refuse_other_files(path)
    # A name in a query stands for a table of the file, never for a variable of the Python program around it.
    config: dict[str, str | bool | int | float | list[str]] = {"python_enable_replacements": "false"}
    if memory_limit is not None:
        config["memory_limit"] = memory_limit
    if threads is not None:
        if threads < 1:
            raise ArgumentError(f"threads is {threads}; it must be at least 1")
        config["threads"] = str(threads)
    if not unsafe:
        config.update(_LOCKED)
    try:
        connection = duckdb.connect(os.path.abspath(path), read_only=True, config=config)
        if not unsafe and duckdb.__version__.startswith("1."):
            # Its lock of the configuration leaves logs out, and one into a file that it may not write ends the process.
            connection.execute("CREATE TEMP MACRO enable_logging() AS TABLE SELECT error('logs are not available')")
        return connection
    except (duckdb.ParserException, duckdb.InvalidInputException) as error:
        if memory_limit is None:
            raise TableError(f"{path}: cannot be opened: {_first_line(error)}") from error
        message = f"memory limit {memory_limit!r} is not a size such as 500MB or 2GB: {_first_line(error)}"
        raise ArgumentError(message) from error
    except (duckdb.Error, RuntimeError, ValueError) as error:
        raise TableError(f"{path}: cannot be opened as a latency table: {_first_line(error)}") from error


def run_query(
    path: str | os.PathLike[str],
    query: str,
    *,
    unsafe: bool = False,
    memory_limit: str | None = None,
    threads: int | None = None,
    timeout_s: float | None = None,
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run one query on a table file.

    Parameters
    ----------
    path, unsafe, memory_limit, threads
        As in `connect`.
    query : str
        SQL; of several statements, the last one's rows are returned.
    timeout_s : float, optional
        Seconds after which the query is stopped.

    Returns
    -------
    names : list of str
        Columns; none for a statement without a result.
    rows : list of tuple

    Raises
    ------
    LutestError
        The query fails or takes too long, or as `connect`.
    """
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise ArgumentError(f"timeout is {timeout_s:g}; it must be a number of seconds above 0")
    if not query.strip():
        raise ArgumentError("the query is empty; give it as an argument or on standard input")
    with (
        connect(path, unsafe=unsafe, memory_limit=memory_limit, threads=threads) as connection,
        database_errors("query: "),
        concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor,
    ):
        # In a thread of its own, a query can be stopped: DuckDB does not always listen to Ctrl-C while it works.
        running = executor.submit(_fetch, connection, query)
        try:
            return running.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            raise LutestError(f"the query took longer than {timeout_s:g} s and was stopped") from error
        finally:
            while not running.done():  # an interrupt that comes before the query has begun is lost
                connection.interrupt()
                concurrent.futures.wait([running], timeout=0.05)


@contextlib.contextmanager
def database_errors(prefix: str = "") -> Iterator[None]:
    """Turn errors of DuckDB into those of lutest, in one line."""
    import duckdb

    try:
        yield
    except duckdb.InterruptException as error:
        raise KeyboardInterrupt from error
    except duckdb.Error as error:
        raise LutestError(f"{prefix}{_cause(error)}") from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # Ctrl-C, as older versions of DuckDB tell it
            raise KeyboardInterrupt from error
        raise


def _fetch(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    try:
        connection.execute(query)
        names = [column[0] for column in connection.description or ()]
        return names, connection.fetchall() if names else []
    except (RuntimeError, ValueError, OverflowError) as error:  # values that Python has no type for, such as year 30000
        raise LutestError(f"query: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """Message of DuckDB in one line, without the excerpt of the query that follows it."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
