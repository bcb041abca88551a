"""Verbs that judge: a table by runs, runs by themselves, a file by its seal."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import lutest
from lutest.cli.arguments import JSON, TABLE, Answer, add_runs, given_runs, verb
from lutest.cli.printing import format_table, one_line, working
from lutest.judging.finding import SEVERITIES, Finding, count
from lutest.reader.names import quantile_suffix

if TYPE_CHECKING:
    from lutest.judging.evaluate import Evaluation, Score
    from lutest.reader.figures import Key

__all__ = ["diagnose", "evaluate", "render_evaluation", "render_findings", "verify"]

_NONE = "–"
_WIDTH = 110


@verb("lutest evaluate tables/mine.duckdb held-out/", TABLE, add_runs, JSON)
def evaluate(arguments: argparse.Namespace) -> Answer:
    """Judge a table by runs, best by runs that it was not built from."""
    runs, config = given_runs(arguments)
    with working() as progress:
        evaluation = lutest.evaluate(arguments.table, runs, config=config, progress=progress)
    return Answer(evaluation.as_dict(), [render_evaluation(evaluation)])


@verb("lutest diagnose results/", add_runs, JSON)
def diagnose(arguments: argparse.Namespace) -> Answer:
    """Say what is wrong with runs before building on them."""
    runs, config = given_runs(arguments)
    with working() as progress:
        findings = lutest.diagnose(runs, config=config, progress=progress)
    return Answer({"findings": [finding.as_dict() for finding in findings]}, [render_findings(findings)])


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
    margin = 2 + max(map(len, SEVERITIES)) + max((len(finding.name) for finding in findings), default=0) + 2
    lines = []
    for finding in findings:
        head = f"{finding.severity:<{max(map(len, SEVERITIES))}}  {finding.name}".ljust(margin)
        wrapped = textwrap.wrap(
            one_line(finding.sentence), _WIDTH - margin, break_long_words=False, break_on_hyphens=False
        )
        lines += [(head if number == 0 else " " * margin) + line for number, line in enumerate(wrapped)]
    totals = [f"{sum(finding.severity == level for finding in findings)} {level}" for level in reversed(SEVERITIES)]
    return "\n".join([*lines, "", ", ".join(totals)])


def render_evaluation(evaluation: Evaluation) -> str:
    """The evaluation as text for people; by output length and configuration the most telling figures alone."""
    from lutest.judging.evaluate import BANDS

    names = [_quantile_name(q) for q in evaluation.overall[0].coverage]
    keys = list(dict.fromkeys(score.key for score in evaluation.by_key if score.key is not None))
    clamped = f"; {count(evaluation.n_clamped, 'run')} clamped at zero decode" if evaluation.n_clamped else ""
    lines = [f"{count(evaluation.n_runs, 'run')} of {count(len(keys), 'configuration')}, outliers kept{clamped}"]
    lines += [f"  {count(n, 'run')} left out: {reason}" for reason, n in evaluation.left_out.items()]
    lines += [f"warning: {warning}" for warning in evaluation.warnings]
    headers = ["", "n", "R²", "MAE ms", "MAPE %", "median %", "bias %"]
    headers += [f"pinball {name} ms" for name in names] + [f"≤ {name} %" for name in names]
    rows = [
        [
            score.stage,
            score.n,
            _fixed(score.r_squared, 4),
            _or_none(score.mae_ms),
            *(_percent(value) for value in (score.mape, score.median_ape, score.bias)),
            *map(_or_none, score.pinball_ms.values()),
            *map(_percent, score.coverage.values()),
        ]
        for score in evaluation.overall
    ]
    return "\n".join(
        [
            *lines,
            "",
            _table(headers, rows),
            "",
            _grouped("output tokens", evaluation.by_output_tokens, BANDS),
            "",
            _grouped("configuration", evaluation.by_key, keys),
            "",
            "R², MAE, MAPE, median error and bias: of P50; bias: the median, above 0 predicted too high;",
            "≤ P95 %: share of observations at or below the predicted P95",
        ]
    )


def _grouped(title: str, scores: Sequence[Score], groups: Sequence[str | Key]) -> str:
    """One row a group: runs, and for each stage bias and coverage of P95."""
    from lutest.judging.evaluate import STAGES

    stages = [stage for stage in STAGES if any(score.stage == stage for score in scores)]
    found = {(score.stage, score.key or score.output_tokens): score for score in scores}
    headers = [title, "runs", *(header for stage in stages for header in (f"{stage} bias %", "≤ P95 %"))]
    rows: list[list[object]] = []
    for group in groups:
        held = [found.get((stage, group)) for stage in stages]
        if held[0] is None:  # every run has a prefill
            continue
        row: list[object] = [" ".join(map(str, group)) if isinstance(group, tuple) else group, held[0].n]
        for score in held:
            row += [_percent(score.bias), _percent(score.coverage[0.95])] if score is not None else [_NONE, _NONE]
        rows.append(row)
    return _table(headers, rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with texts of figures to the right, the first column apart."""
    widths = [
        max(len(cell) for cell in (header, *(row[place] for row in rows)) if isinstance(cell, str))
        for place, header in enumerate(headers)
    ]
    aligned = [
        [
            row[0],
            *(
                cell.rjust(width) if isinstance(cell, str) else cell
                for cell, width in zip(row[1:], widths[1:], strict=True)
            ),
        ]
        for row in rows
    ]
    titles = [headers[0], *(header.rjust(width) for header, width in zip(headers[1:], widths[1:], strict=True))]
    return format_table(titles, aligned)


def _quantile_name(q: float) -> str:
    return quantile_suffix(q).upper().replace("_", ".")


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}" if math.isfinite(share) else _NONE


def _fixed(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else _NONE


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
