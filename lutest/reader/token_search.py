"""The largest number of output tokens that fits a budget: a guess from the pieces, then a search around it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from math import sqrt

from lutest.reader.arguments import MAX_TOKENS
from lutest.reader.curves import Pieces, sum_to, value_at

__all__ = ["guess_tokens", "most_tokens"]


def guess_tokens(step: Pieces, ratio: Pieces, median: int, i: int, start: int, room_ms: float) -> int:
    """Output tokens that about fill `room_ms` of decode: the sum of the steps inverted piece by piece.

    Parameters
    ----------
    step, ratio : Pieces
        Of the configuration.
    median, i : int
        Places of 0.5 and of the wanted quantile.
    start : int
        Prompt tokens.
    room_ms : float
        Milliseconds left after prefill, 0 or more.
    """
    before = sum_to(step, median, start)
    steps = 1
    for _ in range(3):  # the ratio depends on the answer, weakly
        target = before + room_ms / value_at(ratio, i, steps)
        j = max(0, bisect_right(step.sums, target) - 1)
        rest, value, slope = target - step.sums[j], step.values[median][j], step.slopes[median][j]
        linear = value + 0.5 * slope
        distance = 2.0 * rest / (linear + sqrt(max(0.0, linear * linear + 2.0 * slope * rest)))
        steps = max(1, min(MAX_TOKENS - 1, int(step.starts[j] + distance) - start))
    return steps + 1


def most_tokens(
    total_ms: Callable[[int | None, int, float], float], prompt: int | None, q: float, budget_ms: float, guess: int
) -> int:
    """The largest n, from 1 to `MAX_TOKENS`, with ``total_ms(prompt, n, q) <= budget_ms``, where n = 1 fits.

    Looked for from `guess` on, in steps that double, and then between the last two: a good guess costs two totals.
    """
    reach = 1
    if total_ms(prompt, guess, q) <= budget_ms:
        low = guess
        while low < MAX_TOKENS and total_ms(prompt, min(low + reach, MAX_TOKENS), q) <= budget_ms:
            low = min(low + reach, MAX_TOKENS)
            reach *= 2
        high = low + reach
    else:
        high = guess
        while high - reach > 1 and total_ms(prompt, high - reach, q) > budget_ms:
            high -= reach
            reach *= 2
        low = max(1, high - reach)
    high = min(high, MAX_TOKENS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if total_ms(prompt, middle, q) <= budget_ms:
            low = middle
        else:
            high = middle
    return low
