"""`check`: false alarms on runs without drift, and detection of a drift."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from printing import Verdict, percent, print_aligned, verdict

import lutest

__all__ = ["drift_verdicts"]

SPLITS, RESAMPLES = 10, 100  # of each split
DETECTIONS = 20
RUNS = 100
DRIFT = 1.05
RATES = (0.01, 0.05)
_LATENCIES = ["prefill_ms", "decode_ms", "total_ms"]


def drift_verdicts(folder: Path, sets: Mapping[str, pd.DataFrame]) -> list[Verdict]:
    """Item 4: tables built from half of the runs, held against samples of the other half."""
    rows = [["", *(f"false alarms at {rate:g}" for rate in RATES), *(f"+5 % found at {rate:g}" for rate in RATES)]]
    verdicts = []
    for name, runs in sets.items():
        alarms = {(drift, rate): 0 for drift in (1.0, DRIFT) for rate in RATES}
        for number in range(SPLITS):
            chance = np.random.default_rng(number)
            order = chance.permutation(len(runs))
            path = folder / "drift.duckdb"
            lutest.build(runs=runs.iloc[order[: len(runs) // 2]], output=path)
            table = lutest.load(path)
            others = order[len(runs) // 2 :]
            for drift, times in ((1.0, RESAMPLES), (DRIFT, DETECTIONS)):
                for _ in range(times):
                    sample = runs.iloc[chance.choice(others, size=RUNS, replace=False)].copy()
                    sample[_LATENCIES] *= drift
                    adjusted = lowest_p_value(table, sample)
                    for rate in RATES:
                        alarms[drift, rate] += adjusted <= rate
        counts = {1.0: SPLITS * RESAMPLES, DRIFT: SPLITS * DETECTIONS}
        shares = {held: found / counts[held[0]] for held, found in alarms.items()}
        rows.append([f"{name}, {RUNS} runs", *(percent(share) for share in shares.values())])
        for rate in RATES:
            chance_limit = rate + 2 * float(np.sqrt(rate * (1 - rate) / counts[1.0]))
            text = f"{name}: {percent(shares[1.0, rate])} false alarms in {counts[1.0]:,} resamples, stated {rate:.0%}"
            verdicts.append(verdict("4", shares[1.0, rate] <= chance_limit, text))
        found = shares[DRIFT, RATES[0]]
        text = f"{name}: +5 % is found in {percent(found)} of {counts[DRIFT]} samples of {RUNS} runs at {RATES[0]:.0%}"
        verdicts.append(verdict("4", found >= 0.9, text))
    print(f"\nlutest.check on {RUNS} runs, {SPLITS * RESAMPLES:,} resamples of runs that the table was not built from")
    print_aligned(rows)
    return verdicts


def lowest_p_value(table: lutest.LatencyTable, runs: pd.DataFrame) -> float:
    columns = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms"]
    return min(test.adjusted for test in lutest.check(table, runs[columns]).drift.tests)
