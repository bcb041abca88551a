"""Raw fields into canonical runs, and the structural checks that a run must pass."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from lutest.reader.figures import KeyColumn
from lutest.reader.names import literal, quote
from lutest.runs.configuration import COUNTED, BuildConfig, ColumnRule
from lutest.runs.sources.run_rows import SourceFields, field_column

MAX_MS = 1e9  # 11 days: beyond it a value is a broken clock
MIN_MS = 1e-6  # a nanosecond: no clock tells less
MAX_TOKENS = 1e9
MAX_KEY = 1e15  # whole numbers up to it are exact
LEAST_TIMES = 8  # of a source that its tick is told by
TICKS_MS = (1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # that clocks, and those who write times down, have
_TIMES = ("prefill_ms", "decode_ms", "total_ms")
_TOKENS = ("prompt_tokens", "output_tokens", "vision_tokens", "text_tokens")
_NUMBERS = (*_TOKENS, *_TIMES, "accuracy")
# Seconds or milliseconds of the epoch, or a date and time; what is neither is not known.
_STARTED_MS = """coalesce(
    TRY_CAST(started_text AS DOUBLE) * CASE WHEN abs(TRY_CAST(started_text AS DOUBLE)) < 1e11 THEN 1e3 ELSE 1 END,
    epoch_ms(TRY_CAST(started_text AS TIMESTAMP))
)::DOUBLE"""
_REQUIRED = ("prompt_tokens", "output_tokens", "prefill_ms")
_TOLD_BY = ("prompt_tokens", "output_tokens", "prefill_ms", "decode_ms", "total_ms")
_TEXTS = ("workload", "sample_id", "device", "model")


def raw_fields(columns: dict[str, ColumnRule], extra: Sequence[str] = ()) -> SourceFields:
    """The raw fields that a mapping needs: scalars, with others to look at, and those that may hold lists of steps."""
    scalars: dict[str, None] = {}
    for name, rule in columns.items():
        if name != "decode_steps_ms":
            scalars.update((field, None) for fields in rule.alternatives for field in fields)
    known = {name.lower() for name in scalars}
    steps = tuple(field for fields in columns["decode_steps_ms"].alternatives for field in fields)
    return SourceFields((*scalars, *(name for name in extra if name.lower() not in known)), steps)


def write_runs(
    connection: duckdb.DuckDBPyConnection, settings: BuildConfig, *, with_steps: bool = True
) -> tuple[KeyColumn, ...]:
    """Create ``runs``, ``run_steps`` and ``keys``.

    ``runs`` has one row a run: its key columns, canonical columns, and ``reason`` and ``detail`` where a check failed.
    ``run_steps`` is a view of the steps of timed runs, which stand in ``runs`` as well where that is asked for.
    ``keys`` has the configurations of sound runs in order, with their ``key_id``, by which ``runs`` names them.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``raw_runs`` and ``source_files``.
    settings : BuildConfig
        What the key is, where columns come from, and the unit of the sources' times.
    with_steps : bool
        Whether ``runs`` has the columns ``decode_steps_ms`` and ``step_positions``.

    Returns
    -------
    tuple of KeyColumn
        The key columns, each of the kind that was given or that its values have.
    """
    columns, unit = settings.columns, repr(settings.milliseconds)
    key = _key_columns(connection, settings)
    names = [column.name for column in key]
    numbers = list(dict.fromkeys([*_NUMBERS, *(column.name for column in key if column.kind == "number")]))
    texts = dict.fromkeys([*numbers, *names, *_TEXTS])
    scale = {name: f" * {unit}" if name in _TIMES else "" for name in numbers}
    read = [f"{column_text(columns[name])} AS {_text(name)}" for name in texts]
    read += [f"{_number(columns[name])}{scale[name]} AS {_value(name)}" for name in numbers]
    kept = [f"{_key_value(column)} AS {quote(column.name)}" for column in key]
    kept += [f"{_text(name)} AS {name}" for name in _TEXTS if name not in names]
    kept += [f"TRY_CAST({_value(name)} AS BIGINT) AS {name}" for name in _TOKENS if name not in names]
    kept.append(f"{_STARTED_MS} AS started_ms")
    read.append(f"{column_text(columns['started_ms'])} AS started_text")
    hashed = [_value(name) if kind == "number" else f"length({_text(name)}), {_text(name)}" for name, kind, _ in key]
    scaled = "steps" if settings.milliseconds == 1.0 else f"[step * {unit} FOR step IN steps]"
    steps, hashed_steps = "", ""
    if with_steps:
        steps = "CASE WHEN timed THEN steps END AS decode_steps_ms,"
        steps += " CASE WHEN timed THEN step_positions END AS step_positions,"
        hashed_steps = ", CASE WHEN timed THEN steps END::VARCHAR"
    _write_ticks(connection, columns, unit)
    connection.execute(
        f"""
        CREATE OR REPLACE VIEW run_steps AS
        SELECT source_id, "row", {scaled} AS decode_steps_ms, step_positions FROM raw_runs WHERE len(steps) > 0
        """
    )
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE runs AS
        WITH as_read AS (
            SELECT
                source_id, "row", problem, steps_problem, step_positions,
                {scaled} AS steps,
                coalesce(len(steps), 0) > 0 AS timed,
                {", ".join(read)}
            FROM raw_runs
        ),
        measured AS (
            SELECT
                as_read.* REPLACE (coalesce(workload_text, source_files.folder, 'default') AS workload_text),
                total_ms_value - prefill_ms_value AS after_prefill_ms,
                coalesce(tick_ms, 0) AS tick_ms,
                decode_ms_text IS NULL AND steps IS NULL AND output_tokens_value >= 2
                    AND after_prefill_ms IS NOT NULL AS one_pass
            FROM as_read JOIN source_files USING (source_id) LEFT JOIN ticks USING (source_id)
        ),
        completed AS (
            SELECT
                * REPLACE (
                    CASE
                        WHEN decode_ms_text IS NOT NULL THEN decode_ms_value
                        WHEN output_tokens_value = 1 THEN 0.0
                        WHEN step_positions IS NULL AND timed THEN list_sum(steps)
                        -- a clock that ticked no more, or once less, between two readings
                        WHEN one_pass AND after_prefill_ms BETWEEN -1.001 * tick_ms AND 0 THEN 0.0
                        WHEN one_pass THEN after_prefill_ms
                    END AS decode_ms_value
                )
            FROM measured
        ),
        judged AS (
            SELECT
                * REPLACE (
                    CASE WHEN one_pass AND decode_ms_value = 0 THEN prefill_ms_value ELSE total_ms_value END
                        AS total_ms_value
                ),
                CASE {" ".join(_verdicts(columns, key))} END AS verdict
            FROM completed
        )
        SELECT
            source_id,
            "row",
            NULL::INTEGER AS key_id,
            {", ".join(kept)},
            prefill_ms_value AS prefill_ms,
            decode_ms_value AS decode_ms,
            coalesce(total_ms_value, prefill_ms_value + decode_ms_value) AS total_ms,
            total_ms_value IS NOT NULL AS total_given,
            {steps}
            timed,
            one_pass,
            NOT timed AND output_tokens_value >= 2 AND decode_ms_value = 0 AS clamped,
            accuracy_value AS accuracy,
            verdict.reason AS reason,
            -- on one line, whatever stood in the field
            regexp_replace(verdict.detail, '[\\p{{Cc}}\\p{{Zl}}\\p{{Zp}}]+', ' ', 'g') AS detail,
            -- lengths before texts, and a mark for NULL: no value can pass for the one beside it
            concat_ws(
                '|', {", ".join(hashed)},
                coalesce(length(sample_id_text) || ':' || sample_id_text, '-'),
                prompt_tokens_value, output_tokens_value, prefill_ms_value, decode_ms_value,
                coalesce(total_ms_value::VARCHAR, '-'), coalesce(accuracy_value::VARCHAR, '-'){hashed_steps}
            ) AS run_text,
            md5(run_text) AS run_hash
        FROM judged
        """
    )
    if not with_steps:
        _tell_apart(connection, names)
    connection.execute("ALTER TABLE runs DROP COLUMN run_text")
    listed = ", ".join(quote(name) for name in names)
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE keys AS
        SELECT (row_number() OVER (ORDER BY {listed}) - 1)::INTEGER AS key_id, {listed}
        FROM (SELECT DISTINCT {listed} FROM runs WHERE reason IS NULL)
        """
    )
    same = " AND ".join(f"runs.{quote(name)} = keys.{quote(name)}" for name in names)
    connection.execute(f"UPDATE runs SET key_id = keys.key_id FROM keys WHERE {same}")
    return key


def _tell_apart(connection: duckdb.DuckDBPyConnection, key_names: Sequence[str]) -> None:
    """Hash the steps of timed runs that no time or length tells apart: their text is long, and few are such."""
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE alike_runs AS
        SELECT source_id, "row", run_text
        FROM (
            SELECT *, count(*) OVER (
                PARTITION BY {", ".join(map(quote, dict.fromkeys((*key_names, *_TOLD_BY))))}
            ) > 1 AS alike
            FROM runs
            WHERE reason IS NULL
        )
        WHERE timed AND alike
        """
    )
    if connection.execute("SELECT 1 FROM alike_runs LIMIT 1").fetchone():
        connection.execute(
            """
            UPDATE runs SET run_hash = told.run_hash
            FROM (
                SELECT source_id, "row", md5(concat_ws('|', run_text, decode_steps_ms::VARCHAR)) AS run_hash
                FROM run_steps JOIN alike_runs USING (source_id, "row")
            ) AS told
            WHERE runs.source_id = told.source_id AND runs."row" = told."row"
            """
        )


def _key_columns(connection: duckdb.DuckDBPyConnection, settings: BuildConfig) -> tuple[KeyColumn, ...]:
    """Key columns, each of the kind that was given, or a number where every value given is one."""
    described = []
    for name, kind in settings.key:
        counted = connection.execute(
            f"""
            SELECT count(value), count(*) FILTER (abs(number) <= {MAX_KEY!r}),
                coalesce(bool_and(number = floor(number)) FILTER (abs(number) <= {MAX_KEY!r}), true)
            FROM (
                SELECT nullif({column_text(settings.columns[name])}, '') AS value, TRY_CAST(value AS DOUBLE) AS number
                FROM raw_runs WHERE problem IS NULL
            )
            WHERE number IS NULL OR NOT isnan(number)
            """
        ).fetchone()
        assert counted is not None
        n, n_numbers, whole = counted
        if kind == "category" or (kind is None and n_numbers < n):
            described.append(KeyColumn(name, "category", "VARCHAR"))
        else:
            described.append(KeyColumn(name, "number", "BIGINT" if whole or name in COUNTED else "DOUBLE"))
    return tuple(described)


def _write_ticks(connection: duckdb.DuckDBPyConnection, columns: dict[str, ColumnRule], unit: str) -> None:
    """Create ``ticks``: the coarsest tick that all times of a source fall on, where decode times are told by them."""
    prefill, total = _number(columns["prefill_ms"]), _number(columns["total_ms"])
    falls = "bool_and(abs(time_ms - round(time_ms / {0!r}) * {0!r}) <= 1e-9 * (1 + time_ms))"
    cases = " ".join(f"WHEN {falls.format(tick)} THEN {tick!r}" for tick in TICKS_MS)
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE ticks AS
        WITH times AS (
            SELECT source_id, unnest([{prefill}, {total}]) * {unit} AS time_ms
            FROM raw_runs
            WHERE {column_text(columns["decode_ms"])} IS NULL AND {total} IS NOT NULL
        )
        SELECT source_id, CASE {cases} ELSE 0 END AS tick_ms
        FROM times WHERE isfinite(time_ms)
        GROUP BY source_id
        HAVING count(*) >= {LEAST_TIMES}  -- fewer may all be round by chance
        """
    )


def _text(name: str) -> str:
    return quote(f"{name}_text")


def _value(name: str) -> str:
    return quote(f"{name}_value")


def _key_value(column: KeyColumn) -> str:
    """Value of a key column as the file has it; NULL where it cannot be one."""
    if column.kind == "category":
        return f"CASE WHEN lower({_text(column.name)}) NOT IN ('', 'nan') THEN {_text(column.name)} END"
    value = _value(column.name)
    whole = f" AND {value} = floor({value})" if column.type == "BIGINT" else ""
    return f"CASE WHEN abs({value}) <= {MAX_KEY!r}{whole} THEN ({value} + 0.0)::{column.type} END"  # no -0.0


def _case(rule: ColumnRule, joined: str, cast: bool) -> str:
    branches = []
    for fields in rule.alternatives:
        cells = [quote(field_column(field)) for field in fields]
        present = " AND ".join(f"{cell} IS NOT NULL" for cell in cells)
        branches.append(f"WHEN {present} THEN {joined.join(f'TRY_CAST({c} AS DOUBLE)' if cast else c for c in cells)}")
    return f"CASE {' '.join(branches)} END"


def column_text(rule: ColumnRule) -> str:
    """Expression for what a column says in ``raw_runs``, as text."""
    return literal(rule.constant) if rule.constant is not None else _case(rule, " || ' + ' || ", cast=False)


def _number(rule: ColumnRule) -> str:
    if rule.constant is not None:
        return f"TRY_CAST({literal(rule.constant)} AS DOUBLE)"
    return _case(rule, " + ", cast=True)


def _verdict(condition: str, reason: str, detail: str) -> str:
    return f"WHEN {condition} THEN struct_pack(reason := '{reason}', detail := {detail})"


def _verdicts(columns: dict[str, ColumnRule], key: Sequence[KeyColumn]) -> list[str]:
    """Checks in the order in which they are told: the first that fails names the reason."""

    def wanted(name: str) -> str:
        return " or ".join(" + ".join(fields) for fields in columns[name].alternatives)

    def because(name: str, fault: str) -> str:
        shown = f"left({_text(name)}, 60)"
        if name == "decode_ms":
            difference = "CASE WHEN one_pass THEN 'total_ms less prefill_ms: ' || decode_ms_value END"
            shown = f"coalesce({shown}, {difference}, 'the sum of its steps')"
        return f"{literal(f'{name} is ')} || {shown} || {literal(fault)}"

    checks = [_verdict("problem IS NOT NULL", "unreadable_row", "problem")]
    names = [column.name for column in key]
    for name in dict.fromkeys((*names, *_REQUIRED)):
        missing = f"{_text(name)} IS NULL OR {_text(name)} = ''"
        checks.append(_verdict(missing, "missing_value", literal(f"no {name}: wants {wanted(name)}")))
    axes = [column.name for column in key if column.kind == "number"]
    checks += [
        _verdict(f"lower({_text(name)}) = 'nan'", "missing_value", because(name, ", which is no name"))
        for name in names
        if name not in axes
    ]
    for name in dict.fromkeys((*axes, *_NUMBERS)):
        value = _value(name)
        not_a_number = f"{_text(name)} IS NOT NULL AND {value} IS NULL"
        checks.append(_verdict(not_a_number, "not_a_number", because(name, ", not a number")))
        checks.append(_verdict(f"NOT isfinite({value})", "not_finite", because(name, ", not a finite number")))
        counted = name in (*_TOKENS, *COUNTED)
        limit = MAX_MS if name in _TIMES else MAX_TOKENS if counted or name == "accuracy" else MAX_KEY
        if counted or name in _TIMES:
            checks.append(_verdict(f"{value} < 0", "negative_value", because(name, ", below 0")))
        checks.append(_verdict(f"abs({value}) > {limit!r}", "out_of_range", because(name, f", beyond {limit:g}")))
        if name in _TIMES:
            least = because(name, f", between 0 and {MIN_MS:g} ms")
            checks.append(_verdict(f"{value} > 0 AND {value} < {MIN_MS!r}", "out_of_range", least))
        if counted:
            checks.append(_verdict(f"{value} <> floor({value})", "not_whole", because(name, ", not a whole number")))
        if name in COUNTED:
            checks.append(_verdict(f"{value} < 1", "out_of_range", because(name, ", below 1")))
    step_count = "coalesce(list_max(step_positions), len(steps))"
    checks += [
        _verdict("output_tokens_value < 1", "no_output_tokens", because("output_tokens", ": a run has at least 1")),
        _verdict("prefill_ms_value = 0", "zero_prefill", "'prefill_ms is 0: clamped or never measured'"),
        _verdict("total_ms_value = 0", "zero_total", "'total_ms is 0: clamped or never measured'"),
        _verdict("steps_problem IS NOT NULL", "bad_steps", "steps_problem"),
        _verdict(
            "decode_ms_value IS NULL",
            "missing_value",
            literal(f"no decode_ms: wants {wanted('decode_ms')}, or decode_steps_ms: {wanted('decode_steps_ms')}"),
        ),
        _verdict(
            "timed AND len(list_distinct(step_positions)) <> list_max(step_positions)",
            "bad_steps",
            "'a position before the last one has no step'",
        ),
        _verdict(
            f"timed AND {step_count} <> output_tokens_value - 1",
            "step_count_mismatch",
            f"{step_count} || ' steps for ' || output_tokens_value::BIGINT || ' output tokens, which take one less'",
        ),
        *(
            _verdict(f"timed AND {condition}", reason, literal(f"a decode step is {fault}") + shown)
            for condition, reason, fault, shown in (
                ("NOT (isfinite(list_min(steps)) AND isfinite(list_max(steps)))", "not_finite", "not finite", ""),
                ("list_min(steps) < 0", "negative_value", "below 0: ", " || list_min(steps)"),
                ("list_min(steps) = 0", "zero_step", "0: clamped or never measured", ""),
                (f"list_min(steps) < {MIN_MS!r}", "out_of_range", f"below {MIN_MS:g} ms: ", " || list_min(steps)"),
                (f"list_max(steps) > {MAX_MS!r}", "out_of_range", f"above {MAX_MS:g} ms: ", " || list_max(steps)"),
            )
        ),
    ]
    return checks
