"""Quantiles of weighted values, near a place and beyond the sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["local_quantiles", "weighted_quantiles"]

NEIGHBOURS = 150  # runs that a local quantile rests on, where there are as many
TAIL_RUNS = 10  # runs that an exponential tail rests on

Array = npt.NDArray[np.float64]


def local_quantiles(at: Array, values: Array, places: Array, levels: Array) -> Array:
    """Quantiles of `values` near each place (places × levels), tricube weights over the distance."""
    order = np.argsort(values, kind="stable")
    at, values = at[order], values[order]
    quantiles = np.empty((len(places), len(levels)))
    for number, place in enumerate(places):
        distance = np.abs(at - place)
        near = np.partition(distance, min(NEIGHBOURS, len(at)) - 1)[min(NEIGHBOURS, len(at)) - 1]
        reach = max(1.0, 1.5 * float(near))
        weight = np.clip(1 - (distance / reach) ** 3, 0, None) ** 3
        used = weight > 0
        quantiles[number] = weighted_quantiles(values[used], weight[used], levels)
    return quantiles


def weighted_quantiles(values: Array, weight: Array, levels: Array) -> Array:
    """Quantiles of weighted ascending values at ranks (n + 1) · q, an exponential tail beyond the sample."""
    total = weight.sum()
    effective = total**2 / np.sum(weight**2)
    rank = ((np.cumsum(weight) - weight / 2) / total * effective + 0.5) / (effective + 1)
    found = np.interp(levels, rank, values)
    for number, q in enumerate(levels):
        if q > rank[-1]:
            found[number] = max(values[-1], _tail(values, weight, rank, effective, q))
        elif q < rank[0]:
            found[number] = min(values[0], -_tail(-values[::-1], weight[::-1], 1 - rank[::-1], effective, 1 - q))
    return found


def _tail(values: Array, weight: Array, rank: Array, effective: float, q: float) -> float:
    anchor = max(0.5, 1 - TAIL_RUNS / (effective + 1))
    threshold = float(np.interp(anchor, rank, values))
    beyond = rank > anchor
    if not beyond.any():
        return threshold
    excess = float(np.sum(weight[beyond] * (values[beyond] - threshold)) / weight[beyond].sum())
    return threshold + excess * float(np.log((1 - anchor) / (1 - q)))
