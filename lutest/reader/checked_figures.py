"""Rows of the tables into figures, all checked: what is wrong is said here, never guessed at later."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NoReturn

from lutest.reader.errors import TableError
from lutest.reader.figures import (
    Curve,
    Figures,
    Key,
    KeyColumn,
    KeyFigures,
    Quality,
    Summary,
    TotalRatios,
    described_key,
)
from lutest.reader.names import KEY_COLUMNS, REBUILD, SCHEMA_VERSION, quantile_column, quantile_suffix

Row = tuple[Any, ...]
_TYPES = {("category", "VARCHAR"): str, ("number", "BIGINT"): int, ("number", "DOUBLE"): float}
_SOURCES = ("measured", "calibrated", "interpolated", "extrapolated")


def check_figures(path: str, rows: Callable[[str, Sequence[str]], list[Row]]) -> Figures:
    """Turn the rows of a table into figures.

    Parameters
    ----------
    path : str
        The file, for messages.
    rows : callable
        Called with the name of a table and of columns of it: its rows, in any order, with those columns.

    Returns
    -------
    Figures

    Raises
    ------
    TableError
        Not a whole and sound table of this version: naming the file, table, configuration and value.
    """
    return _Checker(path, rows).figures()


class _Checker:
    """The tables of one file, turned into figures one after the other."""

    def __init__(self, path: str, rows: Callable[[str, Sequence[str]], list[Row]]) -> None:
        self.path, self.rows = path, rows
        self.key_columns: tuple[KeyColumn, ...] = ()
        self.meta = self.read_meta()
        self.quantiles = self.read_quantiles()
        self.key_columns = self.read_key_columns()
        self.suffixes = [quantile_suffix(q) for q in self.quantiles]

    def figures(self) -> Figures:
        columns = ("n", "p95_upper_ms", "mean_ms", *map(quantile_column, self.quantiles))
        prompts = ("prompt_tokens_p50", "prompt_tokens_min", "prompt_tokens_max")
        prefill = self.one_per_key("prefill", (*prompts, "vision_tokens_p50", *columns))
        decode = self.one_per_key("decode", ("n_steps", *columns))
        if not prefill:
            self.fail("prefill", None, "holds no configuration")
        prefill_curves = self.curves("prefill_curve", "prompt_tokens", 0)
        decode_curves = self.curves("decode_curve", "kv_len", 1)
        ratios = {key: TotalRatios(*curve[:3]) for key, curve in self.knots("decode_total", "decode_steps", 1, "ratio")}
        correlations = self.one_per_key("total", [f"{suffix}_correlation" for suffix in self.suffixes])
        for table, held, others in (
            ("prefill_curve", prefill_curves, prefill),
            ("decode_curve", decode_curves, decode),
            ("decode_total", ratios, decode),
            ("total", correlations, {key: None for key in prefill if key in decode or key in correlations}),
            ("decode", decode, {key: None for key in decode if key in prefill}),
        ):
            for key in sorted(others.keys() - held.keys()):
                self.fail(table, key, "has no rows, but rows in the tables beside it")
            for key in sorted(held.keys() - others.keys()):
                self.fail(table, key, "has rows, but none in the tables beside it")
        mixed = self.mixed()
        keys = [
            KeyFigures(
                key=key,
                prefill=self.summary("prefill", key, row[4:]),
                prompt_tokens_p50=self.count("prefill", key, prompts[0], row[0], 0),
                prompt_tokens_min=self.count("prefill", key, prompts[1], row[1], 0),
                prompt_tokens_max=self.count("prefill", key, prompts[2], row[2], row[1]),
                vision_tokens_p50=row[3] and self.count("prefill", key, "vision_tokens_p50", row[3], 0),
                prefill_curve=prefill_curves[key],
                decode=self.summary("decode", key, decode[key][1:]) if key in decode else None,
                n_decode_steps=self.count("decode", key, "n_steps", decode[key][0], 1) if key in decode else 0,
                decode_curve=decode_curves.get(key),
                decode_total=ratios.get(key),
                correlations=self.correlations(key, correlations.get(key)),
                source="calibrated" if "calibrated" in prefill_curves[key].source else "measured",
                mixed=mixed,
            )
            for key, row in sorted(prefill.items())
        ]
        lengths, qualities = self.output_lengths(), self.qualities()
        return Figures(self.quantiles, self.key_columns, tuple(keys), lengths, qualities, self.meta)

    def fail(self, table: str, key: Key | None, problem: str) -> NoReturn:
        at = f", {described_key(self.key_columns, key)}" if key else ""
        raise TableError(f"{self.path}: table {table}{at}: {problem}; {REBUILD}")

    def read_meta(self) -> dict[str, str]:
        meta = {self.text("meta", "key", key): value for key, value in self.rows("meta", ("key", "value"))}
        for key, value in meta.items():
            self.text("meta", f"value of {key!r}", value)
        version = meta.get("schema_version")
        if version != str(SCHEMA_VERSION):
            found = "no schema version" if version is None else f"schema version {version}"
            raise TableError(
                f"{self.path}: has {found}, this lutest reads version {SCHEMA_VERSION}; "
                f"{REBUILD} of this version, or install the one that wrote it"
            )
        return meta

    def json(self, name: str, sound: Callable[[Any], Any], wanted: str) -> Any:
        """What `sound` makes of a row of meta; an error where that is nothing."""
        text = self.meta.get(name, "")
        try:
            found = sound(json.loads(text))
        except (AttributeError, TypeError, ValueError):
            found = None
        if not found:
            self.fail("meta", None, f"{name} is {text!r}, not {wanted}")
        return found

    def read_quantiles(self) -> tuple[float, ...]:
        def sound(levels: Any) -> Any:
            ordered = levels == sorted(set(levels)) and all(type(q) is float and 0.0 < q < 1.0 for q in levels)
            return ordered and {0.5, 0.95} <= set(levels) and tuple(levels)

        quantiles: tuple[float, ...] = self.json(
            "quantiles", sound, "an increasing list between 0 and 1 with 0.5 and 0.95"
        )
        return quantiles

    def read_key_columns(self) -> tuple[KeyColumn, ...]:
        def sound(given: Any) -> Any:
            columns = tuple(KeyColumn(**column) for column in given)
            names = {column.name for column in columns if type(column.name) is str}
            return len(columns) == len(names) <= 8 and {column[1:] for column in columns} <= _TYPES.keys() and columns

        wanted = "one to eight columns with name, kind and type"
        columns: tuple[KeyColumn, ...] = self.json(KEY_COLUMNS, sound, wanted)
        return columns

    def mixed(self) -> str:
        def sound(held: Any) -> str:
            return "; ".join(f"{name} {', '.join(values)}" for name, values in held.items())

        found: str = self.json("mixed", sound, "lists of models and devices") if "mixed" in self.meta else ""
        return found

    def grouped(self, table: str, columns: Sequence[str]) -> Iterator[tuple[Key, list[Row]]]:
        """Rows per configuration, ordered by the first of the columns."""
        width = len(self.key_columns)
        rows = self.rows(table, (*(column.name for column in self.key_columns), *columns))
        for row in rows:
            for column, value in zip(self.key_columns, row, strict=False):
                if type(value) is not _TYPES[column[1:]] or value != value or value in (math.inf, -math.inf):
                    self.fail(table, None, f"{column.name} of the configuration {row[:width]!r} is no {column.kind}")
            if row[width] is None:
                self.fail(table, row[:width], f"{columns[0]} is NULL")
        rows.sort(key=lambda row: row[: width + 1])
        for key, group in groupby(rows, key=lambda row: row[:width]):
            yield key, [row[width:] for row in group]

    def one_per_key(self, table: str, columns: Sequence[str]) -> dict[Key, Row]:
        held = {}
        # a key column once more in front: any of the others may be NULL
        for key, rows in self.grouped(table, (self.key_columns[0].name, *columns)):
            if len(rows) > 1:
                self.fail(table, key, f"has {len(rows)} rows, not one")
            held[key] = rows[0][1:]
        return held

    def curves(self, table: str, at: str, least: int) -> dict[Key, Curve]:
        return {key: Curve(*columns) for key, columns in self.knots(table, at, least, "ms")}

    def knots(self, table: str, at: str, least: int, unit: str) -> Iterator[tuple[Key, tuple[Any, ...]]]:
        """Of every configuration: knots, values by quantile and knot, sample sizes and sources."""
        for key, rows in self.grouped(table, (at, "n", "source", *(f"{suffix}_{unit}" for suffix in self.suffixes))):
            before = least - 1
            for x, n, source, *values in rows:
                if type(x) is not int or x <= before:
                    knots = f"knots are whole numbers from {least} on, increasing"
                    self.fail(table, key, f"knot {x!r} after {before}: {knots}")
                self.count(table, key, f"at {x}: n", n, 0)
                if source not in _SOURCES:
                    self.fail(table, key, f"at {x}: source is {source!r}, not one of {', '.join(_SOURCES)}")
                self.ordered(table, key, f"at {x}: ", values, unit)
                before = x
            columns = list(zip(*rows, strict=True))
            yield key, (columns[0], tuple(columns[3:]), columns[1], columns[2])

    def summary(self, table: str, key: Key, row: Row) -> Summary:
        n, upper, mean, *values = row
        self.count(table, key, "n", n, 1)
        self.ordered(table, key, "", values, "ms")
        for name, value in (("mean_ms", mean), *((("p95_upper_ms", upper),) if upper is not None else ())):
            if type(value) is not float or not 0.0 < value < math.inf:
                self.fail(table, key, f"{name} is {value!r}, not finite and above 0")
        return Summary(n, tuple(values), upper, mean)

    def correlations(self, key: Key, row: Row | None) -> tuple[float, ...]:
        held = []
        for suffix, q, value in zip(self.suffixes, self.quantiles, row or (0.0,) * len(self.quantiles), strict=True):
            number = 0.0 if value is None and q == 0.5 else value  # the median has no deviations to combine
            if type(number) is not float or not 0.0 <= number <= 1.0:
                self.fail("total", key, f"{suffix}_correlation is {value!r}, not between 0 and 1")
            held.append(number)
        return tuple(held)

    def count(self, table: str, key: Key | None, name: str, value: Any, least: int) -> int:
        if type(value) is not int or value < least:
            self.fail(table, key, f"{name} is {value!r}, not a whole number from {least} on")
        return value

    def text(self, table: str, name: str, value: Any) -> str:
        if type(value) is not str:
            self.fail(table, None, f"{name} is {value!r}, not text")
        return value

    def ordered(self, table: str, key: Key, where: str, values: Sequence[Any], unit: str) -> None:
        before = 0.0
        for suffix, value in zip(self.suffixes, values, strict=True):
            if type(value) is not float or not 0.0 < value < math.inf:
                self.fail(table, key, f"{where}{suffix}_{unit} is {value!r}, not finite and above 0")
            if value < before:
                self.fail(table, key, f"{where}{suffix}_{unit} is {value!r}, below the quantile before it, {before!r}")
            before = value

    def output_lengths(self) -> dict[str, tuple[tuple[int, int], ...]]:
        lengths: dict[str, dict[int, int]] = {}
        for workload, tokens, n in self.rows("output_length", ("workload", "output_tokens", "n")):
            held = lengths.setdefault(self.text("output_length", "workload", workload), {})
            for name, value in (("output_tokens", tokens), ("n", n)):
                self.count("output_length", None, f"workload {workload!r}: {name}", value, 1)
            if tokens in held:
                self.fail("output_length", None, f"workload {workload!r} holds {tokens} tokens twice")
            held[tokens] = n
        return {workload: tuple(sorted(lengths[workload].items())) for workload in sorted(lengths)}

    def qualities(self) -> tuple[Quality, ...]:
        held = []
        names = ("accuracy", "accuracy_lower", "accuracy_upper")
        for key, rows in self.grouped("quality", ("workload", "n", *names)):
            for workload, n, *values in rows:
                self.count("quality", key, "n", n, 1)
                self.text("quality", "workload", workload)
                for name, value in zip(names, values, strict=True):
                    missing = value is None and name != "accuracy"
                    if not missing and (type(value) is not float or not math.isfinite(value)):
                        self.fail("quality", key, f"{name} is {value!r}, not finite")
                held.append(Quality(key, workload, n, *values))
        return tuple(held)
