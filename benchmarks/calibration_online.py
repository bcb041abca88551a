"""OnlineCalibrator: what an observation costs, how fast a step is followed, and what outliers do to it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from printing import Verdict, percent, print_aligned, verdict

import lutest

__all__ = ["online_verdicts"]

STEP = 1.3
SETTLED = 0.03  # of the new ratio
BEFORE, AFTER = 500, 1500
SEEDS = 50
BLOCKS = 300
HALF_LIFE = 100.0

Observation = tuple[tuple[str, int, int], int, int, float, float]


def online_verdicts(folder: Path, runs: pd.DataFrame) -> list[Verdict]:
    """Item 3."""
    path = folder / "online.duckdb"
    lutest.build(runs=runs, output=path)
    table = lutest.load(path)
    ratio, nanoseconds = observe_cost(table, observations(runs))
    text = f"observe takes {nanoseconds:,.0f} ns, {ratio:.1f} x a function that looks into a dict"
    verdicts = [verdict("3", ratio < 20.0, text)]
    rows = [["", "followed within (median)", "at worst", "largest factor beyond the settled one", "settled at"]]
    for share in (0.0, 0.05):
        followed, beyond, settled = step_response(table, runs, share)
        rows.append(
            [
                f"{share:.0%} of the observations ten times too slow",
                f"{statistics.median(followed):.0f} samples",
                f"{max(followed)}",
                percent(max(beyond)),
                f"{statistics.median(settled):.3f}",
            ]
        )
        if not share:
            limit = 3 * HALF_LIFE
            text = f"a step of {STEP} is followed within {max(followed)} samples, stated: {limit:.0f}"
            verdicts.append(verdict("3", max(followed) <= limit, text))
        else:
            text = f"with {share:.0%} ten times too slow, the factor goes {percent(max(beyond))} beyond {STEP} at most"
            verdicts.append(verdict("3", max(beyond) <= 0.05, text))
    print(
        f"\nA step of {STEP} after {BEFORE} observations, half-life {HALF_LIFE:.0f}, {SEEDS} orders of the shipped runs"
    )
    print_aligned(rows)
    return verdicts


def observations(runs: pd.DataFrame) -> list[Observation]:
    names = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms"]
    rows = runs[names].itertuples(index=False)
    return [((t, int(k), int(b)), int(p), int(n), float(a), float(d)) for t, k, b, p, n, a, d in rows]


def observe_cost(table: lutest.LatencyTable, held: Sequence[Observation]) -> tuple[float, float]:
    """Ratio to a dict function that takes turns with it, and nanoseconds."""
    prices = {tuple(key): table[key].prefill_p50_ms for key in table.keys}

    def dict_function(tier: str, top_k: int, num_blocks: int) -> float:
        return prices[tier, top_k, num_blocks]

    observe = lutest.OnlineCalibrator(table).observe
    clock = time.perf_counter_ns

    def cost(function: Callable[..., object], block: Sequence[tuple[object, ...]]) -> float:
        start = clock()
        for arguments in block:
            function(*arguments)
        return (clock() - start) / len(block)

    chance = np.random.default_rng(0)
    ratios, costs = [], []
    for _ in range(BLOCKS):
        block = [held[place] for place in chance.integers(len(held), size=500)]
        plain = cost(dict_function, [key for key, *_ in block])
        costs.append(cost(observe, block))
        ratios.append(costs[-1] / plain)
    return statistics.median(ratios), statistics.median(costs)


def step_response(
    table: lutest.LatencyTable, runs: pd.DataFrame, share: float
) -> tuple[list[int], list[float], list[float]]:
    """Samples until the factors stay near the new ratio; how far the largest one goes beyond it; where they settle.

    The ratio is that of the runs to the table, which is not quite 1, times the step.
    """
    held = observations(runs)
    followed, beyond, settled = [], [], []
    for seed in range(SEEDS):
        chance = np.random.default_rng(seed)
        calibrator = lutest.OnlineCalibrator(table, half_life=HALF_LIFE)
        factors = []
        for number, place in enumerate(chance.permutation(len(held))[: BEFORE + AFTER]):
            key, prompt, output, prefill_ms, decode_ms = held[place]
            factor = STEP if number >= BEFORE else 1.0
            factor *= 10.0 if chance.random() < share else 1.0
            calibrator.observe(key, prompt, output, prefill_ms * factor, decode_ms * factor)
            factors.append(calibrator.overall().prefill)
        after = np.array(factors[BEFORE:])
        off = np.abs(after / STEP - 1.0) > SETTLED
        followed.append(int(np.flatnonzero(off)[-1]) + 1 if off.any() else 0)
        beyond.append(float(after.max() / STEP - 1.0))
        settled.append(float(after[-1]))
    return followed, beyond, settled
