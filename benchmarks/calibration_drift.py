"""`check`: false alarms on runs without drift, and detection of a drift."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from printing import Verdict, percent, print_aligned, verdict

import lutest
from lutest.calibration.coverage import TOLERANCE

__all__ = ["drift_verdicts"]

SPLITS, RESAMPLES = 10, 100  # of each split
FEW = 20  # of each split, for what needs no thousand
RUNS = 100
DRIFT = 1.05
RATES = (0.01, 0.05)
LATENCIES = ["prefill_ms", "decode_ms"]
COLUMNS = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", *LATENCIES]


def drift_verdicts(folder: Path, sets: Mapping[str, pd.DataFrame]) -> list[Verdict]:
    """Item 4: tables built from half of the runs, held against samples of the other half.

    Without tolerance the rate of false alarms is tested itself; what is found of a drift, as the tool is used.
    """
    rows = [
        ["", *(f"false alarms at {rate:g}" for rate in RATES), "with tolerance", *(f"+5 % at {r:g}" for r in RATES)]
    ]
    verdicts = []
    for name, runs in sets.items():
        same: list[float] = []
        tolerated: list[float] = []
        slower: list[float] = []
        for number in range(SPLITS):
            chance = np.random.default_rng(number)
            order = chance.permutation(len(runs))
            path = folder / "drift.duckdb"
            lutest.build(runs=runs.iloc[order[: len(runs) // 2]], output=path)
            table = lutest.load(path)
            others = order[len(runs) // 2 :]
            for turn in range(RESAMPLES):
                sample = runs.iloc[chance.choice(others, size=RUNS, replace=False)][COLUMNS]
                same.append(lowest_p_value(table, sample, 0.0))
                if turn < FEW:
                    tolerated.append(lowest_p_value(table, sample, TOLERANCE))
                    drifted = sample.assign(**{held: DRIFT * sample[held] for held in LATENCIES})
                    slower.append(lowest_p_value(table, drifted, TOLERANCE))
        alarms = {rate: share_below(same, rate) for rate in RATES}
        found = {rate: share_below(slower, rate) for rate in RATES}
        shares = [*alarms.values(), share_below(tolerated, RATES[0]), *found.values()]
        rows.append([f"{name}, {RUNS} runs", *map(percent, shares)])
        for rate, share in alarms.items():
            most = rate + 2 * float(np.sqrt(rate * (1 - rate) / len(same)))
            text = f"{name}: {percent(share)} false alarms in {len(same):,} resamples, stated {rate:.0%}"
            verdicts.append(verdict("4", share <= most, text))
        share = found[RATES[0]]
        text = f"{name}: +5 % is found in {percent(share)} of {len(slower)} samples of {RUNS} runs at {RATES[0]:.0%}"
        verdicts.append(verdict("4", share >= 0.9, text))
    print(f"\nlutest.check on {RUNS} runs, {SPLITS * RESAMPLES:,} resamples of runs that the table was not built from")
    print_aligned(rows)
    return verdicts


def share_below(p_values: list[float], rate: float) -> float:
    return float(np.mean(np.array(p_values) <= rate))


def lowest_p_value(table: lutest.LatencyTable, runs: pd.DataFrame, tolerance: float) -> float:
    return min(test.adjusted for test in lutest.check(table, runs, tolerance=tolerance).tests)
