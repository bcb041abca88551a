"""Options of `lutest profile` that need no torch."""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb
import pytest

from lutest.cli.main import main
from lutest.profile.presets import PRESETS, parse_output_lengths
from lutest.reader.errors import ArgumentError, TableError


def test_output_lengths_with_weights() -> None:
    assert parse_output_lengths("2:30,8:10,32") == {2: 30.0, 8: 10.0, 32: 1.0}
    assert parse_output_lengths("4,4:0.5") == {4: 1.5}


@pytest.mark.parametrize("given", ["", "0", "-3:1", "2:0", "2:-1", "2:nan", "2:inf", "two", "2;3", "missing.duckdb"])
def test_what_are_no_output_lengths(given: str) -> None:
    with pytest.raises(ArgumentError, match="neither the path of a table nor tokens with a weight"):
        parse_output_lengths(given)


def test_output_lengths_of_a_table(direct_table: Path, direct_runs: Path) -> None:
    lengths = parse_output_lengths(str(direct_table))
    with duckdb.connect() as connection:
        counted = connection.execute(
            "SELECT output_tokens, count(*) FROM read_parquet(?) GROUP BY 1", [str(direct_runs)]
        ).fetchall()
    assert set(lengths) <= {tokens for tokens, _ in counted}
    assert all(n <= dict(counted)[tokens] for tokens, n in lengths.items())
    assert sum(lengths.values()) > 0.9 * sum(n for _, n in counted)


def test_output_lengths_of_a_file_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "table.duckdb"
    path.write_text("no table", encoding="utf-8")
    with pytest.raises(TableError, match=r"table\.duckdb"):
        parse_output_lengths(str(path))


def test_without_torch_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["profile", "-o", str(tmp_path / "runs"), "--preset", "tiny"]) == 2
    assert capsys.readouterr().err == (
        "lutest: error: profiling the presets needs torch: pip install 'lutest[profile]'\n"
    )
    assert not (tmp_path / "runs").exists()


def test_lists_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "-o", "runs", "--top-k", "4,x"])
    assert "'4,x' is no list of whole numbers" in capsys.readouterr().err


def test_the_presets_sweep_over_27_configurations() -> None:
    for name in ("cpu", "molmoe-1b"):
        preset = PRESETS[name]
        assert len(preset.crops) * len(preset.top_k) * len(preset.num_blocks) == 27
        assert max(preset.num_blocks) == preset.decoder.blocks
        weights = preset.output_lengths
        assert 8 < sum(n * weight for n, weight in weights.items()) / sum(weights.values()) < 11
