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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lutest
from lutest.cli.main import VERBS, main
from tests.runs_frame import noisy_runs

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


@pytest.mark.parametrize("command", VERBS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1]
    assert example.strip().startswith(f"lutest {command} ")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text and verb.summary in text for name, verb in VERBS.items())


def test_build_prints_a_summary_with_every_key(tmp_path: Path, printed: Printed) -> None:
    output = tmp_path / "mine.duckdb"
    frame = noisy_runs(runs_per_key=20)
    frame.loc[3, "prefill_ms"] *= 100
    frame.to_json(tmp_path / "runs.jsonl", orient="records", lines=True)
    text = printed("build", tmp_path / "runs.jsonl", "-o", output)
    lines = text.splitlines()
    table = lutest.load(output)
    header = next(number for number, line in enumerate(lines) if line.startswith("tier "))
    shown = [line.split() for line in lines[header + 1 : header + 1 + len(table.keys)]]
    assert [(tier, int(top_k), int(blocks)) for tier, top_k, blocks, *_ in shown] == list(table.keys)
    for (*_, n, p50, p95, step, _step_p95), key in zip(shown, table.keys, strict=True):
        entry = table.lookup(*key)
        assert int(n) == entry.n
        assert entry.decode_step_p50_ms is not None
        assert [float(p50), float(p95), float(step)] == pytest.approx(
            [entry.prefill_p50_ms, entry.prefill_p95_ms, entry.decode_step_p50_ms], abs=0.06
        )
    assert table.meta["content_hash"] in lines[-1]
    assert str(output) in lines[-1]
    assert "rejected: outlier" in text


def test_build_json_accounts_for_every_run(subtraction_runs: Path, tmp_path: Path, printed: Printed) -> None:
    summary = printed.json("build", subtraction_runs, "-o", tmp_path / "mine.duckdb")
    (source,) = summary["sources"]
    assert source["rows_read"] == 1956
    assert source["rows_read"] == source["rows_used"] + source["rows_rejected"]
    assert sum(summary["rejected"].values()) == source["rows_rejected"]
    assert summary["n_clamped"] > 0
    assert len(summary["keys"]) == 12


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a few runs and the configuration that is read by default."""
    (tmp_path / "tables").mkdir()
    lutest.convert(noisy_runs(runs_per_key=5).drop(columns="decode_steps_ms"), tmp_path / "runs.parquet")
    (tmp_path / "tables" / "build.yaml").write_text("sources: ../runs.parquet\noutput: here.duckdb\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ((), "tables/here.duckdb"),
        (
            ("run*.parquet", "-o", "there.duckdb", "--config", "wrong.yaml", "--set", "quantiles=[0.5, 0.9, 0.95]"),
            "there.duckdb",
        ),
        (("-o", "there.duckdb", "runs.parquet", "--config", "bare.yaml"), "there.duckdb"),
    ],
)
def test_build_takes_runs_and_a_configuration_in_any_order(
    arguments: tuple[str, ...], output: str, project: Path, printed: Printed
) -> None:
    (project / "bare.yaml").write_text("quantiles: [0.5, 0.9, 0.95]\n")
    (project / "wrong.yaml").write_text("sources: none.parquet\noutput: none/none.duckdb\n")
    assert f"written to {output} " in printed("build", *arguments)
    levels = (0.5, 0.9, 0.95) if len(arguments) > 3 else (0.5, 0.95)
    assert lutest.load(project / output).quantiles == levels


def test_other_verbs_take_runs_and_configurations_alike(
    project: Path, printed: Printed, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = noisy_runs(runs_per_key=5).drop(columns="tier").assign(gpu="H100")
    frame.rename(columns={"prefill_ms": "ttft"}).to_json(project / "gpus.jsonl", orient="records", lines=True)
    options = ("--set", "key=[gpu, top_k]", "--set", "columns.prefill_ms=ttft")
    table = project / "gpus.duckdb"
    printed("build", "gpus.jsonl", *options, "-o", table)
    assert lutest.load(table).keys == (("H100", 4), ("H100", 8))
    assert printed.json("evaluate", table, "gpus.jsonl")["n_runs"] == 15  # read as the table was built
    judged = printed.json("evaluate", "--set", "columns.decode_steps_ms=none_of_them", table, "gpus.jsonl")
    assert "decode step" not in [score["stage"] for score in judged["overall"]]
    assert main(["check", str(table), "gpus.jsonl"]) == 3  # fifteen runs are too few to tell
    assert "cannot tell" in capsys.readouterr().out
    assert printed("diagnose", "gpus.jsonl", *options).endswith(" ok\n")
    assert printed.json("diagnose") == printed.json("diagnose", "tables/build.yaml")
    assert printed.json("convert", "-o", "all.parquet")["rows"] == 15
    assert len(printed.json("plan", table, "-n", 3)["runs"][0]) == 3
    assert "gpu" in printed("plan", table, "-n", 3).splitlines()[0]
    assert "H100, " not in printed("info", table)
    assert printed.json("info", table)["key_columns"] == ["gpu", "top_k"]


def test_two_machines_are_mixed_on_purpose_only(project: Path, printed: Printed) -> None:
    frame = noisy_runs(runs_per_key=5).drop(columns="decode_steps_ms").assign(device="desk")
    frame.loc[::2, "device"] = "rack"
    lutest.convert(frame, project / "two.parquet")
    message = printed.error("build", "two.parquet", "-o", "two.duckdb")
    assert "'desk'" in message
    assert "--mixed" in message
    printed("build", "two.parquet", "-o", "two.duckdb", "--mixed")
    assert "runs of 2 devices share figures: built with --mixed" in printed("info", "two.duckdb")


def test_many_sources_are_summed_up(tmp_path: Path, printed: Printed) -> None:
    for number in range(25):
        (tmp_path / f"{number}.csv").write_text(
            "tier,top_k,num_blocks,prompt_tokens,output_tokens,prefill_ms,decode_ms\n"
            + "".join(f"low,4,12,{100 + row},2,{200 + row + number / 7},46.{number}{row}\n" for row in range(4))
        )
    text = printed("build", tmp_path, "-o", tmp_path / "mine.duckdb")
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
    assert "high, low, medium" in text
    assert "2,025 runs read" in text
    content = printed.json("info", direct_table)
    assert content["meta"]["content_hash"] in text
    assert [key["tier"] for key in content["keys"]] == ["high"] * 9 + ["low"] * 9 + ["medium"] * 9
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
    entry = lutest.load(direct_table)["low", 8, 16]
    arguments = ("low", 8, 16, "--prompt-tokens", 150, "--output-tokens", 32)
    assert printed("lookup", direct_table, *arguments, "-q", 0.95) == f"{entry.explain(150, 32, 0.95)}\n"
    assert printed("lookup", "--prompt-tokens", 150, direct_table, "low", 8, 16) == f"{entry.explain(150, 1, 0.5)}\n"
    content = printed.json("lookup", direct_table, *arguments, "--budget-ms", 1500)
    assert content["total"]["value_ms"] == entry.total_ms(150, 32, 0.5)
    fitting = entry.max_output_tokens(1500, 150, 0.95)
    assert content["max_output_tokens"] == fitting
    text = printed("lookup", direct_table, *arguments, "--budget-ms", 1500)
    assert text.endswith(f"1500 ms fit {fitting} output tokens at q = 0.95\n")


def test_lookup_of_an_unknown_key(direct_table: Path, printed: Printed) -> None:
    assert "'low', 4, 14" in printed.error("lookup", direct_table, "low", 5, 13)
    content = printed.json("lookup", direct_table, "low", 5, 13, "--missing", "interpolate")
    assert content["prefill"]["source"] == "interpolated"
    assert "low" in printed.error("lookup", direct_table, "lwo", 4, 12)


def test_a_table_has_the_key_that_it_has(serving_table: Path, printed: Printed) -> None:
    table = lutest.load(serving_table)
    expected = table["H100", 2, 64].explain(100, 1, 0.5)
    assert printed("lookup", serving_table, "H100", 2, "64.0", "--prompt-tokens", 100) == f"{expected}\n"
    found = printed.json("feasible", serving_table, 500, "--prompt-tokens", "A100=40,H100=30")["feasible"]
    keys = [(key["gpu"], key["n_gpus"], key["users"]) for key in found]
    assert keys == list(table.feasible(500, prompt_tokens={"A100": 40, "H100": 30}))
    assert 0 < len(keys) < len(table.keys)
    assert [key["prefill_ms"] for key in found] == [
        table[key].prefill_ms(40 if key[0] == "A100" else 30, 0.95) for key in keys
    ]


def test_feasible_lists_what_the_reader_finds(direct_table: Path, printed: Printed) -> None:
    table = lutest.load(direct_table)
    by_tier = {"low": 100, "medium": 300, "high": 500}
    for options, expected in (
        ((), table.feasible(700)),
        (("--output-tokens", 8), table.feasible(700, output_tokens=8)),
        (("--prompt-tokens", 300, "-q", 0.5), table.feasible(700, prompt_tokens=300, q=0.5)),
        (("--prefill-share", 0.5, "--margin", 0.1), table.feasible(700, prefill_share=0.5, margin=0.1)),
        (("--prompt-tokens", "tier:low=100,medium=300,high=500"), table.feasible(700, prompt_tokens=by_tier)),
        (("--prompt-tokens", "low=100,medium=300,high=500,ultra=900"), table.feasible(700, prompt_tokens=by_tier)),
        (("--p-at-least", 0.4), table.feasible(700, p_at_least=0.4)),
        (("--by", "expected", "--prompt-tokens", 200), table.feasible(700, prompt_tokens=200, by="expected")),
    ):
        found = printed.json("feasible", direct_table, 700, *options)["feasible"]
        assert [(key["tier"], key["top_k"], key["num_blocks"]) for key in found] == list(expected)
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
    endless = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"
    assert "took longer than 0.2 s" in printed.error("sql", direct_table, endless, "--timeout", 0.2)
    assert "took longer than 1e-09 s" in printed.error("sql", direct_table, endless, "--timeout", 1e-9)
    large = "SELECT list(a) FROM range(100000000) r(a)"
    assert "emory" in printed.error("sql", direct_table, large, "--memory-limit", "64MB", "--threads", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lookup", "{table}", "low", "8"), "give TIER TOP_K NUM_BLOCKS, such as high 4 12"),
        (("lookup", "{table}"), "0 values of a configuration of 3 columns"),
        (("lookup", "{table}", "low", "eight", "16"), "top_k is 'eight'; it is a number in this table, such as 4"),
        (("lookup", "{table}", "8", "low", "16"), "top_k is 'low'"),
        (("lookup", "{table}", "4", "8", "16"), "'4'"),
        (("lookup", "{table}", "low", "8", "16", "--prompt-tokens", "-5"), "prompt_tokens is -5"),
        (("lookup", "{table}", "low", "8", "16", "-q", "0.9"), "0.95"),
        (("lookup", "{table}", "low", "8", "16", "--budget-ms", "nan"), "budget_ms is nan"),
        (("lookup", "{nowhere}", "low", "8", "16"), "nowhere"),
        (("feasible", "{table}", "-3"), "budget_ms is -3"),
        (("feasible", "{table}", "100", "--margin", "inf"), "margin is inf"),
        (("feasible", "{table}", "100", "--prompt-tokens", "many"), "'many' for a number of tokens"),
        (("feasible", "{table}", "100", "--prompt-tokens", "low=100"), "medium"),
        (("feasible", "{table}", "100", "--prompt-tokens", "tiny=100"), "tier 'high', 'low', 'medium'"),
        (("feasible", "{serving}", "100", "--prompt-tokens", "1=9,4=9"), "fits n_gpus and users: name the column"),
        (("feasible", "{table}", "100", "--p-at-least", "0.9", "-q", "0.5"), "q"),
        (("feasible", "{table}", "100", "--by", "luck"), "'luck'"),
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
        (("build", "--config", "{nowhere}"), "nowhere"),
        (("build", "--config", "{misspelt}"), "did you mean `sources`"),
        (("build", "--config", "{folder}"), "folder"),
        (("build", "{misspelt}", "{runs}"), "write --config "),
        (("build",), "no runs, and no tables/build.yaml here"),
        (("build", "{runs}"), "no output"),
        (("build", "{runs}", "-o", "{out}", "--set", "columns.tier"), "NAME=VALUE"),
        (("build", "{runs}", "-o", "{out}", "--set", "key=[gpu]"), "gpu"),
        (("build", "{folder}", "-o", "{out}"), "no runs in this folder"),
        (("build", "{truncated}", "-o", "{out}"), "truncated.json"),
        (("build", "{strange}", "-o", "{out}"), "tier"),
        (("build", "{runs}", "-o", "{text}/below.duckdb"), "below.duckdb"),
        (("build", "{runs}", "-o", "{text}"), "notes.txt"),
        (("evaluate", "{table}"), "no runs: name files or folders"),
        (("diagnose",), "no runs, and no tables/build.yaml here"),
        (("convert", "{runs}", "-o", "{text}/below.parquet"), "below.parquet"),
        (("convert", "{nowhere}", "-o", "{out}.parquet"), "nowhere"),
        (("convert", "{runs}"), "--output"),
        ((), "COMMAND"),
        (("biuld",), "biuld"),
    ],
)
def test_bad_input_takes_one_line(
    arguments: tuple[str, ...],
    message: str,
    direct_table: Path,
    serving_table: Path,
    direct_runs: Path,
    tmp_path: Path,
    printed: Printed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "table": direct_table,
        "serving": serving_table,
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


def test_a_failed_build_leaves_the_old_table(direct_table: Path, project: Path, printed: Printed) -> None:
    table = Path(shutil.copy(direct_table, project))
    (project / "broken.json").write_text("{")
    printed.error("build", "runs.parquet", "broken.json", "-o", table)
    assert table.read_bytes() == direct_table.read_bytes()


def test_the_module_runs_and_shows_no_bar_in_a_pipe(direct_runs: Path, tmp_path: Path) -> None:
    done = _process("convert", direct_runs, "-o", tmp_path / "runs.parquet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2,025 runs written to" in done.stdout


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 80 columns: ours, which never blocks, and the one for a process."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(ours, False)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_a_terminal_gets_a_progress_bar(direct_runs: Path, tmp_path: Path, terminal: tuple[int, int]) -> None:
    done = _process("convert", direct_runs, "-o", tmp_path / "runs.parquet", stderr=terminal[1])
    shown = os.read(terminal[0], 10_000).decode()
    assert done.returncode == 0
    assert "%" in shown
    assert "direct.parquet" in shown


def test_wide_columns_are_cut_on_a_terminal_alone(
    direct_table: Path, terminal: tuple[int, int], printed: Printed
) -> None:
    query = "SELECT 'a' AS short, repeat('x', 100) AS text, repeat('日本', 30) AS wide, 12.5::DOUBLE AS number"
    _process("sql", direct_table, query, stdout=terminal[1], env={**os.environ, "PYTHONPATH": str(PROJECT)})
    header, row, note = os.read(terminal[0], 10_000).decode().splitlines()
    assert note == "… text cut to the 80 columns of the terminal; whole in a pipe, or with --csv or --json"
    assert header.split() == ["short", "text", "wide", "number"]
    assert row.startswith("a      xxxxx")
    assert row.endswith("…   12.50")
    assert row.count("…") == 2
    assert sum(2 if character in "日本" else 1 for character in row) <= 80
    assert "x" * 100 in printed("sql", direct_table, query)


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
    assert "high, low, medium" in done.stdout


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
