"""Verbs that judge: a table by runs, runs by themselves, a file by its seal."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import lutest
from lutest.cli.arguments import JSON, TABLE, Answer, add_runs, argument, given_runs, verb
from lutest.cli.printing import format_table, one_line, working
from lutest.judging.finding import SEVERITIES, Finding, count, plain
from lutest.reader.names import quantile_suffix

if TYPE_CHECKING:
    from lutest.judging.diff import Change
    from lutest.judging.evaluate import Evaluation, Score

_WIDTH = 110
_UNUSABLE = 1
_SLOWER = 1  # exit code
_MOST_LINES = 20


@verb("lutest evaluate tables/mine.duckdb held-out/", TABLE, add_runs, JSON)
def evaluate(arguments: argparse.Namespace) -> Answer:
    """Judge a table by runs, best by runs that it was not built from."""
    runs, config = given_runs(arguments)
    with working() as progress:
        evaluation = lutest.evaluate(arguments.table, runs, config=config, progress=progress)
    return Answer(evaluation.as_dict(), [render_evaluation(evaluation)])


@verb("lutest diagnose results/", add_runs, JSON)
def diagnose(arguments: argparse.Namespace) -> Answer:
    """Say what is wrong with runs before building on them; exit code 1 if no build can use any."""
    runs, config = given_runs(arguments)
    with working() as progress:
        findings = lutest.diagnose(runs, config=config, progress=progress)
    status = _UNUSABLE if len(findings) == 1 else 0
    return Answer({"findings": [finding.as_dict() for finding in findings]}, [render_findings(findings)], status)


@verb(
    "lutest diff tables/yesterday.duckdb tables/mine.duckdb",
    argument("old", metavar="OLD", help="older table file"),
    argument("new", metavar="NEW", help="newer table file"),
    argument(
        "--tolerance", type=float, default=0.05, metavar="T", help="what still counts as the same (default: 0.05)"
    ),
    JSON,
)
def diff(arguments: argparse.Namespace) -> Answer:
    """Say what changed between two tables; exit code 1 if something got slower."""
    found = lutest.diff(arguments.old, arguments.new, tolerance=arguments.tolerance)
    whole = [change for change in found.changes if change.key is None]
    single = [change for change in found.changes if change.key is not None]
    headers = ["stage", "configuration", "quantile", "old ms", "new ms", "change %", "interval %", "runs", ""]
    lines = [format_table(headers, list(map(_change_row, whole + single[:_MOST_LINES])))]
    if len(single) > _MOST_LINES:
        lines.append(f"and {len(single) - _MOST_LINES} more of single configurations, less sure or smaller")
    for name, keys in (("old", found.only_old), ("new", found.only_new)):
        if keys:
            lines.append(f"in the {name} table alone: {'; '.join(' '.join(map(str, key)) for key in keys)}")
    counts = Counter(change.verdict for change in found.changes)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("slower", "faster", "same", "not sure"))
    lines.append(f"{told}, beyond a tolerance of {found.tolerance:g}; no interval is wrong with a probability of 95 %")
    return Answer(found.as_dict(), lines, _SLOWER if found.slower else 0)


def _change_row(change: Change) -> list[object]:
    name = "all" if change.key is None else " ".join(map(str, change.key))
    interval = f"{_change(change.lower)} to {_change(change.upper)}"
    row: list[object] = [
        change.stage,
        name,
        f"P{100 * change.q:g}",
        change.old_ms,
        change.new_ms,
        _change(change.ratio),
    ]
    return [*row, interval, f"{change.n_old:,}, {change.n_new:,}", change.verdict]


def _change(ratio: float) -> str:
    return f"{100.0 * (ratio - 1.0):+.1f}"


@verb("lutest verify tables/mine.duckdb", TABLE, JSON)
def verify(arguments: argparse.Namespace) -> Answer:
    """Check every byte and every row of a table."""
    verified = lutest.verify(arguments.table)
    rows = count(sum(verified.rows.values()), "row")
    whole = (
        f"{verified.path}: whole: {verified.size_bytes / 1024:,.0f} KiB as sealed, "
        f"{rows} in {len(verified.rows)} tables with content hash {verified.content_hash}"
    )
    return Answer(asdict(verified), [whole])


def render_findings(findings: Sequence[Finding]) -> str:
    """Findings as plain text, one paragraph each."""
    first = max(map(len, SEVERITIES)) + 2
    margin = first + max(len(finding.name) for finding in findings) + 2
    lines = []
    wrapper = textwrap.TextWrapper(_WIDTH, break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * margin
    for finding in findings:
        wrapper.initial_indent = f"{finding.severity:<{first}}{finding.name}".ljust(margin)
        lines += wrapper.wrap(one_line(finding.sentence))
    totals = [f"{sum(finding.severity == level for finding in findings)} {level}" for level in reversed(SEVERITIES)]
    return "\n".join([*lines, "", ", ".join(totals)])


def render_evaluation(evaluation: Evaluation) -> str:
    """The evaluation as text for people; by output length and configuration the most telling figures alone."""
    n_keys = len({score.key for score in evaluation.by_key})
    clamped = f"; {count(evaluation.n_clamped, 'run')} clamped at zero decode" if evaluation.n_clamped else ""
    names = [quantile_suffix(q).upper().replace("_", ".") for q in evaluation.overall[0].coverage]
    headers = ["", "n", "R²", "MAE ms", "MAPE %", "median %", "bias %"]
    headers += [f"pinball {name} ms" for name in names] + [f"≤ {name} %" for name in names]
    rows = [
        [
            score.stage,
            score.n,
            f"{score.r_squared:.4f}" if math.isfinite(score.r_squared) else None,
            plain(score.mae_ms),
            *map(_percent, (score.mape, score.median_ape, score.bias)),
            *map(plain, score.pinball_ms.values()),
            *map(_percent, score.coverage.values()),
        ]
        for score in evaluation.overall
    ]
    return "\n".join(
        [
            f"{count(evaluation.n_runs, 'run')} of {count(n_keys, 'configuration')}, outliers kept{clamped}",
            *(f"  {count(n, 'run')} left out: {reason}" for reason, n in evaluation.left_out.items()),
            *(f"warning: {warning}" for warning in evaluation.warnings),
            "",
            format_table(headers, rows, figures=True),
            "",
            _grouped("output tokens", evaluation.by_output_tokens),
            "",
            _grouped("configuration", evaluation.by_key),
            "",
            "R², MAE, MAPE, median error and bias: of P50; bias: the median, above 0 predicted too high;",
            "≤ P95 %: share of observations at or below the predicted P95",
        ]
    )


def _grouped(title: str, scores: Sequence[Score]) -> str:
    """One row a group: runs, and for each stage bias and coverage of P95."""
    stages = list(dict.fromkeys(score.stage for score in scores))
    rows: dict[object, list[object]] = {}
    for score in scores:  # prefill first, which every run has
        name = " ".join(map(str, score.key)) if score.key else score.output_tokens
        row = rows.setdefault(name, [name, score.n, *[None] * 2 * len(stages)])
        place = 2 + 2 * stages.index(score.stage)
        row[place : place + 2] = _percent(score.bias), _percent(score.coverage[0.95])
    headers = [title, "runs", *(header for stage in stages for header in (f"{stage} bias %", "≤ P95 %"))]
    return format_table(headers, list(rows.values()), figures=True)


def _percent(share: float) -> str | None:
    return f"{round(100 * share, 1) + 0.0:.1f}" if math.isfinite(share) else None
