"""Budgets when nobody knows how many tokens will come out: totals averaged over the table's output lengths.

Of a run of n tokens the table holds the total at some levels. Between them, latency is linear in the normal score of
the level; beyond the outermost ones the last line is carried on, up to `OUTERMOST_SCORE`, where the rest of the
probability stands. That makes a whole distribution of the total, of which the levels are the quantiles.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import erfc, exp, pi, sqrt
from typing import Any, NamedTuple

import numpy as np

from lutest.reader.arrays import NOTHING, Floats, Ints, deviation
from lutest.reader.curves import ByLength
from lutest.reader.lengths import Lengths

OUTERMOST_SCORE = 3.0  # 0.1 % on either side: what lies beyond is nothing that a table could know
ALL = 1.0 - 1e-12  # what the shares of all lengths add up to, at least
LEAST_MS = 1e-18  # between levels, so that equal ones are a step
_SCORES = 4096  # places of the normal distribution that are held, straight between them: 6e-8 at most
MORE = 1.0 + 1e-14  # of a budget, which is what two ways of adding differ by
_SUMS = 2048  # lengths up to which sums of steps are held


class Levels(NamedTuple):
    """Normal scores of the levels of a table, the place of the median, and the weight of each in the mean total.

    `probabilities` are those of the increasing scores `at`, beyond which they are 0 and 1.
    """

    scores: tuple[float, ...]
    outermost: float
    weights: tuple[float, ...]
    median: int
    at: Any
    probabilities: Any


@lru_cache(maxsize=64)
def levels_of(quantiles: tuple[float, ...]) -> Levels:
    """Normal scores of quantiles, and the weight of each in the mean."""
    from statistics import NormalDist  # here, as it is large, and many never ask

    scores = tuple(NormalDist().inv_cdf(q) for q in quantiles)
    outermost = max(OUTERMOST_SCORE, -scores[0], scores[-1])
    weights = [0.0] * len(scores)
    for j in range(len(scores) - 1):
        low, high = scores[j], scores[j + 1]
        # probability and mean score of the part of the normal distribution that this line stands for
        start, end = (low if j else -outermost), (high if j < len(scores) - 2 else outermost)
        mass = _below(end) - _below(start)
        moment = (exp(-0.5 * start * start) - exp(-0.5 * end * end)) / sqrt(2.0 * pi)
        for edge, score in ((not j, start), (j == len(scores) - 2, end)):
            beyond = _below(-outermost) if edge else 0.0
            mass, moment = mass + beyond, moment + beyond * score
        weights[j] += (high * mass - moment) / (high - low)
        weights[j + 1] += (moment - low * mass) / (high - low)
    at = np.union1d(np.linspace(-outermost, outermost, _SCORES + 1), scores)
    probabilities = np.array([_below(score) for score in at.tolist()])
    return Levels(scores, outermost, tuple(weights), quantiles.index(0.5), at, probabilities)


def _below(score: float) -> float:
    return 0.5 * erfc(-score / sqrt(2.0))


def share_within(levels: Levels, budget_ms: Any, middle_ms: Any, deviations_ms: Iterable[Any]) -> Any:
    """Probabilities that totals stay within budgets; parameters as of `scores_within`."""
    score = scores_within(levels, budget_ms, middle_ms, deviations_ms)
    return np.interp(score, levels.at, levels.probabilities, 0.0, 1.0)


def scores_within(levels: Levels, budget_ms: Any, middle_ms: Any, deviations_ms: Iterable[Any], of: Any = np) -> Any:
    """Normal scores of the probabilities that totals stay within budgets.

    Parameters
    ----------
    levels : Levels
    budget_ms, middle_ms : float or array
        Budgets, and P50 of the totals.
    deviations_ms : iterable of float or array
        How far the totals at the levels are from that; what decreases from level to level is taken for equal.
    of : module
        Whose arrays they are: NumPy's, or torch's.
    """
    excess = budget_ms - middle_ms
    score: Any = None
    low, *higher = deviations_ms
    for j, high in enumerate(higher):
        rise = levels.scores[j + 1] - levels.scores[j]
        if j == levels.median:  # where both are 0
            on_line = excess * rise / high
        else:
            if j + 1 != levels.median:
                high = of.maximum(high, low + LEAST_MS)
            on_line = (excess - low) * rise / (high - low) + levels.scores[j]
        score = on_line if score is None else of.where(excess >= low, on_line, score)
        low = high
    return score


def mean_of(levels: Levels, middle_ms: Any, deviations_ms: Iterable[Any]) -> Any:
    """Means of totals, of which P50 and how far they are from it at the levels are known."""
    if len(levels.scores) == 2:  # their line is symmetric about the median
        return middle_ms
    return middle_ms + sum(weight * ms for weight, ms in zip(levels.weights, deviations_ms, strict=True))


class OverLengths:
    """The totals of one configuration over output lengths.

    Parameters
    ----------
    lengths : Lengths
        Those with more than one token need decode figures.
    levels : Levels
    curves : sequence of ByLength
        One a level.
    correlated : sequence of float
        Twice the correlation of prefill and decode, one a level.
    own : sequence of tuple
        Stand for the pieces over the tokens that are held where no prompt is given: the median one, and the
        configuration's own quantiles of prefill.
    """

    def __init__(
        self,
        lengths: Lengths,
        levels: Levels,
        curves: Sequence[ByLength],
        correlated: Sequence[float],
        own: Sequence[tuple[Any, ...]],
    ) -> None:
        tokens = np.array(lengths.tokens)
        outs = [np.array(curve.out or NOTHING).T for curve in curves]
        places = np.searchsorted(outs[0][0], tokens, "right") - 1
        self._levels, self._shares, self._steps = levels, np.array(lengths.shares), tokens - 1
        self._ratio = outs[0][1].take(places) + outs[0][2].take(places) * tokens  # the same at all levels
        spreads = [out[3].take(places) + out[4].take(places) * tokens for out in outs]
        self._held = curves[levels.median].held
        self._starts = [row[0] for row in self._held]
        self._own = own[levels.median]
        self._parts = list(zip(levels.scores, (curve.held for curve in curves), own, correlated, spreads, strict=True))
        self._rows = np.array([row[5:] for row in self._held])
        self._sums_ms = self._sums_to(np.arange(_SUMS))

    def p_within(self, budget_ms: float, prompt_tokens: int | None) -> float:
        """See `Entry.p_within`."""
        prefill_ms, decode_ms, deviations_ms = self._totals(prompt_tokens)
        within = float(
            share_within(self._levels, budget_ms * MORE - prefill_ms, decode_ms, deviations_ms) @ self._shares
        )
        return within if within < ALL else 1.0

    def expected_ms(self, prompt_tokens: int | None) -> float:
        """See `Entry.expected_total_ms`."""
        prefill_ms, decode_ms, deviations_ms = self._totals(prompt_tokens)
        return prefill_ms + float(mean_of(self._levels, decode_ms, deviations_ms) @ self._shares)

    def _totals(self, prompt: int | None) -> tuple[float, Floats, Iterator[Floats | float]]:
        """P50 of prefill, P50 of decode of all lengths, and how far totals at the levels are from their sum."""
        place = None if prompt is None else bisect_right(self._starts, prompt) - 1
        at, p0, p1, _, _, b0, b1, b2 = self._own if place is None else self._held[place]
        start = at if prompt is None else prompt
        ends = self._steps + start
        sums_ms = self._sums_ms.take(ends) if ends[-1] < _SUMS else self._sums_to(ends)
        steps_ms = sums_ms - (b0 + start * (b1 + start * b2))

        def deviations() -> Iterator[Floats | float]:
            for score, held, own, correlated, spread in self._parts:
                if score:
                    _, _, _, a0, a1, _, _, _ = own if place is None else held[place]
                    apart = deviation(max(a0 + start * a1, LEAST_MS), spread * steps_ms, correlated)
                    yield apart if score > 0.0 else -apart
                else:
                    yield 0.0

        return p0 + start * p1, self._ratio * steps_ms, deviations()

    def _sums_to(self, ends: Ints) -> Floats:
        """Sums of the P50 steps up to lengths."""
        rows = self._rows[np.searchsorted(self._starts, ends, "right") - 1]
        found: Floats = rows[:, 0] + ends * (rows[:, 1] + ends * rows[:, 2])
        return found
