"""A number of users that was never measured: filled in by the table, beside what one would do by hand.

    python benchmarks/unmeasured_users.py

On the shipped serving runs, every second number of users is left out of the build, those between measured ones, in two
turns. What `load(missing="interpolate")` says of them is held against the table of all
runs, at the median prompt and output length of their own runs. By hand: linear interpolation between the neighbours on
the logarithmic axis of users, and the nearest neighbour on it.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

import lutest

RUNS = Path(__file__).parents[1] / "tables" / "runs" / "llama-13b-serving.parquet"
KEY = ["gpu", "n_gpus", "users"]
STAGES = ("prefill", "total")


def main() -> None:
    with duckdb.connect() as connection:
        runs = connection.execute("SELECT * FROM read_parquet(?)", [str(RUNS)]).df()
    with tempfile.TemporaryDirectory() as folder:
        whole = built(runs, Path(folder) / "whole.duckdb")
        errors: dict[tuple[str, str], list[float]] = {}
        levels = sorted(runs["users"].unique().tolist())
        for turn in (1, 2):
            left_out = levels[turn:-1:2]
            kept = built(runs[~runs["users"].isin(left_out)], Path(folder) / f"{turn}.duckdb")
            for key in whole:
                if key[2] in left_out:
                    judge(whole, kept, key, runs, errors)
    print(f"{'median error of P50':<28}{'prefill':>10}{'total':>10}{'keys':>6}")
    for way in ("lutest", "linear on the log axis", "nearest key"):
        shown = [f"{np.median(errors[way, stage]):>10.1%}" for stage in STAGES]
        print(f"{way:<28}{''.join(shown)}{len(errors[way, 'total']):>6}")


def built(runs: pd.DataFrame, output: Path) -> lutest.LatencyTable:
    lutest.build({"key": KEY}, runs=runs, output=output)
    return lutest.load(output, missing="interpolate")


def judge(
    whole: lutest.LatencyTable,
    kept: lutest.LatencyTable,
    key: lutest.Key,
    runs: pd.DataFrame,
    errors: dict[tuple[str, str], list[float]],
) -> None:
    own = runs[(runs[KEY] == pd.Series(key, index=KEY)).all(axis=1)]
    prompt, tokens = int(own["prompt_tokens"].median()), int(own["output_tokens"].median())
    beside = [other for other in kept if other[:2] == key[:2]]
    below = max((other for other in beside if float(other[2]) < float(key[2])), default=None)
    above = min((other for other in beside if float(other[2]) > float(key[2])), default=None)
    if below is None or above is None or whole[key].decode_step_p50_ms is None:
        return

    def figures(table: lutest.LatencyTable, of: lutest.Key) -> Any:
        try:
            return np.array([table[of].prefill_ms(prompt), table[of].total_ms(prompt, tokens)])
        except lutest.NoDecodeDataError:
            return None

    at, low, high = (math.log(float(held[2])) for held in (key, below, above))
    ends = figures(kept, below), figures(kept, above)
    filled, truth = figures(kept, key), figures(whole, key)
    if filled is None or ends[0] is None or ends[1] is None:
        return
    share = (at - low) / (high - low)
    ways = {
        "lutest": filled,
        "linear on the log axis": (1 - share) * ends[0] + share * ends[1],
        "nearest key": ends[0] if share < 0.5 else ends[1],
    }
    for way, found in ways.items():
        for stage, error in zip(STAGES, np.abs(found / truth - 1), strict=True):
            errors.setdefault((way, stage), []).append(float(error))


if __name__ == "__main__":
    main()
