"""Sessions that are killed and go on: no run twice, none lost but the one in flight."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb

from lutest.profile.recorder import Recorder
from lutest.runs.convert import convert
from tests.children import run_child

KEYS = [(tier, top_k, 12) for tier in ("low", "medium", "high") for top_k in (4, 8)]
RUNS_PER_KEY = 20
WITNESS = "witness.txt"

RunKey = tuple[str, int, int, int]


def session(folder: str, fatal: int | None = None, pause_s: float = 0.0) -> int:
    """Record what is missing; kill this process just before one of its changes to the file system, if told to."""
    if fatal is not None:
        # never stopped: this process is a child that ends after the session
        left = iter(range(fatal, -1, -1))
        for name in ("fsync", "replace", "unlink"):
            mock.patch.object(os, name, _deadly(getattr(os, name), left)).start()
    witness = os.open(Path(folder, WITNESS), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Recorder(Path(folder, "runs"), model="none", runs_per_shard=7) as recorder:
        for (tier, top_k, num_blocks), sample_id in recorder.plan(KEYS, RUNS_PER_KEY):
            with recorder.run((tier, top_k, num_blocks), sample_id=sample_id, prompt_tokens=20) as run:
                with run.prefill():
                    time.sleep(pause_s)
                with run.step():
                    pass
            os.write(witness, f"{tier} {top_k} {num_blocks} {sample_id}\n".encode())
        return recorder.n_recorded


def _deadly(function: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return call


def witnessed(folder: Path) -> list[RunKey]:
    """Runs that were over, and told to be kept, before the process died."""
    path = folder / WITNESS
    lines = path.read_text().splitlines() if path.exists() else []
    return [(tier, int(a), int(b), int(c)) for tier, a, b, c in (line.split() for line in lines)]


def kept(folder: Path) -> list[RunKey]:
    """Runs in the folder of a session, be it over or not."""
    rows: list[RunKey] = []
    for path in (folder / "runs").glob("runs-*.jsonl"):
        whole = map(json.loads, path.read_text().split("\n")[:-1])
        rows += [(row["tier"], row["top_k"], row["num_blocks"], row["sample_id"]) for row in whole]
    shards = [str(path) for path in (folder / "runs").glob("runs-*.parquet")]
    if shards:
        with duckdb.connect() as connection:
            rows += connection.execute(
                "SELECT tier, top_k, num_blocks, sample_id FROM read_parquet(?)", [shards]
            ).fetchall()
    return rows


def check_whole(folder: Path) -> None:
    """Every run that was planned is there once, and is read as it would be for a build."""
    wanted = {(*key, sample_id) for key in KEYS for sample_id in range(RUNS_PER_KEY)}
    assert Counter(kept(folder)) == Counter(dict.fromkeys(wanted, 1))
    assert set(witnessed(folder)) <= wanted
    assert not [path.name for path in (folder / "runs").iterdir() if "tmp" in path.name or path.suffix == ".jsonl"]
    summary = convert(folder / "runs", folder / "all.parquet")
    assert (summary.rows, summary.problems) == (len(wanted), {})


def test_killed_at_random_moments_and_resumed(tmp_path: Path, long: bool) -> None:
    chance = random.Random()  # other moments each time
    kills = 0
    while kills < (100 if long else 4):
        outcome = run_child(session, str(tmp_path), None, 0.003, kill_after_s=chance.uniform(0.0, 0.5))
        if not outcome.killed:
            break
        kills += 1
        before = witnessed(tmp_path)
        assert len(before) == len(set(before)), "a run was done twice"
        lost = set(before) - set(kept(tmp_path))
        assert not lost, f"{len(lost)} runs were lost"
    outcome = run_child(session, str(tmp_path))
    assert outcome.ended
    assert outcome.error is None
    check_whole(tmp_path)
    # a run that was kept in the moment of the kill was not told of; no other is missing from the witness
    assert len(KEYS) * RUNS_PER_KEY - len(set(witnessed(tmp_path))) <= kills


def test_killed_before_every_change_to_the_file_system(tmp_path: Path, long: bool) -> None:
    moments = range(40) if long else (0, 3, 5, 6, 7, 8)
    for moment in moments:
        outcome = run_child(session, str(tmp_path), moment)
        assert outcome.killed, f"moment {moment} never came"
        assert set(witnessed(tmp_path)) <= set(kept(tmp_path))
    outcome = run_child(session, str(tmp_path))
    assert outcome.ended
    assert outcome.error is None
    check_whole(tmp_path)


def test_a_session_that_is_whole_has_nothing_to_do(tmp_path: Path) -> None:
    assert session(str(tmp_path)) == len(KEYS) * RUNS_PER_KEY
    assert session(str(tmp_path)) == 0
    check_whole(tmp_path)


def test_the_kill_switch_works(tmp_path: Path) -> None:
    """A test of the tests: a moment that never comes kills nobody."""
    outcome = run_child(session, str(tmp_path), 10_000)
    assert outcome.ended
    assert outcome.value == len(KEYS) * RUNS_PER_KEY
