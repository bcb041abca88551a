"""Runs to learn from and runs to judge by: reading them, splitting them by run, and the table beside its rivals."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from numpy.typing import NDArray

import lutest
from lutest.reader.table import Missing

__all__ = [
    "KEYS",
    "QUANTILES",
    "TARGETS",
    "Built",
    "Floats",
    "Ints",
    "Predicted",
    "Runs",
    "build_table",
    "load_runs",
    "observed",
    "split",
    "table_predictions",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
KEYS = ["tier", "top_k", "num_blocks"]
QUANTILES = (0.5, 0.95)
TARGETS = ("prefill", "decode step", "decode total", "total")

# target → its P50 and P95 in two rows; "decode step" for each row of `Runs.steps`, the others for each of `Runs.frame`
Predicted = dict[str, Floats]


@dataclass(frozen=True)
class Runs:
    """Runs that are sound.

    Attributes
    ----------
    frame : DataFrame
        One row a run: canonical columns, `key` (number of its configuration) and `tier_index`.
    steps : DataFrame
        One row a timed step: `run` (its place in `frame`), `position` (from 1), `kv_len`, `step_ms`.
    """

    frame: pd.DataFrame
    steps: pd.DataFrame

    def take(self, places: Ints) -> Runs:
        """The runs at these places of `frame`, with their steps."""
        new_places = np.full(len(self.frame), -1, dtype=np.int64)
        new_places[places] = np.arange(len(places))
        run = new_places[self.step_runs()]
        steps = self.steps.assign(run=run)[run >= 0].reset_index(drop=True)
        return Runs(self.frame.iloc[places].reset_index(drop=True), steps)

    def column(self, name: str) -> Floats:
        """A column of `frame` as floats."""
        return np.asarray(self.frame[name], dtype=np.float64)

    def keys(self) -> Ints:
        """The configuration of each run."""
        return np.asarray(self.frame["key"], dtype=np.int64)

    def decode_steps(self) -> Ints:
        """Steps of each run: its output tokens less the one that comes out of prefill."""
        return np.asarray(self.frame["output_tokens"], dtype=np.int64) - 1

    def step_runs(self) -> Ints:
        """The run of each timed step."""
        return np.asarray(self.steps["run"], dtype=np.int64)

    def step_column(self, name: str) -> Floats:
        """A column of `steps` as floats."""
        return np.asarray(self.steps[name], dtype=np.float64)


def load_runs(source: Path, folder: Path) -> Runs:
    """Read runs from whatever lutest reads; those that a build would reject as unsound are left out, outliers stay.

    Parameters
    ----------
    source : Path
        A file or folder of runs.
    folder : Path
        Where intermediate files may lie.
    """
    parquet = folder / "runs.parquet"
    lutest.convert(source, parquet)
    checked = folder / "checked.duckdb"
    lutest.build({"cleaning": {"outliers": "none"}}, runs=parquet, output=checked)
    with duckdb.connect() as connection:
        frame = connection.execute("SELECT * FROM read_parquet(?)", [str(parquet)]).df()
    frame = frame.drop(index=_rejected_places(checked).tolist()).reset_index(drop=True)
    for name in ("vision_tokens", "text_tokens"):
        if name not in frame:
            frame[name] = 0
    if "total_ms" not in frame:
        frame["total_ms"] = np.nan
    frame["total_ms"] = frame["total_ms"].fillna(frame["prefill_ms"] + frame["decode_ms"])
    tiers = frame.groupby("tier")["prompt_tokens"].median().sort_values(kind="stable").index
    frame["tier_index"] = frame["tier"].map({tier: place for place, tier in enumerate(tiers)})
    frame["key"] = frame.groupby(["tier_index", "top_k", "num_blocks"]).ngroup()
    return Runs(frame, _timed_steps(frame))


def _timed_steps(frame: pd.DataFrame) -> pd.DataFrame:
    rows: list[tuple[int, int, float]] = []
    if "decode_steps_ms" in frame:
        for run, steps in enumerate(frame["decode_steps_ms"]):
            if np.ndim(steps) == 0:  # None or NaN: none was timed
                continue
            for position, step in enumerate(steps, 1):
                rows += [(run, position, float(timing)) for timing in np.ravel(step)]  # one, or one list a position
    steps = pd.DataFrame(rows, columns=["run", "position", "step_ms"])
    prompt = frame["prompt_tokens"].to_numpy()[steps["run"].to_numpy(dtype=np.int64)]
    return steps.assign(kv_len=prompt + steps["position"].to_numpy(dtype=np.int64))


def split(runs: Runs, seed: int, runs_per_key: int | None) -> tuple[Ints, Ints]:
    """Split by run within each key.

    Parameters
    ----------
    runs : Runs
        All runs.
    seed : int
        Of the split.
    runs_per_key : int or None
        Runs of a key to learn from; None, or more than there are: half of them.

    Returns
    -------
    train, test : ndarray of int
        Places of runs. A key without any decode step to learn from is judged on its one-token runs only.
    """
    generator = np.random.default_rng(seed)
    keys, steps = runs.keys(), runs.decode_steps()
    train: list[int] = []
    test: list[int] = []
    for key in np.unique(keys):
        places = generator.permutation(np.flatnonzero(keys == key))
        half = (len(places) + 1) // 2
        count = half if runs_per_key is None else min(half, runs_per_key)
        train += places[:count].tolist()
        can_decode = bool((steps[places[:count]] > 0).any())
        test += [place for place in places[count:].tolist() if can_decode or steps[place] == 0]
    return np.array(sorted(train), dtype=np.int64), np.array(sorted(test), dtype=np.int64)


def observed(runs: Runs) -> dict[str, tuple[Ints, Floats, Ints]]:
    """Target → the rows that it is learnt from and judged by, their observations (ms), and their keys."""
    key = runs.keys()
    everything = np.arange(len(key))
    decoding = np.flatnonzero(runs.decode_steps() > 0)
    return {
        "prefill": (everything, runs.column("prefill_ms"), key),
        "decode step": (np.arange(len(runs.steps)), runs.step_column("step_ms"), key[runs.step_runs()]),
        "decode total": (decoding, runs.column("decode_ms")[decoding], key[decoding]),
        "total": (everything, runs.column("total_ms"), key),
    }


@dataclass(frozen=True)
class Built:
    """A table, the places of the runs that it rests on, and what its build took."""

    table: lutest.LatencyTable
    accepted: Ints
    fit_seconds: float
    seconds: float


def build_table(frame: pd.DataFrame, missing: Missing = "error") -> Built:
    """A table of these runs, built with the default configuration into a file and loaded from it."""
    with tempfile.TemporaryDirectory(prefix="lutest-accuracy-") as folder:
        path = Path(folder) / "table.duckdb"
        summary = lutest.build(runs=frame, output=path)
        accepted = np.setdiff1d(np.arange(len(frame)), _rejected_places(path))
        return Built(lutest.load(path, missing=missing), accepted, summary.fit_seconds, summary.seconds)


def _rejected_places(path: Path) -> Ints:
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute('SELECT "row" - 1 FROM rejected_runs').fetchall()
    return np.array([place for (place,) in rows], dtype=np.int64)


def table_predictions(table: lutest.LatencyTable, runs: Runs) -> Predicted:
    """What a table says of runs, by `table.batch`."""
    batch = table.batch
    frame = runs.frame
    ids = batch.key_ids(frame["tier"].to_numpy(dtype=object), frame["top_k"].to_numpy(), frame["num_blocks"].to_numpy())
    prompt, tokens = frame["prompt_tokens"].to_numpy(), frame["output_tokens"].to_numpy()
    step_ids, kv_len = ids[runs.step_runs()], runs.steps["kv_len"].to_numpy()
    return {
        "prefill": np.array([batch.prefill_ms(ids, prompt, q) for q in QUANTILES]),
        "decode step": np.array([batch.decode_step_ms(step_ids, kv_len, q) for q in QUANTILES]),
        "decode total": np.array([batch.decode_ms(ids, prompt, tokens, q) for q in QUANTILES]),
        "total": np.array([batch.total_ms(ids, prompt, tokens, q) for q in QUANTILES]),
    }
