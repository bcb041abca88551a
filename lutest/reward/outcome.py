"""What a rollout's latency is worth, part by part, and what trainers log of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple


class LatencyOutcome(NamedTuple):
    """A latency reward with its parts: ``reward = efficiency_bonus − the three penalties``.

    Attributes
    ----------
    reward : float
    latency_ms : float or None
        The estimate that decided; None for a configuration that is not in the table.
    limit_ms : float
        What it was held against: the budget, or prefill's share of it.
    decided_by : str
        ``total``, ``prefill``, ``expected_total``, ``p_within`` or ``unknown``.
    p_within : float or None
        Probability of staying within the budget, where that decided.
    smooth_penalty, squared_overrun, efficiency_bonus, complexity_penalty : float
        The terms, weighted.
    extrapolated : bool
        Whether the estimate rests on lengths beyond those of the configuration's runs.
    wrong_row : bool
        Whether something in the row could not be read, so that it was priced as an unknown configuration.
    """

    reward: float
    latency_ms: float | None
    limit_ms: float
    decided_by: str
    p_within: float | None
    smooth_penalty: float
    squared_overrun: float
    efficiency_bonus: float
    complexity_penalty: float
    extrapolated: bool = False
    wrong_row: bool = False

    @property
    def over_limit(self) -> bool | None:
        """Whether the estimate lies above its limit; None for a configuration that is not in the table."""
        return None if self.latency_ms is None else self.latency_ms > self.limit_ms

    @property
    def unknown(self) -> bool:
        """Whether the configuration is not in the table, or nothing is known of it for what was asked."""
        return self.decided_by == "unknown"


def reward_of(outcome: LatencyOutcome | None) -> float:
    """The reward, for trainers that take no None: 0 for a rollout without a configuration."""
    return 0.0 if outcome is None else outcome.reward


def trainer_figures(outcome: LatencyOutcome | None) -> dict[str, float | None]:
    """What trainers log of an outcome, None where there is no figure."""
    if outcome is None:
        return dict.fromkeys(("latency_ms", "latency_over_limit", "latency_unknown", "latency_extrapolated"))
    over = None if outcome.over_limit is None else float(outcome.over_limit)
    return {
        "latency_ms": outcome.latency_ms,
        "latency_over_limit": over,
        "latency_unknown": float(outcome.unknown),
        "latency_extrapolated": float(outcome.extrapolated),
    }


def metrics_of(outcomes: Sequence[LatencyOutcome]) -> Iterator[tuple[str, float]]:
    """Names and means of what is logged of a batch, as far as there is anything to take them of."""
    if outcomes:
        yield "latency/unknown", fmean(outcome.unknown for outcome in outcomes)
        yield "latency/extrapolated", fmean(outcome.extrapolated for outcome in outcomes)
        yield "latency/wrong_row", fmean(outcome.wrong_row for outcome in outcomes)
        for term in ("smooth_penalty", "squared_overrun", "efficiency_bonus", "complexity_penalty"):
            yield f"latency/{term}", fmean(getattr(outcome, term) for outcome in outcomes)
    known_ms = [outcome.latency_ms for outcome in outcomes if outcome.latency_ms is not None]
    if known_ms:
        yield "latency/ms", fmean(known_ms)
        yield "latency/over_limit", sum(bool(outcome.over_limit) for outcome in outcomes) / len(known_ms)
