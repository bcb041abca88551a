"""Runs of a CSV file, one a line."""

from __future__ import annotations

import csv
from itertools import chain
from typing import BinaryIO

from lutest.reader.errors import SourceError
from lutest.runs.sources.column_places import column_places
from lutest.runs.sources.run_rows import RunWriter, SourceFields
from lutest.runs.sources.text_lines import decoded, without_bom

__all__ = ["read_csv"]

CSV_FIELD_CHARACTERS = 256 << 20


def read_csv(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    """Read one run a line, the first line giving the names of the columns; the delimiter is the commonest there."""
    lines = decoded(without_bom(stream), shown)
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
        places = column_places(header, (*fields.scalars, *fields.steps), shown)
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
