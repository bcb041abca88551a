"""Sources of runs: read each kind, hashed, into the tables ``source_files`` and ``raw_runs``."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import duckdb
import pandas as pd

from lutest.reader.errors import SourceError
from lutest.runs.parts import PartOf, open_parts, part_name
from lutest.runs.sources.aiperf import aiperf_summary
from lutest.runs.sources.discovery import PACKED, list_sources, plain_name, printable, show_path, storable, unreadable
from lutest.runs.sources.json_runs import read_json, read_json_lines
from lutest.runs.sources.parquet import read_parquet
from lutest.runs.sources.run_rows import RunWriter, SourceFields, create_raw_runs
from lutest.runs.sources.tabular import hash_frame, read_csv, read_frame
from lutest.tablefile.store import replacing

Source: TypeAlias = str | os.PathLike[str] | pd.DataFrame
Progress: TypeAlias = Callable[[str, int, int], None]

HASH_CHUNK_BYTES = 1 << 20
_MOST_BROKEN_SHOWN = 20


@dataclass(frozen=True)
class _Found:
    """A source that was found: a file, or a frame."""

    sha256: str
    shown: str
    folder: str | None
    content: Path | pd.DataFrame
    size_bytes: int
    modified_ns: int = 0


def listed(runs: Source | Sequence[Source]) -> list[Source]:
    """One source, or several, as a list."""
    return [runs] if isinstance(runs, str | os.PathLike | pd.DataFrame) else list(runs)


def read_sources(
    connection: duckdb.DuckDBPyConnection,
    sources: Sequence[Source],
    fields: SourceFields,
    *,
    base: Path,
    progress: Progress | None = None,
    skip_broken: bool = False,
    parts: Path | None = None,
    earlier: Sequence[PartOf] = (),
) -> None:
    """Read every run of every source into the tables ``source_files`` and ``raw_runs``.

    Parameters
    ----------
    connection : duckdb.DuckDBPyConnection
        Where the tables are created.
    sources : sequence of path or DataFrame
        Files, folders, glob patterns, frames.
    fields : SourceFields
        The fields to keep.
    base : Path
        Folder that relative paths are relative to.
    progress : callable, optional
        Called now and then with the source, and with the bytes done and to do of all files together.
    skip_broken : bool
        Go on without files that cannot be read as a whole; they stand in ``broken_sources`` (path, sha256, problem).
    parts : Path, optional
        Folder where each source becomes a part, unless its part is there; ``raw_runs`` is then a view of the parts.
    earlier : sequence of PartOf
        Sources that became parts before. Those of the same content are not read again.

    Raises
    ------
    SourceError
        A source cannot be found, or some cannot be read as a whole: naming all of them. A single unreadable run is no
        error: it stands in ``raw_runs`` with its `problem`.
    """
    if not sources and not earlier:
        raise SourceError("no sources of runs are given")
    _check_fields(fields)
    root = Path(os.path.abspath(base))
    broken: dict[str, tuple[str | None, str]] = {}  # path → hash and what is wrong
    paths = list_sources([path for path in sources if not isinstance(path, pd.DataFrame)], root)
    found = [held for path in paths if (held := _hashed(path, root, broken)) is not None]
    frames = [source for source in sources if isinstance(source, pd.DataFrame)]
    for number, frame in enumerate(frames, 1):
        shown = f"<DataFrame {number}>"
        found.append(_Found(hash_frame(frame, shown, fields), shown, None, frame, 0))
    known = {held.sha256 for held in earlier}
    found = sorted((source for source in found if source.sha256 not in known), key=_order)
    total_bytes = sum(source.size_bytes for source in found)

    create_raw_runs(connection, fields)
    connection.execute(
        "CREATE OR REPLACE TABLE source_files "
        "(source_id INTEGER, path VARCHAR, sha256 VARCHAR, folder VARCHAR, rows_read BIGINT, "
        "tool VARCHAR, fields VARCHAR[])"
    )
    made = list(earlier)
    # 0: DuckDB takes object columns for text and does not guess their type from the first rows
    setting = connection.execute("SELECT current_setting('pandas_analyze_sample')").fetchone()
    connection.execute("SET pandas_analyze_sample = 0")
    try:
        done_bytes = 0
        for source_id, source in enumerate(found, 1):
            report = _reporter(progress, source, done_bytes, total_bytes)
            report(0)
            part = None if parts is None else parts / part_name(source.sha256, source.folder, fields)
            try:
                if part is None:
                    writer = RunWriter(connection, source_id, fields)
                    _read_source(connection, source, fields, writer, report)
                    connection.execute(
                        "INSERT INTO source_files VALUES (?, ?, ?, ?, ?, ?, ?)",
                        [
                            source_id,
                            source.shown,
                            source.sha256,
                            source.folder,
                            writer.rows,
                            writer.tool,
                            [*writer.names],
                        ],
                    )
                elif not part.exists():
                    with replacing(part) as temporary:
                        writer = RunWriter(connection, source_id, fields, temporary)
                        _read_source(connection, source, fields, writer, report)
                        writer.write_part()
            except SourceError as error:
                connection.execute("DELETE FROM raw_runs WHERE source_id = ?", [source_id])
                broken[source.shown] = source.sha256, str(error)
                continue
            if part is not None:
                made.append(PartOf(source.sha256, source.shown, source.folder, part))
            report(source.size_bytes)
            done_bytes += source.size_bytes
    finally:
        if setting is not None:
            connection.execute(f"SET pandas_analyze_sample = {int(setting[0])}")
    is_any_read = made or connection.execute("SELECT 1 FROM source_files LIMIT 1").fetchall()
    _account_for(connection, broken, not (skip_broken and is_any_read))
    if parts is not None:
        connection.execute("DROP TABLE raw_runs")
        made.sort(key=_order)
        open_parts(connection, made)


def _order(source: _Found | PartOf) -> tuple[str, str]:
    return source.sha256, source.shown


def _account_for(
    connection: duckdb.DuckDBPyConnection, broken: Mapping[str, tuple[str | None, str]], refused: bool
) -> None:
    """Say which sources cannot be read, all of them at once, or note them in ``broken_sources``."""
    problems = [problem for _, (_, problem) in sorted(broken.items())]
    if len(problems) == 1 and refused:
        raise SourceError(problems[0])
    if problems and refused:
        listed = "; ".join(problems[:_MOST_BROKEN_SHOWN]) + ("; …" if len(problems) > _MOST_BROKEN_SHOWN else "")
        raise SourceError(f"{len(problems)} files cannot be read (`--skip-broken` builds without them): {listed}")
    connection.execute("CREATE OR REPLACE TABLE broken_sources (path VARCHAR, sha256 VARCHAR, problem VARCHAR)")
    for shown, (digest, problem) in broken.items():
        connection.execute("INSERT INTO broken_sources VALUES (?, ?, ?)", [shown, digest, problem])


def _check_fields(fields: SourceFields) -> None:
    names: dict[str, str] = {}
    for name in fields.scalars:  # DuckDB's columns do not tell upper from lower case
        if names.setdefault(name.lower(), name) != name:
            raise SourceError(f"the fields {names[name.lower()]!r} and {name!r} differ in upper and lower case alone")


def _reporter(progress: Progress | None, source: _Found, done: int, total: int) -> Callable[[int], None]:
    def report(position: int) -> None:
        if progress is not None:
            progress(source.shown, done + position, total)

    return report


def _hashed(path: Path, root: Path, broken: dict[str, tuple[str | None, str]]) -> _Found | None:
    try:
        return _hash_file(path, root)
    except SourceError as error:
        broken[show_path(path, root)] = None, str(error)
        return None


def _hash_file(path: Path, root: Path) -> _Found:
    shown = show_path(path, root)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
        if path.suffix.lower() == ".jsonl" and (beside := aiperf_summary(path)).is_file():
            digest.update(beside.read_bytes())  # is read with it
    except OSError as error:
        raise unreadable(printable(shown), error) from None
    if status.st_size == 0:
        raise SourceError(f"{printable(shown)}: the file is empty")
    return _Found(digest.hexdigest(), shown, storable(path.parent.name), path, status.st_size, status.st_mtime_ns)


def _read_source(
    connection: duckdb.DuckDBPyConnection,
    source: _Found,
    fields: SourceFields,
    writer: RunWriter,
    report: Callable[[int], None],
) -> None:
    shown = printable(source.shown)
    if isinstance(source.content, pd.DataFrame):
        read_frame(source.content, shown, fields, writer)
        writer.flush()
        return
    try:
        _read_file(connection, source.content, shown, fields, writer, report)
        writer.flush()
        status = source.content.stat()
    except OSError as error:
        raise unreadable(shown, error) from None
    if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
        raise SourceError(f"{shown}: the file changed while it was read; build again once it is complete")


def _read_file(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    shown: str,
    fields: SourceFields,
    writer: RunWriter,
    report: Callable[[int], None],
) -> None:
    ending = plain_name(path).suffix.lower()
    if ending == ".parquet":
        read_parquet(connection, path, shown, fields, writer)
        return
    with contextlib.ExitStack() as opened:
        held = opened.enter_context(path.open("rb"))
        stream: BinaryIO = held
        if path.suffix.lower() == PACKED:
            stream = opened.enter_context(cast(BinaryIO, gzip.GzipFile(fileobj=held)))
            opened.enter_context(_unpacking(shown))
        writer.on_flush = lambda: report(held.tell())
        if ending == ".json":
            read_json(stream, shown, fields, writer)
        elif ending == ".csv":
            read_csv(stream, shown, fields, writer)
        else:
            read_json_lines(stream, shown, fields, writer)
        writer.flush()


@contextlib.contextmanager
def _unpacking(shown: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{shown}: cannot be unpacked: {error}") from None
