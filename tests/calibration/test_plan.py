"""Runs that are proposed for a calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lutest
from lutest.cli.main import main


def test_planned_runs_leave_less_uncertain_than_random_ones(table: lutest.LatencyTable) -> None:
    before = float("inf")
    for n in (5, 10, 25, 50):
        planned = lutest.plan(table, n)
        assert len(planned.runs) == n
        assert planned.deviation < planned.random_deviation
        assert planned.deviation < before
        before = planned.deviation
    assert len({run.key for run in planned.runs}) >= 20  # of 27: little is learnt from the same one again


def test_each_proposal_is_a_measured_configuration_and_length(parent: Path, table: lutest.LatencyTable) -> None:
    curves = {held.key: held.prefill_curve.at for held in table.figures.keys}
    for run in lutest.plan(parent, 30).runs:
        assert curves[run.key][0] <= run.prompt_tokens <= curves[run.key][-1]


def test_the_first_proposals_do_not_depend_on_how_many_are_asked_for(parent: Path) -> None:
    assert lutest.plan(parent, 40).runs[:10] == lutest.plan(parent, 10).runs


@pytest.mark.parametrize("n", [0, -1, 2.5, 10_001, "many"])
def test_a_number_of_runs_that_is_none(parent: Path, n: object) -> None:
    with pytest.raises(lutest.ArgumentError, match="n is"):
        lutest.plan(parent, n)  # type: ignore[arg-type]


def test_the_command(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(parent), "-n", "12"]) == 0
    printed = capsys.readouterr().out
    assert "prompt tokens" in printed
    assert "12 runs at random" in printed
    assert main(["plan", str(parent), "-n", "12", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 12
