"""Maps of latencies from one machine to another, and a whole table under them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lutest.reader.figures import Curve, Figures, Key, KeyFigures, Summary

CALIBRATED = "calibrated"


@dataclass(frozen=True)
class StageMap:
    """A map of the P50 of one stage, and what becomes of the other quantiles.

    Attributes
    ----------
    scale, offset_ms, least_ms : float
        A P50 of t becomes ``max(scale * t + offset_ms, least_ms)``.
    stretch, widening : tuple of float
        By quantile of the table, empty for 1 and 0: log(quantile / P50) of l becomes ``stretch * hypot(l, widening)``.
    """

    scale: float = 1.0
    offset_ms: float = 0.0
    least_ms: float = 0.0
    stretch: tuple[float, ...] = ()
    widening: tuple[float, ...] = ()

    def p50_ms(self, ms: float) -> float:
        """The map of a P50."""
        return max(self.scale * ms + self.offset_ms, self.least_ms)

    def ratios(self, values: Sequence[float], median: int) -> list[float]:
        """Ratios of quantiles to their P50, as the map makes them; `median` is the place of the P50 among them."""
        middle = values[median]
        if not self.stretch:
            return [value / middle for value in values]
        logs = [math.log(value / middle) for value in values]
        widening = self.widening or (0.0,) * len(logs)
        sides = [0.0 if i == median else math.copysign(1.0, i - median) for i in range(len(logs))]
        parts = zip(sides, self.stretch, logs, widening, strict=True)
        return [math.exp(side * stretch * math.hypot(log, wide)) for side, stretch, log, wide in parts]


IDENTITY = StageMap()


@dataclass(frozen=True)
class KeyMaps:
    """The maps of one configuration.

    Attributes
    ----------
    prefill, decode_step : StageMap
        Of the curves of prefill and of one decode step.
    decode_total : StageMap
        What becomes of the quantiles of all steps of a run together; its P50 follows from those of the steps.
    correlations : tuple of float
        How far the deviations of prefill and decode go together, by quantile; empty: as they are.
    """

    prefill: StageMap = IDENTITY
    decode_step: StageMap = IDENTITY
    decode_total: StageMap = IDENTITY
    correlations: tuple[float, ...] = ()


def mapped_figures(figures: Figures, maps: Mapping[Key, KeyMaps]) -> Figures:
    """A whole table with the latencies of each configuration mapped.

    Parameters
    ----------
    figures : Figures
        The table.
    maps : mapping
        Configuration → its maps; every configuration of the table.

    Returns
    -------
    Figures
        Sample sizes stay: the shapes still rest on them. Bounds of P95 do not hold any more, and are None.
    """
    median = figures.quantiles.index(0.5)
    return replace(figures, keys=tuple(mapped_key(held, maps[held.key], median) for held in figures.keys))


def mapped_key(figures: KeyFigures, maps: KeyMaps, median: int) -> KeyFigures:
    """The figures of one configuration mapped; `median` is the place of 0.5 among the quantiles.

    Their source is ``calibrated``; that of a configuration which was filled in stays, for it says how.
    """
    source = CALIBRATED if figures.source == "measured" else figures.source
    typical_ms = _at_nearest_knot(figures.prefill_curve, figures.prompt_tokens_p50)
    mapped = replace(
        figures,
        prefill=_mapped_summary(figures.prefill, maps.prefill, median, typical_ms),
        prefill_curve=_mapped_curve(figures.prefill_curve, maps.prefill, median, source),
        correlations=maps.correlations or figures.correlations,
        source=source,
    )
    totals = figures.decode_total
    if figures.decode is None or figures.decode_curve is None or totals is None:
        return mapped
    typical_ms = _at_nearest_knot(figures.decode_curve, figures.prompt_tokens_p50 + 1)
    return replace(
        mapped,
        decode=_mapped_summary(figures.decode, maps.decode_step, median, typical_ms),
        decode_curve=_mapped_curve(figures.decode_curve, maps.decode_step, median, source),
        decode_total=replace(totals, ratios=_mapped_rows(totals.ratios, maps.decode_total, median)),
    )


def _mapped_curve(curve: Curve, stage: StageMap, median: int, source: str) -> Curve:
    values_ms = _mapped_rows(curve.values_ms, stage, median, stage.p50_ms)
    sources = tuple(held if held == "extrapolated" else source for held in curve.source)
    return Curve(curve.at, values_ms, curve.n, sources)


def _mapped_rows(
    rows: Sequence[Sequence[float]], stage: StageMap, median: int, p50: Callable[[float], float] = float
) -> tuple[tuple[float, ...], ...]:
    """Quantiles (a row each) over places, of which `p50` maps the P50 and the stage how far the others are from it."""
    columns = []
    for values in zip(*rows, strict=True):
        after = p50(values[median])
        columns.append(_rising(after * ratio for ratio in stage.ratios(values, median)))
    return tuple(zip(*columns, strict=True))


def _rising(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(accumulate(values, max))


def _at_nearest_knot(curve: Curve, x: int) -> tuple[float, ...]:
    nearest = min(range(len(curve.at)), key=lambda j: abs(curve.at[j] - x))
    return tuple(values[nearest] for values in curve.values_ms)


def _mapped_summary(summary: Summary, stage: StageMap, median: int, typical_ms: Sequence[float]) -> Summary:
    """Quantiles over all lengths together: the spread at one length is stretched, that of the lengths is mapped.

    `typical_ms` are the quantiles at a typical length. The squares of the two spreads add up, as those of independent
    deviations do.
    """
    before = summary.quantiles_ms[median]
    after = stage.p50_ms(before)
    quantiles = []
    for value, typical, ratio in zip(summary.quantiles_ms, typical_ms, stage.ratios(typical_ms, median), strict=True):
        reach = math.log(value / before)
        noise, new_noise = abs(math.log(typical / typical_ms[median])), abs(math.log(ratio))
        side = math.copysign(1.0, reach)
        lengths = math.sqrt(max(0.0, reach * reach - noise * noise))
        unexplained = abs(reach) - math.hypot(lengths, noise)  # below 0 where one length spreads more than all
        moved = math.log(stage.p50_ms(before * math.exp(side * lengths)) / after)
        quantiles.append(after * math.exp(side * (math.hypot(moved, new_noise) + unexplained)))
    return Summary(summary.n, _rising(quantiles), None, stage.p50_ms(summary.mean_ms))
