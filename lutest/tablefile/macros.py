"""Views and macros of the file: the reader's arithmetic for SQL users."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import duckdb

from lutest.reader.figures import REACH, KeyColumn
from lutest.reader.names import literal, quantile_suffix, quote
from lutest.reader.over_lengths import levels_of
from lutest.reader.search import BUDGET_QUANTILE

ESTIMATE_QUANTILE = 0.5  # as in the verbs of an entry
PREFILL_SHARE = 0.8  # as in LatencyTable.feasible

# kind, name, definition and comment of a view or macro
Object = tuple[str, str, str, str]


def write_macros(
    connection: duckdb.DuckDBPyConnection, quantiles: Sequence[float], key_columns: Sequence[KeyColumn]
) -> None:
    """Create the views and macros, each with its comment, in the database in use.

    Parameters
    ----------
    connection : duckdb connection
        The tables of the file exist in its current database.
    quantiles : sequence of float
        Levels that the table holds.
    key_columns : sequence of KeyColumn
        What its configurations are made of.

    Notes
    -----
    Inside a macro, a column named like a parameter is ambiguous to DuckDB, within the views that it reads as well.
    So an estimate takes its parameters into a row ``x`` of its own, which it joins with views that rename the key
    columns and qualify every column that they read.

    DuckDB 1.2 takes values of parameters with defaults by name alone. So estimates, whose last arguments may be left
    out, are there once per number of arguments; searches have named parameters.
    """
    sql = _Sql(tuple(quantiles), tuple(key_columns))
    for kind, name, definition, comment in (*sql.views(), *sql.estimates(), *sql.searches()):
        connection.execute(f"CREATE OR REPLACE {kind.split()[0]} {name}{definition}")
        connection.execute(f"COMMENT ON {kind} {name} IS {literal(comment)}")


@dataclass(frozen=True)
class _Sql:
    """The SQL of one table's views and macros."""

    quantiles: tuple[float, ...]
    key_columns: tuple[KeyColumn, ...]

    @property
    def keys(self) -> list[str]:
        return [quote(column.name) for column in self.key_columns]

    @property
    def suffixes(self) -> list[str]:
        return [quantile_suffix(q) for q in self.quantiles]

    def of(self, alias: str) -> str:
        return ", ".join(f"{alias}.{key}" for key in self.keys)

    def renamed(self, alias: str) -> str:
        return ", ".join(f"{alias}.{key} AS key_{i}" for i, key in enumerate(self.keys, 1))

    def numbered(self, alias: str) -> str:
        return ", ".join(f"{alias}.key_{i}" for i in range(1, len(self.keys) + 1))

    def same(self, one: str, other: str) -> str:
        return " AND ".join(f"{one}.key_{i} = {other}.key_{i}" for i in range(1, len(self.keys) + 1))

    # views

    def views(self) -> list[Object]:
        own = ", ".join(f"o.{suffix}_ms, 0.0" for suffix in self.suffixes)
        alike = " AND ".join(f"c.{key} = o.{key}" for key in self.keys)
        rank = f"SELECT 1 + bool_or(c.source = 'calibrated')::INTEGER FROM prefill_curve AS c WHERE {alike}"
        own = f"{self.renamed('o')}, NULL, NULL, NULL, {own}, ({rank}), NULL"
        all_prompts = f" UNION ALL SELECT {own} FROM prefill AS o"
        prefill = self._segments("prefill_curve", "prompt_tokens", "ms", carries_on=True) + all_prompts
        decode = self._segments("decode_curve", "kv_len", "ms", "c.p50_sum_ms AS sum_start", carries_on=True)
        ratio = self._segments("decode_total", "decode_steps", "ratio", carries_on=False)
        held = "value at the start and slope, per quantile"
        return [
            ("VIEW", "prefill_segments", prefill, f"Segments of prefill_curve: {held}; no start: all prompts together"),
            ("VIEW", "decode_segments", decode, f"Segments of decode_curve: {held}"),
            ("VIEW", "ratio_segments", ratio, f"Segments of decode_total: {held}"),
            ("VIEW", "key_figures", self._key_figures(), "Median prompt length and correlations per configuration"),
            ("VIEW", "key_values", self._key_values(), "The values of each configuration, a row each"),
            ("VIEW", "lengths", _LENGTHS, "Runs per output length; no workload: all together"),
            ("VIEW", "configs", self._configs(), "One wide row per configuration"),
        ]

    def _segments(self, table: str, place: str, unit: str, *extra: str, carries_on: bool) -> str:
        """One row per segment [first_at, stop) of a piecewise-linear curve; the last one has no stop."""
        columns, last, rank = [], "0", f"list_position({_SOURCES}, c.source)"
        for suffix in self.suffixes:
            value = f"c.{suffix}_{unit}"
            before = f"({value} - lag({value}) OVER along) / (c.{place} - lag(c.{place}) OVER along)"
            after = f"(lead({value}) OVER along - {value}) / (lead(c.{place}) OVER along - c.{place})"
            if carries_on:  # of the quantiles below it at least, so that they never cross
                last = f"greatest(coalesce({before}, 0), {last})"
            columns += [f"{value} AS {suffix}_start", f"coalesce({after}, {last}) AS {suffix}_slope"]
        return f""" AS
            SELECT
                {self.renamed("c")},
                CASE WHEN lag(c.{place}) OVER along IS NULL THEN 0 ELSE c.{place} END AS first_at,
                c.{place} AS start,
                lead(c.{place}) OVER along AS stop,
                {", ".join(columns)},
                {rank} AS rank,
                lead({rank}) OVER along AS stop_rank{"".join(f", {column}" for column in extra)}
            FROM {table} AS c
            WINDOW along AS (PARTITION BY {self.of("c")} ORDER BY c.{place})
        """

    def _key_figures(self) -> str:
        return f""" AS
            SELECT {self.renamed("p")}, p.prompt_tokens_p50 AS median_prompt, p.vision_tokens_p50 AS own_vision,
                {", ".join(f"coalesce(t.{s}_correlation, 0) AS {s}_correlation" for s in self.suffixes)}
            FROM prefill AS p LEFT JOIN total AS t ON {" AND ".join(f"t.{key} = p.{key}" for key in self.keys)}
        """

    def _key_values(self) -> str:
        return " AS " + " UNION ALL ".join(
            f"SELECT {self.renamed('p')}, {i} AS place, {literal(column.name)} AS name, p.{key}::VARCHAR AS value,"
            f" {f'p.{key}::DOUBLE' if column.kind == 'number' else 'NULL::DOUBLE'} AS number FROM prefill AS p"
            for i, (column, key) in enumerate(zip(self.key_columns, self.keys, strict=True), 1)
        )

    def _configs(self) -> str:
        prefill = ", ".join(f"p.{suffix}_ms AS prefill_{suffix}_ms" for suffix in self.suffixes)
        decode = ", ".join(f"d.{suffix}_ms AS decode_step_{suffix}_ms" for suffix in self.suffixes)
        return f""" AS
            SELECT
                {self.of("p")}, p.n,
                {prefill}, p.p95_upper_ms AS prefill_p95_upper_ms,
                p.prompt_tokens_min, p.prompt_tokens_p50, p.prompt_tokens_max,
                {decode}, d.p95_upper_ms AS decode_step_p95_upper_ms,
                d.n AS n_decode_runs, d.n_steps AS n_decode_steps, d.n_clamped
            FROM prefill AS p
            LEFT JOIN decode AS d ON {" AND ".join(f"d.{key} = p.{key}" for key in self.keys)}
            ORDER BY {self.of("p")}
        """

    # what estimates are made of

    def _asked(self, **asked: str) -> str:
        """The row of what was asked for."""
        columns = [f"{key} AS key_{i}" for i, key in enumerate(self.keys, 1)]
        return f"(SELECT {', '.join([*columns, *(f'{value} AS {name}' for name, value in asked.items())])}) AS x"

    def _known(self, *aliases: str, tokens: str = "x.tokens") -> str:
        """Joins of ``x`` with the segments that hold what is asked for."""
        prompt = "coalesce(x.prompt, k.median_prompt)"
        holding = {
            "k": ("key_figures", "true"),
            "p": (
                "prefill_segments",
                f"CASE WHEN x.prompt IS NULL THEN p.start IS NULL ELSE {_holds('p', 'x.prompt')} END",
            ),
            "s": ("decode_segments", _holds("s", "x.kv_len")),
            "a": ("decode_segments", _holds("a", prompt)),
            "b": ("decode_segments", _holds("b", f"{prompt} + {tokens} - 1")),
            "r": ("ratio_segments", _holds("r", f"{tokens} - 1")),
        }
        joins = [(alias, *holding[alias]) for alias in aliases]
        return " ".join(f"LEFT JOIN {view} AS {alias} ON {self.same(alias, 'x')} AND {on}" for alias, view, on in joins)

    def _steps_ms(self, tokens: str = "x.tokens") -> str:
        """Sum of the P50 steps of a run."""
        prompt = "coalesce(x.prompt, k.median_prompt)"
        return f"{_sum_to('b', f'({prompt} + {tokens} - 1)')} - {_sum_to('a', prompt)}"

    def _at_level(self, expression: Callable[[str], str]) -> str:
        """What the expression is at the level that is asked for."""
        branches = " ".join(
            f"WHEN {q!r} THEN {expression(suffix)}" for q, suffix in zip(self.quantiles, self.suffixes, strict=True)
        )
        held = ", ".join(f"{q:g}" for q in self.quantiles)
        return f"CASE x.level {branches} ELSE error('this table holds q = {held}, not q = ' || x.level) END"

    # estimates

    def estimates(self) -> list[Object]:
        q = {"q": repr(ESTIMATE_QUANTILE)}
        run = ("prompt_tokens", "output_tokens")
        of_runs = {"prompt_tokens": "NULL", "workload": "NULL"}
        within = "Probability that a total keeps to a budget, over the output lengths of a workload, or of all together"
        mean = "Mean of prefill + decode over the output lengths of a workload, or of all together, ms"
        return [
            ("MACRO", "normal_share", _NORMAL_SHARE, "Share of a normal distribution below a score"),
            *self._estimate("prefill_ms", ("prompt_tokens",), q, self._prefill_ms(), "Quantile q of prefill, ms"),
            *self._estimate("decode_step_ms", ("kv_len",), q, self._step_ms(), "Quantile q of a decode step, ms"),
            *self._estimate("decode_ms", run, q, self._decode_ms(), "Quantile q of all after the first token, ms"),
            *self._estimate("total_ms", run, q, self._total_ms(), "Quantile q of prefill + decode, ms"),
            *self._estimate("p_within", ("budget_ms",), of_runs, self._p_within(), within),
            *self._estimate("expected_total_ms", (), of_runs, self._expected_total_ms(), mean),
            *self._estimate("source_at", run, {}, self._source_at(), "What a total rests on, of the words in source"),
            (
                "MACRO",
                "known",
                _KNOWN,
                "The value; an error where it is NULL, as estimates of unknown configurations are",
            ),
        ]

    def _estimate(
        self, name: str, required: Sequence[str], optional: Mapping[str, str], answer: str, comment: str
    ) -> Iterator[Object]:
        """A macro of the key and what is required; then again with forms that leave out the last arguments."""
        parameters = ", ".join([*self.keys, *required, *optional])
        definition = f"({parameters}) AS ({answer})"
        yield "MACRO", name, definition, comment
        for given in range(len(optional)):
            names = [*self.keys, *required, *list(optional)[:given]]
            values = ", ".join([*names, *list(optional.values())[given:]])
            definition += f", ({', '.join(names)}) AS {name}({values})"
        yield "MACRO", name, definition, comment

    def _prefill_ms(self) -> str:
        x = self._asked(prompt="prompt_tokens", level="q")
        return f"SELECT {self._at_level(lambda s: _at('p', s, 'x.prompt'))} FROM {x} {self._known('p')}"

    def _step_ms(self) -> str:
        x = self._asked(kv_len="kv_len", level="q")
        return f"SELECT {self._at_level(lambda s: _at('s', s, 'x.kv_len'))} FROM {x} {self._known('s')}"

    def _decode_ms(self) -> str:
        x = self._asked(prompt="prompt_tokens", tokens="output_tokens", level="q")
        ratio = self._at_level(lambda s: _at("r", s, "(x.tokens - 1)"))
        value = f"CASE WHEN x.tokens = 1 THEN 0.0 ELSE ({self._steps_ms()}) * ({ratio}) END"
        return f"SELECT {value} FROM {x} {self._known('k', 'a', 'b', 'r')}"

    def _total_ms(self) -> str:
        x = self._asked(prompt="prompt_tokens", tokens="output_tokens", level="q")
        parts = {
            "tokens": "x.tokens",
            "side": "CASE WHEN x.level < 0.5 THEN -1 ELSE 1 END",
            "steps_ms": self._steps_ms(),
            "prefill_p50": _at("p", "p50", "x.prompt"),
            "prefill_q": self._at_level(lambda s: _at("p", s, "x.prompt")),
            "ratio_p50": _at("r", "p50", "(x.tokens - 1)"),
            "ratio_q": self._at_level(lambda s: _at("r", s, "(x.tokens - 1)")),
            "correlation": self._at_level(lambda s: f"k.{s}_correlation"),
        }
        total = _total("prefill_q", "ratio_q", "correlation", "t.side")
        return f"SELECT {total} FROM ({_select(parts)} FROM {x} {self._known('k', 'p', 'a', 'b', 'r')}) AS t"

    def _source_at(self) -> str:
        """The worst source of the knots that a total rests on, beyond the outermost of them extrapolated."""
        x = self._asked(prompt="prompt_tokens", tokens="output_tokens")
        low, high = "coalesce(x.prompt, k.median_prompt) + 1", "coalesce(x.prompt, k.median_prompt) + x.tokens - 1"
        on_the_way = f"{self.same('s', 'x')} AND s.first_at <= {high} AND (s.stop > {low} OR s.stop IS NULL)"
        outside = "x.tokens - 1 < r.start OR (r.stop IS NULL AND r.first_at > 0 AND x.tokens - 1 > r.start)"
        return f"""
            SELECT ({_SOURCES})[max(w.rank)] FROM (
                SELECT {_worst("p", "x.prompt", "x.prompt")} AS rank FROM {x} {self._known("p")}
                UNION ALL
                SELECT {_worst("s", low, high)} FROM {x} {self._known("k")} JOIN decode_segments AS s ON {on_the_way}
                WHERE x.tokens > 1
                UNION ALL
                SELECT CASE WHEN {outside} THEN 4 END FROM {x} {self._known("r")} WHERE x.tokens > 1
            ) AS w
        """

    def _over_lengths(self, **asked: str) -> str:
        """A row per output length, ``w``: its runs, what was asked, and totals at the levels, which do not fall."""
        x = self._asked(prompt="prompt_tokens", of_workload="workload", **asked)
        parts = {
            **{name: f"x.{name}" for name in asked},
            "n_runs": "l.n_runs",
            "tokens": "l.tokens",
            "steps_ms": self._steps_ms("l.tokens"),
        }
        totals: dict[str, str] = {}
        for q, s in zip(self.quantiles, self.suffixes, strict=True):
            parts[f"prefill_{s}"] = _at("p", s, "x.prompt")
            parts[f"ratio_{s}"] = _at("r", s, "(l.tokens - 1)")
            parts[f"correlation_{s}"] = f"k.{s}_correlation"
            total = _total(f"prefill_{s}", f"ratio_{s}", f"correlation_{s}", "1" if q >= 0.5 else "-1")
            totals[f"{s}_ms"] = f"greatest({', '.join([*totals.values(), total])})" if totals else total
        lengths = "JOIN lengths AS l ON l.of_workload IS NOT DISTINCT FROM x.of_workload"
        known = self._known("k", "p", "a", "b", "r", tokens="l.tokens")
        held = {name: f"t.{name}" for name in (*asked, "n_runs", "tokens")}
        # grouped, each length by itself, so that DuckDB works the parts out once and not wherever they stand
        grouped = {name: f"any_value({value})" for name, value in parts.items()}
        rows = f"{_select(grouped)} FROM {x} {lengths} {known} GROUP BY l.tokens"
        return f"({_select({**held, **totals})} FROM ({rows}) AS t) AS w"

    def _mean(self, value: str, rows: str) -> str:
        """Mean of a value over the runs of rows; NULL where one of them is."""
        missing = "'the table holds no output lengths of workload ' || coalesce(workload, 'any')"
        return f"""
            SELECT CASE
                WHEN count(*) = 0 THEN error({missing})
                WHEN count(m.value) = count(*) THEN sum(m.n_runs * m.value) / sum(m.n_runs)
            END
            FROM (SELECT w.n_runs, {value} AS value FROM {rows}) AS m
        """

    def _p_within(self) -> str:
        levels = levels_of(self.quantiles)
        lines = []
        for (low, low_score), (high, high_score) in pairwise(zip(self.suffixes, levels.scores, strict=True)):
            slope = f"({high_score!r} - {low_score!r}) / (w.{high}_ms - w.{low}_ms)"
            lines.append(f"""
                WHEN w.budget < w.{high}_ms OR {high == self.suffixes[-1]} THEN
                    CASE
                        WHEN w.{low}_ms < w.{high}_ms THEN {low_score!r} + (w.budget - w.{low}_ms) * {slope}
                        WHEN w.budget < w.{low}_ms THEN {-2 * levels.outermost!r}
                        WHEN w.budget >= w.{low}_ms THEN {levels.outermost!r}
                    END""")
        totals = self._over_lengths(budget="budget_ms")
        # grouped for the same reason
        score = f"any_value(w.n_runs) AS n_runs, any_value(CASE {''.join(lines)} END) AS score"
        scores = f"(SELECT {score} FROM {totals} GROUP BY w.tokens) AS w"
        within = f"""
            CASE
                WHEN w.score >= {levels.outermost!r} THEN 1
                WHEN w.score < {-levels.outermost!r} THEN 0
                ELSE normal_share(w.score)
            END
        """
        return self._mean(within, scores)

    def _expected_total_ms(self) -> str:
        weights = levels_of(self.quantiles).weights
        mean = " + ".join(f"{weight!r} * w.{s}_ms" for weight, s in zip(weights, self.suffixes, strict=True))
        # the line of two levels is symmetric about the median
        return self._mean(mean if len(weights) > 2 else "w.p50_ms", self._over_lengths())

    # searches

    def searches(self) -> list[Object]:
        defaults = (
            f"prompt_tokens := NULL, output_tokens := NULL, prefill_share := {PREFILL_SHARE!r}, q := NULL"
            ", margin := 0.0, prompt_tokens_by := NULL, text_tokens := NULL, p_at_least := NULL"
            ', "by" := NULL, workload := NULL'
        )
        parameters = f"(budget_ms, {defaults}) AS TABLE"
        passed_on = ", ".join("{0} := {0}".format(default.split(" := ")[0]) for default in defaults.split(", "))
        fits = (
            "Configurations that fit a budget: prefill its share of it; given output_tokens, the total at q; over the "
            "table's output lengths, the total with probability p_at_least, or its mean: by := 'expected'"
        )
        best = "The feasible configuration of the highest accuracy on a workload; of equals, the fastest"
        lengths = "Prompt length of a request per configuration"
        return [
            ("MACRO TABLE", "prompt_lengths", self._prompt_lengths(), lengths),
            ("MACRO TABLE", "feasible", parameters + self._feasible(), fits),
            ("MACRO TABLE", "best", parameters + self._best(f"feasible(budget_ms, {passed_on})"), best),
        ]

    def _prompt_lengths(self) -> str:
        names = ", ".join(column.name for column in self.key_columns)
        nowhere = literal(f"prompt_tokens_by maps values of none of the key columns {names}")
        name_one = literal(", of which name one, as in MAP {'users': MAP {1: 150}}")
        matches = "CASE WHEN v.number IS NULL THEN v.value = g.value ELSE v.number = TRY_CAST(g.value AS DOUBLE) END"
        return f"""(prompt_tokens, prompt_tokens_by, text_tokens) AS TABLE
            WITH by_column AS (
                SELECT unnest(map_entries(TRY_CAST(prompt_tokens_by AS MAP(VARCHAR, MAP(VARCHAR, VARCHAR))))) AS pair
            ),
            given AS (
                SELECT b.name, b.pair.key AS value, b.pair.value AS tokens
                FROM (SELECT c.pair.key AS name, unnest(map_entries(c.pair.value)) AS pair FROM by_column AS c) AS b
                UNION ALL
                SELECT NULL, d.pair.key, d.pair.value
                FROM (SELECT unnest(map_entries(CAST(prompt_tokens_by AS MAP(VARCHAR, VARCHAR)))) AS pair) AS d
                WHERE NOT EXISTS (SELECT 1 FROM by_column AS c WHERE c.pair.value IS NOT NULL)
            ),
            found AS (
                SELECT
                    count(DISTINCT v.place) AS n,
                    min(v.place) AS place,
                    string_agg(DISTINCT v.name, ' and ' ORDER BY v.name) AS names
                FROM key_values AS v JOIN given AS g ON {matches} AND coalesce(g.name, v.name) = v.name
            )
            SELECT
                {self.numbered("v")},
                CASE
                    WHEN (prompt_tokens IS NOT NULL)::INTEGER + (prompt_tokens_by IS NOT NULL)::INTEGER
                        + (text_tokens IS NOT NULL)::INTEGER > 1
                        THEN error('give one of prompt_tokens, prompt_tokens_by and text_tokens')
                    WHEN text_tokens IS NOT NULL AND k.own_vision IS NULL
                        THEN error('the runs do not hold vision and text tokens apart: give prompt_tokens')
                    WHEN text_tokens IS NOT NULL THEN k.own_vision + text_tokens
                    WHEN prompt_tokens_by IS NULL THEN prompt_tokens
                    WHEN f.n = 0 THEN error({nowhere})
                    WHEN f.n > 1 THEN error('prompt_tokens_by maps values of ' || f.names || {name_one})
                    WHEN TRY_CAST(g.tokens AS BIGINT) IS NULL THEN
                        error('prompt_tokens_by has no whole number for ' || v.name || ' = ' || v.value)
                    ELSE TRY_CAST(g.tokens AS BIGINT)
                END AS prompt
            FROM key_values AS v
            JOIN found AS f ON v.place = coalesce(f.place, 1)
            JOIN key_figures AS k ON {self.same("k", "v")}
            LEFT JOIN given AS g ON {matches}
        """

    def _feasible(self) -> str:
        key = self.numbered("r")
        level = f"coalesce(q, {BUDGET_QUANTILE!r})"
        excluding = literal("allowed is one of p_at_least, by := 'expected', and q with or without output_tokens")
        return f"""
            WITH r AS MATERIALIZED (SELECT p.* FROM prompt_lengths(prompt_tokens, prompt_tokens_by, text_tokens) AS p)
            SELECT c.*, a.latency_ms, source_at({self.of("c")}, a.prompt, coalesce(output_tokens, 1)) AS source
            FROM configs AS c
            JOIN (
                SELECT
                    {key}, r.prompt, prefill_ms({key}, r.prompt, {level}) AS latency_ms,
                    prefill_share * budget_ms AS limit_ms
                FROM r WHERE output_tokens IS NULL AND p_at_least IS NULL AND "by" IS NULL
                UNION ALL
                SELECT {key}, r.prompt, total_ms({key}, r.prompt, output_tokens, {level}), budget_ms
                FROM r WHERE output_tokens IS NOT NULL
                UNION ALL
                SELECT {key}, r.prompt, expected_total_ms({key}, r.prompt, workload), budget_ms
                FROM r WHERE "by" IS NOT NULL
                UNION ALL
                SELECT
                    {key},
                    r.prompt,
                    expected_total_ms({key}, r.prompt, workload),
                    CASE
                        WHEN p_within({key}, budget_ms / (1 + margin), r.prompt, workload) >= p_at_least
                        THEN 'inf'::DOUBLE
                    END
                FROM r WHERE p_at_least IS NOT NULL
            ) AS a ON {" AND ".join(f"a.key_{i} = c.{name}" for i, name in enumerate(self.keys, 1))}
            WHERE
                CASE
                    WHEN "by" <> 'expected' THEN error('by is ' || "by" || '; allowed: expected')
                    WHEN NOT (p_at_least > 0 AND p_at_least < 1) THEN
                        error('p_at_least is ' || p_at_least || '; allowed: above 0 and below 1')
                    WHEN (p_at_least IS NOT NULL)::INTEGER + ("by" IS NOT NULL)::INTEGER
                        + (q IS NOT NULL OR output_tokens IS NOT NULL)::INTEGER > 1 THEN error({excluding})
                    ELSE a.latency_ms * (1 + margin) <= a.limit_ms
                        AND (a.prompt IS NULL
                            OR a.prompt BETWEEN c.prompt_tokens_min / {REACH} AND c.prompt_tokens_max * {REACH})
                END
            ORDER BY {self.of("c")}
        """

    def _best(self, feasible: str) -> str:
        return f"""
            SELECT f.*, s.accuracy, s.workload
            FROM {feasible} AS f
            CROSS JOIN (
                SELECT
                    count(DISTINCT w.workload) AS n,
                    string_agg(DISTINCT w.workload, ', ' ORDER BY w.workload) AS names,
                    coalesce(workload, min(w.workload)) AS chosen,
                    bool_or(w.workload = workload) AS held
                FROM quality AS w
            ) AS v
            LEFT JOIN quality AS s
                ON s.workload = v.chosen AND {" AND ".join(f"s.{name} = f.{name}" for name in self.keys)}
            WHERE
                CASE
                    WHEN v.n = 0 THEN error('the table holds no accuracy: build from runs with a column accuracy')
                    WHEN workload IS NULL AND v.n > 1 THEN error('whose accuracy? name a workload: ' || v.names)
                    WHEN NOT v.held THEN error('no accuracy on the workload ' || workload || '; allowed: ' || v.names)
                    ELSE s.accuracy IS NOT NULL
                END
            ORDER BY s.accuracy DESC, f.latency_ms, {self.of("f")}
            LIMIT 1
        """


_SOURCES = "['measured', 'calibrated', 'interpolated', 'extrapolated']"  # by rank
_KNOWN = """(value) AS
    CASE
        WHEN value IS NULL THEN error(
            'NULL: not a configuration of this table, or nothing is known of it there; it has '
            || (
                SELECT string_agg(h.name || ' ' || h.held, '; ' ORDER BY h.place)
                FROM (
                    SELECT v.place, v.name, string_agg(DISTINCT v.value, ', ' ORDER BY v.value) AS held
                    FROM key_values AS v GROUP BY v.place, v.name
                ) AS h
            )
        )
        ELSE value
    END
"""


def _worst(alias: str, low: str, high: str) -> str:
    """Rank of the worst source of what holds on low … high within a segment."""
    before, after = f"{alias}.first_at = 0 AND {low} < {alias}.start", f"{high} > {alias}.start"
    return (
        f"greatest({alias}.rank, CASE WHEN {after} THEN coalesce({alias}.stop_rank, 4) ELSE 1 END, "
        f"CASE WHEN {before} THEN 4 ELSE 1 END)"
    )


def _select(columns: Mapping[str, str]) -> str:
    return "SELECT " + ", ".join(f"{value} AS {name}" for name, value in columns.items())


def _holds(alias: str, place: str) -> str:
    """Whether a segment holds a place."""
    return f"{alias}.first_at <= {place} AND ({place} < {alias}.stop OR {alias}.stop IS NULL)"


def _at(alias: str, suffix: str, place: str) -> str:
    """Value at a place of the segment that holds it: before the first knot, that of the knot."""
    return f"{alias}.{suffix}_start + greatest({place} - {alias}.start, 0) * {alias}.{suffix}_slope"


def _sum_to(alias: str, place: str) -> str:
    """Sum of the P50 curve over 1 … place: from the knot on an arithmetic series, before the first knot a constant."""
    after = f"({place} - {alias}.start)"
    return f"""
        CASE
            WHEN {after} < 0 THEN {place} * {alias}.p50_start
            ELSE {alias}.sum_start + {after} * {alias}.p50_start + {alias}.p50_slope * {after} * ({after} + 1) / 2
        END
    """


def _total(prefill_q: str, ratio_q: str, correlation: str, sign: str) -> str:
    """The total of parts ``t``: the P50s, and the deviations of prefill and decode combined."""
    prefill, decode = f"abs(t.{prefill_q} - t.prefill_p50)", f"abs(t.steps_ms * (t.{ratio_q} - t.ratio_p50))"
    return f"""
        CASE
            WHEN t.tokens = 1 THEN t.{prefill_q}
            ELSE t.prefill_p50 + t.steps_ms * t.ratio_p50
                + {sign} * sqrt(pow({prefill}, 2) + pow({decode}, 2) + 2 * t.{correlation} * {prefill} * {decode})
        END
    """


_LENGTHS = """ AS
    SELECT o.workload AS of_workload, o.output_tokens AS tokens, o.n AS n_runs FROM output_length AS o
    UNION ALL
    SELECT NULL, o.output_tokens, sum(o.n) FROM output_length AS o GROUP BY o.output_tokens
"""


# Hart et al. (1968), Computer Approximations, no. 5666, as in West (2005), Wilmott Magazine, May, 70-76: to 1e-15 for
# scores within 7
_HART_ABOVE = (
    3.52624965998911e-02, 0.700383064443688, 6.37396220353165, 33.912866078383, 112.079291497871, 221.213596169931,
    220.206867912376,
)  # fmt: skip
_HART_BELOW = (
    8.83883476483184e-02, 1.75566716318264, 16.064177579207, 86.7807322029461, 296.564248779674, 637.333633378831,
    793.826512519948, 440.413735824752,
)  # fmt: skip


def _polynomial(coefficients: Sequence[float]) -> str:
    """By Horner's rule, of the score without its sign."""
    return reduce(lambda held, following: f"({held} * abs(score) + {following})", (f"{c!r}e0" for c in coefficients))


_NORMAL_SHARE = f"""(score) AS
    CASE WHEN score > 0 THEN 1 ELSE 0 END
    + CASE WHEN score > 0 THEN -1 ELSE 1 END
    * exp(-0.5 * score * score) * {_polynomial(_HART_ABOVE)} / {_polynomial(_HART_BELOW)}
"""
