"""Writing a table file so that its path always holds a whole table: the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import filelock

from lutest.reader.errors import BuildError, TableError
from lutest.reader.figures import KeyColumn
from lutest.reader.file import EXPORT_FORMAT
from lutest.reader.names import KEY_COLUMNS, LOG_ENDINGS, TEMPORARY_ENDING, literal, quote
from lutest.reader.seal import write_seal
from lutest.tablefile.macros import write_macros
from lutest.tablefile.schema import STORAGE_VERSION, TABLES, Table, stored_key_columns
from lutest.tablefile.sql import connect
from lutest.tablefile.verify import content_hash, parent_schema, row_counts

REPORT_MARK = '<meta name="generator" content="lutest report">'
PICTURE_MARK = b"\n<!-- lutest plot -->\n"  # behind the end of an SVG or PNG file, where nothing reads on
RUNS_MARK = "KV_METADATA {lutest: 'runs'}"  # option of COPY, by which a Parquet file is known as one of convert's
_BLOCK_SIZE = 16_384  # small tables: the default of 256 KiB a block would be mostly air
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems without advisory locks


@contextlib.contextmanager
def locked(output: Path, sources: Iterable[Path] = (), kind: str = "table") -> Iterator[Path]:
    """Hold the lock of an output path, clear what a killed build left beside it, and yield the file to replace.

    A link is followed: the file that it points to is replaced, and the link stays.

    Parameters
    ----------
    output, sources, kind
        As in `replaceable`.

    Raises
    ------
    BuildError
        As `replaceable`; its folder cannot be written, another build holds the lock, or another program has changes of
        the old table still to write.
    """
    target = replaceable(output, sources, kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{output}: cannot make the folder {target.parent}: {error.strerror}") from error
    busy = "locked, another build is writing it; try again when it is done"
    with held_lock(target.parent / f".{target.name}.lutest-lock", target, busy) as alone:
        if alone:  # else what looks left over may be another build at work, and the rename alone keeps tables whole
            _clear(target)
        _refuse_log(target)
        yield target


def _is_table(path: Path) -> bool:
    if b"\nlutest seal " in _end(path):  # of any version, whole or damaged
        return True
    return _answers(path, "SELECT 1 FROM meta WHERE key = 'lutest_version'")


def _is_runs(path: Path) -> bool:
    query = f"SELECT 1 FROM parquet_kv_metadata({literal(path)}) WHERE key = 'lutest'::BLOB"
    return _start(path)[:4] == b"PAR1" and _answers(None, query)


def _is_export(path: Path) -> bool:
    return b"".join(_start(path).split()).startswith(f'{{"format":"{EXPORT_FORMAT}"'.replace(" ", "").encode())


def _is_report(path: Path) -> bool:
    return REPORT_MARK.encode() in _start(path)


def _is_picture(path: Path) -> bool:
    return _end(path).endswith(PICTURE_MARK)


class _Kind(NamedTuple):
    """What a verb writes."""

    name: str
    example: str
    is_one: Callable[[Path], bool]


_KINDS = {
    "table": _Kind("a lutest table", "table.duckdb", _is_table),
    "runs": _Kind("a file of runs that `lutest convert` wrote", "runs.parquet", _is_runs),
    "export": _Kind("an export of a lutest table", "table.json", _is_export),
    "report": _Kind("a report of lutest", "report.html", _is_report),
    "picture": _Kind("a picture that `lutest plot` wrote", "decode.svg", _is_picture),
}


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 256))
        return file.read()


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def _answers(path: Path | None, query: str) -> bool:
    """Whether a query on a database, or on none, has a row; not where it cannot be answered."""
    try:
        with connect(path) if path else duckdb.connect() as connection:
            return connection.execute(query).fetchone() is not None
    except (duckdb.Error, TableError):
        return False


def _described(path: Path) -> str:
    """What stands at a path that is nothing which a verb may replace there."""
    start = _start(path)
    for kind in _KINDS.values():
        if kind.is_one(path):
            return kind.name
    if start[8:12] == b"DUCK":
        return "another DuckDB database"
    if start[:4] == b"PAR1":
        return "another Parquet file"
    if b"\0" in start:
        return "a file that lutest did not write"
    return "a JSON file" if start.lstrip()[:1] in (b"{", b"[") else "a text file"


def replaceable(output: Path, sources: Iterable[Path], kind: str) -> Path:
    """The file behind an output path, a link being followed; after refusing to replace what must not be.

    Parameters
    ----------
    output : Path
        Where a file comes to stand.
    sources : iterable of Path
        The files that it is made from, none of which it may replace.
    kind : {"table", "runs", "export", "report", "picture"}
        What comes to stand there: a table, runs in Parquet written with `RUNS_MARK`, an export, a page that has
        `REPORT_MARK`, or a picture that ends in `PICTURE_MARK`. Only the like of it is replaced.

    Raises
    ------
    BuildError
        Something else stands there, or it is a path that no file can have.
    """
    name, example, is_one = _KINDS[kind]
    if output.name.endswith((TEMPORARY_ENDING, *LOG_ENDINGS)):
        raise BuildError(f"{output}: the name of a temporary file; name another one, such as {example}")
    try:
        status = output.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BuildError(f"{output}: is a folder; name a file, such as {output / example}")
        if not stat.S_ISREG(status.st_mode):
            raise BuildError(f"{output}: is not a regular file, so nothing can take its place")
        if any(os.path.samefile(source, output) for source in sources if source.exists()):
            raise BuildError(f"{output}: is one of the sources; name another output")
        if status.st_size and not is_one(output):
            raise BuildError(
                f"{output}: {_described(output)} stands there, not {name}; name another output, or move it away"
            )
    except FileNotFoundError:
        pass
    except OSError as error:  # links in a circle, a name too long, a file in place of a folder, one that cannot be read
        raise BuildError(f"{output}: cannot be written: {error.strerror}") from error
    return Path(os.path.realpath(output)) if output.is_symlink() else output


@contextlib.contextmanager
def held_lock(path: Path, locked: Path, busy: str) -> Iterator[bool]:
    """Hold a lock file, which stays; whether that keeps others out, as it does not on every file system.

    Raises
    ------
    BuildError
        Another process holds it, of which `busy` says what it does with what is `locked`; or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        alone = True
        try:
            held.enter_context(filelock.FileLock(path, timeout=0))
        except filelock.Timeout as error:
            raise BuildError(f"{locked}: {busy}") from error
        except NotImplementedError:  # no locks there
            alone = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise BuildError(f"{locked}: cannot write into {path.parent}: {error.strerror}") from error
            alone = False
        yield alone


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


def parts_folder(table: Path) -> Path:
    """Folder beside a table for the parts that it was built from, where they are kept."""
    return table.with_name(f"{table.name}.parts")


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `output` in the end, or is gone where that fails."""
    temporary = temporary_path(output)
    try:
        yield temporary
        os.replace(temporary, output)
    finally:
        for ending in ("", *LOG_ENDINGS):
            _remove(temporary.with_name(temporary.name + ending))


def write_table(
    connection: duckdb.DuckDBPyConnection,
    output: Path,
    relations: Mapping[str, str],
    quantiles: Sequence[float],
    key_columns: Sequence[KeyColumn],
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
    key_columns : sequence of KeyColumn
        What its configurations are made of.
    meta : mapping
        Rows of ``meta``; the key columns and the content hash are added.
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
    described = {**meta, KEY_COLUMNS: json.dumps([column._asdict() for column in key_columns])}
    try:
        with replacing(output) as temporary:
            digest, counts = _write(connection, temporary, relations, quantiles, key_columns, described, parent)
            write_seal(temporary)
            _verify(temporary, digest, counts)
            read_back(temporary)
            synced(temporary)
            _refuse_log(output)
        synced(output.parent)
    except TableError as error:
        raise BuildError(f"{output}: the new table cannot be read, so it did not replace the old: {error}") from error
    except duckdb.Error as error:
        raise BuildError(f"{output}: cannot write the table: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise BuildError(f"{output}: cannot write the table: {error.strerror or error}") from error
    return digest


def _write(
    connection: duckdb.DuckDBPyConnection,
    temporary: Path,
    relations: Mapping[str, str],
    quantiles: Sequence[float],
    key_columns: Sequence[KeyColumn],
    meta: Mapping[str, str],
    parent: Path | None,
) -> tuple[str, dict[str, int]]:
    home = connection.execute("SELECT current_database(), current_schema()").fetchone()
    assert home is not None
    if parent is not None:
        connection.execute(f"ATTACH {literal(parent)} AS parent_table (READ_ONLY)")
    options = f"STORAGE_VERSION {literal(STORAGE_VERSION)}, BLOCK_SIZE {_BLOCK_SIZE}"
    connection.execute(f"ATTACH {literal(temporary)} AS new_table ({options})")
    try:
        connection.execute("BEGIN")  # one commit: each would wait for the disk
        for table in TABLES.values():
            # In full: DuckDB 1.2 looks up a bare name in the database that is inserted into.
            source = ".".join(map(quote, (*home, relations[table.name]))) if table.name in relations else None
            _write_rows(connection, table, quantiles, key_columns, "new_table.main", source)
        if parent is not None:
            _keep_parent(connection, quantiles)
        for key, value in sorted(meta.items()):
            connection.execute("INSERT INTO new_table.meta VALUES (?, ?)", [key, value])
        connection.execute("USE new_table")
        write_macros(connection, quantiles, key_columns)
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
    connection: duckdb.DuckDBPyConnection,
    table: Table,
    quantiles: Sequence[float],
    key_columns: Sequence[KeyColumn],
    schema: str,
    source: str | None,
) -> None:
    """Create a table with its comments in a schema, with the rows of `source`."""
    columns = table.expand(quantiles, key_columns)
    target = f"{schema}.{quote(table.name)}"
    definitions = ", ".join(f"{quote(column.name)} {column.type}" for column in columns)
    connection.execute(f"CREATE TABLE {target} ({definitions})")
    connection.execute(f"COMMENT ON TABLE {target} IS {literal(table.comment)}")
    for column in columns:
        connection.execute(f"COMMENT ON COLUMN {target}.{quote(column.name)} IS {literal(column.comment)}")
    if source is not None:
        names = ", ".join(quote(column.name) for column in columns)
        order = ", ".join(quote(name) for name in table.ordered_by(key_columns))
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
        key_columns = stored_key_columns(connection, f"parent_table.{schema}.")
        for table in TABLES.values():
            _write_rows(connection, table, quantiles, key_columns, target, f"parent_table.{schema}.{quote(table.name)}")


def _verify(temporary: Path, digest: str, counts: Mapping[str, int]) -> None:
    with duckdb.connect(str(temporary), read_only=True) as connection:
        if row_counts(connection) != counts or content_hash(connection) != digest:
            raise BuildError(f"{temporary.parent}: what was read back is not what was written; is the disk sound?")


def synced(path: Path) -> None:
    """Return once a file is on the disk, or a folder with what was renamed in it."""
    if path.is_dir() and os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows wants a file open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
