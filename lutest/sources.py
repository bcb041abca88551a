"""Sources of runs: read each kind, hashed, into the tables ``source_files`` and ``raw_runs``."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import duckdb
import numpy as np
import pandas as pd

from .discovery import list_sources, printable, show_path, storable, unreadable
from .errors import SourceError
from .json_stream import RESULTS, Configuration, JsonText, read_runs
from .parquet_source import read_parquet
from .run_rows import HELD_NULL, RunWriter, SourceFields, brief, create_raw_runs
from .serving_tools import Row, open_served, served_line

__all__ = ["ServedSource", "Source", "SourceFields", "list_sources", "read_sources"]

Source: TypeAlias = str | os.PathLike[str] | pd.DataFrame
Progress: TypeAlias = Callable[[str, int, int], None]

FRAME_BATCH_ROWS = 5_000
HASH_CHUNK_BYTES = 1 << 20
CSV_FIELD_CHARACTERS = 256 << 20


@dataclass(frozen=True)
class _Found:
    """A source that was found: a file, or a frame."""

    sha256: str
    shown: str
    folder: str | None
    content: Path | pd.DataFrame
    size_bytes: int
    modified_ns: int = 0


@dataclass(frozen=True)
class ServedSource:
    """A file that a load generator wrote; its runs have canonical fields, with times in milliseconds."""

    source_id: int
    path: str
    tool: str


def read_sources(
    connection: duckdb.DuckDBPyConnection,
    sources: Sequence[Source],
    fields: SourceFields,
    *,
    base: Path,
    progress: Progress | None = None,
) -> list[ServedSource]:
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

    Returns
    -------
    list of ServedSource
        The files among them that a load generator wrote.

    Raises
    ------
    SourceError
        A source cannot be found, or cannot be read as a whole. A single unreadable run is no error: it stands in
        ``raw_runs`` with its `problem`.
    """
    if not sources:
        raise SourceError("no sources of runs are given")
    _check_fields(fields)
    root = Path(os.path.abspath(base))
    found = [
        _hash_file(path, root)
        for path in list_sources([path for path in sources if not isinstance(path, pd.DataFrame)], root)
    ]
    frames = [source for source in sources if isinstance(source, pd.DataFrame)]
    for number, frame in enumerate(frames, 1):
        shown = f"<DataFrame {number}>"
        found.append(_Found(_hash_frame(frame, shown, fields), shown, None, frame, 0))
    found.sort(key=lambda source: (source.sha256, source.shown))
    total_bytes = sum(source.size_bytes for source in found)

    create_raw_runs(connection, fields)
    connection.execute(
        "CREATE OR REPLACE TABLE source_files "
        "(source_id INTEGER, path VARCHAR, sha256 VARCHAR, folder VARCHAR, rows_read BIGINT)"
    )
    # 0: DuckDB takes object columns for text and does not guess their type from the first rows
    setting = connection.execute("SELECT current_setting('pandas_analyze_sample')").fetchone()
    connection.execute("SET pandas_analyze_sample = 0")
    served: list[ServedSource] = []
    try:
        done_bytes = 0
        for source_id, source in enumerate(found, 1):
            report = _reporter(progress, source, done_bytes, total_bytes)
            report(0)
            rows, tool = _read_source(connection, source_id, source, fields, report)
            if tool is not None:
                served.append(ServedSource(source_id, printable(source.shown), tool))
            connection.execute(
                "INSERT INTO source_files VALUES (?, ?, ?, ?, ?)",
                [source_id, source.shown, source.sha256, source.folder, rows],
            )
            report(source.size_bytes)
            done_bytes += source.size_bytes
    finally:
        if setting is not None:
            connection.execute(f"SET pandas_analyze_sample = {int(setting[0])}")
    return served


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


def _hash_file(path: Path, root: Path) -> _Found:
    shown = show_path(path, root)
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as stream:
            modified_ns = os.fstat(stream.fileno()).st_mtime_ns
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise unreadable(printable(shown), error) from None
    if size == 0:
        raise SourceError(f"{printable(shown)}: the file is empty")
    return _Found(digest.hexdigest(), shown, storable(path.parent.name), path, size, modified_ns)


def _hash_frame(frame: pd.DataFrame, shown: str, fields: SourceFields) -> str:
    places = _frame_places(frame, shown, (*fields.scalars, *fields.steps))
    digest = hashlib.sha256(str(len(frame)).encode())
    for name, place in sorted(places.items()):
        column = frame.iloc[:, place]
        digest.update(repr((name, str(column.dtype))).encode())
        if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
            digest.update(column.to_numpy().tobytes())
        else:
            _hash_cells(digest.update, column, f"{shown}: the column {name!r}")
    return digest.hexdigest()


def _hash_cells(update: Callable[[bytes], None], column: pd.Series[Any], where: str) -> None:
    try:
        for start in range(0, len(column), FRAME_BATCH_ROWS):
            cells = [_plain(value) for value in column.iloc[start : start + FRAME_BATCH_ROWS].tolist()]
            update(repr(cells).encode("utf-8", "surrogatepass"))
    except RecursionError:
        raise SourceError(f"{where} holds values that are nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise SourceError(f"{where} holds a value without a text: {str(error).split(';')[0]}") from None


def _read_source(
    connection: duckdb.DuckDBPyConnection,
    source_id: int,
    source: _Found,
    fields: SourceFields,
    report: Callable[[int], None],
) -> tuple[int, str | None]:
    """Read one source; how many runs it has, and the load generator that wrote it."""
    shown = printable(source.shown)
    if isinstance(source.content, pd.DataFrame):
        writer = RunWriter(connection, source_id, fields)
        _read_frame(source.content, shown, fields, writer)
        writer.flush()
        return writer.rows, None
    try:
        rows, tool = _read_file(connection, source_id, source.content, shown, fields, report)
        status = source.content.stat()
    except OSError as error:
        raise unreadable(shown, error) from None
    if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
        raise SourceError(f"{shown}: the file changed while it was read; build again once it is complete")
    return rows, tool


def _read_file(
    connection: duckdb.DuckDBPyConnection,
    source_id: int,
    path: Path,
    shown: str,
    fields: SourceFields,
    report: Callable[[int], None],
) -> tuple[int, str | None]:
    ending = path.suffix.lower()
    if ending == ".parquet":
        return read_parquet(connection, path, shown, source_id, fields), None
    tool = None
    with path.open("rb") as stream:
        writer = RunWriter(connection, source_id, fields, lambda: report(stream.tell()))
        if ending == ".json":
            found = open_served(stream, shown, os.fstat(stream.fileno()).st_size, fields.scalars)
            if found is None:
                _read_json(stream, shown, fields, writer)
            else:
                tool, rows = found
                _add_served(rows, fields, writer)
        elif ending == ".csv":
            _read_csv(stream, shown, fields, writer)
        else:
            tool = _read_json_lines(stream, shown, fields, writer)
        writer.flush()
        return writer.rows, tool


def _add_served(rows: Iterable[Row], fields: SourceFields, writer: RunWriter) -> None:
    for row in rows:
        if isinstance(row, str):
            writer.add_problem(row)
        else:
            writer.add([row.get(name) for name in fields.scalars], [row.get(name) for name in fields.steps])


def _read_json(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    current = Configuration()
    first_row = 1

    def finish() -> None:
        if current.streamed:
            try:
                writer.fill_header(first_row, current.header)
            except ValueError as error:
                raise SourceError(f"{shown}: a header field {error}") from None

    for configuration, run in read_runs(JsonText(stream, shown), {*fields.scalars, *fields.steps}):
        if configuration is not current:
            finish()
            current, first_row = configuration, writer.rows + 1
        if not isinstance(run, dict):
            writer.add_problem(f"the run is {brief(run)}, not an object")
            continue
        scalars = [run.get(name) for name in fields.scalars]
        for index, value in enumerate(scalars):
            if value is None:
                name = fields.scalars[index]
                if name not in run:
                    scalars[index] = current.header.get(name)
                elif current.streamed:
                    scalars[index] = HELD_NULL
        writer.add(scalars, [run.get(name) for name in fields.steps])
    finish()


def _read_json_lines(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> str | None:
    """Read one run a line; the load generator that wrote the last line that one wrote."""
    tool = None
    for number, line in enumerate(_without_bom(stream), 1):
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SourceError(f"{shown}: not UTF-8 text at byte offset 0: the file is UTF-16")
        if not line.strip():
            continue
        try:
            run = json.loads(line.decode())
        except UnicodeDecodeError as error:
            writer.add_problem(f"line {number} is not UTF-8 text: {error.reason} at byte {error.start + 1} of it")
        except json.JSONDecodeError as error:
            writer.add_problem(f"line {number} is not valid JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            writer.add_problem(f"line {number} is not valid JSON: values are nested too deeply")
        except ValueError as error:
            writer.add_problem(f"line {number} is not valid JSON: {str(error).split(';')[0]}")
        else:
            if not isinstance(run, dict):
                writer.add_problem(f"line {number} is {brief(run)}, not an object")
            elif RESULTS in run:
                writer.add_problem(f"line {number} holds {RESULTS}: put one run on a line, or name the file .json")
            elif found := served_line(run, fields.scalars):
                tool, rows = found
                _add_served(rows, fields, writer)
            else:
                _add_served([run], fields, writer)
    return tool


def _read_csv(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    lines = _decoded(_without_bom(stream), shown)
    header_line = next(lines, "")
    delimiter = max(",;\t", key=header_line.count)
    previous_limit = csv.field_size_limit(CSV_FIELD_CHARACTERS)
    try:
        reader = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader)]
        except csv.Error as error:
            raise SourceError(f"{shown}: the header line is not valid CSV: {error}") from None
        if not any(header):
            raise SourceError(f"{shown}: the first line is blank, where the names of the columns are due")
        places = _places(header, (*fields.scalars, *fields.steps), shown)
        scalars = [places.get(name, len(header)) for name in fields.scalars]
        steps = [places.get(name, len(header)) for name in fields.steps]
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise SourceError(f"{shown}: the file ends within quotes opened in line {start}") from None
                writer.add_problem(f"line {start} is not valid CSV: {error}")
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                writer.add_problem(f"line {start} has {len(cells)} fields, where the header has {len(header)}")
                continue
            values = [cell or None for cell in cells]
            values.append(None)  # the place of columns that the file lacks
            writer.add([values[place] for place in scalars], [values[place] for place in steps])
    finally:
        csv.field_size_limit(previous_limit)


def _without_bom(stream: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(stream):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _decoded(lines: Iterable[bytes], shown: str) -> Iterator[str]:
    offset = 0
    try:
        for line in lines:
            yield line.decode()
            offset += len(line)
    except UnicodeDecodeError as error:
        where = f"byte offset {offset + error.start}"
        raise SourceError(f"{shown}: not UTF-8 text at {where}: {error.reason}") from None


def _read_frame(frame: pd.DataFrame, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    places = _frame_places(frame, shown, (*fields.scalars, *fields.steps))
    for start in range(0, len(frame), FRAME_BATCH_ROWS):
        part = frame.iloc[start : start + FRAME_BATCH_ROWS]
        absent: list[object] = [None] * len(part)
        columns = {name: [_plain(value) for value in part.iloc[:, place].tolist()] for name, place in places.items()}
        for index in range(len(part)):
            writer.add(
                [columns.get(name, absent)[index] for name in fields.scalars],
                [columns.get(name, absent)[index] for name in fields.steps],
            )


def _frame_places(frame: pd.DataFrame, shown: str, names: Iterable[str]) -> dict[str, int]:
    return _places([str(name) for name in frame.columns], names, shown)


def _places(header: Sequence[str], names: Iterable[str], shown: str) -> dict[str, int]:
    """Places of the columns that are needed, by name."""
    wanted = set(names)
    places: dict[str, int] = {}
    for place, name in enumerate(header):
        if name not in wanted:
            continue
        if name in places:
            raise SourceError(f"{shown}: two columns are named {name!r}; which one counts is not clear")
        places[name] = place
    return places


def _plain(value: object) -> object:
    """Cell of a frame as `json` would give it; a missing one, NaN too, as None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain_element(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    return value


def _plain_element(value: object) -> object:
    """Element of a list in a cell: NaN stays, as a step that is not finite."""
    if isinstance(value, float):
        return float(value)
    return _plain(value)
