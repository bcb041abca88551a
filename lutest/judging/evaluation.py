"""What an evaluation of a table says, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lutest.reader.figures import Key
from lutest.reader.names import quantile_suffix

__all__ = ["BANDS", "STAGES", "Evaluation", "Score"]

STAGES = ("prefill", "decode step", "decode total", "total")
BANDS = ("1", "2", "3–5", "6–10", "11–20", "21–50", "51+")  # output tokens


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


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
