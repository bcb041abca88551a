"""Verbs that keep a table right: carry it to another device, plan the runs for that, check that it still holds."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import lutest
from lutest.cli.arguments import JSON, TABLE, Answer, add_runs, argument, given_runs, verb
from lutest.cli.printing import format_table, working
from lutest.judging.finding import count

if TYPE_CHECKING:
    from lutest.calibration.coverage import CoverageTest
    from lutest.calibration.table_maps import StageCalibration

_DRIFTED, _CANNOT_TELL = 1, 3  # exit codes
_MOST_LINES = 12


@verb(
    "lutest calibrate tables/mine.duckdb new-device/ -o tables/new-device.duckdb",
    TABLE,
    add_runs,
    argument("-o", "--output", required=True, metavar="NEW", help="table file to write"),
    JSON,
)
def calibrate(arguments: argparse.Namespace) -> Answer:
    """Carry a table to another device with few runs."""
    runs, config = given_runs(arguments)
    with working() as progress:
        done = lutest.calibrate(arguments.table, runs, arguments.output, config=config, progress=progress)
    return Answer(
        asdict(done),
        [
            f"{done.output}: calibrated with {count(done.n_runs, 'run')}{_left_out(done.left_out)}",
            *(f"warning: {sentence}" for sentence in done.warnings),
            _stage_line("prefill", done.prefill),
            _stage_line("decode", done.decode),
            f"content hash {done.content_hash}, of its parent {done.parent_content_hash}",
        ],
    )


def _left_out(left_out: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
    return f" (left out: {reasons})" if reasons else ""


def _stage_line(name: str, stage: StageCalibration | None) -> str:
    if stage is None:
        return f"{name}: as it was, for no run has two tokens or more"
    least, middle, largest = stage.scale
    shared = ", ".join(name.replace("_", " ") for name in stage.shared) or "one for all"
    stretch = ", ".join(f"P{100 * q:g} {factor:.2f}" for q, factor in stage.stretch.items())
    return (
        f"{name}: P50 x {middle:.3f} ({least:.3f} to {largest:.3f}; by {shared}) {stage.offset_ms:+.3g} ms, "
        f"{stage.error:.1%} off for runs that were left out; distance to P50 x {stretch}"
    )


@verb(
    "lutest plan tables/mine.duckdb -n 25",
    TABLE,
    argument("-n", type=int, default=25, metavar="N", help="how many runs (default: 25)"),
    JSON,
)
def plan(arguments: argparse.Namespace) -> Answer:
    """Propose the runs that make a calibration the least uncertain."""
    planned = lutest.plan(arguments.table, arguments.n)
    runs = [
        {**dict(zip(planned.key_columns, run.key, strict=True)), "prompt_tokens": run.prompt_tokens}
        for run in planned.runs
    ]
    rows = [[*run.key, run.prompt_tokens, times] for run, times in Counter(planned.runs).items()]
    told = (
        f"the most telling first; they leave P50 uncertain by {planned.deviation:.2f} of a run's deviation, "
        f"{count(arguments.n, 'run')} at random by {planned.random_deviation:.2f}"
    )
    return Answer(
        {"runs": runs, "deviation": planned.deviation, "random_deviation": planned.random_deviation},
        [format_table([*planned.key_columns, "prompt tokens", "runs"], rows), told],
    )


@verb(
    "lutest check tables/mine.duckdb results-of-today/ || echo profile again",
    TABLE,
    add_runs,
    argument(
        "--false-alarm-rate", type=float, default=0.01, metavar="A", help="if nothing has changed (default: 0.01)"
    ),
    argument(
        "--tolerance", type=float, default=0.02, metavar="T", help="what still counts as the same (default: 0.02)"
    ),
    JSON,
)
def check(arguments: argparse.Namespace) -> Answer:
    """Test whether a table still holds for runs; exit code 1 if it does not, 3 if the runs are too few to tell."""
    runs, config = given_runs(arguments)
    limits = {name: getattr(arguments, name) for name in ("false_alarm_rate", "tolerance")}
    with working() as progress:
        found = lutest.check(arguments.table, runs, config=config, progress=progress, **limits)
    alarms = [test for test in found.alarms if test.coverage.key is not None]
    shown = [test for test in found.tests if test.coverage.key is None] + alarms[:_MOST_LINES]
    headers = ["stage", "configuration", "runs", "observed / P50", "quantile", "within %", "p", "adjusted p", ""]
    lines = [format_table(headers, [_test_row(test, test in found.alarms) for test in shown])]
    if len(alarms) > _MOST_LINES:
        lines.append(f"and {len(alarms) - _MOST_LINES} more of single configurations")
    verdict, code = {
        True: ("still holds", 0),
        False: ("no longer holds", _DRIFTED),
        None: ("cannot tell whether it holds", _CANNOT_TELL),
    }[found.holds]
    lines.append(
        f"{found.table}: {verdict} for {count(found.n_runs, 'run')}{_left_out(found.left_out)}; "
        f"{count(len(found.tests), 'test')}, false alarms at most {found.false_alarm_rate:g}"
    )
    shifts = ", ".join(
        f"{stage} {'no shift' if shift is None else f'{shift:.1%}'}" for stage, shift in found.detectable.items()
    )
    lines.append(f"so many runs show in nine cases of ten, at the least, a shift of: {shifts}")
    return Answer(found.as_dict(), lines, code)


def _test_row(test: CoverageTest, alarm: bool) -> list[object]:
    held = test.coverage
    name = "all" if held.key is None else " ".join(map(str, held.key))
    row: list[object] = [held.stage, name, held.n, f"{held.ratio:.3f}", f"P{100 * test.q:g}"]
    row += [f"{test.share_within:.1%}", f"{test.p_value:.2g}", f"{test.adjusted:.2g}", "drift" if alarm else ""]
    return row
