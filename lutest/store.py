"""Writing a table file so that its path always holds a whole table: the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb

from .errors import BuildError
from .integrity import content_hash
from .macros import write_macros
from .schema import STORAGE_VERSION, TABLES, quote

try:
    import fcntl
except ImportError:  # Windows: without advisory locks, the rename alone keeps tables whole
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "temporary_path", "write_table"]

_BLOCK_SIZE = 16_384  # small tables: the default of 256 KiB a block would be mostly air
_TEMPORARY = ".lutest-tmp"


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output path, and clear what a killed build left beside it.

    Raises
    ------
    BuildError
        The folder does not exist or cannot be written, or another build holds the lock.
    """
    folder = output.parent
    if output.is_dir():
        raise BuildError(f"{output}: is a folder; `output` names the table file, such as {output / 'table.duckdb'}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / f".{output.name}.lutest-lock", "ab")  # noqa: SIM115  closed below, after the unlock
    except OSError as error:
        raise BuildError(f"{output}: cannot write into {folder}: {error.strerror}") from error
    with handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BuildError(f"{output}: locked, another build is writing it; try again when it is done") from error
        for leftover in folder.glob(f".{_escape(output.name)}.*{_TEMPORARY}*"):
            _remove(leftover)
        yield


def _remove(leftover: Path) -> None:
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            leftover.unlink()


def _escape(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def temporary_path(output: Path) -> Path:
    """A unique name in the folder of `output` that no reader takes for a table."""
    return output.parent / f".{output.name}.{uuid.uuid4().hex}{_TEMPORARY}"


def write_table(
    connection: duckdb.DuckDBPyConnection,
    output: Path,
    relations: Mapping[str, str],
    quantiles: Sequence[float],
    meta: Mapping[str, str],
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

    Returns
    -------
    str
        The content hash.

    Raises
    ------
    BuildError
        The disk is full, the folder is not writable, or what was read back is not what was written.
    """
    temporary = temporary_path(output)
    try:
        digest, counts = _write(connection, temporary, relations, quantiles, meta)
        _verify(temporary, digest, counts)
        _sync(temporary)
        os.replace(temporary, output)
        _sync(output.parent)
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise BuildError(f"{output}: cannot write the table: {reason}") from error
    except OSError as error:
        raise BuildError(f"{output}: cannot write the table: {error.strerror or error}") from error
    finally:
        for leftover in (temporary, temporary.with_name(temporary.name + ".wal")):
            _remove(leftover)
    return digest


def _write(
    connection: duckdb.DuckDBPyConnection,
    temporary: Path,
    relations: Mapping[str, str],
    quantiles: Sequence[float],
    meta: Mapping[str, str],
) -> tuple[str, dict[str, int]]:
    path = str(temporary).replace("'", "''")
    home = connection.execute("SELECT current_database(), current_schema()").fetchone()
    assert home is not None
    connection.execute(f"ATTACH '{path}' AS new_table (STORAGE_VERSION '{STORAGE_VERSION}', BLOCK_SIZE {_BLOCK_SIZE})")
    try:
        for table in TABLES.values():
            columns = table.expand(quantiles)
            target = f"new_table.{quote(table.name)}"
            definitions = ", ".join(f"{quote(column.name)} {column.type}" for column in columns)
            connection.execute(f"CREATE TABLE {target} ({definitions})")
            connection.execute(f"COMMENT ON TABLE {target} IS '{_quoted(table.comment)}'")
            for column in columns:
                comment = _quoted(column.comment)
                connection.execute(f"COMMENT ON COLUMN {target}.{quote(column.name)} IS '{comment}'")
            if table.name in relations:
                names = ", ".join(quote(column.name) for column in columns)
                order = ", ".join(quote(name) for name in table.order)
                connection.execute(f"INSERT INTO {target} SELECT {names} FROM {relations[table.name]} ORDER BY {order}")
        for key, value in sorted(meta.items()):
            connection.execute("INSERT INTO new_table.meta VALUES (?, ?)", [key, value])
        connection.execute("USE new_table")
        write_macros(connection, quantiles)
        connection.execute(f"USE {quote(home[0])}.{quote(home[1])}")
        digest = content_hash(connection, "new_table")
        connection.execute("INSERT INTO new_table.meta VALUES ('content_hash', ?)", [digest])
        counts = _counts(connection, "new_table")
        connection.execute("CHECKPOINT new_table")
    finally:
        connection.execute(f"USE {quote(home[0])}.{quote(home[1])}")
        connection.execute("DETACH new_table")
    return digest, counts


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _counts(connection: duckdb.DuckDBPyConnection, database: str | None = None) -> dict[str, int]:
    prefix = f"{quote(database)}." if database else ""
    counts = {}
    for name in TABLES:
        row = connection.execute(f"SELECT count(*) FROM {prefix}{quote(name)}").fetchone()
        assert row is not None
        counts[name] = row[0]
    return counts


def _verify(temporary: Path, digest: str, counts: Mapping[str, int]) -> None:
    with duckdb.connect(str(temporary), read_only=True) as connection:
        if _counts(connection) != counts or content_hash(connection) != digest:
            raise BuildError(f"{temporary.parent}: what was read back is not what was written; is the disk sound?")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
