"""LLMPerf's individual responses: ``…_individual_responses.json``, a list of one object a request.

- ``ttft_s`` is the prefill, ``end_to_end_latency_s`` the total; what lies between is the decode time.
- ``inter_token_latency_s`` is the end-to-end latency over n, the first token's time included: it is no decode step, and
  is not read.
- There are no single gaps, so runs have a total and no steps.
- A request that failed has an ``error_code``, and times that say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lutest.runs.sources.json_stream import JsonText
from lutest.runs.sources.run_rows import brief
from lutest.runs.sources.served import Row, UnusableRequestError, last_line, number, served_run

LLMPERF_FIELDS = frozenset(
    ("ttft_s", "end_to_end_latency_s", "number_input_tokens", "number_output_tokens", "error_code")
)


def read_llmperf(text: JsonText) -> Iterator[Row]:
    """Read the requests of a file, one at a time: runs, or why they are none."""
    for place, _ in enumerate(text.elements()):
        request = text.value()
        try:
            yield (
                {**_run(request), "sample_id": place}
                if isinstance(request, dict)
                else f"the request is {brief(request)}, not an object"
            )
        except UnusableRequestError as error:
            yield str(error)
    if text.peek():
        raise text.fault("more follows after the end of the list")


def _run(request: Mapping[str, object]) -> dict[str, object]:
    if request.get("error_code") is not None:
        told = request.get("error_msg") or f"error {brief(request['error_code'])}"
        raise UnusableRequestError(f"the request failed: {last_line(told)}")
    prefill_ms = number(request.get("ttft_s"), "ttft_s") * 1e3
    if prefill_ms == 0:
        raise UnusableRequestError("no time to first token: the answer was empty, or not streamed")
    return served_run(
        request.get("number_input_tokens"),
        request.get("number_output_tokens"),
        prefill_ms,
        number(request.get("end_to_end_latency_s"), "end_to_end_latency_s") * 1e3 - prefill_ms,
    )
