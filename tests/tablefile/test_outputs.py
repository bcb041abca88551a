"""A verb that writes replaces only what it would have written itself, and never what it reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from lutest.builder.build import build
from lutest.calibration.calibrate import calibrate
from lutest.cli.main import main
from lutest.reader.errors import BuildError
from lutest.runs.convert import convert
from lutest.tablefile.export import export
from lutest.tablefile.verify import verify
from tests.children import write_runs
from tests.runs_frame import noisy_runs


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, and one of each thing that is written."""
    folder = tmp_path_factory.mktemp("ours")
    write_runs(folder / "runs.jsonl", noisy_runs(runs_per_key=8).drop(columns="decode_steps_ms"))
    build({}, runs=folder / "runs.jsonl", output=folder / "table.duckdb")
    convert(folder / "runs.jsonl", folder / "runs.parquet")
    export(folder / "table.duckdb", folder / "table.json")
    return folder


VERBS: dict[str, Callable[[Path, Path], object]] = {
    "build": lambda ours, output: build({}, runs=ours / "runs.jsonl", output=output),
    "calibrate": lambda ours, output: calibrate(ours / "table.duckdb", ours / "runs.jsonl", output),
    "convert": lambda ours, output: convert(ours / "runs.jsonl", output),
    "export": lambda ours, output: export(ours / "table.duckdb", output),
}
ENDINGS = {"build": ".duckdb", "calibrate": ".duckdb", "convert": ".parquet", "export": ".json"}
WRITTEN = {"build": "table.duckdb", "calibrate": "table.duckdb", "convert": "runs.parquet", "export": "table.json"}
every_verb = pytest.mark.parametrize("verb", VERBS)


def _other_database(path: Path) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE meta (key VARCHAR, value VARCHAR)")
        connection.execute("INSERT INTO meta VALUES ('schema_version', '1')")


def _other_parquet(path: Path) -> None:
    duckdb.execute(f"COPY (SELECT 1 AS a) TO '{path}' (FORMAT parquet)")


@every_verb
@pytest.mark.parametrize(
    ("write", "stands_there"),
    [
        (lambda path: path.write_text("tier,prefill_ms\nlow,3\n"), "a text file stands there"),
        (lambda path: path.write_text('{"per_sample_results": []}'), "a JSON file stands there"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "a file that lutest did not write stands there"),
        (_other_database, "another DuckDB database stands there"),
        (_other_parquet, "another Parquet file stands there"),
    ],
)
def test_what_others_wrote_stays(
    verb: str, write: Callable[[Path], object], stands_there: str, ours: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"mine{ENDINGS[verb]}"
    write(output)
    before = output.read_bytes()
    for path in (output, tmp_path / f"link{ENDINGS[verb]}"):
        if path != output:
            path.symlink_to(output)
        with pytest.raises(BuildError, match=f"{path.name}: {stands_there}, not .*; name another output") as raised:
            VERBS[verb](ours, path)
        assert "\n" not in str(raised.value)
    assert output.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@every_verb
@pytest.mark.parametrize("written", ["table.duckdb", "runs.parquet", "table.json"])
def test_each_verb_replaces_what_it_wrote_and_nothing_else_of_ours(
    verb: str, written: str, ours: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"mine{ENDINGS[verb]}"
    shutil.copy(ours / written, output)
    before = output.read_bytes()
    if written == WRITTEN[verb]:
        VERBS[verb](ours, output)
        return
    with pytest.raises(BuildError, match=r"(a lutest table|`lutest convert` wrote|an export of a lutest table) stands"):
        VERBS[verb](ours, output)
    assert output.read_bytes() == before


@pytest.mark.parametrize("change", ["another schema version", "changed by SQL", "damaged", "empty"])
def test_a_table_is_known_whatever_became_of_it(change: str, ours: Path, tmp_path: Path) -> None:
    output = Path(shutil.copy(ours / "table.duckdb", tmp_path / "table.duckdb"))
    if change == "damaged":
        content = bytearray(output.read_bytes())
        content[20_000:30_000] = bytes(10_000)
        output.write_bytes(content)
    elif change == "empty":
        output.write_bytes(b"")
    else:
        with duckdb.connect(str(output)) as connection:
            connection.execute("UPDATE meta SET value = '0' WHERE key = 'schema_version'")
            if change == "changed by SQL":  # so much that the seal is gone
                connection.execute("CREATE TABLE note AS SELECT * FROM range(200000)")
    VERBS["build"](ours, output)
    verify(output)


def test_a_source_is_never_replaced(ours: Path, tmp_path: Path) -> None:
    for name in ("runs.parquet", "table.duckdb"):
        shutil.copy(ours / name, tmp_path / name)
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
        os.link(tmp_path / name, tmp_path / f"hard-{name}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    runs, table = tmp_path / "runs.parquet", tmp_path / "table.duckdb"
    for prefix in ("", "link-", "hard-", "./../" + tmp_path.name + "/"):
        with pytest.raises(BuildError, match="is one of the sources; name another output"):
            convert([runs], f"{tmp_path}/{prefix}runs.parquet")
        with pytest.raises(BuildError, match="is one of the sources; name another output"):
            calibrate(table, runs, f"{tmp_path}/{prefix}table.duckdb")
    with pytest.raises(BuildError, match="is one of the sources"):  # of a folder, too
        convert([tmp_path], runs)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_line_says_so_in_one_line(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Path(shutil.copy(ours / "runs.jsonl", tmp_path / "runs.jsonl"))
    before = runs.read_bytes()
    assert main(["build", str(runs), "-o", str(runs)]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"lutest: error: {runs}: is one of the sources; name another output\n"
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("Chapter 1\n")
    assert main(["build", str(runs), "-o", str(thesis)]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"lutest: error: {thesis}: a text file stands there, not a lutest table; name another output, or move it away\n"
    )
    assert (runs.read_bytes(), thesis.read_text()) == (before, "Chapter 1\n")
