"""Whole runs beside the curves that were fitted to them: what totals are calibrated on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from lutest.reader.names import KEY_COLUMNS, quantile_column

__all__ = ["CalibrationKey", "Fold", "place_of_median", "read_calibration_keys"]

KEYS = list(KEY_COLUMNS)

Array = npt.NDArray[np.float64]


class Fold(NamedTuple):
    """Runs, by their ``run_hash``, and the curves fitted to all others."""

    run_hashes: Collection[str]
    prefill_curve: pd.DataFrame
    decode_curve: pd.DataFrame


@dataclass(frozen=True)
class KnotCurve:
    """Piecewise-linear curve over integer knots: constant before them, never falling after them."""

    knots: Array
    values: Array  # knots × levels

    def at(self, x: Array) -> Array:
        """Value of each level at each x."""
        place = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, None)
        distance = np.maximum(x - self.knots[place], 0.0)
        return np.asarray(self.values[place] + distance[:, None] * self._slopes()[place])

    def sum_between(self, start: Array, stop: Array, level: int) -> Array:
        """Sum of one level over start + 1, …, stop."""
        return self.sum_to(stop, level) - self.sum_to(start, level)

    def sum_to(self, x: Array, level: int) -> Array:
        """Sum of one level over 1, 2, …, x."""
        value, slope = self.values[:, level], self._slopes()[:, level]
        steps = np.diff(self.knots)
        sums = value[0] * self.knots[0] + np.concatenate(
            [[0.0], np.cumsum(steps * value[:-1] + slope[:-1] * steps * (steps + 1) / 2)]
        )
        place = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, None)
        distance = x - self.knots[place]
        inside = sums[place] + distance * value[place] + slope[place] * distance * (distance + 1) / 2
        return np.asarray(np.where(x < self.knots[0], value[0] * x, inside))

    def steadiness(self, level: int) -> float:
        """Least ratio of the curve at a place to the curve at a place before."""
        value = self.values[:, level]
        return float(np.min(value / np.maximum.accumulate(value)))

    def _slopes(self) -> Array:
        if len(self.knots) == 1:
            return np.zeros_like(self.values)
        inner = np.diff(self.values, axis=0) / np.diff(self.knots)[:, None]
        return np.concatenate([inner, np.maximum(inner[-1:], 0.0)])


@dataclass(frozen=True)
class CalibrationKey:
    """Runs of two tokens or more of one key, and its curves at them."""

    name: tuple[object, ...]
    timed: bool
    steps: Array
    ratio: Array  # decode_ms over D
    fixed: Array  # what noise of a fixed size comes to in the ratio
    decode_ms: Array  # D
    prefill_ms: Array  # runs × levels
    seen_ms: tuple[Array, Array, Array]  # prefill, decode and total as measured
    fixed_one: float  # `fixed` of a run of one step at the key's median prompt
    steadiness: float


def read_calibration_keys(
    run_sample: pd.DataFrame, whole: Fold, folds: Sequence[Fold], levels: Array
) -> list[CalibrationKey]:
    """Runs of two tokens or more by key, each run beside the curves of its fold, or else of `whole`."""
    columns = [quantile_column(q) for q in levels]
    middle = place_of_median(levels)
    curves = [
        (_curves(fold.prefill_curve, "prompt_tokens", columns), _curves(fold.decode_curve, "kv_len", columns))
        for fold in (whole, *folds)
    ]
    prefill, decode = curves[0]
    runs = run_sample[run_sample["output_tokens"] >= 2]
    # Sums of floats depend on their order; rows come in any.
    order = [*KEYS, "output_tokens", "prompt_tokens", "decode_ms", "prefill_ms", "total_ms"]
    runs = runs.sort_values([*order, "run_hash"] if folds else order)
    keys = []
    for name, group in runs.groupby(KEYS):
        if name not in decode or name not in prefill:
            continue
        prompt = group["prompt_tokens"].to_numpy(float)
        steps = group["output_tokens"].to_numpy(float) - 1
        first = prefill[name].at(prompt)
        expected = decode[name].sum_between(prompt, prompt + steps, middle)
        for fold, (own_prefill, own_decode) in zip(folds, curves[1:], strict=True):
            mine = group["run_hash"].isin(fold.run_hashes).to_numpy()
            if mine.any() and name in own_prefill and name in own_decode:
                first[mine] = own_prefill[name].at(prompt[mine])
                expected[mine] = own_decode[name].sum_between(prompt[mine], (prompt + steps)[mine], middle)
        timed = bool(group["timed"].any())
        median_prompt = np.array([np.median(prompt)])
        # Passes that are subtracted each carry the noise of a prefill; timed runs at most that of a step or so.
        fixed, fixed_one = 1 / steps, 1.0
        if not timed:
            fixed = first[:, middle] / expected
            fixed_one = float((prefill[name].at(median_prompt) / decode[name].at(median_prompt + 1))[0, middle])
        seen = (group[column].to_numpy(float) for column in ("prefill_ms", "decode_ms", "total_ms"))
        prefill_ms, decode_ms, total_ms = seen
        keys.append(
            CalibrationKey(
                name,
                timed,
                steps,
                decode_ms / expected,
                fixed,
                expected,
                first,
                (prefill_ms, decode_ms, total_ms),
                fixed_one,
                decode[name].steadiness(middle),
            )
        )
    return keys


def _curves(curve: pd.DataFrame, place: str, columns: list[str]) -> dict[tuple[object, ...], KnotCurve]:
    ordered = curve.sort_values([*KEYS, place])
    return {
        name: KnotCurve(group[place].to_numpy(float), group[columns].to_numpy(float))
        for name, group in ordered.groupby(KEYS)
    }


def place_of_median(levels: Array) -> int:
    """Place of 0.5 among the levels."""
    return int(np.flatnonzero(levels == 0.5)[0])
