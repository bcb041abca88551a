"""Synthetic figures, and a table file made from them, for tests of the reading side."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
from hypothesis import settings
from scipy.stats import norm

from lutest.reader.figures import Curve, Figures, KeyColumn, KeyFigures, Quality, Summary, TotalRatios
from lutest.reader.names import SCHEMA_VERSION
from lutest.reader.over_lengths import OUTERMOST_SCORE
from lutest.tablefile.schema import STORAGE_VERSION, TABLES

settings.register_profile("untimed", deadline=None)  # machines that run tests are shared
settings.load_profile("untimed")

QUANTILES = (0.1, 0.5, 0.95, 0.99)
FACTORS = (0.8, 1.0, 1.4, 1.9)
PROMPTS = {"low": (40, 90, 160), "medium": (160, 300, 420), "high": (400, 600, 801)}
TOP_KS = (4, 8)
NUM_BLOCKS = (12, 16)
KEY_COLUMNS = (
    KeyColumn("tier", "category", "VARCHAR"),
    KeyColumn("top_k", "number", "BIGINT"),
    KeyColumn("num_blocks", "number", "BIGINT"),
)
NO_DECODE: tuple[str, int, int] = ("high", 8, 16)
SINGLE_KNOT: tuple[str, int, int] = ("low", 4, 12)


def _curve(at: tuple[int, ...], median: tuple[float, ...]) -> Curve:
    values = tuple(tuple(factor * (1 + 0.01 * j) * v for j, v in enumerate(median)) for factor in FACTORS)
    sources = ("measured", "interpolated", "extrapolated")
    return Curve(at, values, tuple(10 + j for j in range(len(at))), tuple(sources[j % 3 % 2] for j in range(len(at))))


def make_key(key: tuple[str, int, int]) -> KeyFigures:
    """Figures of one configuration: prefill and steps grow with prompt, top_k and num_blocks."""
    tier, top_k, num_blocks = key
    work = 0.3 * num_blocks * (1 + 0.1 * top_k)
    prompts = PROMPTS[tier] if key != SINGLE_KNOT else PROMPTS[tier][:1]
    kv = tuple(x + step for x, step in zip(prompts, (1, 17, 90), strict=False))
    prefill = _curve(prompts, tuple(work * (3 + 0.01 * x**1.2) for x in prompts))
    steps = _curve(kv, tuple(work * (0.5 + 0.0007 * x) for x in kv))
    middle = prefill.values_ms[1][len(prompts) // 2]
    figures = KeyFigures(
        key=key,
        prefill=Summary(70, tuple(f * middle for f in FACTORS), 1.6 * middle, 1.1 * middle),
        prompt_tokens_p50=prompts[len(prompts) // 2],
        prompt_tokens_min=0,  # so that nothing is out of reach
        prompt_tokens_max=9999,
        vision_tokens_p50=None,
        prefill_curve=prefill,
        decode=Summary(60, tuple(f * steps.values_ms[1][0] for f in FACTORS), None, steps.values_ms[1][0]),
        n_decode_steps=900,
        decode_curve=steps,
        decode_total=TotalRatios(
            (1, 4, 16, 64),
            ((0.85, 0.9, 0.93, 0.95), (0.99, 1.0, 1.0, 1.01), (1.5, 1.35, 1.25, 1.2), (2.2, 1.6, 1.4, 1.35)),
            (30, 20, 10, 5),
        ),
        correlations=(0.1, 0.0, 0.4, 0.7),
    )
    if key != NO_DECODE:
        return figures
    return replace(
        figures,
        decode=None,
        n_decode_steps=0,
        decode_curve=None,
        decode_total=None,
        correlations=(0.0,) * len(QUANTILES),
    )


def make_figures() -> Figures:
    """Twelve configurations; `NO_DECODE` has only one-token runs, `SINGLE_KNOT` one knot per curve."""
    keys = tuple(make_key((t, k, b)) for t in ("high", "low", "medium") for k in TOP_KS for b in NUM_BLOCKS)
    return Figures(
        quantiles=QUANTILES,
        key_columns=KEY_COLUMNS,
        keys=keys,
        output_lengths={"vqa": ((1, 5), (2, 30), (48, 4)), "web": ((7, 1),)},
        qualities=(
            Quality(("low", 4, 12), "vqa", 40, 0.5, 0.4, 0.6),
            Quality(("low", 8, 12), "vqa", 1, 1.0, None, None),
        ),
        meta={
            "device": "a test",
            "quantiles": json.dumps(list(QUANTILES)),
            "key_columns": json.dumps([column._asdict() for column in KEY_COLUMNS]),
            "schema_version": str(SCHEMA_VERSION),
        },
    )


def step_sums(curve: Curve, median: int) -> list[float]:
    """Sum of the median curve over 1 … each knot, by a loop over every length."""
    return [sum(curve_at(curve, median, x) for x in range(1, knot + 1)) for knot in curve.at]


def curve_at(curve: Curve, i: int, x: int) -> float:
    """Value of a curve by the rules of the file, written down the plain way."""
    at, values = curve.at, curve.values_ms[i]
    if x <= at[0]:
        return values[0]
    if x >= at[-1]:
        below = curve.values_ms[: i + 1]  # of this quantile and those below it: they never cross
        slopes = [(held[-1] - held[-2]) / (at[-1] - at[-2]) for held in below if len(at) > 1]
        return values[-1] + max([0.0, *slopes]) * (x - at[-1])
    j = max(j for j, knot in enumerate(at) if knot <= x)
    return values[j] + (values[j + 1] - values[j]) * (x - at[j]) / (at[j + 1] - at[j])


def ratio_at(ratios: TotalRatios, i: int, m: int) -> float:
    """Ratio at m steps, held constant outside of the knots."""
    inside = min(max(m, ratios.decode_steps[0]), ratios.decode_steps[-1])
    return curve_at(Curve(ratios.decode_steps, ratios.ratios, (), ()), i, inside)


def write_file(figures: Figures, path: Path) -> Path:
    """Write figures as a table file, as the builder would."""
    rows: dict[str, list[tuple[object, ...]]] = {name: [] for name in TABLES}
    unknown = (None,) * (len(figures.quantiles) + 1)  # standard errors, and the size of the sample behind them
    for held in figures.keys:
        key = tuple(held.key)
        s = held.prefill
        extent = (held.prompt_tokens_p50, held.prompt_tokens_min, held.prompt_tokens_max, held.vision_tokens_p50)
        rows["prefill"].append((*key, s.n, *s.quantiles_ms, s.p95_upper_ms, s.mean_ms, 1.0, 0.1, 99.0, *extent))
        for j, x in enumerate(held.prefill_curve.at):
            curve = held.prefill_curve
            rows["prefill_curve"].append(
                (*key, x, curve.n[j], *(v[j] for v in curve.values_ms), *unknown, curve.source[j])
            )
        if held.decode is None or held.decode_curve is None or held.decode_total is None:
            continue
        s, curve, ratios = held.decode, held.decode_curve, held.decode_total
        spread = (s.p95_upper_ms, s.mean_ms, 1.0, "timed")
        rows["decode"].append((*key, s.n, held.n_decode_steps, 0, *s.quantiles_ms, *spread))
        for j, (x, total) in enumerate(zip(curve.at, step_sums(curve, figures.quantiles.index(0.5)), strict=True)):
            values = (v[j] for v in curve.values_ms)
            rows["decode_curve"].append((*key, x, curve.n[j], *values, *unknown, total, curve.source[j]))
        for j, m in enumerate(ratios.decode_steps):
            rows["decode_total"].append((*key, m, ratios.n[j], *(v[j] for v in ratios.ratios), *unknown, "measured"))
        rows["total"].append((*key, s.n, *held.correlations))
    for workload, lengths in figures.output_lengths.items():
        rows["output_length"] += [(workload, tokens, n) for tokens, n in lengths]
    rows["quality"] = [(*q.key, q.workload, q.n, q.accuracy, q.lower, q.upper) for q in figures.qualities]
    rows["meta"] = list(figures.meta.items())
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{path}' AS written (STORAGE_VERSION '{STORAGE_VERSION}')")
        connection.execute("USE written")
        for table in TABLES.values():
            columns = table.expand(figures.quantiles, figures.key_columns)
            connection.execute(f"CREATE TABLE {table.name} ({', '.join(f'{c.name} {c.type}' for c in columns)})")
            for row in reversed(rows[table.name]):  # a reader must not rely on their order
                connection.execute(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(row))})", row)
    return path


def within_of(totals: Sequence[float], quantiles: Sequence[float], budget: float) -> float:
    """Probability that a total stays within a budget, from its values at the quantiles, which do not fall."""
    scores = norm.ppf(quantiles)
    j = bisect_right(totals, budget)
    first = min(max(j - 1, 0), len(totals) - 2)
    rise = totals[first + 1] - totals[first]
    if rise <= 0.0:
        return float(j > 0)
    score = scores[first] + (budget - totals[first]) * (scores[first + 1] - scores[first]) / rise
    if abs(score) < max(OUTERMOST_SCORE, *abs(scores)):
        return float(norm.cdf(score))
    return float(score > 0.0)
