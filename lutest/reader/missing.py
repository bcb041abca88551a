"""Figures for a configuration that was not measured, from those of the same categories and other numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lutest.reader.arguments import number_axis
from lutest.reader.errors import UnknownKeyError
from lutest.reader.figures import Curve, Figures, FillError, Key, KeyFigures, Summary, TotalRatios, described_key

Floats = NDArray[np.float64]
_LARGEST_LOG = 60.0  # e^60 ms is beyond any latency: what gets there was extrapolated too far


def interpolate_key(figures: Figures, key: Key) -> KeyFigures:
    """Figures of `key` as a combination of the measured configurations of its categories.

    Logarithms of latencies are combined with the weights of an affine fit over the number columns, on a logarithmic
    axis where all numbers are positive, nearer neighbours counting more (locally weighted regression: Cleveland 1979,
    J. Am. Stat. Assoc. 74, 829-836); where the neighbours do not span it, with inverse squared distances. Quantiles
    keep their order.

    Parameters
    ----------
    figures : Figures
        The table.
    key : Key
        Categories of the table, any numbers.

    Returns
    -------
    KeyFigures
        ``n`` is 0 everywhere; ``source`` is ``interpolated`` where every number lies between those of the neighbours,
        else ``extrapolated``; ``fill_error`` says how far off the neighbours are when filled in from each other.

    Raises
    ------
    UnknownKeyError
        These categories were never measured together, or the configuration is too far from anything measured.
    """
    numbers = [place for place, column in enumerate(figures.key_columns) if column.kind == "number"]
    categories = [place for place in range(len(key)) if place not in numbers]
    neighbours = [held for held in figures.keys if all(held.key[place] == key[place] for place in categories)]
    named = described_key(figures.key_columns, key)
    if not neighbours or not numbers:
        raise UnknownKeyError(f"{named}: these categories were not measured together, and no number leads to them")
    axes = [number_axis([held.key[place] for held in neighbours], key[place]) for place in numbers]
    places, at = np.array(axes).T[:-1], np.array(axes).T[-1]
    if not np.isfinite(at).all():
        raise UnknownKeyError(f"{named}: the numbers that were measured are above 0")
    inside = bool((places.min(axis=0) <= at).all() and (at <= places.max(axis=0)).all())
    source = "interpolated" if inside else "extrapolated"
    weights = _weights(places, at)
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
        prefill=_summary(_combined(weights, prefill_values, median, named), _combined(weights, means, 0, named)),
        prompt_tokens_p50=round(min(max(prompt, min(prompts)), max(prompts))),
        prefill_curve=_curve(prefill_at, _combined(weights, np.array(prefill_curves), median, named), source),
        decode=None,
        n_decode_steps=0,
        decode_curve=None,
        decode_total=None,
        correlations=(0.0,) * len(figures.quantiles),
        source=source,
        fill_error=_fill_error(neighbours, places, median),
        mixed=neighbours[0].mixed,
    )
    decoding = [number for number, held in enumerate(neighbours) if held.decode is not None]
    if not decoding:
        return filled
    return _with_decode(filled, [neighbours[n] for n in decoding], _weights(places[decoding], at), median, named)


def _fill_error(neighbours: Sequence[KeyFigures], places: Floats, median: int) -> FillError:
    prefill = [(held.prefill_curve, held.prompt_tokens_p50, held.prefill) for held in neighbours]
    decode = [
        (held.decode_curve, held.prompt_tokens_p50 + 1, held.decode)
        for held in neighbours
        if held.decode_curve is not None and held.decode is not None
    ]
    decoding = np.array([held.decode is not None for held in neighbours])
    return FillError(_left_out_error(prefill, places, median), _left_out_error(decode, places[decoding], median))


def _left_out_error(held: Sequence[tuple[Curve, int, Summary]], places: Floats, median: int) -> float | None:
    """Root mean square relative error of the curves of the others against each key's plain median of its runs.

    The plain one, since the curves of all keys were fitted together, and know of the key that is left out.
    """
    if len(held) < 2:
        return None
    errors = []
    for left_out, (_, at, summary) in enumerate(held):
        others = [j for j in range(len(held)) if j != left_out]
        logs = np.log([_resampled(held[j][0].at, [held[j][0].values_ms[median]], [at])[0][0] for j in others])
        miss = float(_weights(places[others], places[left_out]) @ logs) - np.log(summary.quantiles_ms[median])
        errors.append(np.expm1(np.clip(miss, -_LARGEST_LOG, _LARGEST_LOG)))
    return float(np.sqrt(np.mean(np.square(errors))))


def _with_decode(
    filled: KeyFigures, neighbours: Sequence[KeyFigures], weights: Floats, median: int, named: str
) -> KeyFigures:
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
    ratio_values = _rising_totals(steps_at, _combined(weights, np.array(ratios), median, named))
    return replace(
        filled,
        decode=_summary(_combined(weights, values, median, named), _combined(weights, means, 0, named)),
        decode_curve=_curve(kv_at, _combined(weights, np.array(curves), median, named), filled.source),
        decode_total=TotalRatios(tuple(steps_at), _rows(ratio_values), (0,) * len(steps_at)),
        correlations=tuple(map(float, correlations)),
    )


def _weights(places: Floats, at: Floats) -> Floats:
    """Weights of the neighbours at these places, 1 in sum, that give the fitted value at a place."""
    span = np.ptp(places, axis=0)
    offsets = (places - at) / np.where(span > 0.0, span, 1.0)
    nearness = 1.0 / np.maximum((offsets**2).sum(axis=1), 1e-12)
    inverse_distance: Floats = nearness / nearness.sum()
    design = np.column_stack([np.ones(len(places)), offsets])
    if np.linalg.matrix_rank(design) < design.shape[1]:
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


def _combined(weights: Floats, values: Floats, median: int, named: str) -> Floats:
    """Combine positive `values` (neighbour, quantile, knot): the median by itself, others by their distance to it."""
    logs = np.log(values)
    combined = np.empty(values.shape[1:])
    combined[median] = np.tensordot(weights, logs[:, median], 1)
    for step, rows in ((1, range(median + 1, len(combined))), (-1, range(median - 1, -1, -1))):
        for i in rows:
            gap = step * np.tensordot(weights, logs[:, i] - logs[:, i - step], 1)
            combined[i] = combined[i - step] + step * np.maximum(gap, 0.0)
    if np.abs(combined).max() > _LARGEST_LOG:
        raise UnknownKeyError(f"{named} is too far from anything measured")
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
