"""Budgets when nobody knows how many tokens will come out: totals averaged over the table's output lengths.

Of a run of n tokens the table holds the total at some levels. Between them, latency is linear in the normal score of
the level; beyond the outermost ones the last line is carried on, up to `OUTERMOST_SCORE`, where the rest of the
probability stands. That makes a whole distribution of the total, of which the levels are the quantiles.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import erfc, exp, pi, sqrt
from typing import NamedTuple

from lutest.reader.errors import ArgumentError

OUTERMOST_SCORE = 3.0  # 0.1 % on either side: what lies beyond is nothing that a table could know
_FEW, _PARTS = 128, 28  # so many lengths are all asked for; more, first at the ends of so many parts
_FLAT = 1e-7  # of the whole range: what is in between two ends this near is their mean
_STEEP = 0.1  # of the whole range: what changes by more is looked into, however straight it seems


class Lengths(NamedTuple):
    """How many tokens come out: distinct lengths, increasing, with what share of the runs has fewer tokens.

    `shares_below` and `tokens_below` are sums over all lengths before the i-th: of shares, and of share · tokens.
    """

    tokens: tuple[int, ...]
    shares_below: tuple[float, ...]
    tokens_below: tuple[float, ...]


class Levels(NamedTuple):
    """Normal scores of the levels of a table, and the weight of the total at each in the mean total."""

    scores: tuple[float, ...]
    outermost: float
    weights: tuple[float, ...]


def lengths_by_workload(output_lengths: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str | None, Lengths]:
    """The lengths of each workload, and under None those of all runs together."""
    together: dict[int, int] = {}
    for pairs in output_lengths.values():
        for tokens, n in pairs:
            together[tokens] = together.get(tokens, 0) + n
    held: dict[str | None, Lengths] = {}
    for workload, pairs in (*output_lengths.items(), (None, sorted(together.items()))):
        if pairs:
            runs = sum(n for _, n in pairs)
            below = accumulate((n / runs for _, n in pairs), initial=0.0)
            tokens_below = accumulate((tokens * n / runs for tokens, n in pairs), initial=0.0)
            held[workload] = Lengths(tuple(tokens for tokens, _ in pairs), tuple(below), tuple(tokens_below))
    return held


def lengths_of(held: Mapping[str | None, Lengths], workload: str | None) -> Lengths:
    """Lengths of a workload; None: of all together.

    Raises
    ------
    ArgumentError
        The table does not hold the workload, or no output lengths at all.
    """
    try:
        return held[workload]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in held if name is not None)
    if not names:
        raise ArgumentError("the table holds no output lengths: give output_tokens to total_ms instead")
    raise ArgumentError(f"workload is {workload!r}; allowed: {names}, or None for all together")


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
    return Levels(scores, outermost, tuple(weights))


def _below(score: float) -> float:
    return 0.5 * erfc(-score / sqrt(2.0))


def share_within(levels: Levels, totals: Sequence[float], budget_ms: float) -> float:
    """Probability that a total stays within a budget, from its values at the levels, which do not decrease."""
    scores = levels.scores
    j = bisect_right(totals, budget_ms)
    first = min(max(j - 1, 0), len(totals) - 2)
    rise = totals[first + 1] - totals[first]
    if rise <= 0.0:  # all levels there are the same: nothing lies beyond
        return 1.0 if j else 0.0
    score = scores[first] + (budget_ms - totals[first]) * ((scores[first + 1] - scores[first]) / rise)
    if score >= levels.outermost:
        return 1.0
    return _below(score) if score >= -levels.outermost else 0.0


def mean_over_lengths(lengths: Lengths, at_length: Callable[[int], float], tolerance: float) -> float:
    """Σ share(n) · at_length(n) for a monotone function of the tokens.

    The function is asked at both ends and then at the middle of what it is not straight in, so that thousands of
    lengths cost no more than some dozens.

    Parameters
    ----------
    lengths : Lengths
    at_length : callable
        Monotone in the number of tokens.
    tolerance : float
        How far the middle of an interval may lie off the straight line, as a share of the function's whole range; the
        answer lies off by less than half as much.
    """
    tokens, shares, weighted = lengths
    last = len(tokens) - 1
    first_value = at_length(tokens[0])
    if not last:
        return first_value
    last_value = at_length(tokens[last])
    extent = abs(last_value - first_value)
    total = first_value * shares[1] + last_value * (1.0 - shares[last])
    n_parts = last if last <= _FEW else _PARTS
    at = [round(part * last / n_parts) for part in range(n_parts + 1)]
    values = [first_value, *(at_length(tokens[place]) for place in at[1:-1]), last_value]
    total += sum(
        value * (shares[place + 1] - shares[place]) for place, value in zip(at[1:-1], values[1:-1], strict=True)
    )
    open_parts = list(zip(at, values, at[1:], values[1:], strict=False))
    while open_parts:
        low, at_low, high, at_high = open_parts.pop()
        if high - low == 1:
            continue
        change = abs(at_high - at_low)
        if change <= _FLAT * extent:
            total += 0.5 * (at_low + at_high) * (shares[high] - shares[low + 1])
            continue
        middle = (low + high) // 2
        at_middle = at_length(tokens[middle])
        total += at_middle * (shares[middle + 1] - shares[middle])
        straight = at_low + (at_high - at_low) * ((tokens[middle] - tokens[low]) / (tokens[high] - tokens[low]))
        parts = (low, at_low, middle, at_middle), (middle, at_middle, high, at_high)
        if change > _STEEP * extent or abs(at_middle - straight) > tolerance * extent:
            open_parts += parts
            continue
        for start, at_start, end, at_end in parts:
            slope = (at_end - at_start) / (tokens[end] - tokens[start])
            share = shares[end] - shares[start + 1]
            total += (at_start - slope * tokens[start]) * share + slope * (weighted[end] - weighted[start + 1])
    return total
