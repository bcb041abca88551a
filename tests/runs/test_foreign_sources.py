"""Files of load generators: the same figures as by hand, and a reason for every request that is no run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

import lutest
from lutest.builder.build import build
from lutest.judging.diagnose import diagnose
from lutest.reader.errors import ConfigError, SourceError
from lutest.runs.configuration import parse_config
from lutest.runs.convert import convert
from lutest.runs.sources import vllm
from lutest.runs.work import read_runs, work_database

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


def read(*sources: Path, config: dict[str, Any] | None = None, columns: str) -> list[tuple[Any, ...]]:
    """Columns of runs, in the order of the files."""
    with work_database() as connection:
        read_runs(connection, sources, parse_config(CONFIG if config is None else config), Path())
        return connection.execute(f'SELECT {columns} FROM runs ORDER BY source_id, "row"').fetchall()


def runs(source: Path, config: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """Output tokens, prefill, decode and steps of sound runs."""
    columns = "output_tokens, prefill_ms, decode_ms, decode_steps_ms, reason IS NULL"
    return [run[:-1] for run in read(source, config=config, columns=columns) if run[-1]]


def problems(source: Path) -> list[str]:
    """Why requests are no runs."""
    rejected = [run for run in read(source, columns="reason, detail") if run[0]]
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


TIERS = {"low": VLLM, "medium": AIPERF, "high": GUIDELLM}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the three files, converted one by one."""
    folder = tmp_path_factory.mktemp("converted")
    converted = []
    for tier, path in TIERS.items():
        columns = {**KEY, "tier": {"constant": tier}}
        summary = convert(path, folder / f"{path.stem}.parquet", config={"columns": columns})
        converted.append(summary.output)
    return build({"cleaning": {"outliers": "none"}}, runs=converted, output=folder / "x.duckdb").output


@pytest.mark.parametrize(
    ("tier", "by_hand", "n_rejected"),
    [("low", vllm_by_hand, 3), ("medium", aiperf_by_hand, 6), ("high", guidellm_by_hand, 2)],
    ids=["vLLM", "AIPerf", "GuideLLM"],
)
def test_figures_are_those_by_hand(
    table: Path, tier: str, by_hand: Callable[[], list[Request]], n_rejected: int
) -> None:
    requests = by_hand()
    [accounts] = query(table, f"SELECT rows_used, rows_rejected FROM sources WHERE path LIKE '%{TIERS[tier].stem}%'")
    assert accounts == (len(requests), n_rejected)
    [(n, *quantiles)] = query(table, f"SELECT n, p50_ms, p95_ms FROM prefill WHERE tier = '{tier}'")
    assert n == len(requests)
    assert quantiles == pytest.approx(np.quantile([request[2] for request in requests], [0.5, 0.95]), rel=1e-12)
    steps = [step for request in requests for step in request[4]]
    [(n_steps, mean, *quantiles)] = query(
        table, f"SELECT n_steps, mean_ms, p50_ms, p95_ms FROM decode WHERE tier = '{tier}'"
    )
    assert n_steps == sum(request[1] - 1 for request in requests)
    if steps:
        assert quantiles == pytest.approx(np.quantile(steps, [0.5, 0.95]), rel=1e-12)
    else:
        assert mean == pytest.approx(sum(request[3] for request in requests) / n_steps, rel=1e-6)
    # every run, to the last figure
    expected = sorted((request[1:] for request in requests), key=lambda request: request[1])
    found = sorted(runs(TIERS[tier]), key=lambda run: run[1])
    assert [run[0] for run in found] == [run[0] for run in expected]
    for place in (1, 2):
        assert [run[place] for run in found] == pytest.approx([run[place] for run in expected], rel=1e-6)
    assert [run[3] or [] for run in found] == [pytest.approx(run[3], rel=1e-12) for run in expected]


def test_the_table_knows_the_lengths_and_the_model(table: Path) -> None:
    lengths = query(table, "SELECT output_tokens, sum(n)::INTEGER FROM output_length GROUP BY ALL ORDER BY 1")
    requests = [*vllm_by_hand(), *aiperf_by_hand(), *guidellm_by_hand()]
    assert lengths == [tuple(pair) for pair in np.transpose(np.unique([r[1] for r in requests], return_counts=True))]
    assert query(table, "SELECT value FROM meta WHERE key = 'model'") == [('["mock-moe"]',)]


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
    expected = f"{path.name}: a file of {tool}: no request has {missing}: the fields are "
    for attempt in (
        lambda: build(runs=path, output=tmp_path / "x.duckdb"),
        lambda: convert(path, tmp_path / "x.parquet"),
        lambda: diagnose(path),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert expected in str(caught.value)
        assert f"`--set columns.{missing.split(',')[0]}.constant=VALUE`" in str(caught.value)


def test_the_file_says_its_key(tmp_path: Path) -> None:
    key = "tier, top_k, num_blocks"
    for path in (VLLM, GUIDELLM):
        config = {"columns": {"num_blocks": {"constant": 12}}}
        assert set(read(path, config=config, columns=f"{key}, reason IS NULL")) >= {("low", 8, 12, True)}
    own = write(tmp_path / "own.json", {**sound_vllm(), "my_tier": "high", "top_k": "4", "num_blocks": "16"})
    assert read(own, config={"columns": {"tier": "my_tier"}}, columns=key) == [("high", 4, 16)]


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_another_time_unit_would_convert_twice(unit: str) -> None:
    with pytest.raises(ConfigError, match=rf"aiperf.*a file of AIPerf has a unit of its own.*time_unit: {unit}"):
        runs(AIPERF, {**CONFIG, "time_unit": unit})


@pytest.mark.parametrize(
    ("name", "rule", "shown"),
    [("prefill_ms", ["a", "b"], "a + b"), ("decode_steps_ms", "gaps", "gaps"), ("prompt_tokens", "isl", "isl")],
)
def test_another_field_would_be_empty(name: str, rule: object, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        runs(VLLM, {"columns": {**KEY, name: rule}})
    assert f"has no field {shown}: leave out `columns.{name}`" in str(caught.value)


def test_beside_runs_of_ones_own(tmp_path: Path) -> None:
    own = {"tier": "low", "top_k": 8, "num_blocks": 16, "prompt_tokens": 40, "output_tokens": 2}
    lines = [{**own, "prefill_ms": 30.5, "decode_ms": 7.25}, *map(json.loads, AIPERF.read_text().splitlines()[3:6])]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(runs(path)) == 4
    with pytest.raises(ConfigError, match="a file of AIPerf has a unit of its own"):
        runs(path, {**CONFIG, "time_unit": "s"})


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
    [run] = runs(write(tmp_path / "a.json", sound_vllm(**columns)))
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
    [problem] = problems(write(tmp_path / "a.json", sound_vllm(**columns)))
    assert problem.startswith(expected)


def test_vllm_token_counts_are_judged_as_in_any_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", sound_vllm(output_lens=["x"]))
    assert read(path, columns="reason, detail") == [("not_a_number", "output_tokens is x, not a number")]


def test_vllm_without_details(tmp_path: Path) -> None:
    lists = ("input_lens", "output_lens", "ttfts", "itls", "errors")
    summary = {name: value for name, value in sound_vllm().items() if name not in lists}
    [problem] = problems(write(tmp_path / "a.json", summary))
    assert problem.endswith("save it with --save-result --save-detailed")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_vllm_results_appended_to_one_file(tmp_path: Path, name: str) -> None:
    first, second = sound_vllm(), sound_vllm(ttfts=[0.03], itls=[[0.004, 0.005, 0.006]])
    path = tmp_path / name
    path.write_text(json.dumps(first) + "\n" + json.dumps(second))
    assert [run[1] for run in runs(path)] == pytest.approx([20.0, 30.0])


def test_sglang_spreads_chunks_so_that_gaps_are_no_steps(tmp_path: Path) -> None:
    result = sound_vllm()
    del result["endpoint_type"]
    assert runs(write(tmp_path / "a.jsonl", result))[0][3] is None


def test_vllm_file_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "MAX_BYTES", 1000)
    with pytest.raises(SourceError, match=r"vllm-bench-serve.json: 0.0 GiB of vLLM's columns"):
        runs(VLLM)


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
    [run] = runs(write(tmp_path / "a.jsonl", sound_aiperf(**metrics)))
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
    [problem] = problems(write(tmp_path / "a.jsonl", record))
    assert problem.startswith(expected)


def test_aiperf_summary_tells_where_the_requests_are(tmp_path: Path) -> None:
    summary = {"schema_version": "1", "aiperf_version": "0.13.0", "request_latency": {"p50": 1.0, "unit": "ms"}}
    assert "profile_export.jsonl" in problems(write(tmp_path / "profile_export_aiperf.json", summary))[0]


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
    converted = runs(write(tmp_path / "a.json", genai_perf(one_token_each, together, identifiers)))
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
    [problem] = problems(write(tmp_path / "a.json", genai_perf(request_)))
    assert problem.startswith(expected)


def test_genai_perf_times_are_those_by_hand(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    moments_ms = [np.cumsum(generator.uniform(5, 9, len(CHUNKS))) for _ in range(40)]
    requests = [genai_perf_request(CHUNKS, moments.tolist()) for moments in moments_ms]
    found = runs(write(tmp_path / "a.json", genai_perf(*requests)))
    assert [run[1] for run in found] == pytest.approx([moments[1] for moments in moments_ms], abs=1e-5)
    assert [run[3] for run in found] == [pytest.approx(np.diff(moments[1:5]), abs=1e-5) for moments in moments_ms]


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
    [run] = runs(write(tmp_path / "a.json", guidellm(**changes)))
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
    [problem] = problems(write(tmp_path / "a.json", report))
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
        assert len(runs(path)) == 2


# LLMPerf


def llmperf(output_tokens: int = 4, ttft_s: float = 0.02, step_s: float = 0.006, **changes: object) -> dict[str, Any]:
    """A response as LLMPerf writes it, whose inter-token latency is the whole latency over n."""
    latency_s = ttft_s + step_s * (output_tokens - 1)
    response = {
        "error_code": None,
        "error_msg": "",
        "inter_token_latency_s": latency_s / output_tokens,
        "ttft_s": ttft_s,
        "end_to_end_latency_s": latency_s,
        "request_output_throughput_token_per_s": output_tokens / latency_s,
        "number_total_tokens": 50 + output_tokens,
        "number_output_tokens": output_tokens,
        "number_input_tokens": 50,
    }
    return {**response, **changes}


def test_llmperf_steps_are_what_lies_after_the_first_token(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 60, 200).tolist()
    responses = [llmperf(n, ttft, 0.01) for n, ttft in zip(lengths, generator.uniform(0.1, 0.4, 200), strict=True)]
    path = write(tmp_path / "a.json", responses)
    per_step = [decode / (n - 1) for n, _, decode, _ in runs(path) if n > 1]
    assert len(runs(path)) == 200
    assert per_step == pytest.approx([10.0] * len(per_step))
    own = [response["inter_token_latency_s"] * 1e3 for response in responses if response["number_output_tokens"] > 1]
    assert np.median(own) > 15
    table = lutest.load(build(CONFIG, runs=path, output=tmp_path / "x.duckdb").output)
    assert table["low", 8, 16].decode_step_p50_ms == pytest.approx(10.0, rel=1e-6)
    assert set(read(path, columns="one_pass = (output_tokens > 1)")) == {(True,)}


def test_equal_responses_of_llmperf_are_told_apart_by_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [llmperf(ttft_s=0.1234567)] * 3)
    assert read(path, columns="sample_id") == [("0",), ("1",), ("2",)]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (llmperf(error_code=429, error_msg="Too\nMany Requests"), "the request failed: Many Requests"),
        (llmperf(error_code=-1), "the request failed: error -1"),
        (llmperf(ttft_s=0), "no time to first token: the answer was empty, or not streamed"),
        (llmperf(ttft_s=0.02, end_to_end_latency_s=0.02), "all 4 tokens came at once"),
        (llmperf(end_to_end_latency_s=None), "no end_to_end_latency_s"),
        ({**llmperf(), "ttft_s": "x"}, "ttft_s is 'x', not a number"),
        ([1], "the request is [1], not an object"),
    ],
)
def test_llmperf_requests_that_are_no_runs(tmp_path: Path, response: object, expected: str) -> None:
    path = write(tmp_path / "a.json", [llmperf(), response])
    assert len(runs(path)) == 1
    assert problems(path)[0].startswith(expected)


# what a tool knows of the load


def sweep(*strategies: dict[str, Any], place: str = "config") -> dict[str, Any]:
    """A report of GuideLLM of several benchmarks, the i-th with i + 2 requests."""
    benchmarks = []
    for number, strategy in enumerate(strategies):
        [request] = guidellm()["benchmarks"][0]["requests"]["successful"]
        requests = [
            {**request, "request_id": f"{number}-{i}", "time_to_first_token_ms": 20.0 + i} for i in range(number + 2)
        ]
        state = {"start_requests_time": 10.0, "end_requests_time": 13.0, "successful_requests": number + 2}
        benchmarks.append(
            {place: {"strategy": strategy}, "scheduler_state": state, "requests": {"successful": requests}}
        )
    return {"benchmarks": benchmarks}


def test_a_sweep_of_guidellm_has_a_key_for_each_rate(tmp_path: Path) -> None:
    strategies = (
        {"type_": "synchronous", "max_concurrency": 1},
        {"type_": "throughput", "max_concurrency": 512},
        {"type_": "constant", "rate": 1.5},
        {"type_": "constant", "rate": 2.25},
        {"type_": "concurrent", "streams": 4},
    )
    summary = build(
        {"key": ["strategy", "rate"]},
        runs=write(tmp_path / "a.json", sweep(*strategies)),
        output=tmp_path / "x.duckdb",
    )
    expected = [
        ("concurrent", 2.0, 6),  # as achieved: 6 requests in 3 s
        ("constant", 1.5, 4),
        ("constant", 2.25, 5),
        ("synchronous", 0.667, 2),
        ("throughput", 1.0, 3),
    ]
    assert query(summary.output, "SELECT strategy, rate, n FROM prefill ORDER BY ALL") == expected
    early = write(tmp_path / "b.json", sweep(*strategies, place="args"))
    assert read(early, config={"key": ["strategy", "concurrency"]}, columns="concurrency")[-1] == (4,)


def test_load_of_vllm(tmp_path: Path) -> None:
    load = {"request_rate": "inf", "burstiness": 1.0, "max_concurrency": 8, "request_throughput": 13.6543}
    path = write(tmp_path / "a.json", {**sound_vllm(), **load})
    config = {"key": ["strategy", "rate", "concurrency", "request_rate", "max_concurrency"]}
    names = ", ".join(config["key"])
    assert read(path, config=config, columns=names) == [("throughput", 13.7, 8, "inf", 8)]
    for burstiness, strategy in ((1.0, "poisson"), (0.5, "gamma")):
        write(path, {**sound_vllm(), **load, "request_rate": 2.5, "burstiness": burstiness})
        assert read(path, config=config, columns=names) == [(strategy, 2.5, 8, 2.5, 8)]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ({"phases": [{"name": "warmup", "type": "concurrency"}, {"name": "profiling", "type": "poisson", "rate": 2.5,
          "concurrency": 8}]}, ("poisson", 2.5, 8)),
        ({"phases": [{"name": "profiling", "type": "concurrency", "concurrency": 8}]}, ("concurrency", 13.7, 8)),
        ({"loadgen": {"request_rate": 2.5, "request_rate_mode": "constant"}}, ("constant", 2.5, None)),
    ],
)  # fmt: skip
def test_load_of_aiperf_is_in_the_summary_beside(
    tmp_path: Path, load: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    path = write(tmp_path / "profile_export.jsonl", sound_aiperf())
    config = {"key": ["strategy", "rate"], "columns": {"accuracy": "concurrency"}}
    with pytest.raises(ConfigError, match="no request has strategy, rate"):
        read(path, config=config, columns="strategy")
    summary = {"aiperf_version": "0.13.0", "input_config": load, "request_throughput": {"avg": 13.6543}}
    write(tmp_path / "profile_export_aiperf.json", summary)
    assert read(path, config=config, columns="strategy, rate, accuracy") == [expected]
    (tmp_path / "profile_export_aiperf.json").write_text("[1")
    with pytest.raises(ConfigError, match="no request has strategy, rate"):
        read(path, config=config, columns="strategy")
