"""What an estimate rests on: how many observations, and whether they were measured there or filled in."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from lutest.reader.figures import Curve, KeyFigures, TotalRatios

__all__ = ["Evidence", "curve_evidence", "decode_evidence", "prefill_evidence", "weakest"]

_RANK = {"measured": 0, "calibrated": 1, "interpolated": 2, "extrapolated": 3}


class Evidence(NamedTuple):
    """Observations behind an estimate, and its source: ``measured``, ``interpolated`` or ``extrapolated``."""

    n: int
    source: str


def prefill_evidence(figures: KeyFigures, prompt_tokens: int | None) -> Evidence:
    """What prefill rests on at a prompt length; None: at the configuration's own quantiles."""
    if prompt_tokens is None:
        return Evidence(figures.prefill.n, figures.source)
    return curve_evidence(figures.prefill_curve, prompt_tokens, prompt_tokens, figures.source)


def curve_evidence(curve: Curve, low: int, high: int, source: str) -> Evidence:
    """What values of a curve on low … high rest on, `source` being that of the whole configuration."""
    knots, outside = _support(curve.at, curve.n, low, high)
    sources = [curve.source[j] for j in knots]
    n = sum(curve.n[j] for j in knots)
    return Evidence(n, _worst(source, *sources, "extrapolated" if outside else "measured"))


def decode_evidence(figures: KeyFigures, curve: Curve, ratios: TotalRatios, start: int, output_tokens: int) -> Evidence:
    """What the decode time of 2 tokens or more rests on: runs behind its ratio, and the worst source on the way.

    `curve` and `ratios` are those of the configuration, `start` its prompt tokens.
    """
    steps = output_tokens - 1
    on_the_way = curve_evidence(curve, start + 1, start + steps, figures.source).source
    knots, outside = _support(ratios.decode_steps, ratios.n, steps, steps)
    beyond = outside and len(ratios.n) > 1  # a single ratio stands for all lengths
    runs = sum(ratios.n[j] for j in knots)
    return Evidence(runs, _worst(on_the_way, "extrapolated" if beyond else "measured"))


def weakest(*parts: Evidence) -> Evidence:
    """What a sum of parts rests on: the fewest observations and the worst source."""
    return Evidence(min(part.n for part in parts), _worst(*(part.source for part in parts)))


def _support(at: tuple[int, ...], n: tuple[int, ...], low: int, high: int) -> tuple[range, bool]:
    """Knots that values on low … high rest on, and whether any of it lies outside of all knots."""
    first = max(0, bisect_right(at, low) - 1)
    last = bisect_right(at, high) - 1
    if last < 0:
        last = 0
    elif at[last] < high and last + 1 < len(n):
        last += 1
    return range(first, last + 1), low < at[0] or high > at[-1]


def _worst(*sources: str) -> str:
    return max(sources, key=_RANK.__getitem__)
