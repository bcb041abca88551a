"""Runs of JSON files, of one value or of one a line, those of load generators included."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from typing import BinaryIO

from lutest.reader.errors import SourceError
from lutest.runs.sources.json_stream import RESULTS, Configuration, JsonText, read_runs
from lutest.runs.sources.run_rows import HELD_NULL, RunWriter, SourceFields, brief
from lutest.runs.sources.served import Row
from lutest.runs.sources.serving_tools import open_served, served_line
from lutest.runs.sources.text_lines import without_bom

__all__ = ["read_json", "read_json_lines"]


def read_json(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> str | None:
    """Read a file of one JSON value; the load generator that wrote it, None for other files."""
    served = open_served(stream, shown, os.fstat(stream.fileno()).st_size, fields.scalars)
    if served is None:
        _read_configurations(stream, shown, fields, writer)
        return None
    tool, rows = served
    _add_served(rows, fields, writer)
    return tool


def _read_configurations(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
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


def read_json_lines(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> str | None:
    """Read one run a line; the load generator that wrote the last line that one wrote."""
    tool = None
    for number, line in enumerate(without_bom(stream), 1):
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


def _add_served(rows: Iterable[Row], fields: SourceFields, writer: RunWriter) -> None:
    for row in rows:
        if isinstance(row, str):
            writer.add_problem(row)
        else:
            writer.add([row.get(name) for name in fields.scalars], [row.get(name) for name in fields.steps])
