"""`lutest evaluate` and `lutest diagnose`: what they print, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lutest.cli.main import main
from lutest.judging.diagnose import diagnose
from lutest.judging.evaluate import evaluate


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_evaluate_prints_figures_and_warnings(
    capsys: pytest.CaptureFixture[str], direct_table: Path, direct_runs: Path
) -> None:
    code, out, err = run(capsys, "evaluate", direct_table, direct_runs)
    assert (code, err) == (0, "")
    assert out.startswith("2,025 runs of 27 configurations")
    assert "\nwarning: 2,025 of 2,025 runs come from files that the table was built from" in out
    for start in ("prefill ", "decode step ", "decode total ", "total ", "51+ ", "medium 6 14 "):
        assert f"\n{start}" in out
    assert max(map(len, out.split("\n\n")[1].splitlines())) <= 130


def test_evaluate_prints_json(capsys: pytest.CaptureFixture[str], direct_table: Path, subtraction_runs: Path) -> None:
    code, out, _ = run(capsys, "evaluate", direct_table, subtraction_runs, "--json")
    assert code == 0
    expected = evaluate(direct_table, subtraction_runs)
    assert json.loads(out) == json.loads(json.dumps(expected.as_dict()))
    assert expected.n_clamped > 100


def test_diagnose_prints_findings(capsys: pytest.CaptureFixture[str], subtraction_runs: Path) -> None:
    code, out, err = run(capsys, "diagnose", subtraction_runs)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["note", "fencepost"]
    assert any(line.startswith("warning  clamped") for line in lines)
    assert lines[-1].startswith("2 warning, ")
    code, out, _ = run(capsys, "diagnose", subtraction_runs, "--json")
    assert code == 0
    assert json.loads(out) == {"findings": [item.as_dict() for item in diagnose(subtraction_runs)]}


def test_configuration_gives_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = ["size,k,blocks,prompt,tokens,ttft,rest"]
    rows += [f"low,4,12,100,{n},{0.2 + n / 1e4},{0.046 * (n - 1)}" for n in range(2, 40)]
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    (tmp_path / "build.yaml").write_text(
        "time_unit: s\n"
        "columns: {tier: size, top_k: k, num_blocks: blocks, prompt_tokens: prompt, output_tokens: tokens, "
        "prefill_ms: ttft, decode_ms: rest}\n"
    )
    code, out, _ = run(capsys, "diagnose", tmp_path / "runs.csv", "--config", tmp_path / "build.yaml")
    assert code == 0
    assert "the steps are constant at 46 ms" in " ".join(out.split())


@pytest.mark.parametrize("arguments", [("evaluate", "TABLE", "none.json"), ("diagnose", "none.json")])
def test_missing_runs_are_one_line(
    capsys: pytest.CaptureFixture[str], direct_table: Path, arguments: tuple[str, ...]
) -> None:
    given = [direct_table if argument == "TABLE" else argument for argument in arguments]
    code, out, err = run(capsys, *given)
    assert (code, out) == (2, "")
    assert err.startswith("lutest: error: ")
    assert "none.json" in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_table_is_one_line(
    capsys: pytest.CaptureFixture[str], direct_runs: Path, subtraction_runs: Path
) -> None:
    code, out, err = run(capsys, "evaluate", direct_runs, subtraction_runs)
    assert (code, out) == (2, "")
    assert err.startswith("lutest: error: ")
    assert err.count("\n") == 1
