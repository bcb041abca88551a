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
# the reading side: module → modules beside the base that it may import
READING = {
    "reader": set(),
    "arguments": set(),
    "pieces": set(),
    "explanation": set(),
    "interpolate": set(),
    "estimate": {"arguments", "explanation", "pieces"},
    "grid": {"pieces"},
    "batch": {"arguments", "grid", "pieces"},
    "table": {"arguments", "batch", "estimate", "explanation", "grid", "interpolate", "pieces", "reader"},
}
NUMPY = {"grid", "batch", "interpolate"}
STAGES = {"sources", "runs", "clean", "aggregate", "fit", "store"}
HEAVY = {"pandas", "scipy", "duckdb", "numpy", "yaml", "tqdm"}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of lutest, and top-level packages, that a module imports anywhere."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = ".".join(filter(None, ["lutest" if node.level else "", node.module]))
            names = [f"{whole}.{alias.name}" for alias in node.names] if whole == "lutest" else [whole]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "lutest":
                own.add(rest.partition(".")[0])
            else:
                others.add(root)
    return own, others - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", sorted(BASE))
def test_the_base_imports_only_itself(module: str) -> None:
    own, others = imports(module)
    assert own <= BASE
    assert not others


@pytest.mark.parametrize("module", READING)
def test_the_reading_side_imports_what_the_map_allows(module: str) -> None:
    own, others = imports(module)
    assert own <= BASE | READING[module]
    assert others <= ({"numpy"} if module in NUMPY else {"duckdb"} if module == "reader" else set())


@pytest.mark.parametrize("module", sorted(STAGES))
def test_a_stage_imports_no_other_stage_and_nothing_of_the_reading_side(module: str) -> None:
    assert not imports(module)[0] & ((STAGES | set(READING)) - {module})


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
        "SourceError",
        "TableError",
        "UnknownKeyError",
        "__version__",
        "build",
        "convert",
        "load",
        "lookup",
        "use",
    ]
    assert all(getattr(lutest, name) is not None for name in lutest.__all__)
    assert set(lutest.__all__) <= set(dir(lutest))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lutest.nothing


def test_builder_verbs_stay_functions_once_their_modules_are_imported() -> None:
    code = "import lutest.build, lutest.convert, lutest\nassert callable(lutest.build) and callable(lutest.convert)"
    assert "duckdb" in heavy_after(code)


def test_the_version_is_that_of_the_project() -> None:
    project = PACKAGE.parent / "pyproject.toml"
    assert f'version = "{lutest.__version__}"' in project.read_text(encoding="utf-8").splitlines()
