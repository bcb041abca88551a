"""The recorder: stages on the clock, what is kept of a run, and sessions that go on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest
import yaml

import lutest
from lutest.builder.build import build
from lutest.profile.recorder import Recorder, Run, interleave, measure_step_overhead
from lutest.reader.errors import ArgumentError, BuildError, ConfigError, SourceError
from lutest.runs.convert import convert

KEYS = [(tier, top_k, num_blocks) for tier in ("low", "high") for top_k in (4, 8) for num_blocks in (12, 16)]


class StandStillClock:
    """A clock that moves only when it is told to, in whole milliseconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def milliseconds(self, marks: Any) -> list[float]:
        return [mark - marks[0] for mark in marks]


def record(recorder: Recorder, key: Any, steps: int = 2, **options: Any) -> Run:
    """One run without any work in it."""
    with recorder.run(key, **{"prompt_tokens": 40, **options}) as run:
        with run.prefill():
            pass
        for _ in range(steps):
            with run.step():
                pass
    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Runs that the shards of a folder hold."""
    with duckdb.connect() as connection:
        cursor = connection.execute("SELECT * FROM read_parquet(?)", [str(folder / "*.parquet")])
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("runs-", ".runs-")))


def test_every_stage_has_its_own_time_and_the_total_has_the_gaps_too() -> None:
    clock = StandStillClock()
    run = Run(clock)
    clock.now = 100
    with run.vision():
        clock.now += 20
    clock.now += 1
    with run.prefill():
        clock.now += 50
    for step_ms in (7, 8, 9):
        clock.now += 2
        with run.step():
            clock.now += step_ms
    clock.now += 1000  # after the last stage
    times = run.finish()
    assert times.vision_ms == 20
    assert times.prefill_ms == 70
    assert times.decode_steps_ms == [7, 8, 9]
    assert times.total_ms == 20 + 1 + 50 + 3 * 2 + 24


def test_stages_that_are_only_begun_last_until_the_next_one() -> None:
    clock = StandStillClock()
    run = Run(clock)
    run.begin_prefill()
    clock.now += 1
    run.begin_vision()
    clock.now += 20
    run.begin_prefill()
    clock.now += 50
    for step_ms in (7, 8):
        run.begin_step()
        clock.now += step_ms
    run.end()
    times = run.finish()
    assert (times.vision_ms, times.prefill_ms, times.decode_steps_ms, times.total_ms) == (20, 71, [7, 8], 86)


def _no_prefill(run: Run) -> None:
    with run.vision():
        pass


def _nested(run: Run) -> None:
    with run.prefill(), run.step():
        pass


def _step_first(run: Run) -> None:
    with run.step():
        pass
    with run.prefill():
        pass


def _not_ended(run: Run) -> None:
    run.begin_prefill()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (_no_prefill, "without a prefill"),
        (_nested, "overlap"),
        (_step_first, "before the end of prefill"),
        (_not_ended, "has not ended"),
    ],
)
def test_a_run_whose_stages_make_no_sense_is_refused(
    stages: Callable[[Run], None], message: str, tmp_path: Path
) -> None:
    with Recorder(tmp_path, model="none") as recorder:
        with pytest.raises(ArgumentError, match=message), recorder.run(("low", 4, 12), prompt_tokens=9) as run:
            stages(run)
        assert recorder.n_recorded == 0
    assert names_in(tmp_path) == []


def test_a_row_holds_the_run_and_what_it_was_taken_on(tmp_path: Path) -> None:
    with Recorder(tmp_path, model="a model", device="a machine", workload="questions") as recorder:
        with recorder.run(("low", 4, 12), vision_tokens=30, text_tokens=12) as run:
            with run.vision():
                pass
            with run.prefill():
                pass
            with run.step():
                pass
            run.ends_with_eos = True
        record(recorder, ("low", 4, 12), steps=0)
        overhead_us = recorder.step_overhead_us
    first, second = rows_of(tmp_path)
    assert (first["tier"], first["top_k"], first["num_blocks"], first["sample_id"]) == ("low", 4, 12, 0)
    assert (first["prompt_tokens"], first["vision_tokens"], first["text_tokens"]) == (42, 30, 12)
    assert (first["output_tokens"], first["ends_with_eos"]) == (2, True)
    assert (first["model"], first["device"], first["workload"]) == ("a model", "a machine", "questions")
    assert first["prefill_ms"] > first["vision_ms"] > 0
    assert first["decode_ms"] == first["decode_steps_ms"][0] > 0
    assert first["total_ms"] >= first["prefill_ms"] + first["decode_ms"]
    assert first["software"].startswith("Python 3.")
    assert first["synchronization"] == "none"
    assert first["step_overhead_us"] == overhead_us > 0
    assert second["sample_id"] == 1
    assert (second["output_tokens"], second["decode_steps_ms"], second["decode_ms"]) == (1, [], 0.0)
    assert second["ends_with_eos"] is None


def test_the_manifest_tells_of_every_session(tmp_path: Path) -> None:
    for n in (1, 2):
        with Recorder(tmp_path, model="a model", settings={"seed": 7}) as recorder:
            for _ in range(n):
                record(recorder, ("low", 4, 12))
                record(recorder, ("low", 4, 12), warmup=True)
    manifest = yaml.safe_load((tmp_path / "profile.yaml").read_text(encoding="utf-8"))
    assert manifest["settings"] == {"key_columns": ["tier", "top_k", "num_blocks"], "model": "a model", "seed": 7}
    sessions = manifest["sessions"]
    assert [(session["runs"], session["warmup_runs"]) for session in sessions] == [(1, 1), (2, 2)]
    assert sessions[0]["session"] != sessions[1]["session"]
    assert sessions[0]["started_at"] < sessions[0]["ended_at"] < sessions[1]["started_at"]
    assert all(session["clock_resolution_ns"] > 0 and "cpu_mhz" in session for session in sessions)


def test_warm_up_runs_are_timed_and_left_out(tmp_path: Path) -> None:
    with Recorder(tmp_path, model="a model") as recorder:
        run = record(recorder, ("low", 4, 12), warmup=True)
        assert run.warmup
        assert run.times is not None
        assert run.times.total_ms > 0
        record(recorder, ("low", 4, 12))
    assert len(rows_of(tmp_path)) == 1


def test_a_run_that_fails_is_not_kept(tmp_path: Path) -> None:
    with Recorder(tmp_path, model="a model") as recorder:
        with pytest.raises(ZeroDivisionError), recorder.run(("low", 4, 12), prompt_tokens=9) as run, run.prefill():
            _ = 1 / 0
        with pytest.raises(ArgumentError, match="needs prompt_tokens"):
            record(recorder, ("low", 4, 12), prompt_tokens=None)
        with pytest.raises(ArgumentError, match="is no configuration"):
            record(recorder, ("", 4, 12))
        record(recorder, ("low", 4, 12), sample_id=3)
        with pytest.raises(ArgumentError, match="is recorded already; take runs from `plan`"):
            record(recorder, ("low", 4, 12), sample_id=3)
    assert [row["sample_id"] for row in rows_of(tmp_path)] == [3]


def test_runs_become_shards_and_a_journal_that_a_build_reads(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    recorder = Recorder(folder, model="a model", runs_per_shard=3)
    for sample_id in range(8):
        record(recorder, ("low", 4, 12), sample_id=sample_id, prompt_tokens=40 + sample_id)
    assert names_in(folder) == ["runs-000001.parquet", "runs-000002.parquet", "runs-000003.jsonl"]
    assert convert(folder, tmp_path / "open.parquet").rows == 8  # the session is still at work
    recorder.close()
    assert names_in(folder) == [f"runs-00000{number}.parquet" for number in (1, 2, 3)]
    summary = build({}, runs=folder, output=tmp_path / "closed.duckdb", implausible=True)  # steps of nothing
    assert sum(source.rows_read for source in summary.sources) == 8


def test_a_session_goes_on_where_another_stopped(tmp_path: Path) -> None:
    with Recorder(tmp_path, model="a model", runs_per_shard=4) as recorder:
        plan = recorder.plan(KEYS, 3, seed=5)
        assert len(plan) == len(set(plan)) == 3 * len(KEYS)
        for key, sample_id in plan[:10]:
            record(recorder, key, sample_id=sample_id)
    with Recorder(tmp_path, model="a model", runs_per_shard=4) as recorder:
        assert recorder.plan(KEYS, 3, seed=5) == plan[10:]
        for key, sample_id in plan[10:]:
            record(recorder, key, sample_id=sample_id)
        assert recorder.plan(KEYS, 3, seed=5) == []
        assert len(recorder.plan(KEYS, 4, seed=5)) == len(KEYS)
    found = Counter((row["tier"], row["top_k"], row["num_blocks"], row["sample_id"]) for row in rows_of(tmp_path))
    assert found == Counter({(*key, sample_id): 1 for key, sample_id in plan})


def test_a_configuration_is_of_the_columns_that_are_named(tmp_path: Path) -> None:
    keys = [("H100", 1, 0.5), ("H100", 2, 0.5), ("A100", 2, 1)]
    options: dict[str, Any] = {"model": "a model", "key_columns": ("gpu", "users", "rate")}
    with Recorder(tmp_path / "runs", **options) as recorder:
        for key, sample_id in recorder.plan(keys, 4)[:7]:
            record(recorder, key, sample_id=sample_id)
        for wrong in (
            ("H100", 1),
            ("H100", "one", 0.5),
            (100, 1, 0.5),
            ("", 1, 0.5),
            ("H100", 1, None),
            ["H100", 1, 1],
        ):
            with pytest.raises(ArgumentError, match=r"is no configuration|another run"):
                record(recorder, wrong)
    with Recorder(tmp_path / "runs", **options) as recorder:
        left = recorder.plan(keys, 4)
        assert len(left) == 5
        for key, sample_id in left:
            record(recorder, key, sample_id=sample_id)
    assert Counter((row["gpu"], row["users"], row["rate"]) for row in rows_of(tmp_path / "runs")) == dict.fromkeys(
        keys, 4
    )
    build({"key": ["gpu", "users", "rate"]}, runs=tmp_path / "runs", output=tmp_path / "table.duckdb", implausible=True)
    assert lutest.load(tmp_path / "table.duckdb").keys == tuple(sorted(keys))
    with pytest.raises(ConfigError, match=r"was begun with key_columns = \['gpu', 'users', 'rate'\]"):
        Recorder(tmp_path / "runs", model="a model")


@pytest.mark.parametrize("names", [(), ("gpu", "GPU"), ("Model",), ("sample_id",), ("n",), ("",)])
def test_names_that_key_columns_cannot_have(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Recorder(tmp_path, model="a model", key_columns=names)
    assert not list(tmp_path.iterdir())


def _cut_journal(folder: Path, source: Path) -> int:
    """A journal of which the last line was not written to its end."""
    (folder / "runs-000001.jsonl").write_bytes(source.read_bytes()[:-9])
    return 4


def _journal_beside_its_shard(folder: Path, source: Path) -> int:
    """Killed after the shard was put in its place, and before its journal went."""
    with Recorder(folder, model="a model"):
        pass
    (folder / "runs-000001.jsonl").write_bytes(source.read_bytes())
    with Recorder(folder, model="a model"):
        pass
    (folder / "runs-000001.jsonl").write_bytes(source.read_bytes())
    return 5


def _half_a_shard(folder: Path, source: Path) -> int:
    """Killed while the shard was being written."""
    (folder / "runs-000001.jsonl").write_bytes(source.read_bytes())
    (folder / ".runs-000001.parquet.lutest-tmp").write_bytes(b"PAR1")
    return 5


def _empty_journal(folder: Path, source: Path) -> int:
    """Killed between the making of the journal and its first line."""
    (folder / "runs-000001.jsonl").write_bytes(source.read_bytes()[:5])
    return 0


@pytest.mark.parametrize("leave", [_cut_journal, _journal_beside_its_shard, _half_a_shard, _empty_journal])
def test_what_a_kill_leaves_behind_is_put_in_order(leave: Callable[[Path, Path], int], tmp_path: Path) -> None:
    source = tmp_path / "journal"
    template = Recorder(tmp_path / "template", model="a model")
    for sample_id in range(5):
        record(template, ("low", 4, 12), sample_id=sample_id)
    source.write_bytes((tmp_path / "template" / "runs-000001.jsonl").read_bytes())
    template.close()

    folder = tmp_path / "killed"
    folder.mkdir()
    n = leave(folder, source)
    with Recorder(folder, model="a model") as recorder:
        assert recorder.plan([("low", 4, 12)], 6) == [(("low", 4, 12), sample_id) for sample_id in range(n, 6)]
        record(recorder, ("low", 4, 12))
    assert not [name for name in names_in(folder) if not name.endswith(".parquet")]
    assert sorted(row["sample_id"] for row in rows_of(folder)) == list(range(n + 1))


def test_a_journal_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs-000001.jsonl").write_text('{"tier": "low"\n{}\n', encoding="utf-8")
    with pytest.raises(SourceError, match=r"runs-000001\.jsonl: line 1 is not a run"):
        Recorder(tmp_path, model="a model")


def test_other_settings_do_not_go_into_the_same_folder(tmp_path: Path) -> None:
    with Recorder(tmp_path, model="a model", settings={"seed": 1}):
        pass
    with pytest.raises(ConfigError, match="was begun with seed = 1, not 2"):
        Recorder(tmp_path, model="a model", settings={"seed": 2})
    with pytest.raises(ConfigError, match="was begun with model = a model, not another"):
        Recorder(tmp_path, model="another", settings={"seed": 1})
    (tmp_path / "profile.yaml").write_text("settings: 3", encoding="utf-8")
    with pytest.raises(ConfigError, match="not the record of a profile"):
        Recorder(tmp_path, model="a model", settings={"seed": 1})


def test_one_session_at_a_time(tmp_path: Path) -> None:
    with Recorder(tmp_path, model="a model"), pytest.raises(BuildError, match="another session"):
        Recorder(tmp_path, model="a model")
    with Recorder(tmp_path, model="a model"):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BuildError, match="cannot record runs there"):
        Recorder(tmp_path / "file", model="a model")


def test_configurations_are_interleaved_in_random_order() -> None:
    order = list(interleave(KEYS, 20, seed=3))
    rounds = [order[start : start + len(KEYS)] for start in range(0, len(order), len(KEYS))]
    for sample_id, one_round in enumerate(rounds):
        assert sorted(key for key, _ in one_round) == sorted(KEYS)
        assert {number for _, number in one_round} == {sample_id}
    assert len({tuple(key for key, _ in one_round) for one_round in rounds}) > 15
    assert order == list(interleave(KEYS, 20, seed=3))
    assert order != list(interleave(KEYS, 20, seed=4))
    assert list(interleave([*KEYS, KEYS[0]], 20, seed=3)) == order
    with pytest.raises(ArgumentError, match="runs_per_key is 0"):
        list(interleave(KEYS, 0, seed=3))


def test_the_overhead_is_what_an_empty_step_costs() -> None:
    class SlowClock(StandStillClock):
        def mark(self) -> float:
            return float(sum(range(1000)))

    assert 0 < measure_step_overhead(StandStillClock()) < measure_step_overhead(SlowClock())


class StandInCuda:
    """What is used of torch.cuda; its time moves only when it is told to."""

    def __init__(self) -> None:
        self.waits = 0
        self.now = 0.0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, end: Event) -> float:
                assert cuda.waits, "read before the device was waited for"
                return end.at - self.at

            def synchronize(self) -> None:
                cuda.waits += 1

        self.Event = Event

    def is_available(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waits += 1


def test_cuda_events_are_read_after_the_run_and_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = StandInCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with Recorder(tmp_path, model="a model", synchronization="events") as recorder:
        with recorder.run(("low", 4, 12), prompt_tokens=9) as run:
            with run.prefill():
                cuda.now += 40
            for step_ms in (5, 6):
                with run.step():
                    cuda.now += step_ms
            assert cuda.waits == 0
        assert cuda.waits == 1
    (row,) = rows_of(tmp_path)
    assert (row["prefill_ms"], row["decode_steps_ms"], row["total_ms"]) == (40, [5, 6], 51)
    assert row["synchronization"] == "events"


def test_synchronization_waits_at_both_ends_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with Recorder(tmp_path, model="a model", synchronization="synchronize") as recorder:
        before = cuda.waits
        record(recorder, ("low", 4, 12), steps=3)
        assert cuda.waits - before == 2 * 4


@pytest.mark.parametrize("synchronization", ["synchronize", "events"])
def test_a_clock_of_a_device_that_is_not_there(synchronization: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        with Recorder(tmp_path, model="a model", synchronization=synchronization) as recorder:
            record(recorder, ("low", 4, 12))
        assert rows_of(tmp_path)[0]["total_ms"] >= 0
    else:
        with pytest.raises(ArgumentError, match="torch finds none"):
            Recorder(tmp_path, model="a model", synchronization=synchronization)


def test_an_unknown_clock(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="it can be none, synchronize, events"):
        Recorder(tmp_path, model="a model", synchronization="cuda")
    with pytest.raises(ArgumentError, match="runs_per_shard is 0"):
        Recorder(tmp_path, model="a model", runs_per_shard=0)


def test_the_journal_is_one_run_a_line(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, model="a model")
    run = record(recorder, ("low", 4, 12), steps=3)
    assert run.times is not None
    lines = (tmp_path / "runs-000001.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["decode_steps_ms"] for line in lines] == [run.times.decode_steps_ms]
    recorder.close()
