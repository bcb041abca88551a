"""Every example of the README runs on the table that its first command builds."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import duckdb
import pytest

from lutest.cli.main import main
from lutest.tablefile.sql import connect

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def _blocks(language: str) -> list[str]:
    after_start = README.split("\n## Start\n")[1].split("\n## ", 1)[1]
    return [code for name, code in FENCED.findall(after_start) if name == language]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped runs, their table, results of one's own, and a few of a slower device."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(PROJECT / "tables", folder / "tables", ignore=shutil.ignore_patterns("*.duckdb", ".*"))
    (folder / "results").mkdir()
    runs = PROJECT / "tables" / "runs" / "direct.parquet"
    shutil.copy(runs, folder / "results")
    (folder / "new-device").mkdir()
    few = duckdb.execute("SELECT * EXCLUDE (decode_steps_ms) FROM read_parquet(?)", [str(runs)]).df()
    few = few.sample(60, random_state=0)
    for latency in ("prefill_ms", "decode_ms", "total_ms"):
        few[latency] *= 1.5
    few.to_csv(folder / "new-device" / "runs.csv", index=False)
    assert main(["build", str(folder / "tables" / "build.yaml")]) == 0
    return folder


def test_start_holds_exactly_two_commands() -> None:
    blocks = FENCED.findall(_section("Start"))
    assert [language for language, _ in blocks] == ["sh", "sh"]
    assert [code.count("\n") for _, code in blocks] == [1, 1]
    build, test = (code.strip() for _, code in blocks)
    assert build.endswith("lutest build")
    assert test.endswith("-m pytest")


def test_python_examples(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = _blocks("python")
    assert len(blocks) >= 3
    monkeypatch.chdir(project)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_sql_examples(project: Path) -> None:
    blocks = _blocks("sql")
    assert len(blocks) >= 4
    with connect(project / "tables" / "olmoe-cpu-direct.duckdb") as connection:
        for block in blocks:
            cursor = connection.execute(block)
            assert cursor.description
            rows = cursor.fetchall()
            assert rows or "rejected_runs" in block, block


def test_command_examples(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [shlex.split(line) for block in _blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 5
    monkeypatch.chdir(project)
    for command in commands:
        assert command[0] == "lutest"
        assert main(command[1:]) == 0, command
        printed = capsys.readouterr()
        assert printed.out
        assert printed.err == ""
