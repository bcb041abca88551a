"""Which runs to take next: configurations and prompt lengths that leave a calibration the least uncertain."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lutest.calibration.key_similarity import EACH, NEAR, similarities
from lutest.reader.arguments import whole_number
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Figures, Key
from lutest.reader.loading import load
from lutest.reader.table import LatencyTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_RUNS = 10_000
# What a change of device is taken to do before any run is seen: variances in units of a run's. Most is shared by all,
# much along the key columns, little belongs to one configuration; the shape of the curve moves as well.
_LEVEL = 1e3
_COLUMN, _NEAR, _EACH = 30.0, 10.0, 3.0
_SHAPE = 30.0
_RANDOM_DRAWS = 100


@dataclass(frozen=True)
class PlannedRun:
    """A run to take.

    Attributes
    ----------
    key : Key
        Its configuration.
    prompt_tokens : int
        Its prompt length.
    """

    key: Key
    prompt_tokens: int


@dataclass(frozen=True)
class Plan:
    """Runs to take, the most telling first.

    Attributes
    ----------
    key_columns : tuple of str
        What the configurations of the runs are made of.
    runs : tuple of PlannedRun
        A configuration may come more than once.
    deviation, random_deviation : float
        Root mean square standard deviation of the logarithm of P50 over all configurations and prompts that the table
        was measured at, after these runs, and after as many at random; in units of that of a single run.
    """

    key_columns: tuple[str, ...]
    runs: tuple[PlannedRun, ...]
    deviation: float
    random_deviation: float


def plan(table: LatencyTable | str | os.PathLike[str], n: int) -> Plan:
    """Propose runs for `lutest.calibrate`.

    Runs are picked one after the other, each the one that lowers the mean variance of prefill over the whole table
    most (an I-optimal design of the Gaussian process that calibration fits, with strengths assumed instead of chosen).

    Parameters
    ----------
    table : LatencyTable or path
        The table to calibrate.
    n : int
        How many runs.

    Raises
    ------
    ArgumentError, TableError

    References
    ----------
    V. V. Fedorov, Theory of Optimal Experiments (1972), chapter 2; greedy: A. Krause, A. Singh and C. Guestrin (2008),
    Near-optimal sensor placements in Gaussian processes, J. Mach. Learn. Res. 9.
    """
    count = whole_number("n", n, 1)
    if count > MOST_RUNS:
        raise ArgumentError(f"n is {n!r}; allowed: up to {MOST_RUNS:,}")
    held = table if isinstance(table, LatencyTable) else load(table)
    figures = held.figures
    key_id, prompts = _candidates(figures)
    parts = similarities(figures.key_columns, held.keys)
    covariance = _covariance(parts, key_id, held.batch.prefill_ms(key_id, prompts))
    picked, deviation = _greedy(covariance, count)
    chance = np.random.default_rng(0)
    draws = [chance.integers(len(key_id), size=count) for _ in range(_RANDOM_DRAWS)]
    at_random = float(np.sqrt(np.mean([_mean_variance(covariance, draw) for draw in draws])))
    runs = tuple(PlannedRun(figures.keys[key_id[place]].key, int(prompts[place])) for place in picked)
    return Plan(held.key_columns, runs, deviation, at_random)


def _candidates(figures: Figures) -> tuple[Ints, Ints]:
    """Configurations and prompt lengths to choose among: the shortest, a typical and the longest one measured."""
    pairs = []
    for number, held in enumerate(figures.keys):
        curve = held.prefill_curve
        known = [x for x, source in zip(curve.at, curve.source, strict=True) if source != "extrapolated"] or curve.at
        pairs += [(number, x) for x in sorted({known[0], held.prompt_tokens_p50, known[-1]})]
    columns = np.array(pairs, dtype=np.int64).T
    return columns[0], columns[1]


def _covariance(parts: Mapping[str, Floats], key_id: Ints, p50_ms: Floats) -> Floats:
    """Prior covariance of log(new P50 / old P50) of the candidates."""
    strengths = {**dict.fromkeys(parts, _COLUMN), NEAR: _NEAR, EACH: _EACH}
    shared = sum((strengths[name] * part for name, part in parts.items()), np.zeros_like(parts[EACH]))
    shape = 1.0 / p50_ms  # what an offset does to the logarithm
    shape = (shape - shape.mean()) / (np.ptp(shape) or 1.0)
    return np.asarray(_LEVEL + shared[np.ix_(key_id, key_id)] + _SHAPE * np.outer(shape, shape))


def _greedy(covariance: Floats, count: int) -> tuple[list[int], float]:
    """Places of the best `count` runs, one after the other, and the deviation that they leave."""
    left = covariance.copy()
    picked = []
    for _ in range(count):
        gain = (left**2).sum(axis=0) / (np.diag(left) + 1.0)
        best = int(np.argmax(gain))
        picked.append(best)
        left -= np.outer(left[:, best], left[best]) / (left[best, best] + 1.0)
    return picked, float(np.sqrt(np.mean(np.diag(left))))


def _mean_variance(covariance: Floats, picked: Ints) -> float:
    rows = covariance[:, picked]
    inner = covariance[np.ix_(picked, picked)] + np.eye(len(picked))
    explained = np.einsum("ij,ji->i", rows, np.linalg.solve(inner, rows.T))
    return float(np.mean(np.diag(covariance) - explained))
