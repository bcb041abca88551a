"""Whether a table still holds for runs that were taken since."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutest.builder.matched_runs import match_runs
from lutest.calibration.coverage import TOLERANCE, Check, Coverage, adjusted_tests, tolerated_factors
from lutest.reader.figures import Key
from lutest.reader.loading import load
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import BuildConfig
from lutest.runs.sources import Source
from lutest.runs.work import work_database

__all__ = ["check"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Progress = Callable[[str, int, int], None]


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
    key_id, prompt, output = runs["key_id"], runs["prompt_tokens"], runs["output_tokens"]
    has_decode = np.array([key.decode_curve is not None for key in table.figures.keys])
    several = (output >= 2) & has_decode[key_id]
    whole = several | (output == 1)
    batch = table.batch
    stages: dict[str, tuple[NDArray[np.bool_], Floats, Callable[..., Floats]]] = {
        "prefill": (np.ones(len(key_id), dtype=bool), runs["prefill_ms"], batch.prefill_ms),
        "decode": (several, runs["decode_ms"], batch.decode_ms),
        "total": (whole, runs["total_ms"], batch.total_ms),
    }
    found = []
    for stage, (chosen, values, predict) in stages.items():
        lengths = (prompt[chosen],) if stage == "prefill" else (prompt[chosen], output[chosen])
        predicted = {q: predict(key_id[chosen], *lengths, q) for q in (0.5, 0.95)}
        found += _stage_coverages(table, stage, key_id[chosen], values[chosen], predicted, tolerated)
    return found


def _stage_coverages(
    table: LatencyTable,
    stage: str,
    key_id: Ints,
    observed_ms: Floats,
    predicted_ms: dict[float, Floats],
    tolerated: tuple[float, float],
) -> list[Coverage]:
    ratio = observed_ms / predicted_ms[0.5]
    slower, faster = tolerated
    above = {q: (observed_ms > slower * values, observed_ms > faster * values) for q, values in predicted_ms.items()}
    within = {q: observed_ms <= values for q, values in predicted_ms.items()}

    def coverage(key: Key | None, rows: NDArray[np.bool_], n_table: int) -> Coverage:
        n_above = {q: (int(more[rows].sum()), int(less[rows].sum())) for q, (more, less) in above.items()}
        n_within = {q: int(held[rows].sum()) for q, held in within.items()}
        return Coverage(stage, key, int(rows.sum()), n_table, n_above, n_within, float(np.median(ratio[rows])))

    summaries = [held.decode if stage == "decode" else held.prefill for held in table.figures.keys]
    behind = [0 if summary is None else summary.n for summary in summaries]
    found = []
    present = np.unique(key_id)
    if len(present):
        found.append(coverage(None, np.ones(len(key_id), dtype=bool), sum(behind[number] for number in present)))
    found += [coverage(table.keys[number], key_id == number, behind[number]) for number in present]
    return found
