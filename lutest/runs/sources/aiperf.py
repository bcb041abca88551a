"""Exports of NVIDIA's load generators: AIPerf's ``profile_export.jsonl``, GenAI-Perf's ``profile_export.json``.

AIPerf writes one record a line: ``metadata``, ``metrics`` (each with ``value`` and ``unit``) and ``error``.

- ``time_to_first_token`` (``ttft`` in early versions) is the prefill; streamed requests alone have it.
- ``request_latency`` ends with the last chunk that has content; less TTFT it is the decode time.
- ``inter_chunk_latency`` are the gaps between chunks with content: decode steps where each chunk carried one token.
- ``inter_token_latency`` is a mean: (request latency − TTFT) / (n − 1), or over n less the tokens of the first chunk
  where the server reports those. It is not read.
- Tokens are the server's counts (``usage_prompt_tokens``, ``usage_completion_tokens``) where a record has them, else
  AIPerf's own (``input_sequence_length``, ``output_sequence_length``), which know nothing of a chat template.
- Rate and concurrency stand in the summary beside it, ``profile_export_aiperf.json``.

GenAI-Perf's file holds, for each request, when it was sent, and when each chunk came and what it was (nanoseconds); its
means, such as (request latency − TTFT) / (n − 1) for the inter-token latency, are not in the file. Prefill and gaps are
taken from chunks with content, as GenAI-Perf itself does. Its token counts come from a tokenizer that is not in it,
so they are read from the server's ``usage``, or counted where the file holds token ids; requests without either are no
runs.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lutest.runs.sources.json_stream import JsonText
from lutest.runs.sources.run_rows import brief
from lutest.runs.sources.served import (
    Row,
    UnusableRequestError,
    inner,
    last_line,
    load_fields,
    number,
    numbers,
    served_run,
)

_MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "sec": 1e3, "s": 1e3}
_NS = 1e-6


def is_aiperf_record(line: Mapping[str, object]) -> bool:
    """Whether a line of JSON is a record of AIPerf's ``profile_export.jsonl``."""
    metadata = line.get("metadata")
    named = isinstance(metadata, dict) and ("benchmark_phase" in metadata or "credit_phase" in metadata)
    return named and isinstance(line.get("metrics"), dict)


def aiperf_summary(path: str | os.PathLike[str]) -> Path:
    """The summary that AIPerf writes beside a file of records, ``profile_export_aiperf.json``."""
    return Path(path).with_name(f"{Path(path).stem}_aiperf.json")


def read_aiperf_load(path: str | os.PathLike[str]) -> dict[str, object]:
    """What the summary beside a file of records says of the load; nothing where there is none."""
    try:
        summary = json.loads(aiperf_summary(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    config = inner(summary, "input_config")
    phases = config.get("phases")
    phase = inner(config, "loadgen")  # of early versions
    for candidate in phases if isinstance(phases, list) else []:
        if isinstance(candidate, dict) and "warmup" not in (candidate.get("kind"), candidate.get("name")):
            phase = candidate
    rate = phase.get("rate", phase.get("request_rate"))
    strategy = phase.get("type") or ("concurrency" if rate is None else phase.get("request_rate_mode"))
    return load_fields(strategy, rate, phase.get("concurrency"), inner(summary, "request_throughput").get("avg"))


def aiperf_row(record: Mapping[str, object], load: Mapping[str, object]) -> Row:
    """A run of one record under that load, or why it is none."""
    metadata, metrics = record["metadata"], record["metrics"]
    assert isinstance(metadata, dict)
    assert isinstance(metrics, dict)
    if "warmup" in (metadata.get("benchmark_phase"), metadata.get("credit_phase")):
        return "a warm-up request"
    error = record.get("error")
    if error:
        told = error.get("message") or error.get("type") if isinstance(error, dict) else error
        return f"the request failed: {last_line(told)}"
    try:
        first = "ttft" if "ttft" in metrics else "time_to_first_token"
        if first not in metrics:
            return f"no {first}: the answer was not streamed"
        prefill_ms, latency_ms = _time_ms(metrics, first), _time_ms(metrics, "request_latency")
        return served_run(
            _count(metrics, "usage_prompt_tokens", "input_sequence_length"),
            _count(metrics, "usage_completion_tokens", "output_sequence_length"),
            prefill_ms,
            latency_ms - prefill_ms,
            _gaps_ms(metrics),
            sample_id=metadata.get("x_request_id"),
            **load,
        )
    except UnusableRequestError as unusable:
        return str(unusable)


def _count(metrics: Mapping[str, object], server: str, own: str) -> object:
    value = inner(metrics, server).get("value")
    return inner(metrics, own).get("value") if value is None else value


def _time_ms(metrics: Mapping[str, object], name: str) -> float:
    metric = inner(metrics, name)
    return number(metric.get("value"), name) * _milliseconds(metric, name)


def _gaps_ms(metrics: Mapping[str, object]) -> list[float] | None:
    name = "inter_chunk_latency"
    if name not in metrics:
        return None
    metric = inner(metrics, name)
    return [gap * _milliseconds(metric, name) for gap in numbers(metric.get("value"), name)]


def _milliseconds(metric: Mapping[str, object], name: str) -> float:
    """Milliseconds in the unit of a metric."""
    unit = metric.get("unit")
    if not isinstance(unit, str) or unit not in _MILLISECONDS:
        raise UnusableRequestError(f"{name} is in {brief(unit)}, not one of {', '.join(_MILLISECONDS)}")
    return _MILLISECONDS[unit]


def read_genai_perf(text: JsonText) -> Iterator[Row]:
    """Read the requests of GenAI-Perf's ``profile_export.json``, one at a time.

    Parameters
    ----------
    text : JsonText
        The file.

    Yields
    ------
    dict or str
        A run, or why a request is none.

    Raises
    ------
    SourceError
        The file is malformed as a whole.
    """
    for key in text.members():
        if key != "experiments" or text.peek() != "[":
            text.skip()
            continue
        for _ in text.elements():
            if text.peek() != "{":
                yield f"the experiment is {brief(text.value())}, not an object"
                continue
            for part in text.members():
                if part != "requests" or text.peek() != "[":
                    text.skip()
                    continue
                for _ in text.elements():
                    yield _genai_perf_row(text.value())


def _genai_perf_row(request: object) -> Row:
    if not isinstance(request, dict):
        return f"the request is {brief(request)}, not an object"
    try:
        return _genai_perf_run(request)
    except UnusableRequestError as unusable:
        return str(unusable)


def _genai_perf_run(request: Mapping[str, object]) -> dict[str, object]:
    start_ns = number(request.get("timestamp"), "timestamp")
    moments_ns = numbers(request.get("response_timestamps"), "response_timestamps")
    outputs = request.get("response_outputs")
    if not isinstance(outputs, list) or len(outputs) != len(moments_ns):
        raise UnusableRequestError("response_outputs is not a list with an element for each of response_timestamps")
    inputs = request.get("request_inputs")
    identifiers = inputs.get("input_ids") if isinstance(inputs, dict) else None
    prompt_tokens: object = len(identifiers) if isinstance(identifiers, list) else None
    output_tokens: object = None
    model: object = None
    content_ns: list[float] = []
    streamed = True
    for moment_ns, output in zip(moments_ns, outputs, strict=True):
        if not isinstance(output, dict):
            raise UnusableRequestError(f"a response is {brief(output)}, not an object")
        if "output_ids" in output:
            count = len(output["output_ids"]) if isinstance(output["output_ids"], list) else 1
            output_tokens = count + (output_tokens if isinstance(output_tokens, int) else 0)
            content_ns += [moment_ns] * bool(count)
            continue
        contents = False
        for event in _events(output.get("response")):
            contents = contents or _has_content(event)
            streamed = streamed and event.get("object") != "chat.completion"
            model = event.get("model", model)
            usage = event.get("usage")
            if isinstance(usage, dict):
                prompt_tokens = usage.get("prompt_tokens", prompt_tokens)
                output_tokens = usage.get("completion_tokens", output_tokens)
        content_ns += [moment_ns] * contents
    if not content_ns:
        raise UnusableRequestError("the request failed: no response with content")
    if not streamed:
        raise UnusableRequestError("no time to first token: the answer was not streamed")
    if prompt_tokens is None or output_tokens is None:
        raise UnusableRequestError(
            "no token counts: the responses hold no `usage`; have the server report it, or profile with AIPerf"
        )
    return served_run(
        prompt_tokens,
        output_tokens,
        (content_ns[0] - start_ns) * _NS,
        (content_ns[-1] - content_ns[0]) * _NS,
        [(later - earlier) * _NS for earlier, later in itertools.pairwise(content_ns)],
        **({"model": model} if isinstance(model, str) else {}),
    )


def _events(response: object) -> Iterator[Mapping[str, object]]:
    """Objects of a response: server-sent events, several where they were read at once, or plain JSON."""
    for line in str(response or "").splitlines():
        content = line.strip().removeprefix("data:").strip()
        if not content.startswith("{"):
            continue
        try:
            event = json.loads(content)
        except (ValueError, RecursionError):
            raise UnusableRequestError(f"a response is cut off: {brief(content)}") from None
        if isinstance(event, dict):
            yield event


def _has_content(event: Mapping[str, object]) -> bool:
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return bool(event.get("text_output"))
    for part in (choice.get("delta"), choice.get("message"), choice):
        if isinstance(part, dict) and (part.get("content") or part.get("reasoning_content") or part.get("text")):
            return True
    return False
