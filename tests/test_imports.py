"""Which module may import which, and what `import lutest` brings in."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import lutest
from lutest.reader.table import LatencyTable
from tests.synthetic import make_figures, write_file

PACKAGE = Path(lutest.__file__).parent
HEAVY = {"pandas", "scipy", "duckdb", "numpy", "torch", "yaml", "tqdm", "altair"}


def test_the_reader_imports_the_standard_library_and_numpy_alone() -> None:
    for file in sorted((PACKAGE / "reader").glob("**/*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        delayed = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.If)]
        inside = {node for outer in delayed for node in ast.walk(outer)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            allowed = {"lutest.reader", "numpy", *sys.stdlib_module_names}
            if node in inside or file.name == "torch_module.py":  # which itself is imported inside of a function
                allowed |= {"duckdb", "pandas", "torch"}
            for name in names:
                root = ".".join(name.split(".")[:2]) if name.startswith("lutest") else name.split(".")[0]
                assert root in allowed, f"{file}: {name}"


def heavy_after(code: str) -> list[str]:
    """Which of the heavy packages a new process holds after running code."""
    ask = f"import json, sys; print(json.dumps(sorted({HEAVY} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ask}"], check=True, capture_output=True, text=True)
    held: list[str] = json.loads(done.stdout)
    return held


def test_importing_lutest_loads_nothing_heavy() -> None:
    assert heavy_after("import lutest") == []


def test_loading_a_table_loads_numpy_and_duckdb_only(tmp_path: Path) -> None:
    path = write_file(make_figures(), tmp_path / "table.duckdb")
    code = f"import lutest\nlutest.load({str(path)!r}).batch.total_ms(0, 5, 5, 0.95)"
    assert set(heavy_after(code)) == {"duckdb", "numpy"}


def test_a_pickled_table_needs_no_duckdb(tmp_path: Path) -> None:
    path = tmp_path / "table.pickle"
    path.write_bytes(pickle.dumps(LatencyTable(make_figures())))
    code = f"import pickle\ntable = pickle.load(open({str(path)!r}, 'rb'))\ntable['low', 4, 12].total_ms(50, 9, 0.95)"
    assert heavy_after(code) == []


def test_the_facade_is_pinned() -> None:
    assert sorted(lutest.__all__) == [
        "ArgumentError",
        "BuildError",
        "Columns",
        "ConfigError",
        "Entry",
        "Explanation",
        "Key",
        "LatencyOutcome",
        "LatencyReward",
        "LatencyTable",
        "LutestError",
        "LutestWarning",
        "NoDecodeDataError",
        "OnlineCalibrator",
        "OpenRLHFReward",
        "Recorder",
        "SourceError",
        "TRLReward",
        "TableError",
        "UnknownKeyError",
        "VerifiersReward",
        "VerlReward",
        "Weights",
        "__version__",
        "append",
        "build",
        "calibrate",
        "charts",
        "check",
        "convert",
        "diagnose",
        "diff",
        "evaluate",
        "export",
        "load",
        "lookup",
        "plan",
        "record_generate",
        "report",
        "tensor_reward",
        "use",
        "verify",
    ]
    assert all(getattr(lutest, name) is not None for name in lutest.__all__)
    assert set(lutest.__all__) <= set(dir(lutest))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lutest.nothing


def test_an_online_calibrator_needs_no_builder() -> None:
    code = "import lutest\nassert lutest.OnlineCalibrator.__module__ == 'lutest.calibration.online'"
    assert set(heavy_after(code)) <= {"numpy"}


def test_the_version_is_that_of_the_project() -> None:
    project = PACKAGE.parent / "pyproject.toml"
    assert f'version = "{lutest.__version__}"' in project.read_text(encoding="utf-8").splitlines()
