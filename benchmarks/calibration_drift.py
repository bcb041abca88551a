"""`check`: false alarms on runs without drift, and detection of a drift, beside a test that has both samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from printing import Verdict, percent, print_aligned, verdict
from scipy import stats

import lutest
from lutest.calibration.coverage import TOLERANCE, exceedance_tail

__all__ = ["drift_verdicts", "pair_verdicts"]

SPLITS, RESAMPLES = 10, 100  # of each split
FEW = 20  # of each split, for what needs no thousand
RUNS = 100
DRIFT = 1.05
RATES = (0.01, 0.05)
LATENCIES = ["prefill_ms", "decode_ms"]
PAIR_RUNS, BLOCK = 600, 20  # runs of a configuration, and of a block
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
        exact: list[float] = []
        rival: list[float] = []
        for number in range(SPLITS):
            chance = np.random.default_rng(number)
            order = chance.permutation(len(runs))
            path = folder / "drift.duckdb"
            lutest.build(runs=runs.iloc[order[: len(runs) // 2]], output=path)
            table = lutest.load(path)
            others = order[len(runs) // 2 :]
            seen = ratios(table, runs.iloc[order[: len(runs) // 2]])
            for turn in range(RESAMPLES):
                sample = runs.iloc[chance.choice(others, size=RUNS, replace=False)][COLUMNS]
                same.append(lowest_p_value(table, sample, 0.0))
                if turn < FEW:
                    tolerated.append(lowest_p_value(table, sample, TOLERANCE))
                    drifted = sample.assign(**{held: DRIFT * sample[held] for held in LATENCIES})
                    slower.append(lowest_p_value(table, drifted, TOLERANCE))
                    exact.append(lowest_p_value(table, drifted, 0.0))
                    rival.append(two_sample_p_value(seen, ratios(table, drifted)))
        alarms = {rate: share_below(same, rate) for rate in RATES}
        found = {rate: share_below(slower, rate) for rate in RATES}
        shares = [*alarms.values(), share_below(tolerated, RATES[0]), *found.values()]
        rows.append([f"{name}, {RUNS} runs", *map(percent, shares)])
        for rate, share in alarms.items():
            most = rate + 2 * float(np.sqrt(rate * (1 - rate) / len(same)))
            text = f"{name}: {percent(share)} false alarms in {len(same):,} resamples, stated {rate:.0%}"
            verdicts.append(verdict("4", share <= most, text))
        for rate in RATES:
            ours, theirs = share_below(exact, rate), share_below(rival, rate)
            text = (
                f"{name}: at tolerance 0, +5 % is found in {percent(ours)} at {rate:.0%}; in {percent(theirs)} "
                "by two-sample exceedance tests (Balakrishnan and Ng) of observed over P50, which know both samples"
            )
            verdicts.append(verdict("4", ours >= theirs - 2 * (theirs * (1 - theirs) / len(rival)) ** 0.5, text))
        share = found[RATES[0]]
        text = f"{name}: +5 % is found in {percent(share)} of {len(slower)} samples of {RUNS} runs at {RATES[0]:.0%}"
        verdicts.append(verdict("4", share >= 0.9, text))
    print(f"\nlutest.check on {RUNS} runs, {SPLITS * RESAMPLES:,} resamples of runs that the table was not built from")
    print_aligned(rows)
    return verdicts


def ratios(table: lutest.LatencyTable, runs: pd.DataFrame) -> list[NDArray[np.float64]]:
    """Observed over predicted P50 of prefill, decode and total."""
    places = {key: number for number, key in enumerate(table.keys)}
    ids = np.array([places[key] for key in runs[list(table.key_columns)].itertuples(index=False, name=None)])
    prompt, output = runs["prompt_tokens"].to_numpy(), runs["output_tokens"].to_numpy()
    prefill, decode = runs["prefill_ms"].to_numpy(), runs["decode_ms"].to_numpy()
    some = output > 1
    return [
        prefill / table.batch.prefill_ms(ids, prompt),
        decode[some] / table.batch.decode_ms(ids[some], prompt[some], output[some]),
        (prefill + decode) / table.batch.total_ms(ids, prompt, output),
    ]


def two_sample_p_value(old: list[NDArray[np.float64]], new: list[NDArray[np.float64]]) -> float:
    """Smallest of the exceedance tests of P50 and P95 of each stage, times their number."""
    p_values = []
    for before, now in zip(old, new, strict=True):
        for q in (0.5, 0.95):
            above = int((now > np.quantile(before, q)).sum())
            tails = [exceedance_tail(above, len(now), len(before), q, upwards=up) for up in (True, False)]
            p_values.append(2 * min(tails))
    return min(1.0, len(p_values) * min(p_values))


def pair_verdicts(folder: Path, runs: pd.DataFrame, pairs: int) -> list[Verdict]:
    """Item 4: parts of one log, of three configurations at a time: random halves, and interleaved blocks."""
    key = ["gpu", "n_gpus", "users"]
    logs = [log for _, log in runs.sort_values("started_ms", kind="stable").groupby(key)]
    verdicts = []
    for kind in ("random halves", "interleaved blocks"):
        p_values = []
        for number in range(pairs):
            chance = np.random.default_rng(number)
            chosen = [logs[place].head(PAIR_RUNS) for place in chance.choice(len(logs), 3, replace=False)]
            held = pd.concat(chosen, ignore_index=True)
            first = chance.random(len(held)) < 0.5
            if kind == "interleaved blocks":
                blocks = held.groupby(key).cumcount().to_numpy() // BLOCK
                first = (blocks + chance.integers(2)) % 2 == 0
            path = folder / "pair.duckdb"
            lutest.build({"key": key}, runs=held[first], output=path)
            p_values.append(lowest_p_value(lutest.load(path), held[~first], TOLERANCE))
        for rate in RATES:
            alarms = int((np.array(p_values) <= rate).sum())
            low, high = stats.binom.interval(0.95, pairs, rate)
            text = f"serving, {kind}: {alarms} alarms in {pairs} pairs at {rate:.0%}; {low:.0f} to {high:.0f} expected"
            verdicts.append(verdict("4", low <= alarms <= high, text))
    return verdicts


def share_below(p_values: list[float], rate: float) -> float:
    return float(np.mean(np.array(p_values) <= rate))


def lowest_p_value(table: lutest.LatencyTable, runs: pd.DataFrame, tolerance: float) -> float:
    return min(test.adjusted for test in lutest.check(table, runs, tolerance=tolerance).tests)
