"""Verbs that keep a table right: carry it to another device, plan the runs for that, check that it still holds."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from lutest.cli.terminal import print_json, progress_bar
from lutest.cli.text_tables import format_table
from lutest.judging.finding import count

if TYPE_CHECKING:
    from lutest.calibration.calibrate import StageCalibration
    from lutest.calibration.drift import DriftTest

__all__ = ["calibrate", "check", "plan"]

_DRIFTED = 1  # exit code
_MOST_LINES = 12


def calibrate(arguments: argparse.Namespace) -> None:
    """Calibrate a table and print what became of it."""
    from lutest.calibration.calibrate import calibrate as calibrate_table
    from lutest.tablefile.sql import database_errors

    with database_errors(), progress_bar() as progress:
        done = calibrate_table(
            arguments.table, arguments.runs, arguments.output, config=arguments.config, progress=progress
        )
    if arguments.json:
        print_json(asdict(done))
        return
    print(f"{done.output}: calibrated with {count(done.n_runs, 'run')}{_left_out(done.left_out)}")
    for name, stage in (("prefill", done.prefill), ("decode", done.decode)):
        print(_stage_line(name, stage))
    print(f"content hash {done.content_hash}, of its parent {done.parent_content_hash}")


def _left_out(left_out: dict[str, int]) -> str:
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


def plan(arguments: argparse.Namespace) -> None:
    """Print which runs to take for a calibration."""
    from lutest.calibration.plan import plan as plan_runs

    planned = plan_runs(arguments.table, arguments.n)
    if arguments.json:
        print_json(
            {
                "runs": [{**run.key._asdict(), "prompt_tokens": run.prompt_tokens} for run in planned.runs],
                "deviation": planned.deviation,
                "random_deviation": planned.random_deviation,
            }
        )
        return
    counted = Counter(planned.runs)
    rows = [[*run.key, run.prompt_tokens, times] for run, times in counted.items()]
    print(format_table(["tier", "top_k", "blocks", "prompt tokens", "runs"], rows))
    print(
        f"the most telling first; they leave P50 uncertain by {planned.deviation:.2f} of a run's deviation, "
        f"{count(arguments.n, 'run')} at random by {planned.random_deviation:.2f}"
    )


def check(arguments: argparse.Namespace) -> int:
    """Print whether a table still holds; 1 where it does not."""
    from lutest.calibration.check import check as check_table
    from lutest.tablefile.sql import database_errors

    with database_errors(), progress_bar() as progress:
        found = check_table(
            arguments.table,
            arguments.runs,
            false_alarm_rate=arguments.false_alarm_rate,
            tolerance=arguments.tolerance,
            config=arguments.config,
            progress=progress,
        )
    if arguments.json:
        print_json(found.as_dict())
        return 0 if found.drift.holds else _DRIFTED
    alarms = found.drift.alarms
    shown = [test for test in found.drift.tests if test.coverage.key is None]
    shown += [test for test in alarms if test.coverage.key is not None][:_MOST_LINES]
    headers = ["stage", "configuration", "runs", "observed / P50", "quantile", "within %", "p", "adjusted p", ""]
    print(format_table(headers, [_test_row(test, test in alarms) for test in shown]))
    more = len([test for test in alarms if test.coverage.key is not None]) - _MOST_LINES
    if more > 0:
        print(f"and {more} more of single configurations")
    verdict = "still holds" if found.drift.holds else "no longer holds"
    print(
        f"{found.table}: {verdict} for {count(found.n_runs, 'run')}{_left_out(found.left_out)}; "
        f"{count(len(found.drift.tests), 'test')}, false alarms at most {found.drift.false_alarm_rate:g}"
    )
    return 0 if found.drift.holds else _DRIFTED


def _test_row(test: DriftTest, alarm: bool) -> list[object]:
    held = test.coverage
    name = "all" if held.key is None else " ".join(map(str, held.key))
    return [
        held.stage,
        name,
        held.n,
        f"{held.ratio:.3f}",
        f"P{100 * test.q:g}",
        f"{test.share_within:.1%}",
        f"{test.p_value:.2g}",
        f"{test.adjusted:.2g}",
        "drift" if alarm else "",
    ]
