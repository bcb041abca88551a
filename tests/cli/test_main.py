"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

import lutest
from lutest.cli.main import main

COMMANDS = ("build", "convert", "export", "info", "lookup", "feasible", "sql")
PROJECT = Path(__file__).parents[2]


class Printed:
    """Runs the command line in this process and returns what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> str:
        """Standard output of a command that succeeds without a word on standard error."""
        self._capsys.readouterr()
        assert main(list(map(str, arguments))) == 0
        printed = self._capsys.readouterr()
        assert printed.err == ""
        return printed.out

    def json(self, *arguments: object) -> Any:
        """What a command prints with --json."""
        return json.loads(self(*arguments, "--json"))

    def error(self, *arguments: object) -> str:
        """The one line of a command that fails with exit code 2 and prints nothing else."""
        self._capsys.readouterr()
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else -1
        printed = self._capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert printed.err.startswith("lutest: error: ")
        assert printed.err.count("\n") == 1
        assert printed.err.endswith("\n")
        return printed.err


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    return Printed(capsys)


def _process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "lutest", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, **options}
    return subprocess.run(command, text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1]
    assert example.strip().startswith(f"lutest {command} ")


def test_build_prints_a_summary_with_every_key(direct_runs: Path, tmp_path: Path, printed: Printed) -> None:
    output = tmp_path / "mine.duckdb"
    text = printed("build", "--runs", direct_runs, "-o", output)
    lines = text.splitlines()
    table = lutest.load(output)
    header = next(number for number, line in enumerate(lines) if line.startswith("tier "))
    shown = [line.split() for line in lines[header + 1 : header + 1 + len(table.keys)]]
    assert [(tier, int(top_k), int(blocks)) for tier, top_k, blocks, *_ in shown] == [tuple(key) for key in table.keys]
    for (*_, n, p50, p95, step, _step_p95), key in zip(shown, table.keys, strict=True):
        entry = table.lookup(*key)
        assert int(n) == entry.n
        assert entry.prefill_p95_ms is not None
        assert entry.decode_step_p50_ms is not None
        assert [float(p50), float(p95), float(step)] == pytest.approx(
            [entry.prefill_p50_ms, entry.prefill_p95_ms, entry.decode_step_p50_ms], abs=0.06
        )
    assert table.meta["content_hash"] in lines[-1]
    assert str(output) in lines[-1]
    assert "rejected: outlier" in text


def test_build_json_accounts_for_every_run(subtraction_runs: Path, tmp_path: Path, printed: Printed) -> None:
    summary = printed.json("build", "--runs", subtraction_runs, "-o", tmp_path / "mine.duckdb")
    (source,) = summary["sources"]
    assert source["rows_read"] == 1956
    assert source["rows_read"] == source["rows_used"] + source["rows_rejected"]
    assert sum(summary["rejected"].values()) == source["rows_rejected"]
    assert summary["n_clamped"] > 0
    assert len(summary["keys"]) == 12


def test_build_reads_the_configuration_by_default(
    direct_runs: Path, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    shutil.copy(direct_runs, tmp_path / "tables" / "direct.parquet")
    (tmp_path / "tables" / "build.yaml").write_text("sources: direct.parquet\noutput: here.duckdb\n")
    monkeypatch.chdir(tmp_path)
    assert "here.duckdb" in printed("build")
    assert (tmp_path / "tables" / "here.duckdb").is_file()


def test_many_sources_are_summed_up(tmp_path: Path, printed: Printed) -> None:
    for number in range(25):
        (tmp_path / f"{number}.csv").write_text(
            "tier,top_k,num_blocks,prompt_tokens,output_tokens,prefill_ms,decode_ms\n"
            + "".join(f"low,4,12,{100 + row},2,{200 + row + number / 7},46.{number}{row}\n" for row in range(4))
        )
    text = printed("build", "--runs", tmp_path, "-o", tmp_path / "mine.duckdb")
    assert text.count(".csv") == 20
    assert "… 25 sources in all: 100 runs read" in text


def test_convert_says_what_it_wrote(direct_runs: Path, tmp_path: Path, printed: Printed) -> None:
    output = tmp_path / "runs.parquet"
    assert f"2,025 runs written to {output}" in printed("convert", direct_runs, "-o", output)
    summary = printed.json("convert", direct_runs, "-o", output)
    assert summary["rows"] == 2025
    assert summary["size_bytes"] == output.stat().st_size


def test_info_shows_what_the_table_is(direct_table: Path, printed: Printed) -> None:
    text = printed("info", direct_table)
    assert "CPU, 1 thread, x86_64" in text
    assert "low, medium, high" in text
    assert "2,025 runs read" in text
    content = printed.json("info", direct_table)
    assert content["meta"]["content_hash"] in text
    assert [key["tier"] for key in content["keys"]] == ["low"] * 9 + ["medium"] * 9 + ["high"] * 9
    assert sum(content["rejected"].values()) == sum(source["rows_rejected"] for source in content["sources"])
    for key in content["keys"]:
        assert key["prompt_tokens_min"] <= key["prompt_tokens_p50"] <= key["prompt_tokens_max"]
        assert key["kv_len_min"] < key["kv_len_max"]


def test_info_says_how_many_runs_thin_keys_want(direct_table: Path, printed: Printed) -> None:
    thin = {tuple(key[name] for name in ("tier", "top_k", "num_blocks", "n")): key["runs_wanted"]
            for key in printed.json("info", direct_table)["keys"] if key["n"] < 59}  # fmt: skip
    assert thin
    text = printed("info", direct_table)
    for (tier, top_k, num_blocks, n), wanted in thin.items():
        assert wanted == 59 - n
        assert f"{tier} {top_k} {num_blocks}: {n} runs, {wanted} more wanted" in text


def test_lookup_prints_the_explanation(direct_table: Path, printed: Printed) -> None:
    table = lutest.load(direct_table)
    arguments = ("low", 8, 16, "--prompt-tokens", 150, "--output-tokens", 32, "-q", 0.95)
    text = printed("lookup", direct_table, *arguments)
    assert text == f"{table.explain('low', 8, 16, 150, 32, 0.95)}\n"
    content = printed.json("lookup", direct_table, *arguments, "--budget-ms", 1500)
    assert content["total"]["value_ms"] == table.total_ms("low", 8, 16, 150, 32, 0.95)
    fitting = table.max_output_tokens("low", 8, 16, 1500, 150, 0.95)
    assert content["max_output_tokens"] == fitting
    assert f"1500 ms fit {fitting} output tokens" in printed("lookup", direct_table, *arguments, "--budget-ms", 1500)


def test_lookup_of_an_unknown_key(direct_table: Path, printed: Printed) -> None:
    assert "'low', 4, 12" in printed.error("lookup", direct_table, "low", 5, 13)
    content = printed.json("lookup", direct_table, "low", 5, 13, "--missing", "interpolate")
    assert content["prefill"]["source"] == "interpolated"
    assert "low" in printed.error("lookup", direct_table, "lwo", 4, 12)


def test_feasible_lists_what_the_reader_finds(direct_table: Path, printed: Printed) -> None:
    table = lutest.load(direct_table)
    for options, expected in (
        ((), table.feasible(700)),
        (("--output-tokens", 8), table.feasible(700, output_tokens=8)),
        (("--prompt-tokens", 300, "-q", 0.5), table.feasible(700, prompt_tokens=300, q=0.5)),
        (("--prefill-share", 0.5, "--margin", 0.1), table.feasible(700, prefill_share=0.5, margin=0.1)),
    ):
        found = printed.json("feasible", direct_table, 700, *options)["feasible"]
        assert [(key["tier"], key["top_k"], key["num_blocks"]) for key in found] == [tuple(key) for key in expected]
        assert 0 < len(found) < len(table.keys)
        rows = printed("feasible", direct_table, 700, *options).splitlines()[2:]
        assert len(rows) == len(found)


def test_feasible_says_when_nothing_fits(direct_table: Path, printed: Printed) -> None:
    assert printed("feasible", direct_table, 1).startswith("none of the 27 configurations has prefill within")
    assert printed.json("feasible", direct_table, 1)["feasible"] == []


def test_sql_forms(direct_table: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    query = "SELECT 'a,b' AS text, 1.25::DOUBLE AS number, NULL AS missing, 1 AS number"
    header, row = printed("sql", direct_table, query).splitlines()
    assert header.split() == ["text", "number", "missing", "number"]
    assert row.split() == ["a,b", "1.250", "–", "1"]
    assert printed.json("sql", direct_table, query) == [{"text": "a,b", "number": 1.25, "missing": None, "number_2": 1}]
    assert list(csv.reader(io.StringIO(printed("sql", direct_table, query, "--csv")))) == [
        ["text", "number", "missing", "number"],
        ["a,b", "1.25", "", "1"],
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT count(*) AS n FROM configs"))
    assert printed.json("sql", direct_table) == [{"n": 27}]


def test_sql_json_is_json_whatever_the_values(direct_table: Path, printed: Printed) -> None:
    query = "SELECT 'nan'::DOUBLE AS a, [1, 2.5] AS b, DATE '2026-01-02' AS c, 1.5::DECIMAL(4, 2) AS d, {'x': 1} AS e"
    assert printed.json("sql", direct_table, query) == [
        {"a": None, "b": [1.0, 2.5], "c": "2026-01-02", "d": 1.5, "e": {"x": 1}}
    ]


def test_sql_is_safe_unless_asked_otherwise(direct_table: Path, tmp_path: Path, printed: Printed) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n42\n")
    query = f"SELECT a FROM read_csv('{secret}')"
    assert "disabled by configuration" in printed.error("sql", direct_table, query)
    assert "42" in printed("sql", direct_table, query, "--unsafe")
    assert "read-only" in printed.error("sql", direct_table, "DELETE FROM prefill", "--unsafe")


def test_sql_limits(direct_table: Path, printed: Printed) -> None:
    endless = "SELECT count(*) FROM range(1000000000000) a, range(1000000) b WHERE (a.range + b.range) % 7 = 9"
    assert "took longer than 0.2 s" in printed.error("sql", direct_table, endless, "--timeout", 0.2)
    assert "took longer than 1e-09 s" in printed.error("sql", direct_table, endless, "--timeout", 1e-9)
    large = "SELECT list(a) FROM range(100000000) r(a)"
    assert "emory" in printed.error("sql", direct_table, large, "--memory-limit", "64MB", "--threads", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lookup", "{table}", "low", "8"), "NUM_BLOCKS"),
        (("lookup", "{table}", "low", "eight", "16"), "'eight'"),
        (("lookup", "{table}", "low", "8", "16", "--prompt-tokens", "-5"), "prompt_tokens is -5"),
        (("lookup", "{table}", "low", "8", "16", "-q", "0.9"), "0.95"),
        (("lookup", "{table}", "low", "8", "16", "--budget-ms", "nan"), "budget_ms is nan"),
        (("lookup", "{nowhere}", "low", "8", "16"), "nowhere"),
        (("feasible", "{table}", "-3"), "budget_ms is -3"),
        (("feasible", "{table}", "100", "--margin", "inf"), "margin is inf"),
        (("feasible", "{text}", "100"), "notes"),
        (("info", "{text}"), "notes"),
        (("info", "{folder}"), "folder"),
        (("sql", "{text}", "SELECT 1"), "notes"),
        (("sql", "{nowhere}", "SELECT 1"), "nowhere"),
        (("sql", "{table}", "SELEC 1"), "syntax error"),
        (("sql", "{table}", "SELECT\nnothing\nFROM\nprefill"), "nothing"),
        (("sql", "{table}", " "), "empty"),
        (("sql", "{table}", "SELECT 1", "--timeout", "0"), "timeout"),
        (("sql", "{table}", "SELECT 1", "--memory-limit", "lots"), "'lots'"),
        (("sql", "{table}", "SELECT 1", "--json", "--csv"), "not allowed"),
        (("build", "{nowhere}"), "nowhere"),
        (("build", "{misspelt}"), "did you mean `sources`"),
        (("build", "--runs", "{folder}", "-o", "{out}"), "no runs in this folder"),
        (("build", "--runs", "{truncated}", "-o", "{out}"), "truncated.json"),
        (("build", "--runs", "{strange}", "-o", "{out}"), "no tier"),
        (("build", "--runs", "{runs}", "-o", "{text}/below.duckdb"), "below.duckdb"),
        (("build", "--runs", "{runs}"), "output"),
        (("convert", "{runs}", "-o", "{text}/below.parquet"), "below.parquet"),
        (("convert", "{nowhere}", "-o", "{out}.parquet"), "nowhere"),
        (("convert", "{runs}"), "--output"),
        ((), "COMMAND"),
        (("biuld",), "biuld"),
    ],
)
def test_bad_input_takes_one_line(
    arguments: tuple[str, ...], message: str, direct_table: Path, direct_runs: Path, tmp_path: Path, printed: Printed
) -> None:
    places = {
        "table": direct_table,
        "runs": direct_runs,
        "nowhere": tmp_path / "nowhere.duckdb",
        "folder": tmp_path / "folder",
        "text": tmp_path / "notes.txt",
        "misspelt": tmp_path / "misspelt.yaml",
        "truncated": tmp_path / "truncated.json",
        "strange": tmp_path / "strange.csv",
        "out": tmp_path / "out.duckdb",
    }
    places["folder"].mkdir()
    places["text"].write_text("no table\n" * 10_000)
    places["misspelt"].write_text("source: x.json\noutput: y.duckdb\n")
    places["truncated"].write_text('{"tier": "low", "per_sample_results": [{"output_tokens": 2, ')
    places["strange"].write_text("a,b\n1,2\n")
    filled = []
    for argument in arguments:
        for name, place in places.items():
            argument = argument.replace(f"{{{name}}}", str(place))
        filled.append(argument)
    assert message in printed.error(*filled)
    assert not places["out"].exists()


def test_a_failed_build_leaves_the_old_table(direct_runs: Path, tmp_path: Path, printed: Printed) -> None:
    output = tmp_path / "mine.duckdb"
    printed("build", "--runs", direct_runs, "-o", output)
    before = output.read_bytes()
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    printed.error("build", "--runs", direct_runs, broken, "-o", output)
    assert output.read_bytes() == before


def test_the_module_runs_and_shows_no_bar_in_a_pipe(direct_runs: Path, tmp_path: Path) -> None:
    done = _process("build", "--runs", direct_runs, "-o", tmp_path / "mine.duckdb")
    assert (done.returncode, done.stderr) == (0, "")
    assert "written to" in done.stdout


def test_a_terminal_gets_a_progress_bar(direct_runs: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(ours, False)
    try:
        done = _process("build", "--runs", direct_runs, "-o", tmp_path / "mine.duckdb", stderr=theirs)
        shown = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert "%" in shown
    assert "direct.parquet" in shown


def test_a_closed_pipe_is_quiet(direct_table: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = _process("sql", direct_table, "FROM range(100000)", stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device of Linux that is always full")
def test_full_output_takes_one_line(direct_table: Path) -> None:
    with open("/dev/full", "w") as full:
        done = _process("info", direct_table, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "lutest: error: No space left on device\n"


def test_output_that_cannot_show_a_sign_still_shows_the_rest(direct_table: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "ascii"}
    done = _process("info", direct_table, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "low, medium, high" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, lutest.cli.main\n"
        "try: lutest.cli.main.main(['build', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.stderr.write(' '.join(sorted({'duckdb', 'numpy', 'pandas', 'scipy', 'tqdm', 'yaml'} & set(sys.modules))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""


def test_an_interrupt_ends_quietly(
    direct_table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lutest, "load", interrupted)
    assert main(["info", str(direct_table)]) == 130
    assert capsys.readouterr() == ("", "")
