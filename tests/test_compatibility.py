"""Tables that the oldest and the newest supported versions write are read by the other, to the same numbers.

`.ci/compatibility` names an interpreter of each in LUTEST_OLDEST_PYTHON and LUTEST_NEWEST_PYTHON; without them, this
interpreter stands for both.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest

PROJECT = Path(__file__).parent.parent
PYTHONS = {
    "oldest": os.environ.get("LUTEST_OLDEST_PYTHON", sys.executable),
    "newest": os.environ.get("LUTEST_NEWEST_PYTHON", sys.executable),
}

BUILD = """
import sys
import lutest
lutest.build(runs=sys.argv[1], output=sys.argv[2])
"""

READ = """
import json, sys
import lutest
from lutest.tablefile.sql import run_query
path = sys.argv[1]
lutest.verify(path)
table = lutest.load(path)
key = table.keys[-1]
content = {
    "figures": repr(table.figures),
    "estimates": [
        [entry.prefill_ms(200, q), entry.decode_step_ms(300, q), entry.total_ms(200, 16, q)]
        for entry in map(table.__getitem__, table) for q in table.quantiles
    ],
    "sql": run_query(path, f"SELECT total_ms({', '.join(map(repr, key))}, 200, 16, 0.95)")[1],
}
print(json.dumps(content))
"""


def _run(which: str, code: str, *arguments: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [PYTHONS[which], "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def read(direct_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(writer, reader) → what was read; an interpreter that stands for both writes once."""
    folder = tmp_path_factory.mktemp("compatibility")
    runs = folder / "runs.parquet"
    low = f"SELECT * FROM read_parquet('{direct_runs}') WHERE tier = 'low' AND num_blocks = 16"
    duckdb.execute(f"COPY ({low}) TO '{runs}' (FORMAT parquet)")
    tables: dict[str, Path] = {}
    contents = {}
    for writer, python in PYTHONS.items():
        if python not in tables:
            tables[python] = folder / f"{writer}.duckdb"
            _run(writer, BUILD, runs, tables[python])
        for reader in PYTHONS:
            contents[writer, reader] = json.loads(_run(reader, READ, tables[python]))
    return contents


@pytest.mark.parametrize("writer", PYTHONS)
def test_both_read_the_same_numbers(writer: str, read: dict[tuple[str, str], Any]) -> None:
    oldest, newest = read[writer, "oldest"], read[writer, "newest"]
    assert oldest["figures"] == newest["figures"]
    for one, other in zip(oldest["estimates"], newest["estimates"], strict=True):
        assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(one, other, strict=True))
    for content in (oldest, newest):
        assert math.isclose(content["sql"][0][0], content["estimates"][-1][2], rel_tol=1e-9)


def test_both_write_much_the_same(read: dict[tuple[str, str], Any]) -> None:
    oldest, newest = read["oldest", "newest"], read["newest", "newest"]
    # solvers of different versions may choose between fits that are equally good
    for one, other in zip(oldest["estimates"], newest["estimates"], strict=True):
        assert all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(one, other, strict=True))
