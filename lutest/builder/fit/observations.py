"""Latencies at lengths by key and run, as arrays: what the curves are fitted to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lutest.reader.names import KEY_COLUMNS

__all__ = ["FOLDS", "Observations", "read_observations"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FOLDS = 5
_KEYS = list(KEY_COLUMNS)


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
        Row of `keys`; ascending.
    fold : ndarray of int, shape (n,)
        Part of the cross-validation; all observations of a run are in one.
    weight : ndarray of float, shape (n,)
        Worth of an observation; a run whose steps tell the same thing weighs less than their number.
    tiers : ndarray of int, shape (g,)
        Number of each key's tier.
    sizes : ndarray of float, shape (g, 2)
        Logarithms of each key's top_k and num_blocks.
    """

    place: Floats
    log_ms: Floats
    key: Integers
    fold: Integers
    weight: Floats
    tiers: Integers
    sizes: Floats

    def rows(self, chosen: NDArray[np.bool_]) -> Observations:
        """Those of the chosen rows."""
        parts = {name: getattr(self, name)[chosen] for name in ("place", "log_ms", "key", "fold", "weight")}
        return replace(self, **parts)


def read_observations(frame: pd.DataFrame, place: str, latency: str) -> tuple[Observations, pd.DataFrame]:
    """Observations of a frame sorted by key and run, and its keys.

    Parameters
    ----------
    frame : DataFrame
        Columns tier, top_k, num_blocks, run_hash, `place`, `latency`, sorted by key, then run.
    place, latency : str
        Columns of the length and of the latency in milliseconds.

    Returns
    -------
    Observations, DataFrame
        All of weight 1; one row of tier, top_k, num_blocks per key.
    """
    new_key = (frame[_KEYS] != frame[_KEYS].shift()).any(axis=1).to_numpy()
    key = np.cumsum(new_key) - 1
    keys = frame.loc[new_key, _KEYS].reset_index(drop=True)
    new_run = new_key | (frame["run_hash"] != frame["run_hash"].shift()).to_numpy()
    run = np.cumsum(new_run) - 1
    first_run = run[new_key]
    # Each key's runs go round the folds; keys begin at different ones, so that keys of few runs fill all of them.
    fold = (run - first_run[key] + key) % FOLDS
    data = Observations(
        place=np.maximum(frame[place].to_numpy(dtype=np.float64), 1.0),
        log_ms=np.log(frame[latency].to_numpy(dtype=np.float64)),
        key=key.astype(np.int64),
        fold=fold.astype(np.int64),
        weight=np.ones(len(frame)),
        tiers=np.unique(keys["tier"], return_inverse=True)[1].astype(np.int64),
        sizes=np.log(np.maximum(keys[["top_k", "num_blocks"]].to_numpy(dtype=np.float64), 1.0)),
    )
    return data, keys
