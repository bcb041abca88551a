"""Are times what they are called? Runs whose mapping or unit looks wrong are refused before a table rests on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import duckdb

from lutest.reader.errors import BuildError, LutestWarning
from lutest.runs.configuration import TIME_UNITS_MS, BuildConfig

_STEP_MS = (0.05, 60_000.0)  # medians outside of these are in another unit; in the last tenth or hundredth, perhaps
_PREFILL_MS = (0.05, 600_000.0)
_SEEN_MS = (0.5, 5_000.0)  # most models' steps and prefills
_SAMPLED = 50_000  # runs that are looked at, about, picked by a hash
_LEAST_RUNS = 12  # of a configuration, to tell how its times go with lengths
_LEAST_JUDGED = 40  # runs of all such configurations
_TOLERANCE = 0.02  # by which stages may add up to more than the total
_MOST = 0.5  # share of runs, of this many at least:
_FEW = 4
_OFF = 0.5  # of prefill, or of decode: where decode stands at no step, which is 0 of both
_LEAST_RISE = 0.35  # rank correlation of decode and its number of steps
_MOST_RISE = 0.5  # the same of prefill, which knows nothing of it
_LEAST_RATIO, _MOST_RATIO = 0.1, 20_000.0  # prefill over a step


def refuse_implausible(connection: duckdb.DuckDBPyConnection, settings: BuildConfig) -> None:
    """Refuse runs whose times cannot be what they are called, and say what may be meant.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``runs``.
    settings : BuildConfig
        Where columns come from.

    Raises
    ------
    BuildError
        In most runs decode is the total, or stages add up to more than it; decode does not rise from nothing with its
        steps, or prefill rises with them; or a time is in another unit.
    """
    for problem in _problems(connection, settings):
        raise BuildError(f"{problem}; if that is how it is, insist with `--implausible` (implausible=True)")


def _problems(connection: duckdb.DuckDBPyConnection, settings: BuildConfig) -> Iterator[str]:
    field = {
        name: " + ".join(rule.alternatives[0]) if rule.alternatives else "a constant"
        for name, rule in settings.columns.items()
    }
    as_total = (
        f"if {field['decode_ms']} is the time of the whole run, say `--set columns.total_ms={field['decode_ms']}` "
        "and leave decode out"
    )
    ((n_sound,),) = connection.execute("SELECT count(*) FROM runs WHERE reason IS NULL").fetchall()
    one_in = 1 + n_sound // _SAMPLED
    sample = f"(SELECT * FROM runs WHERE reason IS NULL AND ({one_in} = 1 OR hash(run_hash) % {one_in} = 0))"
    n, prefill_ms, step_ms, n_totals, n_equal, n_beyond, n_one_pass, n_none, n_short = connection.execute(
        f"""
        SELECT
            count(*), median(prefill_ms),
            median(decode_ms / (output_tokens - 1)) FILTER (decodes),
            count(*) FILTER (totals),
            count(*) FILTER (totals AND abs(decode_ms - total_ms) <= {_TOLERANCE} * total_ms),
            count(*) FILTER (totals AND prefill_ms + decode_ms > {1 + _TOLERANCE} * total_ms),
            count(*) FILTER (one_pass),
            count(*) FILTER (one_pass AND decode_ms = 0),
            count(*) FILTER (prompt_tokens < vision_tokens + text_tokens)
        FROM (
            SELECT
                prefill_ms, decode_ms, total_ms, prompt_tokens, vision_tokens, text_tokens, output_tokens,
                one_pass,
                output_tokens >= 2 AND decode_ms > 0 AS decodes,
                output_tokens >= 2 AND total_given AND NOT one_pass AS totals
            FROM {sample}
        )
        """
    ).fetchall()[0]
    if not n:
        return
    if n_equal > _MOST * max(n_totals, _FEW):
        yield f"decode_ms is total_ms in {n_equal:,} of {n_totals:,} runs: {as_total}"
    if n_beyond > _MOST * max(n_totals, _FEW):
        yield (
            f"prefill_ms ({field['prefill_ms']}) and decode_ms ({field['decode_ms']}) add up to more than total_ms "
            f"({field['total_ms']}) in {n_beyond:,} of {n_totals:,} runs, so one of them is called by a wrong name: "
            f"{as_total}"
        )
    if n_none > _MOST * max(n_one_pass, _FEW):
        yield (
            f"prefill_ms ({field['prefill_ms']}) is total_ms ({field['total_ms']}) in {n_none:,} of {n_one_pass:,} "
            "runs, so that nothing is left to decode: prefill_ms is the time to the first token"
        )
    if n_short > _MOST * max(n, _FEW):
        yield (
            f"prompt_tokens ({field['prompt_tokens']}) are fewer than vision and text tokens together in {n_short:,} "
            f"of {n:,} runs: prompt_tokens counts both, such as `columns: {{prompt_tokens: [{field['vision_tokens']}, "
            f"{field['text_tokens']}]}}`"
        )
    if step_ms is not None:
        yield from _unit("a decode step", step_ms, _STEP_MS)
    yield from _unit("prefill", prefill_ms, _PREFILL_MS)
    if step_ms is not None and not _LEAST_RATIO <= prefill_ms / step_ms <= _MOST_RATIO:
        yield (
            f"prefill takes {prefill_ms:.3g} ms and a decode step {step_ms:.3g} ms at the median, which looks like two "
            "units: bring prefill_ms and decode_ms into one"
        )
    yield from _along_lengths(connection, sample, field, as_total)


def _unit(what: str, ms: float, limits_ms: tuple[float, float]) -> Iterator[str]:
    if _SEEN_MS[0] <= ms <= _SEEN_MS[1]:
        return
    units = {unit: ms * factor for unit, factor in TIME_UNITS_MS.items()}
    meant = next((unit for unit, held in units.items() if _SEEN_MS[0] <= held <= _SEEN_MS[1]), None)
    unit = f"if times are in {meant}, say so" if meant else "say which unit times are in (s, ms, us, ns)"
    said = f"{what} takes {ms:.3g} ms at the median: {unit}, `--set time_unit={meant or 's'}`"
    if limits_ms[0] <= ms <= limits_ms[1]:
        warnings.warn(said, LutestWarning, stacklevel=5)
    else:
        yield said


def _along_lengths(
    connection: duckdb.DuckDBPyConnection, sample: str, field: dict[str, str], as_total: str
) -> Iterator[str]:
    """How prefill and decode go with the number of steps, the median over configurations of enough lengths."""
    rows = connection.execute(
        f"""
        WITH ranked AS (
            SELECT
                key_id, device, model, output_tokens - 1 AS steps, decode_ms, prefill_ms,
                rank() OVER (PARTITION BY key_id, device, model ORDER BY prefill_ms) AS prefill_rank,
                rank() OVER (PARTITION BY key_id, device, model ORDER BY decode_ms) AS decode_rank,
                rank() OVER (PARTITION BY key_id, device, model ORDER BY output_tokens) AS steps_rank,
                rank() OVER (PARTITION BY key_id, device, model ORDER BY prompt_tokens) AS prompt_rank
            FROM {sample}
            WHERE output_tokens >= 2
        ),
        of_keys AS (
            SELECT
                count(*) AS n,
                corr(prefill_rank, steps_rank) AS prefill_rise,
                coalesce(corr(prefill_rank, prompt_rank), 0) AS prompt_rise,
                corr(decode_rank, steps_rank) AS decode_rise,
                regr_intercept(decode_ms, steps) AS at_none_ms,
                quantile_cont(steps, 0.9) / quantile_cont(steps, 0.1) AS spread,
                median(prefill_ms) AS prefill_ms, median(decode_ms) AS decode_ms
            FROM ranked
            GROUP BY key_id, device, model
            HAVING count(*) >= {_LEAST_RUNS} AND spread >= 1.25
        )
        SELECT
            sum(n), median(prefill_rise), median(prompt_rise), median(decode_rise),
            median(at_none_ms / prefill_ms) FILTER (spread >= 1.5),
            median(at_none_ms / decode_ms) FILTER (spread >= 1.5)
        FROM of_keys
        WHERE decode_ms > 0
        """
    ).fetchall()
    n, prefill_rise, prompt_rise, decode_rise, of_prefill, of_decode = rows[0]
    if n is None or n < _LEAST_JUDGED:
        return
    prefill, decode, output = field["prefill_ms"], field["decode_ms"], field["output_tokens"]
    if prefill_rise > max(_MOST_RISE, prompt_rise):
        yield (
            f"prefill_ms ({prefill}) rises with the number of output tokens ({output}; rank correlation "
            f"{prefill_rise:.2f}): it holds more than the time to the first token, or they are no output tokens"
        )
    if decode_rise < _LEAST_RISE:
        yield (
            f"decode_ms ({decode}) does not rise with the number of output tokens ({output}; rank correlation "
            f"{decode_rise:.2f}): one of the two is something else, such as a time per token, or tokens of the prompt"
        )
    if of_prefill is None:  # no configuration's lengths reach far enough
        return
    if of_prefill > _OFF or of_decode > _OFF:
        yield (
            f"decode_ms ({decode}) does not begin near 0 at one output token but at {of_prefill:.2g} of prefill_ms and "
            f"{of_decode:.2g} of its median: it holds prefill, or is a time per token; {as_total}"
        )
    if of_decode < -_OFF:
        yield (
            f"decode_ms ({decode}) would be below 0 at one output token: {output} counts more than what was "
            "generated, such as the prompt"
        )
