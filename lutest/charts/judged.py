"""What pictures of runs show, held against a table: what `evaluate` and `diagnose` say, and a sample of single runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from lutest.builder.matched_runs import match_read_runs, matching_settings
from lutest.judging.decode_checks import PER_TOKEN_FIELDS
from lutest.judging.diagnose import findings_of
from lutest.judging.evaluate import Evaluation, Score, evaluate_matched
from lutest.judging.finding import Finding
from lutest.judging.metrics import coverage_interval
from lutest.reader.names import quantile_suffix
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import Config
from lutest.runs.sources import Progress, Source, listed
from lutest.runs.work import read_runs, work_database

_MOST_RUNS, _FEWEST_OF_KEY = 4_000, 12  # of the sample
_STEPS_OF_RUN = 3
_ABOUT_CURVES = ("fencepost", "kv_growth", "per_token_field", "clamped", "subtraction", "unaccounted_time")


def judged(
    table: LatencyTable,
    runs: Source | Sequence[Source],
    config: Config | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a table by runs, which are read once.

    Returns
    -------
    dict
        ``n_runs``, ``n_clamped``, ``left_out``, ``warnings``, ``overall``, ``by_output_tokens``, ``by_key`` as in
        `Evaluation`, a configuration by its place in the table and coverage with its 95 % interval; ``findings``, each
        with the part of the page that it is ``about``; ``dots``: stage → place → (length, ms) of single runs and steps;
        ``runs``: (place, observed total, P50, P95) of single runs.

    Raises
    ------
    LutestError
        As `evaluate` and `diagnose`.
    """
    settings = matching_settings(table, config)
    with work_database() as connection:
        read_runs(connection, listed(runs), settings, Path(), progress, extra_fields=PER_TOKEN_FIELDS)
        findings = findings_of(connection, settings)
        evaluation = evaluate_matched(connection, table, match_read_runs(connection, table))
        return {**_evaluated(table, evaluation), "findings": _placed(findings), **_sample(connection, table)}


def _evaluated(table: LatencyTable, evaluation: Evaluation) -> dict[str, Any]:
    named = {name: getattr(evaluation, name) for name in ("n_runs", "n_clamped", "left_out", "warnings")}
    places = {key: place for place, key in enumerate(table.keys)}
    for group in ("overall", "by_output_tokens", "by_key"):
        scores: Sequence[Score] = getattr(evaluation, group)
        named[group] = [
            {
                **{name: value for name, value in vars(score).items() if name not in ("key", "pinball_ms", "coverage")},
                "place": score.key and places[score.key],
                "pinball_ms": {quantile_suffix(q): loss for q, loss in score.pinball_ms.items()},
                "coverage": {quantile_suffix(q): _with_interval(score, q) for q in score.coverage},
            }
            for score in scores
        ]
    return named


def _with_interval(score: Score, q: float) -> list[float | None]:
    """Coverage and its interval; none of single steps, which go together within a run."""
    share = score.coverage[q]
    if score.stage == "decode step":
        return [share, None, None]
    return [share, *(float(end) for end in coverage_interval(share, score.n))]


def _placed(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [
        {
            "name": finding.name,
            "severity": finding.severity,
            "sentence": finding.sentence,
            "about": "curves" if finding.name in _ABOUT_CURVES else "runs",
        }
        for finding in findings
    ]


def _sample(connection: duckdb.DuckDBPyConnection, table: LatencyTable) -> dict[str, Any]:
    """Runs picked by their hash, as many of each configuration."""
    most = max(_FEWEST_OF_KEY, _MOST_RUNS // len(table))
    rows = connection.execute(
        """
        SELECT
            key_id, prompt_tokens, output_tokens, prefill_ms, decode_ms, total_ms,
            CASE WHEN timed THEN decode_steps_ms END,
            coalesce(step_positions, range(1, len(decode_steps_ms) + 1)::INTEGER[])
        FROM matched_runs
        QUALIFY row_number() OVER (PARTITION BY key_id ORDER BY run_hash, source_id, "row") <= $most
        ORDER BY key_id, run_hash, source_id, "row"
        """,
        {"most": most},
    ).fetchall()
    has_decode = [key.decode_curve is not None for key in table.figures.keys]
    prefill: dict[int, list[list[float]]] = {}
    steps: dict[int, list[list[float]]] = {}
    for place, prompt, output, prefill_ms, decode_ms, _, steps_ms, positions in rows:
        prefill.setdefault(place, []).append([prompt, prefill_ms])
        dots = steps.setdefault(place, [])
        if steps_ms:
            chosen = sorted({round(i) for i in np.linspace(0, len(steps_ms) - 1, _STEPS_OF_RUN)})
            dots += [[prompt + positions[i], steps_ms[i]] for i in chosen]
        elif output > 1:  # the mean step of the run, at the middle of it
            dots.append([prompt + output // 2, decode_ms / (output - 1)])
    told = [row for row in rows if row[2] == 1 or has_decode[row[0]]]
    ids, prompts, outputs = (np.array([row[i] for row in told], dtype=np.int64) for i in range(3))
    predicted = [table.batch.total_ms(ids, prompts, outputs, q).tolist() for q in (0.5, 0.95)] if told else [[], []]
    seen = [[row[0], row[5], p50, p95] for row, p50, p95 in zip(told, *predicted, strict=True)]
    return {"dots": {"prefill": prefill, "decode_step": steps}, "runs": seen}
