"""What an evaluation of a table says, as values and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..figures import Key
from ..report import count, format_table
from ..schema import quantile_suffix

__all__ = ["BANDS", "STAGES", "Evaluation", "Score", "render_evaluation"]

STAGES = ("prefill", "decode step", "decode total", "total")
BANDS = ("1", "2", "3–5", "6–10", "11–20", "21–50", "51+")  # output tokens
_NONE = "–"


@dataclass(frozen=True)
class Score:
    """Figures of one stage over one group of runs.

    Attributes
    ----------
    stage : str
        One of `STAGES`.
    key : Key or None
        The configuration; None for all.
    output_tokens : str or None
        The band of output lengths; None for all.
    n : int
        Observations: runs, or steps.
    r_squared : float
        Of P50; NaN where all observations are equal.
    mae_ms : float
        Mean absolute error of P50.
    mape, median_ape, bias : float
        Of P50, as fractions: mean and median absolute error, and median signed error (above 0: predicted too high),
        each relative to the observation. How observations of zero count is said in `lutest.evaluate.metrics`.
    pinball_ms, coverage : dict
        Quantile → mean pinball loss in ms, and share of observations at or below the prediction.
    """

    stage: str
    key: Key | None
    output_tokens: str | None
    n: int
    r_squared: float
    mae_ms: float
    mape: float
    median_ape: float
    bias: float
    pinball_ms: dict[float, float]
    coverage: dict[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; None where a figure does not exist."""
        named: dict[str, Any] = {
            "stage": self.stage,
            "n": self.n,
            **{name: _or_none(getattr(self, name)) for name in ("r_squared", "mae_ms", "mape", "median_ape", "bias")},
            "pinball_ms": {quantile_suffix(q): _or_none(value) for q, value in self.pinball_ms.items()},
            "coverage": {quantile_suffix(q): _or_none(value) for q, value in self.coverage.items()},
        }
        if self.output_tokens is not None:
            named = {"output_tokens": self.output_tokens, **named}
        return {**self.key._asdict(), **named} if self.key is not None else named


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    table : str
        Path of the table; empty for one in memory.
    n_runs : int
        Runs that were judged.
    n_clamped : int
        Runs among them whose decode_ms was clamped at zero.
    left_out : dict
        Why runs were not judged → how many.
    warnings : tuple of str
        What makes the figures say less than they seem to.
    overall, by_output_tokens, by_key : tuple of Score
        Stage by stage; groups without observations are left out.
    """

    table: str
    n_runs: int
    n_clamped: int
    left_out: dict[str, int]
    warnings: tuple[str, ...]
    overall: tuple[Score, ...]
    by_output_tokens: tuple[Score, ...]
    by_key: tuple[Score, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "table": self.table,
            "n_runs": self.n_runs,
            "n_clamped": self.n_clamped,
            "left_out": self.left_out,
            "warnings": list(self.warnings),
            "overall": [score.as_dict() for score in self.overall],
            "by_output_tokens": [score.as_dict() for score in self.by_output_tokens],
            "by_key": [score.as_dict() for score in self.by_key],
        }


def render_evaluation(evaluation: Evaluation) -> str:
    """The evaluation as text for people; by output length and configuration the most telling figures alone."""
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
    stages = [stage for stage in STAGES if any(score.stage == stage for score in scores)]
    found = {(score.stage, score.key or score.output_tokens): score for score in scores}
    headers = [title, "runs", *(header for stage in stages for header in (f"{stage} bias %", "≤ P95 %"))]
    rows: list[list[object]] = []
    for group in groups:
        held = [found.get((stage, group)) for stage in stages]
        if held[0] is None:  # every run has a prefill
            continue
        row: list[object] = [" ".join(map(str, group)) if isinstance(group, Key) else group, held[0].n]
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
