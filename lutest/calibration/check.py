"""Whether a table still holds for runs that were taken since."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutest.builder.matched_runs import match_runs
from lutest.calibration.coverage import TOLERANCE, Check, Coverage, adjusted_tests, tolerated_factors
from lutest.reader.loading import load
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import BuildConfig
from lutest.runs.sources import Progress, Source
from lutest.runs.work import work_database


def check(
    table: LatencyTable | str | os.PathLike[str],
    runs: Source | Sequence[Source],
    *,
    false_alarm_rate: float = 0.01,
    tolerance: float = TOLERANCE,
    config: str | os.PathLike[str] | Mapping[str, object] | BuildConfig | None = None,
    progress: Progress | None = None,
) -> Check:
    """Say whether a table still holds for runs that were taken since.

    Of prefill, decode and total, over all runs and for each configuration, the shares of runs within P50 and P95 are
    put to the test.

    Parameters
    ----------
    table : LatencyTable or path
        The table.
    runs : path, DataFrame, or sequence of them
        Sources of runs, as for a build; paths are relative to the current folder.
    false_alarm_rate : float
        Probability of at least one alarm though nothing has changed; above 0 and below 0.5. It is that of runs which
        are independent of each other: neighbouring runs of one busy minute are not.
    tolerance : float
        How much slower or faster still counts as the same, as a fraction; 0 or more and below 0.5. Two sessions on the
        same machine differ by a percent or two.
    config : path, mapping or BuildConfig, optional
        Where `columns` and `time_unit` are taken from. Left out: from the table's own build.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    Check

    Raises
    ------
    LutestError
        The table or a source cannot be read, no run is of a configuration that the table holds, or the rate is not
        allowed.

    Notes
    -----
    The quantiles of the table are uncertain themselves, and the tests account for it: see
    `lutest.calibration.coverage.exceedance_tail`.
    """
    adjusted_tests([], false_alarm_rate)  # before any work
    tolerated = tolerated_factors(tolerance)
    held = table if isinstance(table, LatencyTable) else load(table)
    with work_database() as connection:
        left_out = match_runs(connection, held, runs, config, progress)
        columns = connection.execute(
            """
            SELECT key_id, prompt_tokens, output_tokens, prefill_ms, decode_ms, total_ms
            FROM matched_runs
            ORDER BY source_id, "row"
            """
        ).fetchnumpy()
    observed = {name: np.asarray(values) for name, values in columns.items()}
    tests = adjusted_tests(_coverages(held, observed, tolerated), false_alarm_rate)
    return Check(held.path, held.key_columns, len(observed["key_id"]), left_out, false_alarm_rate, tests)


def _coverages(table: LatencyTable, runs: dict[str, NDArray[Any]], tolerated: tuple[float, float]) -> list[Coverage]:
    slower, faster = tolerated
    key_id, output = runs["key_id"], runs["output_tokens"]
    several = (output >= 2) & np.array([key.decode_curve is not None for key in table.figures.keys])[key_id]
    found = []
    for stage, chosen, predict in (
        ("prefill", np.full(len(key_id), True), lambda ids, prompt, _, q: table.batch.prefill_ms(ids, prompt, q)),
        ("decode", several, table.batch.decode_ms),
        ("total", several | (output == 1), table.batch.total_ms),
    ):
        ids, prompt, tokens, ms = (
            runs[name][chosen] for name in ("key_id", "prompt_tokens", "output_tokens", f"{stage}_ms")
        )
        predicted = {q: predict(ids, prompt, tokens, q) for q in (0.5, 0.95)}
        summaries = [held.decode if stage == "decode" else held.prefill for held in table.figures.keys]
        behind = np.array([0 if summary is None else summary.n for summary in summaries])
        each = [(table.keys[number], ids == number) for number in np.unique(ids)]
        for key, rows in [(None, np.full(len(ids), True)), *each] if each else []:
            held_ms, at = ms[rows], {q: values[rows] for q, values in predicted.items()}
            n_above = {q: (_above(held_ms, slower * p), _above(held_ms, faster * p)) for q, p in at.items()}
            n_within = {q: len(held_ms) - _above(held_ms, p) for q, p in at.items()}
            n_table = int(behind[np.unique(ids[rows])].sum())
            ratio = float(np.median(held_ms / at[0.5]))
            found.append(Coverage(stage, key, len(held_ms), n_table, n_above, n_within, ratio))
    return found


def _above(observed_ms: NDArray[Any], quantile_ms: NDArray[np.float64]) -> int:
    return int((observed_ms > quantile_ms).sum())
