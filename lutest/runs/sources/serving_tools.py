"""Which load generator wrote a file of JSON, told by its content; see `served` for what becomes of its requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import BinaryIO, TypeAlias

from lutest.reader.errors import SourceError
from lutest.runs.sources.aiperf import aiperf_row, is_aiperf_record, read_genai_perf
from lutest.runs.sources.guidellm import read_guidellm
from lutest.runs.sources.json_stream import RESULTS, JsonText
from lutest.runs.sources.served import Row
from lutest.runs.sources.vllm import COLUMNS, SUMMARY, read_vllm, vllm_rows

__all__ = ["open_served", "served_line"]

Served: TypeAlias = tuple[str, Iterator[Row]]  # the tool, and its requests
_AIPERF_SUMMARY = "aiperf_version"


def open_served(stream: BinaryIO, name: str, size_bytes: int, wanted: Collection[str]) -> Served | None:
    """Open a JSON file that a load generator wrote.

    Parameters
    ----------
    stream : BinaryIO
        The file, at its start; it is at its start again when it turns out to be no such file.
    name : str
        Its name, for messages.
    size_bytes : int
        Its size.
    wanted : collection of str
        Fields of the user's own metadata to keep.

    Returns
    -------
    (str, iterator) or None
        Name of the tool, and its requests: runs, or reasons why they are none. None for other files, and for those
        that are not valid JSON, whose fault their reader tells.
    """
    try:
        tool = _recognise(JsonText(stream, name))
    except SourceError:
        tool = None
    stream.seek(0)
    readers: dict[str, Callable[[JsonText], Iterator[Row]]] = {
        "vLLM": lambda text: read_vllm(text, name, size_bytes, wanted),
        "GuideLLM": lambda text: read_guidellm(text, wanted),
        "GenAI-Perf": read_genai_perf,
        "AIPerf": lambda _: iter(["a summary of AIPerf, without its requests: they are in profile_export.jsonl"]),
    }
    return None if tool is None else (tool, readers[tool](JsonText(stream, name)))


def served_line(line: Mapping[str, object], wanted: Collection[str]) -> Served | None:
    """The tool that wrote a line of JSON, and its requests; None for any other line."""
    if is_aiperf_record(line):
        return "AIPerf", iter([aiperf_row(line)])
    if line.keys() >= COLUMNS:
        return "vLLM", vllm_rows(line, wanted)
    return None


def _recognise(text: JsonText) -> str | None:
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
