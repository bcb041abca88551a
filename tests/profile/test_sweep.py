"""The model with random weights, and the sweep over it."""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pytest

from lutest.builder.build import build
from lutest.cli.main import main
from lutest.profile.machine import make_clock
from lutest.profile.presets import PRESETS
from lutest.profile.recorder import Recorder, interleave, measure_step_overhead
from lutest.profile.sweep import run_sweep
from lutest.reader.errors import ArgumentError

torch = pytest.importorskip("torch", reason="the presets are torch models: pip install 'lutest[profile]'")

PROJECT = Path(__file__).parents[2]
TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def model() -> Any:
    from lutest.profile.model import Model

    torch.set_num_threads(1)
    return Model(TINY)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Runs that the shards of a folder hold."""
    with duckdb.connect() as connection:
        cursor = connection.execute("SELECT * FROM read_parquet(?)", [str(folder / "*.parquet")])
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def requested(model: Any, *, top_k: int = 2, num_blocks: int = 2) -> tuple[Any, Any, Any]:
    """A request that was started, with its image features and text tokens: always the same."""
    chance = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, TINY.vision.image_size, TINY.vision.image_size, generator=chance)
    text = torch.randint(TINY.decoder.vocabulary, (5,), generator=chance)
    generation = model.start(top_k, num_blocks, 60, torch.Generator().manual_seed(4))
    return generation, model.vision_tower.embed(pixels), text


# The model


def test_a_decode_step_gives_what_a_prefill_of_all_tokens_would(model: Any) -> None:
    generation, features, text = requested(model)
    tokens = [int(model.prefill(generation, features, text))]
    for _ in range(8):
        tokens.append(int(model.decode(generation, torch.tensor(tokens[-1:]))))
    chance = torch.Generator().manual_seed(4)
    for known in range(9):
        generation, _, _ = requested(model)
        generation.chance = chance  # draws on as it did
        token = model.prefill(generation, features, torch.cat([text, torch.tensor(tokens[:known], dtype=torch.long)]))
        assert int(token) == tokens[known]
    assert len(set(tokens)) > 3  # else the same experts would serve every step


def test_the_cache_holds_vision_and_text_tokens(model: Any) -> None:
    generation, features, text = requested(model)
    token = model.prefill(generation, features, text)
    assert generation.length == 2 * TINY.vision.tokens_per_crop + 5
    model.decode(generation, token)
    assert generation.length == 2 * TINY.vision.tokens_per_crop + 6
    assert generation.keys.shape[0] == 2


def test_an_expert_mixture_is_the_weighted_sum_of_the_chosen_experts(model: Any) -> None:
    block = model._blocks[0]
    x = torch.randn(7, TINY.decoder.hidden, generator=torch.Generator().manual_seed(1))
    for top_k in (1, 2, TINY.decoder.experts):
        shares = (x @ block._router).softmax(dim=-1)
        least = shares.topk(top_k).values[:, -1:]
        gate, up = torch.einsum("th,ehw->etw", x, block._gate_up).chunk(2, dim=-1)
        all_experts = torch.einsum("etw,ewh->eth", torch.nn.functional.silu(gate) * up, block._down)
        expected = torch.einsum("te,eth->th", shares * (shares >= least), all_experts)
        torch.testing.assert_close(block._mix(x, top_k), expected)
        torch.testing.assert_close(block._mix(x[:1], top_k), expected[:1])


def test_early_exit_leaves_the_later_blocks_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the second block was called")

    monkeypatch.setattr(model._blocks[1], "forward", refuse)
    generation, features, text = requested(model, num_blocks=1)
    model.prefill(generation, features, text)
    generation, features, text = requested(model, num_blocks=2)
    with pytest.raises(AssertionError, match="second block"):
        model.prefill(generation, features, text)


def test_molmoe_has_the_published_shape_and_takes_no_memory_until_it_is_asked_for() -> None:
    from lutest.profile.model import Model

    preset = PRESETS["molmoe-1b"]
    assert preset.vision.tokens_per_crop == 144
    assert preset.crops == {"low": (1, 3), "medium": (4, 8), "high": (9, 15)}
    decoder = preset.decoder
    assert (decoder.blocks, decoder.experts, decoder.hidden) == (16, 64, 2048)
    assert (decoder.head_dim, decoder.expert_width) == (128, 1024)
    total = Model(preset, device="meta").n_parameters
    idle = decoder.blocks * (decoder.experts - 8) * 3 * decoder.hidden * decoder.expert_width
    assert total == pytest.approx(7.2e9, rel=0.03)
    assert 1.0e9 < total - idle < 1.7e9


# The recorder on it


def test_stages_add_up_to_the_wall_clock(model: Any, tmp_path: Path) -> None:
    unaccounted = []
    with Recorder(tmp_path, model="tiny") as recorder:
        for _ in range(60):
            generation, features, text = requested(model)
            pixels = torch.randn(2, 3, TINY.vision.image_size, TINY.vision.image_size)
            with recorder.run(("low", 2, 2), prompt_tokens=13) as run:
                started = time.perf_counter()
                with run.vision():
                    features = model.vision_tower.embed(pixels)
                with run.prefill():
                    token = model.prefill(generation, features, text)
                for _ in range(6):
                    with run.step():
                        token = model.decode(generation, token)
                wall_ms = 1e3 * (time.perf_counter() - started)
            assert run.times is not None
            stages_ms = run.times.prefill_ms + sum(run.times.decode_steps_ms)
            assert stages_ms <= run.times.total_ms <= wall_ms
            unaccounted.append(1 - stages_ms / wall_ms)
    # the median: on a machine that does other things too, a run may be put aside between two stages
    assert statistics.median(unaccounted) < 0.02


def test_the_overhead_is_less_than_a_hundredth_of_a_step() -> None:
    from lutest.profile.model import Model

    torch.set_num_threads(1)
    preset = PRESETS["cpu"]
    model = Model(preset)
    generation = model.start(preset.top_k[0], preset.num_blocks[0], 100, torch.Generator().manual_seed(1))
    features = torch.randn(1, preset.vision.patches_per_side**2 + 1, preset.vision.width)
    token = model.prefill(generation, features, torch.tensor([1, 2, 3]))
    steps_ms = []
    for _ in range(30):
        started = time.perf_counter()
        token = model.decode(generation, token)
        steps_ms.append(1e3 * (time.perf_counter() - started))
    overhead_ms = measure_step_overhead(make_clock("none")) / 1e3
    assert overhead_ms < 0.01 * min(steps_ms)  # the cheapest configuration, its fastest step: the hardest case


# The sweep


def test_a_sweep_is_runs_of_every_configuration(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = run_sweep(tmp_path / "runs", "tiny", runs_per_key=6, progress=lambda *done: seen.append(done))
    assert (summary.n_keys, summary.n_recorded, summary.n_missing, summary.n_warmup) == (12, 72, 0, 12)
    assert seen == [(n, 72) for n in range(1, 73)]
    rows = rows_of(tmp_path / "runs")
    keys = Counter((row["tier"], row["top_k"], row["num_blocks"]) for row in rows)
    assert keys == Counter(
        {(tier, k, b): 6 for tier in ("low", "medium", "high") for k in TINY.top_k for b in TINY.num_blocks}
    )
    for row in rows:
        least, most = TINY.crops[row["tier"]]
        assert least + 1 <= row["vision_tokens"] / TINY.vision.tokens_per_crop <= most + 1
        assert TINY.text_tokens[0] <= row["text_tokens"] <= TINY.text_tokens[1]
        assert row["prompt_tokens"] == row["vision_tokens"] + row["text_tokens"]
        assert row["output_tokens"] in TINY.output_lengths
        assert len(row["decode_steps_ms"]) == row["output_tokens"] - 1
        assert row["ends_with_eos"] == (row["output_tokens"] < max(TINY.output_lengths))
        assert "1 thread" in row["device"]
        assert 0 < row["vision_ms"] < row["prefill_ms"] < row["total_ms"]
    assert {row["output_tokens"] for row in rows} == set(TINY.output_lengths)
    table = build({}, runs=tmp_path / "runs", output=tmp_path / "tiny.duckdb")
    assert sum(source.rows_read for source in table.sources) == 72


def test_an_interrupted_sweep_makes_the_same_requests_as_one_that_was_not(tmp_path: Path) -> None:
    def requests(folder: str) -> list[tuple[Any, ...]]:
        names = ("tier", "top_k", "num_blocks", "sample_id", "vision_tokens", "text_tokens", "output_tokens")
        return sorted(tuple(row[name] for name in names) for row in rows_of(tmp_path / folder))

    run_sweep(tmp_path / "whole", "tiny", runs_per_key=4, top_k=[1])
    run_sweep(tmp_path / "parts", "tiny", runs_per_key=1, top_k=[1], num_blocks=[2])
    first = run_sweep(tmp_path / "parts", "tiny", runs_per_key=4, top_k=[1], minutes=1e-9)
    assert (first.n_recorded, first.n_missing) == (0, 21)
    rest = run_sweep(tmp_path / "parts", "tiny", runs_per_key=4, top_k=[1])
    assert (rest.n_recorded, rest.n_missing) == (21, 0)
    assert requests("parts") == requests("whole")
    run_sweep(tmp_path / "other", "tiny", runs_per_key=4, top_k=[1], seed=1)
    assert requests("other") != requests("whole")


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    command = ["profile", "-o", str(folder), "--preset", "tiny", "--runs", "20", "--warmup", "0", "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "lutest", *command], cwd=PROJECT)
    try:
        while not list(folder.glob("runs-*")):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 0.2))  # another moment each time
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    with Recorder(folder, model=TINY.model_name, settings=_settings(folder)) as recorder:
        keys = [(tier, k, b) for tier in TINY.crops for k in TINY.top_k for b in TINY.num_blocks]
        left = recorder.plan(keys, 20)
    before = {(row["tier"], row["top_k"], row["num_blocks"], row["sample_id"]): row for row in rows_of(folder)}
    assert 0 < len(before) < 240
    assert len(before) + len(left) == 240
    plan = list(interleave(keys, 20, seed=0))
    assert left == plan[len(before) :]  # all that came before the kill is there: none was lost, none skipped

    assert main([*command, "--json"]) == 0
    after = {(row["tier"], row["top_k"], row["num_blocks"], row["sample_id"]): row for row in rows_of(folder)}
    assert len(after) == len(rows_of(folder)) == 240
    assert all(after[key] == row for key, row in before.items())


def _settings(folder: Path) -> dict[str, object]:
    import yaml

    settings = yaml.safe_load((folder / "profile.yaml").read_text(encoding="utf-8"))["settings"]
    return {name: value for name, value in settings.items() if name != "model"}


def test_the_command_tells_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", "-o", str(tmp_path / "runs"), "--preset", "tiny", "--tiers", "low,high", "--top-k", "2"]
    command += ["--blocks", "1,2", "--runs", "3", "--output-lengths", "3"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "12 runs of 4 configurations recorded" in printed.out
    assert "0 still to do; 4 warm-up runs left out" in printed.out
    assert "µs to a decode step" in printed.out
    assert {(row["top_k"], row["output_tokens"]) for row in rows_of(tmp_path / "runs")} == {(2, 3)}
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_recorded"] == 0
    assert main([*command[:-1], "5"]) == 2
    assert "was begun with output_lengths = {3: 1.0}, not {5: 1.0}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "there is no preset 'huge'; there are tiny, cpu, cpu-wide, molmoe-1b"),
        ({"tiers": ["ultra"]}, "there is no tier 'ultra' in tiny"),
        ({"top_k": [5]}, "top_k is 5; in tiny it must be from 1 to 4"),
        ({"num_blocks": [0]}, "blocks is 0; in tiny it must be from 1 to 2"),
        ({"runs_per_key": 0}, "runs_per_key is 0"),
        ({"output_lengths": {0: 1.0}}, "output lengths hold 0"),
        ({"minutes": 0.0}, "minutes is 0; it must be above 0"),
        ({"warmup_rounds": -1}, "warm-up rounds are -1"),
        ({"threads": 0}, "threads are 0"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"device": "meta"}, "it can be cpu or cuda"),
    ],
)
def test_what_cannot_be_swept(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        run_sweep(tmp_path / "runs", **{"preset": "tiny", **options})
    assert not (tmp_path / "runs").exists()
