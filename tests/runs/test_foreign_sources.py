"""Files of load generators: the same figures as by hand, and a reason for every request that is no run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from lutest.builder.build import build
from lutest.judging.diagnose import diagnose
from lutest.reader.errors import BuildError, ConfigError, SourceError
from lutest.runs.convert import convert
from lutest.runs.sources import vllm

DATA = Path(__file__).parents[1] / "data"
VLLM, AIPERF, GUIDELLM = DATA / "vllm-bench-serve.json", DATA / "aiperf-0.13.0.jsonl", DATA / "guidellm-0.8.1.json"
KEY = {"tier": {"constant": "low"}, "top_k": {"constant": 8}, "num_blocks": {"constant": 16}}
CONFIG = {"columns": KEY, "cleaning": {"outliers": "none"}}

# prompt tokens, output tokens, prefill, decode, steps where there are single ones; in milliseconds
Request = tuple[int, int, float, float, list[float]]


def query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(sql).fetchall()


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def runs(source: Path, folder: Path, config: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """Runs as a conversion writes them, in the order of the file: output tokens, prefill, decode, steps."""
    settings = folder / "config.yaml"
    write(settings, {**(config or CONFIG), "sources": [str(source)], "output": "unused.duckdb"})
    output = folder / "runs.parquet"
    convert(source, output, config=settings)
    with duckdb.connect() as connection:
        names = {row[0] for row in connection.execute("DESCRIBE FROM read_parquet(?)", [str(output)]).fetchall()}
        steps = "decode_steps_ms" if "decode_steps_ms" in names else "NULL"
        return connection.execute(
            f"SELECT output_tokens, prefill_ms, decode_ms, {steps} FROM read_parquet(?) ORDER BY prefill_ms",
            [str(output)],
        ).fetchall()


def problems(source: Path, folder: Path) -> list[str]:
    """Why requests are no runs; one sound run stands beside them, so that there is a table."""
    beside = {**sound_vllm(), "num_blocks": "16"}
    summary = build(CONFIG, runs=[source, write(folder / "sound.json", beside)], output=folder / "x.duckdb")
    rejected = query(summary.output, 'SELECT reason, detail FROM rejected_runs ORDER BY source_id, "row"')
    assert {reason for reason, _ in rejected} <= {"unreadable_row"}
    return [detail for _, detail in rejected]


# by hand


def vllm_by_hand() -> list[Request]:
    result = json.loads(VLLM.read_text())
    requests: list[Request] = []
    for place, error in enumerate(result["errors"]):
        if not error:
            gaps = [gap * 1e3 for gap in result["itls"][place]]
            tokens = result["output_lens"][place]
            steps = gaps if len(gaps) == tokens - 1 else []
            requests.append((result["input_lens"][place], tokens, result["ttfts"][place] * 1e3, sum(gaps), steps))
    return requests


def aiperf_by_hand() -> list[Request]:
    requests: list[Request] = []
    for line in AIPERF.read_text().splitlines():
        record = json.loads(line)
        if record.get("error") or record["metadata"]["benchmark_phase"] == "warmup":
            continue
        values = {name: metric["value"] for name, metric in record["metrics"].items()}
        tokens, ttft = values["output_sequence_length"], values["time_to_first_token"]
        gaps = values.get("inter_chunk_latency", [])
        steps = gaps if len(gaps) == tokens - 1 else []
        requests.append((values["input_sequence_length"], tokens, ttft, values["request_latency"] - ttft, steps))
    return requests


def guidellm_by_hand() -> list[Request]:
    requests: list[Request] = []
    for request in json.loads(GUIDELLM.read_text())["benchmarks"][0]["requests"]["successful"]:
        tokens = request["output_tokens"]
        decode = 0.0 if tokens == 1 else request["inter_token_latency_ms"] * (tokens - 1)
        requests.append((request["prompt_tokens"], tokens, request["time_to_first_token_ms"], decode, []))
    return requests


@pytest.mark.parametrize(
    ("path", "by_hand", "n_rejected"),
    [(VLLM, vllm_by_hand, 3), (AIPERF, aiperf_by_hand, 6), (GUIDELLM, guidellm_by_hand, 2)],
    ids=["vLLM", "AIPerf", "GuideLLM"],
)
def test_quantiles_are_those_by_hand(
    tmp_path: Path, path: Path, by_hand: Callable[[], list[Request]], n_rejected: int
) -> None:
    requests = by_hand()
    summary = build(CONFIG, runs=path, output=tmp_path / "x.duckdb")
    assert [(source.rows_used, source.rows_rejected) for source in summary.sources] == [(len(requests), n_rejected)]
    prefill = query(summary.output, "SELECT tier, top_k, num_blocks, n, p50_ms, p95_ms FROM prefill")
    expected = np.quantile([request[2] for request in requests], [0.5, 0.95])
    assert prefill[0][:4] == ("low", 8, 16, len(requests))
    assert prefill[0][4:] == pytest.approx(expected, rel=1e-12)
    lengths = query(summary.output, "SELECT output_tokens, sum(n)::INTEGER FROM output_length GROUP BY ALL ORDER BY 1")
    assert lengths == [tuple(pair) for pair in np.transpose(np.unique([r[1] for r in requests], return_counts=True))]
    steps = [step for request in requests for step in request[4]]
    if steps:
        decode = query(summary.output, "SELECT n_steps, p50_ms, p95_ms FROM decode")
        assert decode[0][0] == sum(request[1] - 1 for request in requests)
        assert decode[0][1:] == pytest.approx(np.quantile(steps, [0.5, 0.95]), rel=1e-12)
    else:
        mean = sum(request[3] for request in requests) / sum(request[1] - 1 for request in requests)
        assert query(summary.output, "SELECT mean_ms FROM decode")[0][0] == pytest.approx(mean, rel=1e-6)
    # every run, to the last figure
    expected_runs = sorted((request[1:] for request in requests), key=lambda request: request[1])
    converted = [run for run in runs(path, tmp_path) if run[1] is not None]
    assert [run[0] for run in converted] == [run[0] for run in expected_runs]
    for place in (1, 2):
        assert [run[place] for run in converted] == pytest.approx([run[place] for run in expected_runs], rel=1e-6)
    assert [run[3] or [] for run in converted] == [pytest.approx(run[3], rel=1e-12) for run in expected_runs]


def test_the_files_hold_what_they_are_to_show() -> None:
    for requests in (vllm_by_hand(), aiperf_by_hand()):
        assert any(steps for *_, steps in requests)
        assert any(tokens > 1 and not steps for _, tokens, _, _, steps in requests), "chunks of several tokens"
        assert any(tokens == 1 for _, tokens, *_ in requests)
    guidellm = json.loads(GUIDELLM.read_text())["benchmarks"][0]["requests"]["successful"]
    # what GuideLLM calls the time per output token, and the latency of the request, are something else
    assert all(request["time_per_output_token_ms"] > request["inter_token_latency_ms"] for request in guidellm)
    assert all(
        request["request_latency"] * 1e3 > request["time_to_first_token_ms"] + hand[3]
        for request, hand in zip(guidellm, guidellm_by_hand(), strict=True)
    )


def test_a_table_of_files_converted_one_by_one(tmp_path: Path) -> None:
    converted = [
        convert(path, tmp_path / f"{path.stem}.parquet", config=build_config(tmp_path, tier=tier)).output
        for path, tier in [(VLLM, "low"), (AIPERF, "medium"), (GUIDELLM, "high")]
    ]
    summary = build({"cleaning": {"outliers": "none"}}, runs=converted, output=tmp_path / "x.duckdb")
    counts = query(summary.output, "SELECT tier, n FROM prefill ORDER BY n, tier")
    assert counts == [("low", 21), ("medium", 21), ("high", 22)]
    models = json.loads(query(summary.output, "SELECT value FROM meta WHERE key = 'model'")[0][0])
    assert models == ["mock-moe"]


def build_config(folder: Path, **constants: object) -> Path:
    columns = {**KEY, **{name: {"constant": value} for name, value in constants.items()}}
    return write(folder / "build.yaml", {"sources": ["x.json"], "output": "x.duckdb", "columns": columns})


# what the configuration has to say, and what not


@pytest.mark.parametrize(
    ("path", "tool", "missing"),
    [
        (VLLM, "vLLM", "num_blocks"),  # --metadata gave the tier and top_k
        (GUIDELLM, "GuideLLM", "num_blocks"),  # and so did --label
        (AIPERF, "AIPerf", "tier, top_k, num_blocks"),
    ],
)
def test_missing_key_tells_how_to_give_it(tmp_path: Path, path: Path, tool: str, missing: str) -> None:
    expected = f"{path.name}: a file of {tool} does not say its {missing}: give constants in the configuration"
    for attempt in (
        lambda: build(runs=path, output=tmp_path / "x.duckdb"),
        lambda: convert(path, tmp_path / "x.parquet"),
        lambda: diagnose(path),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert expected in str(caught.value)
        assert "num_blocks: {constant: 16}" in str(caught.value)


def test_the_file_says_its_key(tmp_path: Path) -> None:
    columns = {"num_blocks": {"constant": 12}}
    for path in (VLLM, GUIDELLM):
        summary = build({"columns": columns}, runs=path, output=tmp_path / "x.duckdb")
        assert query(summary.output, "SELECT tier, top_k, num_blocks FROM prefill") == [("low", 8, 12)]
    own = write(tmp_path / "own.json", {**sound_vllm(), "my_tier": "high", "top_k": "4", "num_blocks": "16"})
    summary = build({"columns": {"tier": "my_tier"}}, runs=own, output=tmp_path / "x.duckdb")
    assert query(summary.output, "SELECT tier, top_k, num_blocks FROM prefill") == [("high", 4, 16)]


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_another_time_unit_would_convert_twice(tmp_path: Path, unit: str) -> None:
    with pytest.raises(ConfigError, match=rf"aiperf.*a file of AIPerf has a unit of its own.*sources in {unit}"):
        build({**CONFIG, "time_unit": unit}, runs=AIPERF, output=tmp_path / "x.duckdb")


@pytest.mark.parametrize(
    ("name", "rule", "shown"),
    [("prefill_ms", ["a", "b"], "a + b"), ("decode_steps_ms", "gaps", "gaps"), ("prompt_tokens", "isl", "isl")],
)
def test_another_field_would_be_empty(tmp_path: Path, name: str, rule: object, shown: str) -> None:
    columns = {**KEY, name: rule}
    with pytest.raises(ConfigError) as caught:
        build({"columns": columns}, runs=VLLM, output=tmp_path / "x.duckdb")
    assert f"has no field {shown}: leave `columns.{name}` out" in str(caught.value)


def test_beside_runs_of_ones_own(tmp_path: Path) -> None:
    own = {"tier": "low", "top_k": 8, "num_blocks": 16, "prompt_tokens": 40, "output_tokens": 2}
    lines = [{**own, "prefill_ms": 30.5, "decode_ms": 7.25}, *map(json.loads, AIPERF.read_text().splitlines()[3:6])]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(runs(path, tmp_path)) == 4
    with pytest.raises(ConfigError, match="a file of AIPerf has a unit of its own"):
        build({**CONFIG, "time_unit": "s"}, runs=path, output=tmp_path / "x.duckdb")


# vLLM


def sound_vllm(**columns: Sequence[object]) -> dict[str, Any]:
    """A result of one request that took 20 ms and three steps; columns replace its own."""
    result = {
        "date": "20260101-000000",
        "endpoint_type": "openai",
        "model_id": "mock-moe",
        "tier": "low",
        "top_k": "8",
        "completed": 1,
        "request_throughput": 1.0,
        "total_output_tokens": 4,
    }
    lists = {"input_lens": [50], "output_lens": [4], "ttfts": [0.02], "itls": [[0.005, 0.006, 0.007]], "errors": [""]}
    return {**result, **lists, **columns}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, (4, 20.0, 18.0, [5.0, 6.0, 7.0])),
        ({"output_lens": [7]}, (7, 20.0, 18.0, None)),  # several tokens a chunk
        ({"output_lens": [3]}, (3, 20.0, 18.0, None)),  # a closing chunk without a token
        ({"output_lens": [1], "itls": [[0.005]]}, (1, 20.0, 0.0, None)),
        ({"output_lens": [1], "itls": [[]]}, (1, 20.0, 0.0, None)),
        ({"itls": [[0.00001, 0.006, 0.007]]}, (4, 20.0, 13.01, None)),  # two chunks read at once
        ({"itls": [[0.0, 0.006, 0.007]]}, (4, 20.0, 13.0, None)),
    ],
)
def test_vllm_chunks(tmp_path: Path, columns: dict[str, Any], expected: tuple[Any, ...]) -> None:
    [run] = runs(write(tmp_path / "a.json", sound_vllm(**columns)), tmp_path)
    assert run[:3] == pytest.approx(expected[:3])
    assert run[3] == (None if expected[3] is None else pytest.approx(expected[3]))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"errors": ["Traceback:\n  in x\nValueError: no\n"]}, "the request failed: ValueError: no"),
        ({"errors": ["a\0b\ud800"]}, "the request failed: a?b?"),
        ({"errors": [{"a": 1}]}, "the request failed: {'a': 1}"),
        ({"ttfts": [0.0], "itls": [[]], "output_lens": [0]}, "no time to first token: the request failed, or its"),
        ({"ttfts": [0.0], "itls": [[]]}, "no time to first token: the request failed, or its answer was not streamed"),
        ({"itls": [[]]}, "all 4 tokens came at once"),
        ({"itls": [[0.0, 0.0, 0.0]]}, "all 4 tokens came at once"),
        ({"itls": [[0.1, -0.05, 0.1]]}, "a gap between chunks is below 0: -50 ms"),
        ({"itls": [[0.1, None]]}, "no element 2 of itls"),
        ({"itls": [["x"]]}, "element 1 of itls is 'x', not a number"),
        ({"itls": [7]}, "itls is 7, not a list of numbers"),
        ({"ttfts": ["x"]}, "ttfts is 'x', not a number"),
        ({"ttfts": [True]}, "ttfts is True, not a number"),
        ({"ttfts": [0.02, 0.03]}, "lists of different lengths: errors 1, input_lens 1, itls 1, output_lens 1, ttfts 2"),
        ({"errors": ["", ""]}, "lists of different lengths: errors 2"),
        ({"itls": 7}, "itls is 7, not a list"),
    ],
)  # fmt: skip
def test_vllm_requests_that_are_no_runs(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    [problem] = problems(write(tmp_path / "a.json", sound_vllm(**columns)), tmp_path)
    assert problem.startswith(expected)


def test_vllm_token_counts_are_judged_as_in_any_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", sound_vllm(output_lens=["x"], input_lens=[None]))
    with pytest.raises(BuildError, match=r"missing_value.*no prompt_tokens"):
        build({"columns": KEY}, runs=path, output=tmp_path / "x.duckdb")


def test_vllm_without_details(tmp_path: Path) -> None:
    lists = ("input_lens", "output_lens", "ttfts", "itls", "errors")
    summary = {name: value for name, value in sound_vllm().items() if name not in lists}
    [problem] = problems(write(tmp_path / "a.json", summary), tmp_path)
    assert problem.endswith("save it with --save-result --save-detailed")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_vllm_results_appended_to_one_file(tmp_path: Path, name: str) -> None:
    first, second = sound_vllm(), sound_vllm(ttfts=[0.03], itls=[[0.004, 0.005, 0.006]])
    path = tmp_path / name
    path.write_text(json.dumps(first) + "\n" + json.dumps(second))
    assert [run[1] for run in runs(path, tmp_path)] == pytest.approx([20.0, 30.0])


def test_sglang_spreads_chunks_so_that_gaps_are_no_steps(tmp_path: Path) -> None:
    result = sound_vllm()
    del result["endpoint_type"]
    assert runs(write(tmp_path / "a.jsonl", result), tmp_path)[0][3] is None


def test_vllm_file_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "MAX_BYTES", 1000)
    with pytest.raises(SourceError, match=r"vllm-bench-serve.json: 0.0 GiB of vLLM's columns"):
        build(CONFIG, runs=VLLM, output=tmp_path / "x.duckdb")


# AIPerf


def sound_aiperf(**metrics: object) -> dict[str, Any]:
    """A record of 20 ms and three steps, 18 ms; metrics replace its own, None takes one away."""
    values: dict[str, object] = {
        "input_sequence_length": {"value": 50, "unit": "tokens"},
        "output_sequence_length": {"value": 4, "unit": "tokens"},
        "time_to_first_token": {"value": 20.0, "unit": "ms"},
        "request_latency": {"value": 38.0, "unit": "ms"},
        "inter_chunk_latency": {"value": [5.0, 6.0, 7.0], "unit": "ms"},
        **metrics,
    }
    return {
        "metadata": {"x_request_id": "one", "benchmark_phase": "profiling"},
        "metrics": {name: value for name, value in values.items() if value is not None},
        "error": None,
    }


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, (4, 20.0, 18.0, [5.0, 6.0, 7.0])),
        ({"inter_chunk_latency": None}, (4, 20.0, 18.0, None)),
        ({"output_sequence_length": {"value": 6}}, (6, 20.0, 18.0, None)),
        ({"usage_completion_tokens": {"value": 7}}, (7, 20.0, 18.0, None)),  # the server knows better
        ({"time_to_first_token": {"value": 0.02, "unit": "sec"}}, (4, 20.0, 18.0, [5.0, 6.0, 7.0])),
        ({"request_latency": {"value": 38_000_000, "unit": "ns"}}, (4, 20.0, 18.0, [5.0, 6.0, 7.0])),
        ({"ttft": {"value": 20.0, "unit": "ms"}, "time_to_first_token": None}, (4, 20.0, 18.0, [5.0, 6.0, 7.0])),
        ({"inter_chunk_latency": {"value": [0.0, 11.0, 7.0], "unit": "ms"}}, (4, 20.0, 18.0, None)),
    ],
)
def test_aiperf_metrics(tmp_path: Path, metrics: dict[str, Any], expected: tuple[Any, ...]) -> None:
    [run] = runs(write(tmp_path / "a.jsonl", sound_aiperf(**metrics)), tmp_path)
    assert run[:3] == pytest.approx(expected[:3])
    assert run[3] == (None if expected[3] is None else pytest.approx(expected[3]))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (sound_aiperf(time_to_first_token=None), "no time_to_first_token: the answer was not streamed"),
        (sound_aiperf(request_latency={"value": 20.0, "unit": "ms"}), "all 4 tokens came at once"),
        (sound_aiperf(request_latency={"value": 20.0, "unit": "parsec"}), "request_latency is in 'parsec', not one of"),
        (sound_aiperf(request_latency=None), "no request_latency"),
        (sound_aiperf(request_latency={"value": [], "unit": "ms"}), "request_latency is [], not a number"),
        (sound_aiperf(inter_chunk_latency={"value": 5, "unit": "ms"}), "inter_chunk_latency is 5, not a list"),
        ({**sound_aiperf(), "error": {"code": 499, "message": "cancelled"}}, "the request failed: cancelled"),
        ({**sound_aiperf(), "metadata": {"credit_phase": "warmup"}}, "a warm-up request"),
    ],
)  # fmt: skip
def test_aiperf_requests_that_are_no_runs(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    [problem] = problems(write(tmp_path / "a.jsonl", record), tmp_path)
    assert problem.startswith(expected)


def test_aiperf_summary_tells_where_the_requests_are(tmp_path: Path) -> None:
    summary = {"schema_version": "1", "aiperf_version": "0.13.0", "request_latency": {"p50": 1.0, "unit": "ms"}}
    assert "profile_export.jsonl" in problems(write(tmp_path / "profile_export_aiperf.json", summary), tmp_path)[0]


# GenAI-Perf: the layout that its own reader of profile_export.json takes, for it is no longer to be had as a whole


def chunk(text: str | None, usage: dict[str, int] | None = None, kind: str = "chat.completion.chunk") -> str:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return "data: " + json.dumps({"object": kind, "model": "mock-moe", "choices": choices, "usage": usage}) + "\n\n"


USAGE = {"prompt_tokens": 50, "completion_tokens": 4}


def genai_perf(*requests: object) -> dict[str, Any]:
    experiment = {"experiment": {"mode": "concurrency", "value": 1}, "requests": requests, "window_boundaries": []}
    return {"service_kind": "openai", "endpoint": "v1/chat/completions", "experiments": [experiment]}


def genai_perf_request(responses: Sequence[object], moments_ms: Sequence[float]) -> dict[str, Any]:
    return {
        "timestamp": 1_000_000_000,
        "request_inputs": {"payload": '{"messages": []}'},
        "response_timestamps": [1_000_000_000 + round(moment * 1e6) for moment in moments_ms],
        "response_outputs": [{"response": response} for response in responses],
    }


CHUNKS = [chunk(""), *map(chunk, "abcd"), chunk(None, USAGE), "data: [DONE]\n\n"]
MOMENTS_MS = [19, 20, 25, 31, 38, 40, 41]


def test_genai_perf_chunks(tmp_path: Path) -> None:
    one_token_each = genai_perf_request(CHUNKS, MOMENTS_MS)
    together = genai_perf_request(
        [chunk("a"), chunk("b") + chunk("c"), chunk("d"), chunk(None, USAGE)], [21, 30, 39, 40]
    )
    identifiers = {
        "timestamp": 0,
        "request_inputs": {"input_ids": [1, 2, 3]},
        "response_timestamps": [22e6, 27e6, 40e6],
        "response_outputs": [{"output_ids": [5]}, {"output_ids": 6}, {"output_ids": [7, 8]}],
    }
    converted = runs(write(tmp_path / "a.json", genai_perf(one_token_each, together, identifiers)), tmp_path)
    assert [run[:3] for run in converted] == [
        pytest.approx((4, 20.0, 18.0)),
        pytest.approx((4, 21.0, 18.0)),
        pytest.approx((4, 22.0, 18.0)),
    ]
    assert [run[3] for run in converted] == [pytest.approx([5.0, 6.0, 7.0]), None, None]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (genai_perf_request([chunk("a"), chunk("b")], [20, 25]), "no token counts: the responses hold no `usage`"),
        (genai_perf_request([], []), "the request failed: no response with content"),
        (genai_perf_request(["data: [DONE]"], [20]), "the request failed: no response with content"),
        (genai_perf_request(['data: {"object": "chat.com'], [20]), "a response is cut off"),
        (genai_perf_request([chunk("a", USAGE, "chat.completion")], [20]), "no time to first token: the answer was"),
        (genai_perf_request([chunk("abcd", USAGE)], [20]), "all 4 tokens came at once"),
        ({**genai_perf_request(CHUNKS, MOMENTS_MS), "timestamp": None}, "no timestamp"),
        ({**genai_perf_request(CHUNKS, MOMENTS_MS), "response_outputs": []}, "response_outputs is not a list with an"),
        (7, "the request is 7, not an object"),
    ],
)  # fmt: skip
def test_genai_perf_requests_that_are_no_runs(tmp_path: Path, request_: object, expected: str) -> None:
    [problem] = problems(write(tmp_path / "a.json", genai_perf(request_)), tmp_path)
    assert problem.startswith(expected)


def test_genai_perf_quantiles_are_those_by_hand(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    moments_ms = [np.cumsum(generator.uniform(5, 9, len(CHUNKS))) for _ in range(40)]
    requests = [genai_perf_request(CHUNKS, moments.tolist()) for moments in moments_ms]
    summary = build(CONFIG, runs=write(tmp_path / "a.json", genai_perf(*requests)), output=tmp_path / "x.duckdb")
    prefill = query(summary.output, "SELECT p50_ms, p95_ms FROM prefill")[0]
    decode = query(summary.output, "SELECT p50_ms, p95_ms FROM decode")[0]
    assert prefill == pytest.approx(np.quantile([moments[1] for moments in moments_ms], [0.5, 0.95]), abs=1e-5)
    steps = [np.diff(moments[1:5]) for moments in moments_ms]
    assert decode == pytest.approx(np.quantile(steps, [0.5, 0.95]), abs=1e-5)


# GuideLLM


def guidellm(status: str = "successful", **changes: object) -> dict[str, Any]:
    request = {
        "request_id": "one",
        "info": {
            "error": "HTTPStatusError('503')",
            "timings": {"first_token_iteration": 100.02, "last_token_iteration": 100.038},
        },
        "request_latency": 0.04,
        "prompt_tokens": 50,
        "output_tokens": 4,
        "time_to_first_token_ms": 20.0,
        "inter_token_latency_ms": 6.0,
        "time_per_output_token_ms": 9.5,
        **changes,
    }
    requests: dict[str, Any] = {"successful": [], "errored": [], "incomplete": None, status: [request], "total": None}
    return {"metadata": {"version": 2}, "benchmarks": [{"type_": "generative_benchmark", "requests": requests}]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (4, 20.0, 18.0)),
        ({"info": {}}, (4, 20.0, 20.0)),  # the latency of the request is all there is
        ({"info": {"timings": {"first_iteration": 7.0, "last_iteration": 7.017}}}, (4, 20.0, 17.0)),
        ({"info": {}, "first_token_time": 7.0, "last_token_time": 7.016}, (4, 20.0, 16.0)),
        ({"output_tokens": 1, "info": {}}, (1, 20.0, 0.0)),
    ],
)
def test_guidellm_timestamps(tmp_path: Path, changes: dict[str, Any], expected: tuple[float, ...]) -> None:
    [run] = runs(write(tmp_path / "a.json", guidellm(**changes)), tmp_path)
    assert run[:3] == pytest.approx(expected)
    assert run[3] is None


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (guidellm(time_to_first_token_ms=None), "no time_to_first_token_ms: the answer was not streamed"),
        (guidellm("errored"), "the request failed: HTTPStatusError('503')"),
        (guidellm("incomplete"), "the request was not complete when the benchmark ended"),
        (guidellm(info={}, request_latency=None), "no request_latency"),
        (guidellm(info={}, request_latency=0.02), "all 4 tokens came at once"),
    ],
)
def test_guidellm_requests_that_are_no_runs(tmp_path: Path, report: dict[str, Any], expected: str) -> None:
    [problem] = problems(write(tmp_path / "a.json", report), tmp_path)
    assert problem.startswith(expected)


def test_runs_of_the_profiler_may_have_any_header(tmp_path: Path) -> None:
    run = {"prompt_tokens": 40, "output_tokens": 2, "prefill_ms": 30.5, "decode_ms": 7.25}
    headers: list[dict[str, object]] = [
        {"benchmarks": ["x"]},
        {"experiments": [{"requests": 7}]},
        {"completed": 1},
        {"ttfts": []},
    ]
    for header in headers:
        path = write(tmp_path / "a.json", {**header, "per_sample_results": [run, run]})
        assert len(runs(path, tmp_path)) == 2
