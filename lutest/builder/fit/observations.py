"""What the curves are fitted to: latencies at lengths by key and run, and the axes that keys lie on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lutest.reader.figures import KeyColumn

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

FOLDS = 5


@dataclass(frozen=True)
class KeyAxes:
    """Keys as points: what the columns of a key say to a model.

    Attributes
    ----------
    numbers : ndarray of float, shape (number columns, keys)
        Columns of numbers as they are.
    levels : ndarray of int, shape (category columns, keys)
        Columns of categories, each value by its place among the sorted ones.
    """

    numbers: Floats
    levels: Integers

    def __len__(self) -> int:
        return len(self.numbers.T)

    def of(self, keys: Integers) -> KeyAxes:
        """Those of some keys, in their order."""
        return KeyAxes(self.numbers[:, keys], self.levels[:, keys])

    def scaled(self) -> Floats:
        """Numbers on a logarithmic axis where all of a column are above zero, else in units of their range."""
        columns = [np.log(n) if (n > 0).all() else n / max(float(np.ptp(n)), 1e-300) for n in self.numbers]
        return np.array(columns).reshape(self.numbers.shape)

    def indicators(self, first: int) -> Floats:
        """A row of 0 and 1 for each level of each category, from the level `first` of a category on."""
        rows = [level == levels for levels in self.levels for level in np.unique(levels)[first:]]
        return np.array(rows, dtype=np.float64).reshape(-1, len(self))


def read_key_axes(keys: pd.DataFrame, key_columns: Sequence[KeyColumn]) -> KeyAxes:
    """Axes of keys, in their order: one row of the named columns a key."""
    numbers = [keys[column.name].to_numpy(np.float64) for column in key_columns if column.kind == "number"]
    names = [keys[column.name].to_numpy() for column in key_columns if column.kind == "category"]
    levels = [np.unique(values, return_inverse=True)[1] for values in names]
    return KeyAxes(
        np.array(numbers, dtype=np.float64).reshape(-1, len(keys)),
        np.array(levels, dtype=np.int64).reshape(-1, len(keys)),
    )


@dataclass(frozen=True)
class Observations:
    """Latencies at places, by key and run.

    Attributes
    ----------
    place : ndarray of float, shape (n,)
        prompt_tokens or kv_len, at least 1.
    log_ms : ndarray of float, shape (n,)
        Logarithm of the latency in milliseconds.
    key : ndarray of int, shape (n,)
        Row of `axes` and place in `key_ids`; ascending.
    fold : ndarray of int, shape (n,)
        Part of the cross-validation; all observations of a run are in one.
    weight : ndarray of float, shape (n,)
        Worth of an observation; a run whose steps tell the same thing weighs less than their number.
    key_ids : ndarray of int, shape (g,)
        The keys that were observed.
    axes : KeyAxes
        Where they lie.
    """

    place: Floats
    log_ms: Floats
    key: Integers
    fold: Integers
    weight: Floats
    key_ids: Integers
    axes: KeyAxes

    def rows(self, chosen: Flags) -> Observations:
        """Those of the chosen rows."""
        parts = {name: getattr(self, name)[chosen] for name in ("place", "log_ms", "key", "fold", "weight")}
        return replace(self, **parts)


def read_observations(frame: pd.DataFrame, axes: KeyAxes, place: str, latency: str) -> Observations:
    """Observations of a frame sorted by key and run, all of weight 1.

    Parameters
    ----------
    frame : DataFrame
        Columns key_id, run_hash, `place`, `latency`, sorted by key, then run.
    axes : KeyAxes
        Of all keys, by key_id.
    place, latency : str
        Columns of the length and of the latency in milliseconds.
    """
    key_ids, key = np.unique(frame["key_id"].to_numpy(np.int64), return_inverse=True)
    new_key = np.diff(key, prepend=-1) > 0
    new_run = new_key | (frame["run_hash"] != frame["run_hash"].shift()).to_numpy()
    run = np.cumsum(new_run) - 1
    first_run = run[new_key]
    # Each key's runs go round the folds; keys begin at different ones, so that keys of few runs fill all of them.
    fold = (run - first_run[key] + key) % FOLDS
    return Observations(
        place=np.maximum(frame[place].to_numpy(dtype=np.float64), 1.0),
        log_ms=np.log(frame[latency].to_numpy(dtype=np.float64)),
        key=key.astype(np.int64),
        fold=fold.astype(np.int64),
        weight=np.ones(len(frame)),
        key_ids=key_ids,
        axes=axes.of(key_ids),
    )
