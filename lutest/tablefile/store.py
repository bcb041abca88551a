"""Writing a table file so that its path always holds a whole table: the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import duckdb

from lutest.reader.errors import BuildError, TableError
from lutest.reader.names import LOG_ENDINGS, TEMPORARY_ENDING, quote
from lutest.reader.seal import write_seal
from lutest.tablefile.integrity import content_hash, parent_schema, row_counts
from lutest.tablefile.macros import write_macros
from lutest.tablefile.schema import STORAGE_VERSION, TABLES, Table

try:
    import fcntl
except ImportError:  # Windows: without advisory locks, the rename alone keeps tables whole
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "temporary_path", "write_table"]

_BLOCK_SIZE = 16_384  # small tables: the default of 256 KiB a block would be mostly air
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems without advisory locks


@contextlib.contextmanager
def locked(output: Path) -> Iterator[Path]:
    """Hold the lock of an output path, clear what a killed build left beside it, and yield the file to replace.

    A link is followed: the file that it points to is replaced, and the link stays.

    Raises
    ------
    BuildError
        The output cannot be a table file, its folder cannot be written, another build holds the lock, or another
        program has changes of the old table still to write.
    """
    target = _target(output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{output}: cannot make the folder {target.parent}: {error.strerror}") from error
    with _lock(target) as alone:
        if alone:  # else what looks left over may be another build at work
            _clear(target)
        _refuse_log(target)
        yield target


def _target(output: Path) -> Path:
    if output.name.endswith((TEMPORARY_ENDING, *LOG_ENDINGS)):
        raise BuildError(f"{output}: the name of a temporary file; name a table file, such as table.duckdb")
    try:
        mode = output.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:  # links in a circle, a name too long, a file in place of a folder
        raise BuildError(f"{output}: cannot be a table file: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise BuildError(f"{output}: is a folder; `output` names the table file, such as {output / 'table.duckdb'}")
    if not stat.S_ISREG(mode):
        raise BuildError(f"{output}: is not a regular file, so no table can take its place")
    return Path(os.path.realpath(output)) if output.is_symlink() else output


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Hold the lock file beside a target; whether that keeps other builds out."""
    path = target.parent / f".{target.name}.lutest-lock"
    while True:
        try:
            handle = open(path, "ab")  # noqa: SIM115  closed below, after the lock file is gone
        except OSError as error:
            raise BuildError(f"{target}: cannot write into {target.parent}: {error.strerror}") from error
        with handle:
            alone = _take(handle.fileno(), target)
            if alone and not _is_at(handle.fileno(), path):
                continue  # the build before removed it between our open and our lock
            try:
                yield alone
            finally:
                _remove(path)
            return


def _take(descriptor: int, target: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BuildError(f"{target}: locked, another build is writing it; try again when it is done") from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise BuildError(f"{target}: cannot be locked: {error.strerror}") from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _clear(target: Path) -> None:
    with os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{target.name}.") and TEMPORARY_ENDING in entry.name:
                _remove(Path(entry.path))


def _remove(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            leftover.unlink()


def _refuse_log(target: Path) -> None:
    """Refuse to replace a table that has a log: DuckDB would play the old table's log back onto the new one."""
    for ending in LOG_ENDINGS:
        log = target.with_name(target.name + ending)
        if log.exists():
            raise BuildError(
                f"{log}: holds changes to the old table that another program has not written yet; "
                "close that program, or remove this file if there is none"
            )


def temporary_path(output: Path) -> Path:
    """A unique name in the folder of `output` that no reader takes for a table."""
    return output.parent / f".{output.name}.{uuid.uuid4().hex}{TEMPORARY_ENDING}"


def write_table(
    connection: duckdb.DuckDBPyConnection,
    output: Path,
    relations: Mapping[str, str],
    quantiles: Sequence[float],
    meta: Mapping[str, str],
    read_back: Callable[[Path], object],
    parent: Path | None = None,
) -> str:
    """Write a table file under a temporary name, verify it, and rename it into place.

    Parameters
    ----------
    connection : duckdb connection
        Holds the relations.
    output : Path
        Where the table comes to stand; the caller holds its lock.
    relations : mapping
        Table of the file → relation of `connection` with its columns.
    quantiles : sequence of float
        Levels that the table holds.
    meta : mapping
        Rows of ``meta``; the content hash is added.
    read_back : callable
        Reads the new file as its readers will; whatever it refuses does not replace a table.
    parent : Path, optional
        A table file whose tables are kept as they are, in the schema ``parent``; those that it keeps itself, in
        ``parent_2`` and so on.

    Returns
    -------
    str
        The content hash.

    Raises
    ------
    BuildError
        The disk is full, the folder is not writable, what was read back is not what was written, or another program
        began to change the old table.
    """
    temporary = temporary_path(output)
    try:
        digest, counts = _write(connection, temporary, relations, quantiles, meta, parent)
        write_seal(temporary)
        _verify(temporary, digest, counts)
        read_back(temporary)
        _sync(temporary)
        _refuse_log(output)
        os.replace(temporary, output)
        _sync(output.parent)
    except TableError as error:
        raise BuildError(f"{output}: the new table cannot be read, so it did not replace the old: {error}") from error
    except duckdb.Error as error:
        raise BuildError(f"{output}: cannot write the table: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise BuildError(f"{output}: cannot write the table: {error.strerror or error}") from error
    finally:
        for ending in ("", *LOG_ENDINGS):
            _remove(temporary.with_name(temporary.name + ending))
    return digest


def _write(
    connection: duckdb.DuckDBPyConnection,
    temporary: Path,
    relations: Mapping[str, str],
    quantiles: Sequence[float],
    meta: Mapping[str, str],
    parent: Path | None,
) -> tuple[str, dict[str, int]]:
    path = _quoted(str(temporary))
    home = connection.execute("SELECT current_database(), current_schema()").fetchone()
    assert home is not None
    if parent is not None:
        connection.execute(f"ATTACH '{_quoted(str(parent))}' AS parent_table (READ_ONLY)")
    connection.execute(f"ATTACH '{path}' AS new_table (STORAGE_VERSION '{STORAGE_VERSION}', BLOCK_SIZE {_BLOCK_SIZE})")
    try:
        connection.execute("BEGIN")  # one commit: each would wait for the disk
        for table in TABLES.values():
            # In full: DuckDB 1.2 looks up a bare name in the database that is inserted into.
            source = ".".join(map(quote, (*home, relations[table.name]))) if table.name in relations else None
            _write_rows(connection, table, quantiles, "new_table.main", source)
        if parent is not None:
            _keep_parent(connection, quantiles)
        for key, value in sorted(meta.items()):
            connection.execute("INSERT INTO new_table.meta VALUES (?, ?)", [key, value])
        connection.execute("USE new_table")
        write_macros(connection, quantiles)
        connection.execute(f"USE {quote(home[0])}.{quote(home[1])}")
        digest = content_hash(connection, "new_table")
        connection.execute("INSERT INTO new_table.meta VALUES ('content_hash', ?)", [digest])
        counts = row_counts(connection, "new_table")
        connection.execute("COMMIT")
        connection.execute("CHECKPOINT new_table")
    except duckdb.Error:
        with contextlib.suppress(duckdb.Error):  # after a failed write, DuckDB may refuse these as well
            connection.execute("ROLLBACK")
        with contextlib.suppress(duckdb.Error):
            connection.execute(f"USE {quote(home[0])}.{quote(home[1])}")
            connection.execute("DETACH new_table")
        raise
    connection.execute("DETACH new_table")
    if parent is not None:
        connection.execute("DETACH parent_table")
    return digest, counts


def _write_rows(
    connection: duckdb.DuckDBPyConnection, table: Table, quantiles: Sequence[float], schema: str, source: str | None
) -> None:
    """Create a table with its comments in a schema, with the rows of `source`."""
    columns = table.expand(quantiles)
    target = f"{schema}.{quote(table.name)}"
    definitions = ", ".join(f"{quote(column.name)} {column.type}" for column in columns)
    connection.execute(f"CREATE TABLE {target} ({definitions})")
    connection.execute(f"COMMENT ON TABLE {target} IS '{_quoted(table.comment)}'")
    for column in columns:
        comment = _quoted(column.comment)
        connection.execute(f"COMMENT ON COLUMN {target}.{quote(column.name)} IS '{comment}'")
    if source is not None:
        names = ", ".join(quote(column.name) for column in columns)
        order = ", ".join(quote(name) for name in table.order)
        connection.execute(f"INSERT INTO {target} SELECT {names} FROM {source} ORDER BY {order}")


def _keep_parent(connection: duckdb.DuckDBPyConnection, quantiles: Sequence[float]) -> None:
    """Copy the tables of the attached parent, and those of its own parents, into schemas of their own."""
    held = connection.execute(
        "SELECT schema_name FROM duckdb_schemas() WHERE database_name = 'parent_table' ORDER BY schema_name"
    ).fetchall()
    kept = ["main", *(parent_schema(place) for place in range(1, len(held) + 1) if (parent_schema(place),) in held)]
    for place, schema in enumerate(kept, 1):
        target = f"new_table.{parent_schema(place)}"
        connection.execute(f"CREATE SCHEMA {target}")
        for table in TABLES.values():
            _write_rows(connection, table, quantiles, target, f"parent_table.{schema}.{quote(table.name)}")


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _verify(temporary: Path, digest: str, counts: Mapping[str, int]) -> None:
    with duckdb.connect(str(temporary), read_only=True) as connection:
        if row_counts(connection) != counts or content_hash(connection) != digest:
            raise BuildError(f"{temporary.parent}: what was read back is not what was written; is the disk sound?")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
