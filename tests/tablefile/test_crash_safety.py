"""A build that is killed, or that finds no room, leaves the old table or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

import lutest
from lutest.builder.build import build
from lutest.reader.errors import BuildError, SourceError, TableError
from lutest.runs.sources.discovery import list_sources
from lutest.tablefile.verify import verify
from tests.children import Outcome, build_to_step, build_whole, count_steps, run_child, write_runs
from tests.conftest import Tally
from tests.runs_frame import noisy_runs

KEYS = (("low", 4, 12), ("high", 8, 16))


class Stand:
    """A table in a folder of its own, and runs to build another one from."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder / "tables"
        self.folder.mkdir()
        self.path = self.folder / "table.duckdb"
        self.lock = self.folder / ".table.duckdb.lutest-lock"
        shutil.copy(source / "1.duckdb", self.path)
        self.runs = [str(source / f"{number}.jsonl") for number in range(2)]
        self.hashes = [verify(source / f"{number}.duckdb").content_hash for number in range(2)]
        assert self.hashes[0] != self.hashes[1]
        self.standing = 1

    @property
    def next_runs(self) -> str:
        return self.runs[1 - self.standing]

    def check(self, before: bytes) -> bool:
        """Whether the new table stands there; fails if it is neither that nor the old one."""
        after = self.path.read_bytes()
        if after == before:
            return False
        assert verify(self.path).content_hash == self.hashes[1 - self.standing]
        self.standing = 1 - self.standing
        return True

    def restore(self, before: bytes) -> None:
        """Put the first table back, alone in its folder."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.path.write_bytes(before)
        self.standing = 1

    def leftovers(self) -> list[Path]:
        """What a build leaves beside its table, but for the lock file, which stays."""
        return sorted(path for path in self.folder.iterdir() if path not in (self.path, self.lock))

    def check_leftovers_are_no_tables(self) -> None:
        for path in self.leftovers():
            if path.is_file():
                with pytest.raises(TableError, match=r"temporary file of a build|log of DuckDB"):
                    lutest.load(path)
        for pattern in (self.folder, self.folder / "*", self.folder / "**"):
            with pytest.raises(SourceError, match="no file"):
                list_sources([str(pattern)], Path())

    def check_next_build_clears(self) -> None:
        assert build_whole(self.next_runs, str(self.path)) == verify(self.path).content_hash
        self.standing = 1 - self.standing
        assert self.leftovers() == []


@pytest.fixture(scope="module")
def source() -> Iterator[Path]:
    """Runs of two tables, and the tables, in a folder that other users can enter, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for number in range(2):
        # one token a run: no steps to fit, so that most of the time goes into reading and writing
        frame = noisy_runs(KEYS, 8, number).drop(columns="decode_steps_ms").assign(output_tokens=1, decode_ms=0.0)
        runs = write_runs(folder / f"{number}.jsonl", frame)
        build_whole(runs, str(folder / f"{number}.duckdb"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def stand(tmp_path: Path, source: Path) -> Stand:
    return Stand(tmp_path, source)


def test_kill_at_random_moments(stand: Stand, long: bool, tally: Tally) -> None:
    generator = random.Random(5)
    for _ in range(2):  # the first child waits for the server that it is forked from
        started = time.perf_counter()
        assert run_child(build_whole, stand.next_runs, str(stand.path)).ended
        duration_s = time.perf_counter() - started  # only spreads the kills: whatever it is, the same must hold
        stand.standing = 1 - stand.standing
    counts = tally["kill -9 of a build at a random moment"] = Counter(tries=0, survived=0, lost=0)
    for _ in range(300 if long else 10):
        before = stand.path.read_bytes()
        moment_s = duration_s * generator.choice([generator.uniform(0, 1), generator.uniform(0.8, 1.2)])
        outcome = run_child(build_whole, stand.next_runs, str(stand.path), kill_after_s=moment_s)
        assert outcome.error is None
        counts.update(tries=1, lost=1)
        replaced = stand.check(before)
        stand.check_leftovers_are_no_tables()
        counts.update({"lost": -1, "survived": 1, "with the new table" if replaced else "with the old table": 1})
    stand.check_next_build_clears()


def test_kill_before_each_step(stand: Stand, long: bool, tally: Tally) -> None:
    before = stand.path.read_bytes()
    names = run_child(count_steps, stand.next_runs, str(stand.path)).value
    assert {"ATTACH", "COMMIT", "CHECKPOINT", "DETACH", "fsync", "replace"} <= set(names)
    statements = [place for place, name in enumerate(names) if name in ("SELECT", "CREATE", "COMMENT", "INSERT", "USE")]
    replacing = len(names) - 1 - names[::-1].index("replace")  # the last: parts are renamed before the table
    chosen = list(range(len(names)))
    if not long:
        written = range(names.index("ATTACH"), len(names))
        kinds = {names[place]: place for place in reversed(written) if place not in statements}  # the first of each
        after = replacing + 1
        chosen = sorted({*kinds.values(), after, *random.Random(6).sample(statements, 2)})
    counts = tally["kill -9 of a build before one of its steps"] = Counter(tries=0, survived=0, lost=0)
    for place in chosen:
        stand.restore(before)  # what a build clears would add to its steps
        outcome = run_child(build_to_step, stand.next_runs, str(stand.path), place)
        assert outcome.killed
        counts.update(tries=1, lost=1)
        replaced = stand.check(before)
        assert replaced == (place > replacing)
        stand.check_leftovers_are_no_tables()
        counts.update({"lost": -1, "survived": 1, "with the new table" if replaced else "with the old table": 1})
    stand.check_next_build_clears()


def test_a_build_clears_the_work_of_a_killed_one(stand: Stand, tmp_path: Path) -> None:
    names = run_child(count_steps, stand.next_runs, str(tmp_path / "other.duckdb")).value
    assert run_child(build_to_step, stand.next_runs, str(stand.path), names.index("CHECKPOINT")).killed
    endings = Counter("".join(path.suffixes[-2:]) if path.is_file() else "folder" for path in stand.leftovers())
    assert endings.keys() >= {"folder"}
    assert sum(endings.values()) >= 2
    assert stand.lock.exists()
    neighbour = stand.folder / f".other.duckdb.{'0' * 32}.lutest-tmp"
    neighbour.write_bytes(b"of another table")
    build_whole(stand.next_runs, str(stand.path))
    assert stand.leftovers() == [neighbour]


def _build_in_bytes(runs: str, output: str, limit_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    build_whole(runs, output)


def test_no_room_for_the_file(stand: Stand, long: bool, tally: Tally) -> None:
    counts = tally["a build that runs out of room"] = Counter(tries=0, survived=0, lost=0)
    size = stand.path.stat().st_size
    most = 8 * size  # the work database takes more than the table
    limits = [0, 5_000, size - 100, size + 100, *random.Random(7).sample(range(most), 100 if long else 2)]
    for limit_bytes in limits:
        before = stand.path.read_bytes()
        counts.update(tries=1, lost=1)
        outcome = run_child(_build_in_bytes, stand.next_runs, str(stand.path), limit_bytes)
        assert outcome.ended
        replaced = stand.check(before)
        assert replaced == (outcome.error is None)
        if not replaced:
            _check_one_line(outcome, stand.folder)
        assert stand.leftovers() == []
        counts.update(lost=-1, survived=1)


def _check_one_line(outcome: Outcome, path: Path) -> None:
    assert outcome.error is not None
    assert str(path) in outcome.error
    assert "\n" not in outcome.error


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_step_leaves_the_old_table(stand: Stand, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stand.path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(BuildError, match="cannot write the table: No space left on device"):
        build_whole(stand.next_runs, str(stand.path))
    assert stand.path.read_bytes() == before
    assert stand.leftovers() == []


def _build_as_nobody(runs: str, output: str) -> None:
    if os.geteuid() == 0:  # root writes everywhere
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    build_whole(runs, output)


def test_read_only_folder(source: Path) -> None:
    stand = Stand(source, source)
    before = stand.path.read_bytes()
    stand.folder.chmod(0o555)
    for output in (stand.path, stand.folder / "new.duckdb", stand.folder / "new" / "table.duckdb"):
        outcome = run_child(_build_as_nobody, stand.next_runs, str(output))
        assert outcome.ended
        _check_one_line(outcome, output)
        assert outcome.error is not None
        assert "Permission denied" in outcome.error
    stand.folder.chmod(0o755)
    assert stand.path.read_bytes() == before
    assert stand.leftovers() == []


def test_a_link_is_followed_and_stays(stand: Stand, tmp_path: Path) -> None:
    link = tmp_path / "current.duckdb"
    link.symlink_to(stand.path)
    summary = build({}, runs=stand.next_runs, output=link)
    assert link.is_symlink()
    assert verify(stand.path).content_hash == summary.content_hash == stand.hashes[1 - stand.standing]
    assert stand.leftovers() == []
    stand.path.unlink()  # the link now points to nothing
    build({}, runs=stand.next_runs, output=link)
    assert link.is_symlink()
    assert verify(stand.path).content_hash == verify(link).content_hash


def test_a_missing_folder_is_made(stand: Stand) -> None:
    output = stand.folder / "a" / "b" / "table.duckdb"
    build_whole(stand.next_runs, str(output))
    assert [path.name for path in output.parent.iterdir() if path.suffix != ".lutest-lock"] == ["table.duckdb"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "is a folder"),
        ("pipe", "not a regular file"),
        ("circle", "symbolic links"),
        ("temporary", "name of a temporary file"),
        ("log", "name of a temporary file"),
        ("below a file", "cannot be written"),
    ],
)
def test_outputs_that_cannot_be(kind: str, message: str, tmp_path: Path) -> None:
    output = tmp_path / "table.duckdb"
    if kind == "folder":
        output.mkdir()
    elif kind == "pipe":
        os.mkfifo(output)
    elif kind == "circle":
        output.symlink_to(output)
    elif kind == "temporary":
        output = tmp_path / "table.lutest-tmp"
    elif kind == "log":
        output = tmp_path / "table.duckdb.wal"
    else:
        output.write_text("")
        output = output / "table.duckdb"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BuildError, match=message) as raised:
        build({}, runs=noisy_runs(KEYS, 4), output=output)
    assert str(output) in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_log_beside_the_old_table_is_not_played_back_onto_the_new(stand: Stand) -> None:
    before = stand.path.read_bytes()
    with duckdb.connect(str(stand.path)) as writer:
        writer.execute("UPDATE prefill SET p50_ms = 0.001")  # stands in the log until the writer closes
        with pytest.raises(BuildError, match=r"table\.duckdb\.wal: holds changes to the old table"):
            build_whole(stand.next_runs, str(stand.path))
        assert stand.path.read_bytes() == before
        with pytest.raises(TableError, match="holds changes that another program has not written"):
            verify(stand.path)
        with pytest.raises(TableError, match="log of DuckDB"):
            lutest.load(f"{stand.path}.wal")
    with pytest.raises(TableError, match="seal"):
        verify(stand.path)
    stand.check_next_build_clears()


def test_a_table_that_cannot_be_read_does_not_replace_one(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stand.path.read_bytes()

    @contextlib.contextmanager
    def unreadable(path: object, *_: object) -> Iterator[None]:
        raise TableError(f"{path}: made up")
        yield

    monkeypatch.setattr("lutest.reader.file._open", unreadable)
    with pytest.raises(BuildError, match=r"cannot be read, so it did not replace the old: .*made up"):
        build_whole(stand.next_runs, str(stand.path))
    assert stand.path.read_bytes() == before
    assert stand.leftovers() == []
