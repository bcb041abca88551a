"""Appending to a table: the table that a build of all runs gives, from parts alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

import lutest
from lutest.reader.errors import BuildError, LutestError
from tests.runs_frame import noisy_runs

UNTOUCHED = ".orphan.part"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """With steps and without, on a clock of 1 ms, with runs of another file, and slow ones that are a mode together."""
    folder = tmp_path_factory.mktemp("files")
    first = noisy_runs(runs_per_key=30, seed=1)
    untimed = noisy_runs(runs_per_key=8, seed=2).drop(columns="decode_steps_ms")
    coarse = noisy_runs(runs_per_key=12, seed=3).round({"prefill_ms": 0, "decode_ms": 0})
    coarse["decode_steps_ms"] = [[max(round(step), 1) for step in steps] for steps in coarse["decode_steps_ms"]]
    coarse["decode_ms"] = [float(sum(steps)) for steps in coarse["decode_steps_ms"]]
    slow = [
        noisy_runs(runs_per_key=1, seed=4 + i).assign(prefill_ms=lambda held: held["prefill_ms"] * 9) for i in range(3)
    ]
    frames = [first, untimed, coarse, pd.concat([first.iloc[::7], slow[0]]), *slow[1:]]
    paths = []
    for number, frame in enumerate(frames):
        paths.append(folder / f"{number}.jsonl")
        frame.to_json(paths[-1], orient="records", lines=True)
    return paths


@pytest.fixture(scope="module")
def whole(files: Sequence[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return lutest.build(runs=files, output=tmp_path_factory.mktemp("whole") / "t.duckdb", threads=1).content_hash


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 3, 0, 2, 4, 1)], ids=str)
def test_the_table_of_all_runs_without_the_old_sources(
    order: Sequence[int], files: Sequence[Path], whole: str, tmp_path: Path
) -> None:
    table = tmp_path / "t[1].duckdb"  # a name that stands for others in a pattern
    moved = [tmp_path / f"{files[number].parent.name}" / files[number].name for number in order]
    moved[0].parent.mkdir()
    for number, path in zip(order, moved, strict=True):
        path.write_bytes(files[number].read_bytes())
    lutest.build(runs=moved[:2], output=table, keep_parts=True, memory_limit="1GB", temp_dir=tmp_path)
    for path in moved[:2]:
        path.unlink()
    (tmp_path / "t[1].duckdb.parts" / UNTOUCHED).touch()
    lutest.append(table, moved[2])
    assert lutest.append(table, [moved[2], *moved[3:]]).content_hash == whole
    lutest.verify(table)
    kept = sorted(path.name for path in (tmp_path / "t[1].duckdb.parts").iterdir())
    assert len(kept) == 6
    assert UNTOUCHED not in kept
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"t[1].duckdb", "t[1].duckdb.parts", ".t[1].duckdb.lutest-lock", moved[0].parent.name}


def test_what_cannot_be_appended_to(files: Sequence[Path], tmp_path: Path) -> None:
    table = tmp_path / "t.duckdb"
    with pytest.raises(LutestError, match=r"t\.duckdb"):
        lutest.append(table, files[0])
    lutest.build(runs=files[0], output=table, keep_parts=True)
    before = table.read_bytes()
    (part,) = (tmp_path / "t.duckdb.parts").iterdir()
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(LutestError, match="empty"):
        lutest.append(table, [files[1], empty])
    assert list((tmp_path / "t.duckdb.parts").iterdir()) == [part]
    part.unlink()
    with pytest.raises(BuildError, match=r"is gone.*--keep-parts"):
        lutest.append(table, files[1])
    assert table.read_bytes() == before
    lutest.build(runs=files[0], output=table)
    assert not (tmp_path / "t.duckdb.parts").exists()
    with pytest.raises(BuildError, match=r"without --keep-parts"):
        lutest.append(table, files[1])


@pytest.mark.parametrize("limit", [{"memory_limit": "lots"}, {"threads": 0}, {"temp_dir": "nowhere"}])
def test_limits_that_are_none(limit: dict[str, object], files: Sequence[Path], tmp_path: Path) -> None:
    with pytest.raises(LutestError, match=next(iter(limit)) + "|nowhere"):
        lutest.build(runs=files[0], output=tmp_path / "t.duckdb", **limit)  # type: ignore[arg-type]
    assert not (tmp_path / "t.duckdb").exists()
