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
from lutest.table import LatencyTable
from tests.synthetic import make_figures, write_file

PACKAGE = Path(lutest.__file__).parent
BASE = {"errors", "schema", "figures"}
# the reading side: module or package → those beside the base that it may import
READING = {
    "seal": set(),
    "integrity": set(),
    "checked_figures": set(),
    "export_reader": {"checked_figures"},
    "reader": {"checked_figures", "export_reader", "seal"},
    "verify": {"export_reader", "integrity", "reader", "seal", "sql"},
    "arguments": set(),
    "pieces": set(),
    "explanation": set(),
    "lengths": set(),
    "interpolate": set(),
    "rows": set(),
    "evidence": set(),
    "unknown_keys": set(),
    "token_search": {"arguments", "pieces"},
    "estimate": {"arguments", "evidence", "explanation", "lengths", "pieces", "rows", "token_search"},
    "grid": {"pieces"},
    "batch_arguments": {"arguments", "grid"},
    "batch": {"arguments", "batch_arguments", "grid", "pieces"},
    "search": {"arguments", "estimate"},
    "drift": set(),
    "stage_maps": set(),
    "online": {"arguments", "drift", "estimate", "search", "stage_maps", "table"},
    "torch_module": {"arguments", "grid", "pieces"},
    "table": {
        *("batch", "estimate", "explanation", "grid", "interpolate", "lengths", "pieces", "rows", "search"),
        *("torch_module", "unknown_keys"),
    },
    "loading": {"integrity", "reader", "reloading", "table", "verify"},
    "current": {"estimate", "loading", "reloading", "table"},
    "reloading": {"estimate", "loading", "table"},
    "reward": {"arguments", "estimate", "loading", "table"},
}
# what else they may import; all but NumPy inside functions, and so by nobody who does not call them
OTHERS = {
    **{module: {"numpy"} for module in ("batch", "batch_arguments", "grid", "interpolate")},
    **{module: {"duckdb"} for module in ("reader", "integrity", "verify")},
    "table": {"numpy", "torch"},
    "torch_module": {"numpy", "torch"},
    "reward": {"torch"},
}
STAGES = {"sources", "runs", "clean", "aggregate", "fit", "store"}
# what stages share with the reading side: what a finished file is
SHARED = {"integrity", "seal"}
HEAVY = {"pandas", "scipy", "duckdb", "numpy", "torch", "yaml", "tqdm"}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules and packages of lutest, and top-level packages, that a module or package imports anywhere."""
    own, others = set(), set()
    place = PACKAGE / module
    for file in place.glob("**/*.py") if place.is_dir() else [place.with_suffix(".py")]:
        folder = [PACKAGE.name, *file.relative_to(PACKAGE).parent.parts]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = folder[: len(folder) - node.level + 1] if node.level else []
                whole = ".".join([*inside, *filter(None, [node.module])])
                names = [f"{whole}.{alias.name}" for alias in node.names] if whole == PACKAGE.name else [whole]
            for name in names:
                root, _, rest = name.partition(".")
                if root == PACKAGE.name:
                    own.add(rest.partition(".")[0])
                else:
                    others.add(root)
    return own - {module}, others - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", sorted(BASE))
def test_the_base_imports_only_itself(module: str) -> None:
    own, others = imports(module)
    assert own <= BASE
    assert not others


@pytest.mark.parametrize("module", READING)
def test_the_reading_side_imports_what_the_map_allows(module: str) -> None:
    own, others = imports(module)
    assert own <= BASE | READING[module]
    assert others <= OTHERS.get(module, set())


@pytest.mark.parametrize("module", sorted(STAGES))
def test_a_stage_imports_no_other_stage_and_nothing_of_the_reading_side(module: str) -> None:
    assert not imports(module)[0] & ((STAGES | set(READING)) - {module} - SHARED)


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
    code = f"import pickle\ntable = pickle.load(open({str(path)!r}, 'rb'))\ntable.total_ms('low', 4, 12, 50, 9, 0.95)"
    assert heavy_after(code) == ["numpy"]


def test_the_facade_is_pinned() -> None:
    assert sorted(lutest.__all__) == [
        "ArgumentError",
        "BuildError",
        "ConfigError",
        "Entry",
        "Explanation",
        "Key",
        "LatencyTable",
        "LutestError",
        "NoDecodeDataError",
        "OnlineCalibrator",
        "SourceError",
        "TableError",
        "UnknownKeyError",
        "__version__",
        "build",
        "calibrate",
        "check",
        "convert",
        "diagnose",
        "evaluate",
        "export",
        "load",
        "lookup",
        "plan",
        "use",
    ]
    assert all(getattr(lutest, name) is not None for name in lutest.__all__)
    assert set(lutest.__all__) <= set(dir(lutest))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lutest.nothing


def test_builder_verbs_stay_functions_once_their_modules_are_imported() -> None:
    code = "import lutest.build, lutest.convert, lutest\nassert callable(lutest.build) and callable(lutest.convert)"
    assert "duckdb" in heavy_after(code)


def test_an_online_calibrator_needs_no_builder() -> None:
    code = "import lutest\nassert lutest.OnlineCalibrator.__module__ == 'lutest.online.calibrator'"
    assert set(heavy_after(code)) <= {"numpy"}


def test_the_version_is_that_of_the_project() -> None:
    project = PACKAGE.parent / "pyproject.toml"
    assert f'version = "{lutest.__version__}"' in project.read_text(encoding="utf-8").splitlines()
