"""The parts of the fit on frames that name their configurations, which the fit itself knows by number alone."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lutest.builder.fit import curves, step_recovery, totals
from lutest.builder.fit.observations import KeyAxes, read_key_axes
from tests.synthetic import KEY_COLUMNS

__all__ = ["KEYS", "calibrate_totals", "fit_prefill_curve", "fit_step_curve", "recover_step_curve"]

KEYS = [column.name for column in KEY_COLUMNS]


def _keys(*frames: pd.DataFrame) -> pd.DataFrame:
    """All configurations in order, one a row."""
    held = pd.concat([frame[KEYS] for frame in frames]).drop_duplicates()
    return held.sort_values(KEYS, ignore_index=True)


def _numbered(frame: pd.DataFrame, keys: pd.DataFrame) -> pd.DataFrame:
    """The frame with numbers in place of the names, its rows in their order."""
    numbers = keys.assign(key_id=range(len(keys))).set_index(KEYS)["key_id"]
    key_id = pd.MultiIndex.from_frame(frame[KEYS]).map(numbers) if len(frame) else []
    numbered = frame.drop(columns=KEYS)
    numbered.insert(0, "key_id", pd.Series(key_id, index=frame.index, dtype="int64"))
    return numbered


def _named(frame: pd.DataFrame, keys: pd.DataFrame) -> pd.DataFrame:
    names = keys.iloc[frame["key_id"].to_numpy(int)].reset_index(drop=True)
    return pd.concat([names, frame.drop(columns="key_id").reset_index(drop=True)], axis=1)


def _axes(keys: pd.DataFrame) -> KeyAxes:
    return read_key_axes(keys, KEY_COLUMNS)


def fit_prefill_curve(runs: pd.DataFrame, quantiles: Sequence[float]) -> pd.DataFrame:
    keys = _keys(runs)
    return _named(curves.fit_prefill_curve(_numbered(runs, keys), _axes(keys), quantiles), keys)


def fit_step_curve(steps: pd.DataFrame, runs: pd.DataFrame, quantiles: Sequence[float]) -> pd.DataFrame:
    keys = _keys(steps, runs)
    fitted = curves.fit_step_curve(_numbered(steps, keys), _numbered(runs, keys), _axes(keys), quantiles)
    return _named(fitted, keys)


def recover_step_curve(runs: pd.DataFrame, quantiles: Sequence[float]) -> pd.DataFrame:
    keys = _keys(runs)
    by_clock = runs if "one_pass" in runs else runs.assign(one_pass=False)
    return _named(step_recovery.recover_step_curve(_numbered(by_clock, keys), _axes(keys), quantiles), keys)


def calibrate_totals(
    runs: pd.DataFrame,
    prefill_curve: pd.DataFrame,
    decode_curve: pd.DataFrame,
    quantiles: Sequence[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    keys = _keys(runs, prefill_curve)
    by_clock = runs if "one_pass" in runs else runs.assign(one_pass=False)
    runs_of, prefill_of, decode_of = (_numbered(frame, keys) for frame in (by_clock, prefill_curve, decode_curve))
    decode_total, total = totals.calibrate_totals(runs_of, prefill_of, decode_of, quantiles)
    return _named(decode_total, keys), _named(total, keys)
