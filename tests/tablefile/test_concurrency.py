"""Readers see whole versions through rebuilds; of two builds at once, one wins and the other says so."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import pandas as pd
import pytest

import lutest
from lutest.builder.build import build
from lutest.reader.errors import BuildError, LutestError
from lutest.tablefile.verify import verify
from tests.children import build_whole, loaded, write_runs
from tests.conftest import Tally
from tests.reading import Seen, read_until
from tests.runs_frame import noisy_runs

KEYS = (("low", 4, 12), ("high", 8, 16))
LOCK = ".table.duckdb.lutest-lock"
# new interpreters, as those of training jobs are
CONTEXT = multiprocessing.get_context("spawn")


def _runs(seed: int) -> pd.DataFrame:
    """Totals alone: no steps to fit, so that most of the time goes into reading and writing."""
    return noisy_runs(KEYS, 8, seed).drop(columns="decode_steps_ms")


def _last_word(receiver: Connection) -> Seen:
    try:
        versions, error = receiver.recv()
    except EOFError:
        return Counter(), "the reader died"
    return versions, error


def test_readers_through_rebuilds(tmp_path: Path, long: bool, tally: Tally) -> None:
    path = str(tmp_path / "table.duckdb")
    sources = [write_runs(tmp_path / f"{seed}.jsonl", _runs(seed)) for seed in range(2)]
    whole = {}
    for runs in sources:
        digest = build_whole(runs, path)
        whole[digest] = repr(lutest.load(path).figures.keys)
    assert len(whole) == 2
    n_readers, n_rebuilds = (16, 100) if long else (3, 4)
    stop = tmp_path / "stop"
    pause_s = n_readers / 20  # leaves the builder some of the processor
    readers: list[Connection] = []
    for _ in range(n_readers):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        CONTEXT.Process(target=read_until, args=(stop, path, pause_s, sender)).start()
        sender.close()
        readers.append(receiver)
    assert [receiver.recv() for receiver in readers] == ["started"] * n_readers
    for number in range(n_rebuilds):
        build_whole(sources[number % 2], path)
    stop.touch()
    results = [_last_word(receiver) for receiver in readers]
    versions = sum((counts for counts, _ in results), Counter[tuple[str, str]]())
    errors = [error for _, error in results if error]
    torn = sum(n for (digest, keys), n in versions.items() if whole.get(digest) != keys)
    tally[f"loads by {n_readers} processes through {n_rebuilds} rebuilds"] = Counter(
        tries=versions.total() + len(errors), survived=versions.total() - torn, lost=torn + len(errors)
    )
    assert errors == []
    assert torn == 0
    assert versions.total() > n_rebuilds
    assert len({digest for digest, _ in versions}) > 1
    verify(path)


def _build_at_once(runs: str, output: str, together: Event, outcomes: Queue[tuple[str, str]]) -> None:
    together.wait()
    try:
        outcomes.put(("built", build_whole(runs, output)))
    except LutestError as error:
        outcomes.put(("refused", str(error)))


def test_two_builds_at_once(tmp_path: Path, long: bool, tally: Tally) -> None:
    path = tmp_path / "table.duckdb"
    sources = [write_runs(tmp_path / f"{seed}.jsonl", _runs(seed)) for seed in range(2)]
    context = multiprocessing.get_context("forkserver")
    counts = tally["two builds onto one output"] = Counter(tries=0, survived=0, lost=0)
    for _ in range(30 if long else 1):
        together = context.Event()
        outcomes: Queue[tuple[str, str]] = context.Queue()
        builders = [
            context.Process(target=_build_at_once, args=(runs, str(path), together, outcomes)) for runs in sources
        ]
        for builder in builders:
            builder.start()
        together.set()
        results = [outcomes.get(timeout=120) for _ in builders]
        for builder in builders:
            builder.join()
        counts.update(tries=1, lost=1)
        built = {detail for fate, detail in results if fate == "built"}
        assert built
        assert all("locked, another build is writing it" in detail for fate, detail in results if fate == "refused")
        assert verify(path).content_hash in built
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [LOCK, "0.jsonl", "1.jsonl", "table.duckdb"]
        counts.update({"lost": -1, "survived": 1, "refused as locked": 2 - len(built)})


def test_a_build_within_a_build_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.duckdb"
    link = tmp_path / "link.duckdb"
    link.symlink_to(path)
    refusals = []

    def build_another(*_: object) -> None:
        for output in (path, link):
            with pytest.raises(BuildError, match="locked, another build is writing it; try again") as raised:
                build({}, runs=_runs(2), output=output)
            refusals.append(str(raised.value))

    runs = write_runs(tmp_path / "runs.jsonl", _runs(1))
    summary = build({}, runs=runs, output=path, progress=build_another)
    assert refusals
    assert verify(path).content_hash == summary.content_hash
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [LOCK, "link.duckdb", "runs.jsonl", "table.duckdb"]


def test_a_file_system_without_locks_still_gets_whole_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "table.duckdb"
    leftover = tmp_path / f".table.duckdb.{'0' * 32}.lutest-tmp"
    leftover.touch()  # may be that of a build at work
    runs = write_runs(tmp_path / "runs.jsonl", _runs(1))
    other = write_runs(tmp_path / "other.jsonl", _runs(2))
    within: list[str] = []

    def build_another(*_: object) -> None:
        if not within:
            within.append("")
            within[0] = build_whole(other, str(path))
            assert verify(path).content_hash == within[0]

    summary = build({}, runs=runs, output=path, progress=build_another)
    assert verify(path).content_hash == summary.content_hash != within[0]
    assert leftover.exists()


def test_loaded_tables_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.duckdb"
    build_whole(write_runs(tmp_path / "runs.jsonl", _runs(1)), str(path))
    table = lutest.load(path)
    expected = table["low", 4, 12].total_ms(100, 9, 0.95)
    digest = loaded(str(path))
    build_whole(write_runs(tmp_path / "other.jsonl", _runs(2)), str(path))
    assert loaded(str(path)) != digest
    path.unlink()
    assert table["low", 4, 12].total_ms(100, 9, 0.95) == expected
