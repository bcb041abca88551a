"""Runs of JSON files, of one value or of one a line, those of load generators included; see `served` for these."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from lutest.reader.errors import SourceError
from lutest.runs.sources.aiperf import aiperf_row, is_aiperf_record, read_aiperf_load, read_genai_perf
from lutest.runs.sources.guidellm import read_guidellm
from lutest.runs.sources.json_stream import RESULTS, Configuration, JsonText, read_runs
from lutest.runs.sources.llmperf import LLMPERF_FIELDS, read_llmperf
from lutest.runs.sources.run_rows import HELD_NULL, RunWriter, SourceFields, brief
from lutest.runs.sources.served import Row
from lutest.runs.sources.vllm import COLUMNS, SUMMARY, read_vllm, vllm_rows

_AIPERF_SUMMARY = "aiperf_version"


def read_json(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    """Read a file of one JSON value, which a load generator may have written: its content tells which."""
    size_bytes = os.fstat(stream.fileno()).st_size
    readers: dict[str, Callable[[JsonText], Iterator[Row]]] = {
        "vLLM": lambda text: read_vllm(text, shown, size_bytes, fields.scalars),
        "GuideLLM": lambda text: read_guidellm(text, fields.scalars),
        "GenAI-Perf": read_genai_perf,
        "LLMPerf": read_llmperf,
        "AIPerf": lambda _: iter(["a summary of AIPerf, without its requests: they are in profile_export.jsonl"]),
    }
    try:
        writer.tool = _recognise(JsonText(stream, shown))
    except SourceError:  # not valid JSON, which its reader tells better
        writer.tool = None
    stream.seek(0)
    if writer.tool is None:
        _read_configurations(stream, shown, fields, writer)
    else:
        _add_rows(readers[writer.tool](JsonText(stream, shown)), fields, writer)


def _recognise(text: JsonText) -> str | None:
    """The load generator that wrote a JSON value."""
    if text.peek() == "[":
        for _ in text.elements():
            return "LLMPerf" if text.peek() == "{" and _has_fields(text, LLMPERF_FIELDS) else None
    if text.peek() != "{":
        return None
    keys: set[str] = set()
    for key in text.members():
        if key == RESULTS:
            return None
        if key == "benchmarks":
            return "GuideLLM" if _lists_requests(text, "{") else None
        if key == "experiments":
            return "GenAI-Perf" if _lists_requests(text, "[") else None
        keys.add(key)
        if keys >= COLUMNS:
            return "vLLM"
        text.skip()
    return "vLLM" if keys >= SUMMARY else "AIPerf" if _AIPERF_SUMMARY in keys else None


def _has_fields(text: JsonText, names: frozenset[str]) -> bool:
    """Whether the object that comes next has all of `names`."""
    missing = set(names)
    for key in text.members():
        missing.discard(key)
        if not missing or key == RESULTS:
            return not missing
        text.skip()
    return False


def _lists_requests(text: JsonText, mark: str) -> bool:
    """Whether a list of objects comes next whose first one has `requests` that begin with `mark`."""
    if text.peek() != "[":
        return False
    for _ in text.elements():
        if text.peek() != "{":
            return False
        for key in text.members():
            if key == "requests":
                return text.peek() == mark
            text.skip()
    return False


def _read_configurations(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    current = Configuration()
    first_row = 1

    def finish() -> None:
        writer.note(current.names)
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
        if writer.rows < first_row:
            writer.note(run)
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


def read_json_lines(stream: BinaryIO, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    """Read one run a line, or the requests of a line that a load generator wrote."""
    load: dict[str, object] | None = None
    for number, line in enumerate(stream, 1):
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise SourceError(f"{shown}: not UTF-8 text at byte offset 0: the file is UTF-16")
            line = line.removeprefix(codecs.BOM_UTF8)
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
            elif is_aiperf_record(run):
                writer.tool = "AIPerf"
                load = read_aiperf_load(stream.name) if load is None else load
                _add_rows([aiperf_row(run, load)], fields, writer)
            elif run.keys() >= COLUMNS:
                writer.tool = "vLLM"
                _add_rows(vllm_rows(run, fields.scalars), fields, writer)
            else:
                _add_rows([run], fields, writer)


def _add_rows(rows: Iterable[Row], fields: SourceFields, writer: RunWriter) -> None:
    for row in rows:
        if isinstance(row, str):
            writer.add_problem(row)
        else:
            if not writer.names:
                writer.note(name for name, value in row.items() if value is not None)
            writer.add([row.get(name) for name in fields.scalars], [row.get(name) for name in fields.steps])
