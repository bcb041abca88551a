"""Figures for a configuration that was not measured, from those of the same categories and other numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutest.reader.arguments import number_axis
from lutest.reader.curves import Pieces, key_pieces, value_at
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
    median = figures.quantiles.index(0.5)
    prompts = [held.prompt_tokens_p50 for held in neighbours]
    visions: list[Any] = [held.vision_tokens_p50 for held in neighbours]
    pieces = [key_pieces(held, median) for held in neighbours]
    mix = _Mix(named, _weights(places, at), median)
    prefill_error = _left_out_error(
        places, [held.prefill for held in pieces], prompts, [h.prefill for h in neighbours], median
    )
    filled = KeyFigures(
        key=key,
        prefill=mix.summary([held.prefill for held in neighbours]),
        prompt_tokens_p50=mix.tokens(prompts),
        prompt_tokens_min=min(held.prompt_tokens_min for held in neighbours),
        prompt_tokens_max=max(held.prompt_tokens_max for held in neighbours),
        vision_tokens_p50=None if None in visions else mix.tokens(visions),
        prefill_curve=mix.curve([held.prefill for held in pieces], source),
        decode=None,
        n_decode_steps=0,
        decode_curve=None,
        decode_total=None,
        correlations=(0.0,) * len(figures.quantiles),
        source=source,
        fill_error=FillError(prefill_error, None),
        mixed=neighbours[0].mixed,
    )
    decoding = [number for number, held in enumerate(neighbours) if held.decode is not None]
    if not decoding:
        return filled
    summaries = [held.decode for held in neighbours if held.decode is not None]
    steps, ratios = ([held for held in curves if held is not None] for curves in list(zip(*pieces, strict=True))[1:])
    mix = _Mix(named, _weights(places[decoding], at), median)
    correlations = mix.weights @ np.array([neighbours[number].correlations for number in decoding])
    after = [prompts[number] + 1 for number in decoding]
    return replace(
        filled,
        decode=mix.summary(summaries),
        decode_curve=mix.curve(steps, source),
        decode_total=mix.ratios(ratios),
        correlations=tuple(map(float, np.clip(correlations, 0.0, 1.0))),
        fill_error=FillError(prefill_error, _left_out_error(places[decoding], steps, after, summaries, median)),
    )


def _left_out_error(
    places: Floats, curves: Sequence[Pieces], at: Sequence[int], summaries: Sequence[Summary], median: int
) -> float | None:
    """Root mean square relative error of the curves of the others against each key's plain P50 of its runs.

    The plain one, since the curves of all keys were fitted together, and know of the key that is left out.
    """
    if len(curves) < 2:
        return None
    errors = []
    for left_out, summary in enumerate(summaries):
        others = [j for j in range(len(curves)) if j != left_out]
        logs = np.log([value_at(curves[j], median, at[left_out]) for j in others])
        miss = float(_weights(places[others], places[left_out]) @ logs) - np.log(summary.quantiles_ms[median])
        errors.append(np.expm1(np.clip(miss, -_LARGEST_LOG, _LARGEST_LOG)))
    return float(np.sqrt(np.mean(np.square(errors))))


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


@dataclass(frozen=True)
class _Mix:
    """Combines figures of neighbours into those of one configuration, called `named` where that cannot be done."""

    named: str
    weights: Floats
    median: int

    def combined(self, values: Sequence[Any], median: int) -> Floats:
        """Positive values (neighbour, quantile, knot): the median by itself, others by their distance to it."""
        logs = np.log(np.array(values))
        combined = np.empty(logs.shape[1:])
        combined[median] = np.tensordot(self.weights, logs[:, median], 1)
        for step, rows in ((1, range(median + 1, len(combined))), (-1, range(median - 1, -1, -1))):
            for i in rows:
                gap = step * np.tensordot(self.weights, logs[:, i] - logs[:, i - step], 1)
                combined[i] = combined[i - step] + step * np.maximum(gap, 0.0)
        if np.abs(combined).max() > _LARGEST_LOG:
            raise UnknownKeyError(f"{self.named} is too far from anything measured")
        filled: Floats = np.exp(combined)
        return filled

    def tokens(self, held: Sequence[int]) -> int:
        return round(min(max(float(self.weights @ np.array(held)), min(held)), max(held)))

    def summary(self, held: Sequence[Summary]) -> Summary:
        quantiles = self.combined([summary.quantiles_ms for summary in held], self.median)
        return Summary(0, tuple(map(float, quantiles)), None, float(self.combined([[h.mean_ms] for h in held], 0)[0]))

    def knots(self, pieces: Sequence[Pieces]) -> tuple[tuple[int, ...], Floats]:
        at = sorted({x for held in pieces for x in held.starts[1:]})
        values = [[[value_at(held, i, x) for x in at] for i in range(len(held.values))] for held in pieces]
        return tuple(at), self.combined(values, self.median)

    def curve(self, pieces: Sequence[Pieces], source: str) -> Curve:
        at, values = self.knots(pieces)
        return Curve(at, _rows(values), (0,) * len(at), (source,) * len(at))

    def ratios(self, pieces: Sequence[Pieces]) -> TotalRatios:
        steps, ratios = self.knots(pieces)
        for j in range(1, len(steps)):  # ratios that fall so fast over the number of steps that decode_ms would fall
            lower = ratios[:, j - 1] * (steps[j] / (2 * steps[j] - steps[j - 1]))
            ratios[:, j] = np.maximum(ratios[:, j], lower)
        return TotalRatios(steps, _rows(ratios), (0,) * len(steps))


def _rows(values: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in values)
