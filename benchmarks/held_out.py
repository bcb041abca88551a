"""Runs to learn from and runs to judge by: reading them, splitting them by run, and the table beside its rivals."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
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
        One row a run: canonical columns, `key` (number of its configuration), and for each key column `…_index`, a
        number: categories are in the order of their prompt lengths.
    steps : DataFrame
        One row a timed step: `run` (its place in `frame`), `position` (from 1), `kv_len`, `step_ms`.
    key_columns : tuple of str
        What a configuration is.
    """

    frame: pd.DataFrame
    steps: pd.DataFrame
    key_columns: tuple[str, ...] = tuple(KEYS)

    def take(self, places: Ints) -> Runs:
        """The runs at these places of `frame`, with their steps."""
        new_places = np.full(len(self.frame), -1, dtype=np.int64)
        new_places[places] = np.arange(len(places))
        run = new_places[self.step_runs()]
        steps = self.steps.assign(run=run)[run >= 0].reset_index(drop=True)
        return Runs(self.frame.iloc[places].reset_index(drop=True), steps, self.key_columns)

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


def load_runs(source: Path, folder: Path, key: Sequence[str] = KEYS) -> Runs:
    """Read runs from whatever lutest reads; those that a build would reject as unsound are left out, outliers stay.

    Parameters
    ----------
    source : Path
        A file or folder of runs.
    folder : Path
        Where intermediate files may lie.
    key : sequence of str
        What a configuration is.
    """
    parquet = folder / "runs.parquet"
    lutest.convert(source, parquet, config={"key": list(key)})
    checked = folder / "checked.duckdb"
    lutest.build({"key": list(key), "cleaning": {"outliers": "none"}}, runs=parquet, output=checked)
    with duckdb.connect() as connection:
        frame = connection.execute("SELECT * FROM read_parquet(?)", [str(parquet)]).df()
    frame = frame.drop(index=_rejected_places(checked).tolist()).reset_index(drop=True)
    for name in ("vision_tokens", "text_tokens"):
        if name not in frame:
            frame[name] = 0
    if "total_ms" not in frame:
        frame["total_ms"] = np.nan
    frame["total_ms"] = frame["total_ms"].fillna(frame["prefill_ms"] + frame["decode_ms"])
    for name in key:
        index = frame[name]
        if not pd.api.types.is_numeric_dtype(index):
            values = frame.groupby(name)["prompt_tokens"].median().sort_values(kind="stable").index
            index = index.map({value: place for place, value in enumerate(values)})
        frame[f"{name}_index"] = index
    frame["key"] = frame.groupby([f"{name}_index" for name in key]).ngroup()
    return Runs(frame, _timed_steps(frame), tuple(key))


def _timed_steps(frame: pd.DataFrame) -> pd.DataFrame:
    empty = np.empty(0)
    timed = [empty] * len(frame)
    if "decode_steps_ms" in frame:  # None or NaN where none was timed
        timed = [np.asarray(held, dtype=np.float64) if np.ndim(held) else empty for held in frame["decode_steps_ms"]]
    lengths = np.array([len(held) for held in timed], dtype=np.int64)
    run = np.repeat(np.arange(len(timed)), lengths)
    position = np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    kv_len = frame["prompt_tokens"].to_numpy()[run] + position
    step_ms = np.concatenate([empty, *timed])
    return pd.DataFrame({"run": run, "position": position, "step_ms": step_ms, "kv_len": kv_len})


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


def build_table(frame: pd.DataFrame, missing: Missing = "error", key: Sequence[str] = KEYS) -> Built:
    """A table of these runs, built with the default configuration into a file and loaded from it."""
    with tempfile.TemporaryDirectory(prefix="lutest-accuracy-") as folder:
        path = Path(folder) / "table.duckdb"
        summary = lutest.build({"key": list(key)}, runs=frame, output=path)
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
    columns = [frame[name] for name in runs.key_columns]
    ids = batch.key_ids(*(c.to_numpy(None if pd.api.types.is_numeric_dtype(c) else object) for c in columns))
    prompt, tokens = frame["prompt_tokens"].to_numpy(), frame["output_tokens"].to_numpy()
    step_ids, kv_len = ids[runs.step_runs()], runs.steps["kv_len"].to_numpy()
    return {
        "prefill": np.array([batch.prefill_ms(ids, prompt, q) for q in QUANTILES]),
        "decode step": np.array([batch.decode_step_ms(step_ids, kv_len, q) for q in QUANTILES]),
        "decode total": np.array([batch.decode_ms(ids, prompt, tokens, q) for q in QUANTILES]),
        "total": np.array([batch.total_ms(ids, prompt, tokens, q) for q in QUANTILES]),
    }
