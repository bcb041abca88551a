"""What a table must hold up to beyond its own keys and step times: subtraction, unmeasured keys, many runs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pandas as pd
from held_out import KEYS, Floats, Runs, build_table, split, table_predictions
from rivals import Predict, fit_careless_median, fit_key_median

import lutest
from lutest.judging.metrics import median_bias

__all__ = [
    "FitTime",
    "SubtractionBias",
    "SubtractionCurve",
    "UnmeasuredKey",
    "fit_time",
    "subtraction_bias",
    "subtraction_curves",
    "unmeasured_keys",
]


class SubtractionCurve(NamedTuple):
    """How far a decode P50 lies from the table of timed steps for one key: means over the shared KV lengths."""

    key: lutest.Key
    first_kv_len: int
    last_kv_len: int
    table_off: float
    table_bias: float
    median_per_step_off: float
    careless_off: float


class SubtractionBias(NamedTuple):
    """Median of (predicted - observed) / observed of one way to predict P50s, mean and spread over splits."""

    name: str
    direct_total: tuple[float, float]
    direct_total_long: tuple[float, float]
    own_total: tuple[float, float]
    direct_prefill: tuple[float, float]


class UnmeasuredKey(NamedTuple):
    """P50s of a key that was left out of the build, on its own runs.

    `*_off`: median of the absolute difference relative to the table that has the key; `*_bias`: median of
    (predicted - observed) / observed.
    """

    key: lutest.Key
    source: str
    prefill_off: float
    total_off: float
    prefill_bias: float
    total_bias: float
    held_total_bias: float


class FitTime(NamedTuple):
    """What a build of made-up runs took."""

    keys: int
    runs: int
    steps: int
    fit_seconds: float
    seconds: float


LONG_OUTPUT_TOKENS = 20


def subtraction_curves(subtraction: Runs, direct: Runs) -> list[SubtractionCurve]:
    """Decode P50 from subtraction alone beside the one from directly timed steps, key by key.

    The shared KV lengths are those between the 1st and 99th percentile of the decode steps in both sets.
    """
    recovered = build_table(subtraction.frame).table
    timed = build_table(direct.frame).table
    naive = {name: fit(subtraction) for name, fit in _NAIVE.items()}
    curves = []
    for key in recovered.keys:
        if key not in timed:
            continue
        ranges = [_kv_range(runs, key) for runs in (subtraction, direct)]
        first, last = max(r[0] for r in ranges), min(r[1] for r in ranges)
        if first > last:
            continue
        kv = np.arange(first, last + 1)
        ids = [table.batch.key_ids(*key) for table in (recovered, timed)]
        truth = timed.batch.decode_step_ms(ids[1], kv)
        ratio = recovered.batch.decode_step_ms(ids[0], kv) / truth
        flat = {name: _flat_step(predict, subtraction, key) / truth for name, predict in naive.items()}
        curves.append(
            SubtractionCurve(
                key,
                first,
                last,
                float(np.abs(ratio - 1).mean()),
                float(ratio.mean() - 1),
                *(float(np.abs(flat[name] - 1).mean()) for name in _NAIVE),
            )
        )
    return curves


_NAIVE = {"median of decode / (n - 1)": fit_key_median, "median of decode / n": fit_careless_median}


def _of_key(runs: Runs, key: lutest.Key) -> pd.Series[bool]:
    return (runs.frame[KEYS] == pd.Series(key, index=KEYS)).all(axis=1)


def _kv_range(runs: Runs, key: lutest.Key) -> tuple[int, int]:
    own = runs.frame[_of_key(runs, key) & (runs.frame["output_tokens"] > 1)]
    if own.empty:
        return 1, 0
    kv = np.concatenate(
        [np.arange(p + 1, p + n) for p, n in zip(own["prompt_tokens"], own["output_tokens"], strict=True)]
    )
    first, last = np.quantile(kv, (0.01, 0.99))
    return int(np.ceil(first)), int(np.floor(last))


def _flat_step(predict: Predict, runs: Runs, key: lutest.Key) -> float:
    """The step of a dictionary: what its decode time grows by from one token to the next."""
    own = runs.frame[_of_key(runs, key)].iloc[[0, 0]].assign(output_tokens=[2, 3])
    first, second = predict(Runs(own.reset_index(drop=True), runs.steps.iloc[:0]))["decode total"][0]
    return float(second - first)


def subtraction_bias(subtraction: Runs, direct: Runs, splits: int) -> list[SubtractionBias]:
    """Bias of P50s learnt from half of the subtraction runs, on direct runs of the same keys and on the other half."""
    measured = {tuple(key) for key in subtraction.frame[KEYS].drop_duplicates().itertuples(index=False)}
    shared = [tuple(key) in measured for key in direct.frame[KEYS].itertuples(index=False)]
    judged = _renumbered(direct.take(np.flatnonzero(shared)), subtraction)
    timed_name = "table from half of direct, for comparison"
    found: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(splits):
        train, test = (subtraction.take(places) for places in split(subtraction, seed, None))
        ways = {"table from subtraction": _table_predict(train)}
        ways |= {name: fit(train) for name, fit in _NAIVE.items()}
        for name, predict in ways.items():
            found.setdefault(name, []).append(_biases(predict, judged, test))
        direct_train, direct_test = (direct.take(places) for places in split(direct, seed, None))
        measured_test = [tuple(key) in measured for key in direct_test.frame[KEYS].itertuples(index=False)]
        rest = direct_test.take(np.flatnonzero(measured_test))
        found.setdefault(timed_name, []).append(_biases(_table_predict(direct_train), rest, test))
    return [
        SubtractionBias(name, *(_mean_and_spread(values) for values in np.array(rows).T))
        for name, rows in found.items()
    ]


def _renumbered(runs: Runs, like: Runs) -> Runs:
    """Runs with the numbers that their keys have in another set."""
    numbers = {tuple(key): number for *key, number in like.frame[[*KEYS, "key"]].itertuples(index=False)}
    keys = [numbers[tuple(key)] for key in runs.frame[KEYS].itertuples(index=False)]
    return Runs(runs.frame.assign(key=keys), runs.steps)


def _table_predict(train: Runs) -> Predict:
    table = build_table(train.frame).table
    return lambda runs: table_predictions(table, runs)


def _biases(predict: Predict, direct: Runs, own: Runs) -> tuple[float, ...]:
    on_direct, on_own = predict(direct), predict(own)
    long = direct.column("output_tokens") > LONG_OUTPUT_TOKENS
    return (
        median_bias(direct.column("total_ms"), on_direct["total"][0]),
        median_bias(direct.column("total_ms")[long], on_direct["total"][0][long]),
        median_bias(own.column("total_ms"), on_own["total"][0]),
        median_bias(direct.column("prefill_ms"), on_direct["prefill"][0]),
    )


def _mean_and_spread(values: Floats) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def unmeasured_keys(runs: Runs, most_keys: int) -> list[UnmeasuredKey]:
    """Each key in turn left out of the build, and filled in by ``load(missing="interpolate")``.

    Parameters
    ----------
    runs : Runs
        All runs.
    most_keys : int
        With more keys than this, as many as this, evenly spaced.
    """
    full = build_table(runs.frame).table
    all_keys = runs.keys()
    codes = np.unique(all_keys)
    if len(codes) > most_keys:
        codes = codes[np.linspace(0, len(codes) - 1, most_keys).round().astype(int)]
    found = []
    for code in codes:
        own = runs.take(np.flatnonzero(all_keys == code))
        first = own.frame.iloc[0]
        key = str(first["tier"]), int(first["top_k"]), int(first["num_blocks"])
        without = build_table(runs.frame[all_keys != code], missing="interpolate").table
        try:
            filled = without.lookup(*key)
            figures = _of_entry(filled, own)
        except lutest.UnknownKeyError:
            continue  # the only key of its tier: nothing to fill it from
        except lutest.NoDecodeDataError:
            continue
        held = table_predictions(full, own)
        prefill, total = (float(np.median(np.abs(figures[t] / held[t][0] - 1))) for t in ("prefill", "total"))
        found.append(
            UnmeasuredKey(
                key,
                filled.source,
                prefill,
                total,
                median_bias(own.column("prefill_ms"), figures["prefill"]),
                median_bias(own.column("total_ms"), figures["total"]),
                median_bias(own.column("total_ms"), held["total"][0]),
            )
        )
    return found


def _of_entry(entry: lutest.Entry, runs: Runs) -> dict[str, Floats]:
    lengths = list(zip(runs.frame["prompt_tokens"].tolist(), runs.frame["output_tokens"].tolist(), strict=True))
    return {
        "prefill": np.array([entry.prefill_ms(prompt) for prompt, _ in lengths]),
        "total": np.array([entry.total_ms(prompt, tokens) for prompt, tokens in lengths]),
    }


def fit_time(folder: Path, run_count: int = 100_000) -> FitTime:
    """Build from made-up runs of 75 keys with timed steps."""
    generator = np.random.default_rng(0)
    keys = [(tier, top_k, blocks) for tier in range(3) for top_k in (2, 4, 6, 8, 10) for blocks in (8, 10, 12, 14, 16)]
    tier, top_k, blocks = np.array(keys).T[:, np.arange(run_count) % len(keys)]
    prompt = generator.integers(80, 200, run_count) * (1 + 2 * tier)
    tokens = np.minimum(1 + generator.geometric(0.12, run_count), 256)
    slow = np.exp(generator.normal(0, 0.1, run_count))
    run = np.repeat(np.arange(run_count), tokens - 1)
    position = np.arange(len(run)) - np.repeat(np.cumsum(tokens - 1) - (tokens - 1), tokens - 1) + 1
    step_ms = (blocks + top_k / 2)[run] * (1 + (prompt[run] + position) / 4000) * slow[run]
    step_ms = step_ms * np.exp(generator.normal(0, 0.1, len(run)))
    prefill_ms = blocks * (20 + prompt * (1 + top_k / 10) / 20) * slow
    names = np.array(["low", "medium", "high"], dtype=object)
    runs = pd.DataFrame({"run": np.arange(run_count), "tier": names[tier], "top_k": top_k, "num_blocks": blocks})
    runs = runs.assign(prompt_tokens=prompt, output_tokens=tokens, prefill_ms=prefill_ms)
    steps = pd.DataFrame({"run": run, "position": position, "step_ms": step_ms})
    source = folder / "many_runs.parquet"
    with duckdb.connect() as connection:
        connection.register("runs", runs)
        connection.register("steps", steps)
        connection.execute(
            f"""
            COPY (
                SELECT runs.* EXCLUDE (run), decode_ms, decode_steps_ms
                FROM runs JOIN (
                    SELECT run, sum(step_ms) AS decode_ms, list(step_ms ORDER BY position) AS decode_steps_ms
                    FROM steps GROUP BY run
                ) USING (run)
                ORDER BY run
            ) TO '{str(source).replace("'", "''")}' (FORMAT parquet)
            """
        )
    summary = lutest.build(runs=source, output=folder / "many_runs.duckdb")
    return FitTime(len(keys), run_count, len(run), summary.fit_seconds, summary.seconds)
