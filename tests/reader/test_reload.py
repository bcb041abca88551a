"""load(reload=True): a handle that follows its file, in threads and processes, while it is rebuilt."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lutest
from lutest import LatencyTable, TableError
from lutest.reader.figures import Figures
from lutest.reader.loading import ReloadingTable
from tests.synthetic import make_figures, write_file

KEY = ("low", 4, 16)
SCALES = (1.0, 2.0, 4.0)


def scaled(scale: float) -> Figures:
    """The synthetic table with all prefill times multiplied; powers of two, so that it is exact."""
    keys = tuple(
        replace(
            held,
            prefill=replace(held.prefill, quantiles_ms=tuple(scale * x for x in held.prefill.quantiles_ms)),
            prefill_curve=replace(
                held.prefill_curve,
                values_ms=tuple(tuple(scale * x for x in row) for row in held.prefill_curve.values_ms),
            ),
        )
        for held in make_figures().keys
    )
    return replace(make_figures(), keys=keys)


BASE = LatencyTable(scaled(1.0))[KEY].prefill_ms(77, 0.95)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three whole tables; the one called by scale has all its prefill times multiplied by it."""
    folder = tmp_path_factory.mktemp("files")
    return [write_file(scaled(scale), folder / f"{scale:g}.duckdb") for scale in SCALES]


@pytest.fixture
def path(tmp_path: Path, files: list[Path]) -> Path:
    place = tmp_path / "table.duckdb"
    put(files[0], place)
    return place


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lutest.reader.loading.CHECK_EVERY_S", 0.0)


def put(file: Path, place: Path) -> None:
    """As a build does: under another name first, then renamed."""
    temporary = place.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    shutil.copyfile(file, temporary)
    temporary.replace(place)


def scale_of(table: Any) -> float:
    return float(table[KEY].prefill_ms(77, 0.95) / BASE)


@pytest.mark.usefixtures("at_once")
def test_a_rebuilt_file_is_picked_up(path: Path, files: list[Path]) -> None:
    table = lutest.load(path, reload=True)
    before, entry = table.current, table[KEY]
    assert scale_of(table) == 1.0
    put(files[1], path)
    assert scale_of(table) == 2.0
    assert table.current is table.current
    assert scale_of(before) == 1.0
    assert entry.prefill_ms(77, 0.95) == BASE
    assert table[KEY].prefill_ms(77, 0.95) == 2.0 * BASE


def test_it_has_all_that_a_table_has(path: Path) -> None:
    table = lutest.load(path, missing="interpolate", reload=True)
    plain = table.current
    assert isinstance(plain, LatencyTable)
    assert len(table) == 12
    assert list(table) == list(plain)
    assert KEY in table
    assert table.lookup(*KEY) is plain.lookup(*KEY)
    assert table.lookup("low", 5, 13).source == "interpolated"
    assert table.feasible(100.0) == plain.feasible(100.0)
    assert table.batch is plain.batch
    assert "reloading <LatencyTable" in repr(table)
    assert {"feasible", "current", "batch", "keys"} <= set(dir(table))
    with pytest.raises(AttributeError, match="nothing"):
        _ = table.nothing
    with pytest.raises(AttributeError, match="_nothing"):
        _ = table._nothing


def test_it_does_not_look_at_every_call(path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    table = lutest.load(path, reload=True)
    put(files[1], path)
    assert scale_of(table) == 1.0
    now += 0.51
    assert scale_of(table) == 2.0


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "no table"])
def test_a_file_that_cannot_be_read_changes_nothing(path: Path, files: list[Path], damage: str) -> None:
    table = lutest.load(path, reload=True)
    if damage == "gone":
        path.unlink()
    else:
        whole = files[1].read_bytes()
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "no table": b"not a table"}[damage])
    with pytest.warns(RuntimeWarning, match=r"table\.duckdb: not read anew, the old table goes on: ."):
        assert scale_of(table) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scale_of(table) == 1.0
    put(files[2], path)
    assert scale_of(table) == 4.0


def test_the_first_table_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such table file"):
        lutest.load(tmp_path / "nothing.duckdb", reload=True)


@pytest.mark.usefixtures("at_once")
def test_the_module_level_lookup_follows(path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lutest.reader.loading, "_current", None)
    monkeypatch.setattr(lutest.reader.loading, "_current_entries", {})
    assert isinstance(lutest.use(lutest.load(path, reload=True)), ReloadingTable)
    assert lutest.lookup(*KEY).prefill_ms(77, 0.95) == BASE
    put(files[1], path)
    assert lutest.lookup(*KEY).prefill_ms(77, 0.95) == 2.0 * BASE


@pytest.mark.usefixtures("at_once")
def test_pickled_it_brings_its_table_and_goes_on_following(path: Path, files: list[Path]) -> None:
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(lutest.load(path, reload=True), 5, buffer_callback=buffers.append)
    other = pickle.loads(content, buffers=buffers)
    put(files[1], path)
    assert scale_of(other) == 2.0
    path.unlink()
    elsewhere = pickle.loads(content, buffers=buffers)
    with pytest.warns(RuntimeWarning, match="it is gone"):
        assert scale_of(elsewhere) == 1.0


@pytest.mark.usefixtures("at_once")
def test_a_fork_in_the_middle_of_a_reload_still_follows(path: Path, files: list[Path]) -> None:
    table = lutest.load(path, reload=True)
    table._claims[os.getpid()] = object()  # as another thread holds it while it reads
    put(files[1], path)
    assert scale_of(table) == 1.0
    context: Any = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_say_scale, args=(table, answers))
    child.start()
    assert answers.get(timeout=60) == 2.0
    child.join(60)


def _say_scale(table: Any, answers: Any) -> None:
    answers.put(scale_of(table))


def hammer(table: Any, until_s: float) -> set[tuple[float, ...]]:
    """Scales that were seen within one call each: those of a whole table are all the same."""
    seen = set()
    keys = list(table)
    while time.monotonic() < until_s:
        entries = table.current
        answers = entries.batch.prefill_ms(range(len(keys)), 77, 0.95)
        first = tuple(sorted({round(float(x) / y, 9) for x, y in zip(answers, _expected(), strict=True)}))
        seen.add(first)
        seen.add((scale_of(table),))
    return seen


def _expected() -> list[float]:
    global _EXPECTED
    if not _EXPECTED:
        base = LatencyTable(scaled(1.0))
        _EXPECTED = [base[key].prefill_ms(77, 0.95) for key in base]
    return _EXPECTED


_EXPECTED: list[float] = []


def _hammer_in_child(table: Any, seconds: float, answers: Any) -> None:
    warnings.simplefilter("error")
    import lutest.reader.loading

    lutest.reader.loading.CHECK_EVERY_S = 0.0
    answers.put(hammer(table, time.monotonic() + seconds))


@pytest.mark.usefixtures("at_once")
def test_threads_and_processes_hammer_it_while_it_is_rebuilt(path: Path, files: list[Path]) -> None:
    table = lutest.load(path, reload=True)
    children, answers = [], []
    for method in ("fork", "spawn"):
        context: Any = multiprocessing.get_context(method)
        for _ in range(2):
            answers.append(context.Queue())
            children.append(context.Process(target=_hammer_in_child, args=(table, 1.0, answers[-1])))
    for child in children:
        child.start()
    seen: list[set[tuple[float, ...]]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            seen.append(hammer(table, time.monotonic() + 1.5))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    rebuilds = 0
    while any(thread.is_alive() for thread in threads):
        rebuilds += 1
        put(files[rebuilds % 3], path)
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    seen += [queue.get(timeout=60) for queue in answers]
    for child in children:
        child.join(60)
    assert failures == []
    assert [child.exitcode for child in children] == [0] * len(children)
    assert rebuilds > 3
    assert len(seen) == 8 + len(children)
    whole = {(scale,) for scale in SCALES}
    assert all(found <= whole for found in seen)
    assert len(set().union(*seen)) > 1
