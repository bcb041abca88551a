"""Results of vLLM's serving benchmark: ``vllm bench serve --save-result --save-detailed``.

The file is one object of columns, each with one element a request: ``input_lens``, ``output_lens`` (the server's count
where it reports one, else vLLM's own), ``ttfts`` and ``itls`` in seconds, ``errors``. With ``--append-result`` several
such objects stand in one file.

- ``ttfts``: from sending the request to the first chunk, the prefill.
- ``itls``: gaps between chunks, one list a request. vLLM counts the time of a chunk once, however many tokens it
  carries, so there are fewer gaps than tokens where chunks carried several; then their sum is the decode time, and
  there are no single steps.
- vLLM's TPOT is (latency − TTFT) / (n − 1), a mean; it is not read.

``--metadata tier=low top_k=8 num_blocks=16`` writes the configuration into the file, where it is found. All plain
values of the file are fields too, such as ``request_rate``, ``max_concurrency`` and ``burstiness``.

SGLang's ``bench_serving --output-details`` writes the same lists, one object a line. Its ``itls`` spread the time of a
chunk evenly over its tokens, so they are no single steps, and only their sum is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from lutest.reader.errors import SourceError
from lutest.runs.sources.json_stream import JsonText
from lutest.runs.sources.run_rows import brief
from lutest.runs.sources.served import (
    Row,
    UnusableRequestError,
    labels,
    last_line,
    load_fields,
    number,
    numbers,
    served_run,
)

COLUMNS = frozenset(("ttfts", "itls", "input_lens", "output_lens"))
SUMMARY = frozenset(("completed", "request_throughput", "total_output_tokens"))  # what it writes without details
MAX_BYTES = 1 << 30  # columns cannot be read request by request: the file is held as a whole, at several times its size


def read_vllm(text: JsonText, name: str, size_bytes: int, wanted: Collection[str]) -> Iterator[Row]:
    """Read the requests of a result file.

    Parameters
    ----------
    text : JsonText
        The file.
    name : str
        Its name, for messages.
    size_bytes : int
        Its size.
    wanted : collection of str
        Fields of metadata to keep.

    Yields
    ------
    dict or str
        A run, or why a request is none.

    Raises
    ------
    SourceError
        The file is malformed as a whole, or larger than `MAX_BYTES`.
    """
    if size_bytes > MAX_BYTES:
        raise SourceError(
            f"{name}: {size_bytes / 2**30:.1f} GiB of vLLM's columns, which are read as a whole and so up to "
            f"{MAX_BYTES / 2**30:g} GiB; save the benchmark in several files"
        )
    while text.peek():
        result = text.value()
        if isinstance(result, dict):
            yield from vllm_rows(result, wanted)
        else:
            yield f"the result is {brief(result)}, not an object"


def vllm_rows(result: Mapping[str, object], wanted: Collection[str]) -> Iterator[Row]:
    """Requests of one result object; see `read_vllm`."""
    missing = sorted(COLUMNS - result.keys())
    if missing:
        yield f"a result of vLLM's benchmark without {', '.join(missing)}: save it with --save-result --save-detailed"
        return
    columns: dict[str, Sequence[object]] = {}
    for name in (*COLUMNS, "errors"):
        column = result.get(name)
        if isinstance(column, list):
            columns[name] = column
        elif name in COLUMNS:
            yield f"{name} is {brief(column)}, not a list"
            return
    lengths = {name: len(column) for name, column in sorted(columns.items())}
    if len(set(lengths.values())) > 1:
        yield "lists of different lengths: " + ", ".join(f"{name} {length}" for name, length in lengths.items())
        return
    rate = result.get("request_rate")  # the text "inf" where all requests are sent at once
    strategy = "throughput" if rate == "inf" else "poisson" if result.get("burstiness") == 1 else "gamma"
    load = load_fields(strategy, rate, result.get("max_concurrency"), result.get("request_throughput"))
    shared = {"model": result.get("model_id"), **load, **labels(result, wanted)}
    single = "endpoint_type" in result  # SGLang has no such field
    for place in range(lengths["ttfts"]):
        request = {name: column[place] for name, column in columns.items()}
        try:
            yield {**_run(request, single), **shared, "sample_id": place}
        except UnusableRequestError as error:
            yield str(error)


def _run(request: Mapping[str, object], single: bool) -> dict[str, object]:
    failure = request.get("errors")
    if failure:
        raise UnusableRequestError(f"the request failed: {last_line(failure)}")
    gaps_s = numbers(request["itls"], "itls")
    ttft_s = number(request["ttfts"], "ttfts")
    if ttft_s == 0 and not gaps_s:
        raise UnusableRequestError("no time to first token: the request failed, or its answer was not streamed")
    return served_run(
        request["input_lens"],
        request["output_lens"],
        ttft_s * 1e3,
        sum(gaps_s) * 1e3,
        [gap * 1e3 for gap in gaps_s] if single else None,
    )
