"""Runs of which only the sum of the steps is known, sorted by key, in units of a typical step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lutest.reader.names import KEY_COLUMNS

__all__ = ["SubtractedRuns", "read_subtracted_runs", "slices_of_keys"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

KEYS = list(KEY_COLUMNS)


@dataclass(frozen=True)
class SubtractedRuns:
    """Runs sorted by key, their times in units of `level_ms`."""

    keys: pd.DataFrame
    level_ms: float
    starts: Integers  # first run of each key
    code: Integers  # key of each run
    prompt: Integers
    steps: Floats
    mean_kv: Floats
    value: Floats
    censored: Flags
    prefill: Floats  # median of the key
    centre: Floats  # of the key's KV lengths
    reach: Floats  # their standard deviation
    middle: float  # of all KV lengths
    structure: Floats  # per key: 1, blocks, experts, both; relative to the middle of their ranges


def read_subtracted_runs(run_sample: pd.DataFrame) -> SubtractedRuns | None:
    """Runs that were not timed step by step, of keys that have decode; None where no decode is above zero."""
    table = run_sample[~run_sample["timed"].to_numpy(dtype=bool)]
    table = table[(table["output_tokens"] >= 2).groupby([table[key] for key in KEYS]).transform("any").astype(bool)]
    order = [*KEYS, "prompt_tokens", "output_tokens", "decode_ms", "total_ms", "prefill_ms"]
    table = table.sort_values(order, kind="mergesort", ignore_index=True)
    value, censored, usable = _values(table)
    table, value, censored = table[usable], value[usable], censored[usable]
    steps = table["output_tokens"].to_numpy(dtype=float) - 1.0
    several = steps > 0
    level = _level(value[several], steps[several])
    if level is None:
        return None
    code = table.groupby(KEYS, sort=False, observed=True).ngroup().to_numpy(dtype=np.int64)
    starts = np.flatnonzero(np.diff(code, prepend=-1)).astype(np.int64)
    keys = table[KEYS].iloc[starts].reset_index(drop=True)
    prompt = table["prompt_tokens"].to_numpy(dtype=np.int64)
    mean_kv = prompt + (steps + 1) / 2
    weight = np.add.reduceat(steps, starts)
    centre = np.rint(np.add.reduceat(steps * mean_kv, starts) / weight)
    within = np.maximum(steps**2 - 1, 0) / 12  # variance of the KV lengths of one run
    reach = np.sqrt(np.add.reduceat(steps * ((mean_kv - centre[code]) ** 2 + within), starts) / weight)
    blocks, experts = _relative(keys["num_blocks"]), _relative(keys["top_k"])
    return SubtractedRuns(
        keys=keys,
        level_ms=level,
        starts=starts,
        code=code,
        prompt=prompt,
        steps=steps,
        mean_kv=mean_kv,
        value=value / level,
        censored=censored,
        prefill=table.groupby(code)["prefill_ms"].median().to_numpy(dtype=float)[code] / level,
        centre=centre,
        reach=np.maximum(reach, 1.0),
        middle=float(np.average(mean_kv, weights=steps)),
        structure=np.column_stack([np.ones(len(keys)), blocks, experts, blocks * experts]),
    )


def _values(table: pd.DataFrame) -> tuple[Floats, Flags, Flags]:
    """Decode before clamping as far as it is known, where it is cut off at zero, and which runs are of use."""
    decode = table["decode_ms"].to_numpy(dtype=float)
    prefill = table["prefill_ms"].to_numpy(dtype=float)
    total = table["total_ms"].to_numpy(dtype=float)
    difference = total - prefill
    zero = decode <= 0
    # A total tells a clamped value only if it is what decode was taken from: then both agree wherever none was clamped.
    agree = np.abs(difference - decode) <= 0.01 * total
    told = table["total_given"].to_numpy(dtype=bool) & bool(np.all(zero) or np.mean(agree[~zero]) > 0.9)
    below = zero & told & (difference < -1e-6 * prefill)
    # One-token runs show the offset if decode is what subtraction left; zeros all over are zeros by definition.
    single = table["output_tokens"].to_numpy() < 2
    bare = bool(np.any(single & (~zero | below)))
    return np.where(below, difference, decode), zero & ~below, ~single | bare


def _level(value: Floats, steps: Floats) -> float | None:
    """Typical step, in milliseconds, as the unit of all times; None where all runs are clamped."""
    if not np.any(value > 0):
        return None
    order = np.argsort(value / steps, kind="stable")
    reached = np.cumsum(steps[order])
    median = float((value / steps)[order][np.searchsorted(reached, reached[-1] / 2)])
    return median if median > 0 else float(value[value > 0].sum() / steps.sum())


def _relative(values: pd.Series) -> Floats:
    numbers = values.to_numpy(dtype=float)
    relative: Floats = numbers / ((numbers.min() + numbers.max()) / 2) - 1.0
    return relative


def slices_of_keys(runs: SubtractedRuns) -> list[slice]:
    """Where the runs of each key stand."""
    ends = np.append(runs.starts[1:], len(runs.steps))
    return [slice(int(start), int(end)) for start, end in zip(runs.starts, ends, strict=True)]
