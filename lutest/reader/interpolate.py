"""Figures for a configuration that was not measured, from its tier's neighbours in (top_k, num_blocks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lutest.reader.errors import UnknownKeyError
from lutest.reader.figures import Curve, Figures, FillError, Key, KeyFigures, Summary, TotalRatios

__all__ = ["interpolate_key"]

Floats = NDArray[np.float64]
_LARGEST_LOG = 60.0  # e^60 ms is beyond any latency: what gets there was extrapolated too far


def interpolate_key(figures: Figures, key: Key) -> KeyFigures:
    """Figures of `key` as a combination of the measured configurations of its tier.

    Logarithms of latencies are combined with the weights of an affine fit in (top_k, num_blocks), nearer neighbours
    counting more (locally weighted regression: Cleveland 1979, J. Am. Stat. Assoc. 74, 829-836); where the neighbours
    do not span a plane, with inverse squared distances. Quantiles keep their order.

    Parameters
    ----------
    figures : Figures
        The table.
    key : Key
        A tier of the table, any top_k and num_blocks of 1 or more.

    Returns
    -------
    KeyFigures
        ``n`` is 0 everywhere; ``source`` is ``interpolated`` inside of the convex hull of the neighbours, else
        ``extrapolated``; ``fill_error`` says how far off the neighbours are when filled in from each other.

    Raises
    ------
    UnknownKeyError
        Nothing is known of the tier, or the configuration is too far from anything measured.
    """
    neighbours = [held for held in figures.keys if held.key.tier == key.tier]
    if not neighbours:
        raise UnknownKeyError(f"tier={key.tier!r} is not in the table, which holds {', '.join(figures.tiers)}")
    if key.top_k < 1 or key.num_blocks < 1:
        raise UnknownKeyError(f"top_k={key.top_k}, num_blocks={key.num_blocks}: both are 1 or more")
    places = _places(neighbours)
    source = "interpolated" if _in_hull(places, (key.top_k, key.num_blocks)) else "extrapolated"
    weights = _weights(places, key)
    median = figures.quantiles.index(0.5)
    prefill_at = sorted({x for held in neighbours for x in held.prefill_curve.at})
    prefill_curves = [
        _resampled(held.prefill_curve.at, held.prefill_curve.values_ms, prefill_at) for held in neighbours
    ]
    prefill_values = np.array([held.prefill.quantiles_ms for held in neighbours])[:, :, None]
    means = np.array([held.prefill.mean_ms for held in neighbours])[:, None, None]
    prompt = float(weights @ [held.prompt_tokens_p50 for held in neighbours])
    prompts = [held.prompt_tokens_p50 for held in neighbours]
    filled = KeyFigures(
        key=key,
        prefill=_summary(_combined(weights, prefill_values, median, key), _combined(weights, means, 0, key)),
        prompt_tokens_p50=round(min(max(prompt, min(prompts)), max(prompts))),
        prefill_curve=_curve(prefill_at, _combined(weights, np.array(prefill_curves), median, key), source),
        decode=None,
        n_decode_steps=0,
        decode_curve=None,
        decode_total=None,
        correlations=(0.0,) * len(figures.quantiles),
        source=source,
        fill_error=_fill_error(neighbours, median),
    )
    return _with_decode(filled, [held for held in neighbours if held.decode is not None], median)


def _fill_error(neighbours: Sequence[KeyFigures], median: int) -> FillError:
    prefill = [(held.key, held.prefill_curve, held.prompt_tokens_p50, held.prefill) for held in neighbours]
    decode = [
        (held.key, held.decode_curve, held.prompt_tokens_p50 + 1, held.decode)
        for held in neighbours
        if held.decode_curve is not None and held.decode is not None
    ]
    return FillError(_left_out_error(prefill, median), _left_out_error(decode, median))


def _left_out_error(held: Sequence[tuple[Key, Curve, int, Summary]], median: int) -> float | None:
    """Root mean square relative error of the curves of the others against each key's plain median of its runs.

    The plain one, since the curves of all keys were fitted together, and know of the key that is left out.
    """
    if len(held) < 2:
        return None
    places = np.array([(key.top_k, key.num_blocks) for key, *_ in held], dtype=np.float64)
    errors = []
    for left_out, (key, _, at, summary) in enumerate(held):
        others = [j for j in range(len(held)) if j != left_out]
        logs = np.log([_resampled(held[j][1].at, [held[j][1].values_ms[median]], [at])[0][0] for j in others])
        miss = float(_weights(places[others], key) @ logs) - np.log(summary.quantiles_ms[median])
        errors.append(np.expm1(np.clip(miss, -_LARGEST_LOG, _LARGEST_LOG)))
    return float(np.sqrt(np.mean(np.square(errors))))


def _with_decode(filled: KeyFigures, neighbours: Sequence[KeyFigures], median: int) -> KeyFigures:
    if not neighbours:
        return filled
    key = filled.key
    weights = _weights(_places(neighbours), key)
    summaries, curves, ratios = [], [], []
    kv_at = sorted({x for held in neighbours if held.decode_curve for x in held.decode_curve.at})
    steps_at = sorted({x for held in neighbours if held.decode_total for x in held.decode_total.decode_steps})
    for held in neighbours:
        assert held.decode is not None
        assert held.decode_curve is not None
        assert held.decode_total is not None
        summaries.append(held.decode)
        curves.append(_resampled(held.decode_curve.at, held.decode_curve.values_ms, kv_at))
        ratios.append(_resampled(held.decode_total.decode_steps, held.decode_total.ratios, steps_at, level=True))
    values = np.array([summary.quantiles_ms for summary in summaries])[:, :, None]
    means = np.array([summary.mean_ms for summary in summaries])[:, None, None]
    correlations = np.clip(weights @ np.array([held.correlations for held in neighbours]), 0.0, 1.0)
    ratio_values = _rising_totals(steps_at, _combined(weights, np.array(ratios), median, key))
    return replace(
        filled,
        decode=_summary(_combined(weights, values, median, key), _combined(weights, means, 0, key)),
        decode_curve=_curve(kv_at, _combined(weights, np.array(curves), median, key), filled.source),
        decode_total=TotalRatios(tuple(steps_at), _rows(ratio_values), (0,) * len(steps_at)),
        correlations=tuple(map(float, correlations)),
    )


def _places(neighbours: Sequence[KeyFigures]) -> Floats:
    return np.array([(held.key.top_k, held.key.num_blocks) for held in neighbours], dtype=np.float64)


def _weights(places: Floats, key: Key) -> Floats:
    """Weights of the neighbours, 1 in sum, that give the fitted value at `key`."""
    span = np.maximum(np.ptp(places, axis=0), 1.0)
    offsets = (places - (key.top_k, key.num_blocks)) / span
    nearness = 1.0 / np.maximum((offsets**2).sum(axis=1), 1e-12)
    inverse_distance: Floats = nearness / nearness.sum()
    design = np.column_stack([np.ones(len(places)), offsets])
    if np.linalg.matrix_rank(design) < 3:
        return inverse_distance
    root = np.sqrt(nearness)
    # the fitted value at offset 0 is the intercept: the first row of the pseudo-inverse
    hat: Floats = np.linalg.pinv(design * root[:, None])[0] * root
    return hat


def _resampled(
    at: Sequence[int], values: Sequence[Sequence[float]], wanted: Sequence[int], level: bool = False
) -> list[Floats]:
    """Values at the `wanted` knots by the table's own rule; `level`: held constant beyond the last knot."""
    rows = []
    for curve in values:
        row = np.interp(wanted, at, curve)
        if len(at) > 1 and not level:
            slope = max(0.0, (curve[-1] - curve[-2]) / (at[-1] - at[-2]))
            row = row + slope * np.maximum(np.array(wanted) - at[-1], 0)
        rows.append(row)
    return rows


def _combined(weights: Floats, values: Floats, median: int, key: Key) -> Floats:
    """Combine positive `values` (neighbour, quantile, knot): the median by itself, others by their distance to it."""
    logs = np.log(values)
    combined = np.empty(values.shape[1:])
    combined[median] = np.tensordot(weights, logs[:, median], 1)
    for step, rows in ((1, range(median + 1, len(combined))), (-1, range(median - 1, -1, -1))):
        for i in rows:
            gap = step * np.tensordot(weights, logs[:, i] - logs[:, i - step], 1)
            combined[i] = combined[i - step] + step * np.maximum(gap, 0.0)
    if np.abs(combined).max() > _LARGEST_LOG:
        raise UnknownKeyError(
            f"tier={key.tier!r}, top_k={key.top_k}, num_blocks={key.num_blocks} is too far from anything measured"
        )
    filled: Floats = np.exp(combined)
    return filled


def _rising_totals(steps: Sequence[int], ratios: Floats) -> Floats:
    """Raise ratios that fall so fast over the number of steps that decode_ms would fall with them."""
    for j in range(1, len(steps)):
        lower = ratios[:, j - 1] * (steps[j] / (2 * steps[j] - steps[j - 1]))
        ratios[:, j] = np.maximum(ratios[:, j], lower)
    return ratios


def _rows(values: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in values)


def _summary(quantiles: Floats, mean: Floats) -> Summary:
    return Summary(0, tuple(map(float, quantiles[:, 0])), None, float(mean[0, 0]))


def _curve(at: Sequence[int], values: Floats, source: str) -> Curve:
    return Curve(tuple(at), _rows(values), (0,) * len(at), (source,) * len(at))


def _in_hull(places: Floats, point: tuple[int, int]) -> bool:
    """Whether the point lies in the convex hull: directions to the corners leave no open half-plane free."""
    offsets = places - point
    if not offsets.any(axis=1).all():
        return True
    angles = np.sort(np.arctan2(offsets[:, 1], offsets[:, 0]))
    gaps = np.append(np.diff(angles), angles[0] + 2 * np.pi - angles[-1])
    return bool(gaps.max() <= np.pi + 1e-9)
