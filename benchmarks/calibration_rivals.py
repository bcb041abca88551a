"""Carrying a table to another device by fewer means than lutest does, and rebuilding it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize

import lutest
from lutest import Key

__all__ = ["FULL", "METHODS", "OURS", "Prediction", "Setting", "by_table", "plain", "rebuilt"]

Floats = NDArray[np.float64]
OURS, FULL = "lutest.calibrate", "rebuilt from all other runs"


@dataclass(frozen=True)
class Prediction:
    """Prefill and total of runs in ms: P50, and P95 where the method has one."""

    prefill_ms: Floats
    total_ms: Floats
    prefill_p95_ms: Floats | None = None
    total_p95_ms: Floats | None = None


@dataclass(frozen=True)
class Setting:
    """A table of the old device, the new device's runs, and what the table says of these.

    Attributes
    ----------
    path : Path
        The table.
    key : tuple of str
        Its key columns.
    runs : DataFrame
        All runs of the new device.
    old : Prediction
        What the table says of each.
    """

    path: Path
    key: tuple[str, ...]
    runs: pd.DataFrame
    old: Prediction


def plain(key: tuple[str, ...]) -> dict[str, object]:
    """A build that leaves outliers in."""
    return {"key": list(key), "cleaning": {"outliers": "none"}}


def by_table(table: lutest.LatencyTable, runs: pd.DataFrame, otherwise: Prediction | None = None) -> Prediction:
    """What a table says of runs; `otherwise` for those of which it cannot say anything."""
    lengths = runs[[*table.key_columns, "prompt_tokens", "output_tokens"]]
    columns: list[Floats] = []
    for stage, q in (("prefill", 0.5), ("total", 0.5), ("prefill", 0.95), ("total", 0.95)):
        values = np.empty(len(runs))
        for place, (*key, prompt, output) in enumerate(lengths.itertuples(index=False)):
            tokens = int(output) if stage == "total" else 1
            values[place] = _answer(table, tuple(key), int(prompt), tokens, q)
        if otherwise is not None:
            missing = np.isnan(values)
            values[missing] = (otherwise.prefill_ms if stage == "prefill" else otherwise.total_ms)[missing]
        columns.append(values)
    return Prediction(*columns)


def _answer(table: lutest.LatencyTable, key: Key, prompt_tokens: int, output_tokens: int, q: float) -> float:
    """The total, which at one token is prefill; NaN where the table cannot tell."""
    try:
        return table[key].total_ms(prompt_tokens, output_tokens, q)
    except (lutest.UnknownKeyError, lutest.NoDecodeDataError):
        return float("nan")


def uncalibrated(setting: Setting, _learn: NDArray[np.int64], _folder: Path) -> Prediction:
    return setting.old


def global_scale(setting: Setting, learn: NDArray[np.int64], _folder: Path) -> Prediction:
    """One factor for everything: the median of observed over predicted totals."""
    factor = np.median(setting.runs["total_ms"].to_numpy()[learn] / setting.old.total_ms[learn])
    return Prediction(setting.old.prefill_ms * factor, setting.old.total_ms * factor)


def stage_affine(setting: Setting, learn: NDArray[np.int64], _folder: Path) -> Prediction:
    """a·T + b for prefill and for a decode step, by least absolute relative error."""
    runs, old = setting.runs, setting.old
    a, b = _affine(old.prefill_ms[learn], runs["prefill_ms"].to_numpy()[learn])
    prefill_ms = np.maximum(a * old.prefill_ms + b, 1e-3)
    steps = runs["output_tokens"].to_numpy() - 1.0
    decode_ms = old.total_ms - old.prefill_ms
    some = learn[steps[learn] > 0]
    if not len(some):
        return Prediction(prefill_ms, prefill_ms + decode_ms)
    observed = runs["decode_ms"].to_numpy()[some] / steps[some]
    a, b = _affine(decode_ms[some] / steps[some], np.maximum(observed, 1e-3))
    return Prediction(prefill_ms, prefill_ms + np.maximum(a * decode_ms + b * steps, 0.0))


def _affine(x: Floats, y: Floats) -> tuple[float, float]:
    n = len(x)
    cost = np.concatenate([[0.0, 0.0], np.ones(2 * n)])
    design = np.column_stack([x / y, 1.0 / y, np.eye(n), -np.eye(n)])
    bounds = [(0, None), (None, None), *[(0, None)] * (2 * n)]
    found = optimize.linprog(cost, A_eq=design, b_eq=np.ones(n), bounds=bounds, method="highs")
    return float(found.x[0]), float(found.x[1])


def calibrated(setting: Setting, learn: NDArray[np.int64], folder: Path) -> Prediction:
    path = folder / "calibrated.duckdb"
    lutest.calibrate(setting.path, setting.runs.iloc[learn], path)
    return by_table(lutest.load(path), setting.runs)


def rebuilt(setting: Setting, learn: NDArray[np.int64], folder: Path) -> Prediction:
    """A table of the new runs alone, missing configurations interpolated; the global scale for what it cannot say."""
    path = folder / "rebuilt.duckdb"
    otherwise = global_scale(setting, learn, folder)
    lutest.build(plain(setting.key), runs=setting.runs.iloc[learn], output=path)
    return by_table(lutest.load(path, missing="interpolate"), setting.runs, otherwise)


METHODS: dict[str, Callable[[Setting, NDArray[np.int64], Path], Prediction]] = {
    "no calibration": uncalibrated,
    "global scale": global_scale,
    "affine per stage": stage_affine,
    OURS: calibrated,
    "rebuilt from these runs": rebuilt,
}
