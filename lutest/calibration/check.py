"""Whether a table still holds for runs that were taken since."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutest.builder.matched_runs import match_runs
from lutest.calibration.calibrate import HASH_LENGTH, own_run_hashes
from lutest.calibration.coverage import (
    TOLERANCE,
    Check,
    Coverage,
    adjusted_tests,
    detectable_shifts,
    tolerated_factors,
)
from lutest.reader.errors import SourceError
from lutest.reader.loading import load
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import BuildConfig
from lutest.runs.sources import Progress, Source
from lutest.runs.work import work_database

_BATCH = 1.0  # times the root of the number of runs: shorter batches miss what lasts, of longer ones there are few
_PRIOR_BATCHES = 10


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
        Probability of at least one alarm though nothing has changed; above 0 and below 0.5.
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
        The table or a source cannot be read, no run is of a configuration that the table holds, all of them are those
        that calibrated it, or the rate is not allowed.

    Notes
    -----
    The quantiles of the table are uncertain themselves, and neighbouring runs of one busy minute are alike; the tests
    account for both: see `lutest.calibration.coverage.exceedance_tail`. How alike they are is told by the order in
    which they were taken: ``started_ms``, else the order of rows.
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
            WHERE NOT list_contains($own::VARCHAR[], left(run_hash, $length))
            ORDER BY started_ms, source_id, "row"
            """,
            {"own": own_run_hashes(held.meta), "length": HASH_LENGTH},
        ).fetchnumpy()
        ((matched,),) = connection.execute("SELECT count(*) FROM matched_runs").fetchall()
    observed = {name: np.asarray(values) for name, values in columns.items()}
    n = len(observed["key_id"])
    if not n:
        raise SourceError("all of these runs calibrated the table: check it by runs that it has not seen")
    if matched > n:
        left_out["calibrated the table"] = matched - n
    tests = adjusted_tests(_coverages(held, observed, tolerated), false_alarm_rate)
    shifts = detectable_shifts(tests, false_alarm_rate, tolerance)
    return Check(held.path, held.key_columns, n, left_out, false_alarm_rate, tests, shifts)


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
        effects = {q: _design_effects(ms > values, ids) for q, values in predicted.items()}
        for number in (None, *np.unique(ids).tolist()) if len(ids) else ():
            key, rows = (None, np.full(len(ids), True)) if number is None else (table.keys[number], ids == number)
            held_ms, at = ms[rows], {q: values[rows] for q, values in predicted.items()}
            effect = {q: by_key[number] for q, by_key in effects.items()}
            n_above = {q: (_above(held_ms, slower * p), _above(held_ms, faster * p)) for q, p in at.items()}
            n_within = {q: len(held_ms) - _above(held_ms, p) for q, p in at.items()}
            n_table = int(behind[np.unique(ids[rows])].sum())
            low, ratio, high = np.quantile(held_ms / at[0.5], (0.25, 0.5, 0.75))
            spread = float(np.log(high / max(low, 1e-3 * high))) / 1.349  # of a normal distribution
            found.append(Coverage(stage, key, len(held_ms), n_table, n_above, n_within, float(ratio), spread, effect))
    return found


def _design_effects(above: NDArray[np.bool_], key_id: NDArray[np.int64]) -> dict[int | None, float]:
    """What dependence of runs that followed one another multiplies the variance of shares by; None: over all keys.

    Of sums over batches of consecutive runs, against what they would vary by if runs were independent, each key's
    share taken off. Shrunk: all keys to 1, each key to all, as if by ten batches more.

    References
    ----------
    C. Alexopoulos and A. F. Seila (1998), Output data analysis, in Handbook of Simulation (ed. J. Banks), chapter 7:
    batch means.
    """
    share = np.bincount(key_id, above) / np.maximum(np.bincount(key_id), 1)
    deviation = above - share[key_id]
    effects: dict[int | None, float] = {None: _batched(deviation, 1.0)}
    for number in np.unique(key_id):
        effects[int(number)] = _batched(deviation[key_id == number], effects[None])
    return effects


def _batched(deviation: NDArray[np.float64], prior: float) -> float:
    size = round(_BATCH * len(deviation) ** 0.5)
    n_batches = len(deviation) // max(size, 1)
    if n_batches < 2 or not deviation.any():
        return prior
    taken = deviation[: n_batches * size]
    sums = taken.reshape(n_batches, size).sum(axis=1)
    effect = float((sums**2).sum() / (taken**2).sum()) * n_batches / (n_batches - 1)
    return float(max(1.0, (n_batches * effect + _PRIOR_BATCHES * prior) / (n_batches + _PRIOR_BATCHES)))


def _above(observed_ms: NDArray[Any], quantile_ms: NDArray[np.float64]) -> int:
    return int((observed_ms > quantile_ms).sum())
