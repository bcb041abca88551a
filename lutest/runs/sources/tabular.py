"""Runs of a CSV file, one a line, and of a DataFrame, one a row."""

from __future__ import annotations

import codecs
import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from lutest.reader.errors import SourceError
from lutest.runs.sources.run_rows import RunWriter, SourceFields

CSV_FIELD_CHARACTERS = 256 << 20
FRAME_BATCH_ROWS = 5_000


def read_csv(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    """Read one run a line, the first line giving the names of the columns; the delimiter is the commonest there."""
    lines = _decoded(stream, shown)
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
        writer.note(header)
        places = _column_places(header, (*fields.scalars, *fields.steps), shown)
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


def _decoded(stream: BinaryIO, shown: str) -> Iterator[str]:
    """Lines as text, less a byte order mark; SourceError with the byte offset where they are not UTF-8."""
    offset = 0
    try:
        for line in stream:
            yield (line if offset else line.removeprefix(codecs.BOM_UTF8)).decode()
            offset += len(line)
    except UnicodeDecodeError as error:
        where = f"byte offset {offset + error.start}"
        raise SourceError(f"{shown}: not UTF-8 text at {where}: {error.reason}") from None


def _column_places(header: Sequence[str], names: Iterable[str], shown: str) -> dict[str, int]:
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


def read_frame(frame: pd.DataFrame, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    """Read one run a row."""
    writer.note(frame.columns)
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


def hash_frame(frame: pd.DataFrame, shown: str, fields: SourceFields) -> str:
    """Hash of what is read of a frame: names, types and cells of the columns that are needed, in any order."""
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


def _frame_places(frame: pd.DataFrame, shown: str, names: Iterable[str]) -> dict[str, int]:
    return _column_places([str(name) for name in frame.columns], names, shown)


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
