"""GuideLLM's report: ``benchmarks.json``.

``benchmarks[].requests`` holds lists of requests: ``successful``, ``errored`` and ``incomplete``. Of a successful one:

- ``time_to_first_token_ms`` is the prefill; it is null where the answer was not streamed.
- The decode time is that from the first token to the last, by their timestamps (seconds). ``request_latency`` (seconds)
  ends with the stream, some time after the last token; less TTFT it stands in where a file has no timestamps.
- ``time_per_output_token_ms`` divides by n and includes TTFT: it is no decode step, and is not read.
- ``inter_token_latency_ms`` is a mean over n − 1 gaps, and null for one token; it is not read either.
- There are no single gaps, so runs have a total and no steps.
- Strategy, rate and streams stand in the ``config`` of each benchmark (``args`` before 0.4).

``--label tier=low --label top_k=8 --label num_blocks=16`` writes the configuration into the file, where it is found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from lutest.runs.sources.json_stream import JsonText
from lutest.runs.sources.run_rows import brief
from lutest.runs.sources.served import (
    Row,
    UnusableRequestError,
    inner,
    labels,
    last_line,
    load_fields,
    number,
    served_run,
)

# the names of the first and last token's timestamps: in info.timings from 0.4 on, in the request itself before
_TIMESTAMPS = (
    ("first_token_iteration", "last_token_iteration"),
    ("first_iteration", "last_iteration"),
    ("first_token_time", "last_token_time"),
)


def read_guidellm(text: JsonText, wanted: Collection[str]) -> Iterator[Row]:
    """Read the requests of a report, one at a time.

    Parameters
    ----------
    text : JsonText
        The file.
    wanted : collection of str
        Labels to keep.

    Yields
    ------
    dict or str
        A run, or why a request is none.

    Raises
    ------
    SourceError
        The file is malformed as a whole.
    """
    shared: dict[str, object] = {}
    for key in text.members():
        if key in ("config", "args"):
            shared |= _shared(text.value(), wanted)
        elif key == "benchmarks" and text.peek() == "[":
            for _ in text.elements():
                for row in _benchmark(text):
                    yield row if isinstance(row, str) else {**row, **shared}
        else:
            text.skip()


def _shared(config: object, wanted: Collection[str]) -> dict[str, object]:
    """Model and labels of all requests."""
    backend = inner(inner(config, "spec"), "backend")
    model = backend.get("model") or inner(config).get("model")
    found = labels(inner(inner(config, "metadata"), "labels"), wanted)
    return {"model": model, **found} if isinstance(model, str) else found


def _benchmark(text: JsonText) -> Iterator[Row]:
    if text.peek() != "{":
        yield f"the benchmark is {brief(text.value())}, not an object"
        return
    strategy: Mapping[str, object] = {}
    state: Mapping[str, object] = {}
    for key in text.members():
        if key in ("config", "args"):  # stand before the requests
            strategy = inner(text.value(), "strategy")
        elif key == "scheduler_state":
            state = inner(text.value())
        elif key == "requests" and text.peek() == "{":
            load = _load(strategy, state)
            for status in text.members():
                if text.peek() != "[":
                    text.skip()
                    continue
                for _ in text.elements():
                    row = _row(status, text.value())
                    yield row if isinstance(row, str) else {**row, **load}
        else:
            text.skip()


def _load(strategy: Mapping[str, object], state: Mapping[str, object]) -> dict[str, object]:
    try:
        seconds = number(state.get("end_requests_time"), "") - number(state.get("start_requests_time"), "")
        achieved = number(state.get("successful_requests"), "") / seconds
    except (UnusableRequestError, ZeroDivisionError):
        achieved = None
    concurrency = strategy.get("streams") or strategy.get("max_concurrency")
    return load_fields(strategy.get("type_"), strategy.get("rate"), concurrency, achieved)


def _row(status: str, request: object) -> Row:
    if not isinstance(request, dict):
        return f"the request is {brief(request)}, not an object"
    information = inner(request, "info")
    if status == "incomplete":
        return "the request was not complete when the benchmark ended"
    if status != "successful":
        return f"the request failed: {last_line(information.get('error') or request.get('error'))}"
    try:
        return _run(request, inner(information, "timings"))
    except UnusableRequestError as error:
        return str(error)


def _run(request: Mapping[str, object], timings: Mapping[str, object]) -> dict[str, object]:
    if request.get("time_to_first_token_ms") is None:
        raise UnusableRequestError("no time_to_first_token_ms: the answer was not streamed")
    prefill_ms = number(request["time_to_first_token_ms"], "time_to_first_token_ms")
    known = {**request, **timings}
    for first, last in _TIMESTAMPS:
        if known.get(first) is not None and known.get(last) is not None:
            decode_ms = (number(known[last], last) - number(known[first], first)) * 1e3
            break
    else:
        decode_ms = number(request.get("request_latency"), "request_latency") * 1e3 - prefill_ms
    return served_run(
        request.get("prompt_tokens"),
        request.get("output_tokens"),
        prefill_ms,
        decode_ms,
        sample_id=request.get("request_id"),
    )
