"""Rows of the tables into figures, all checked: what is wrong is said here, never guessed at later."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

__all__ = ["Row", "check_figures"]

Row = tuple[Any, ...]
Keys = Mapping[Key, object]

_TYPES = {"VARCHAR": str, "BIGINT": int, "DOUBLE": float}
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
        self.path = path
        self.rows = rows
        self.key_columns: tuple[KeyColumn, ...] = ()

    def figures(self) -> Figures:
        meta = self.meta()
        self.quantiles = self.levels(meta)
        self.key_columns = self.columns_of_keys(meta)
        mixed = self.mixed(meta)
        self.median = self.quantiles.index(0.5)
        self.latencies = [quantile_column(q) for q in self.quantiles]
        columns = ("n", "p95_upper_ms", "mean_ms", *self.latencies)
        prefill = self.one_per_key("prefill", ("prompt_tokens_p50", *columns))
        decode = self.one_per_key("decode", ("n_steps", *columns))
        if not prefill:
            self.fail("prefill", None, "holds no configuration")
        prefill_curves = {
            key: self.curve("prefill_curve", key, rows, 0)
            for key, rows in self.curve_rows("prefill_curve", "prompt_tokens")
        }
        decode_curves = {
            key: self.curve("decode_curve", key, rows, 1)
            for key, rows in self.curve_rows("decode_curve", "kv_len", "p50_sum_ms")
        }
        ratio_columns = [f"{quantile_suffix(q)}_ratio" for q in self.quantiles]
        totals = dict(self.grouped("decode_total", ("decode_steps", "n", *ratio_columns)))
        ratios = {key: self.ratios(key, rows) for key, rows in totals.items()}
        correlation_columns = [f"{quantile_suffix(q)}_correlation" for q in self.quantiles]
        correlations = self.one_per_key("total", correlation_columns)
        self.whole(prefill, prefill_curves, decode, decode_curves, ratios, correlations)
        keys = [
            KeyFigures(
                key=key,
                prefill=self.summary("prefill", key, row[1:]),
                prompt_tokens_p50=self.count("prefill", key, "prompt_tokens_p50", row[0], 0),
                prefill_curve=prefill_curves[key],
                decode=self.summary("decode", key, decode[key][1:]) if key in decode else None,
                n_decode_steps=self.count("decode", key, "n_steps", decode[key][0], 1) if key in decode else 0,
                decode_curve=decode_curves.get(key),
                decode_total=ratios.get(key),
                correlations=self.correlations(key, correlations.get(key)),
                mixed=mixed,
                source="calibrated" if "calibrated" in prefill_curves[key].source else "measured",
            )
            for key, row in prefill.items()
        ]
        keys.sort(key=lambda held: held.key)
        return Figures(self.quantiles, self.key_columns, tuple(keys), self.output_lengths(), self.qualities(), meta)

    def whole(self, prefill: Keys, prefill_curves: Keys, decode: Keys, curves: Keys, ratios: Keys, total: Keys) -> None:
        """Check that a configuration that is in one table is in all others that it belongs to."""
        decode_parts = {"decode_curve": curves, "decode_total": ratios}
        for table, held in {"prefill_curve": prefill_curves, "decode": decode, **decode_parts, "total": total}.items():
            for key in sorted(held.keys() - prefill.keys()):
                self.fail(table, key, "is not in prefill")
        for key in sorted(prefill.keys() - prefill_curves.keys()):
            self.fail("prefill_curve", key, "has no rows")
        for table, held in {**decode_parts, "total": total}.items():
            for key in sorted(decode.keys() - held.keys()):
                self.fail(table, key, "has no rows, but rows in decode")
        for table, held in decode_parts.items():
            for key in sorted(held.keys() - decode.keys()):
                self.fail("decode", key, f"has no rows, but rows in {table}")

    def fail(self, table: str, key: Key | None, problem: str) -> NoReturn:
        at = f", {described_key(self.key_columns, key)}" if key else ""
        raise TableError(f"{self.path}: table {table}{at}: {problem}; {REBUILD}")

    def meta(self) -> dict[str, str]:
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

    def levels(self, meta: dict[str, str]) -> tuple[float, ...]:
        text = meta.get("quantiles", "")
        try:
            levels = json.loads(text)
        except ValueError:
            levels = None
        if not (
            isinstance(levels, list)
            and all(type(q) is float and 0.0 < q < 1.0 for q in levels)
            and {0.5, 0.95} <= set(levels)
            and levels == sorted(set(levels))
        ):
            self.fail("meta", None, f"quantiles is {text!r}, not an increasing list between 0 and 1 with 0.5 and 0.95")
        return tuple(levels)

    def columns_of_keys(self, meta: dict[str, str]) -> tuple[KeyColumn, ...]:
        text = meta.get(KEY_COLUMNS, "")
        try:
            columns = tuple(KeyColumn(**column) for column in json.loads(text))
        except (TypeError, ValueError):
            columns = ()
        sound = {("category", "VARCHAR"), ("number", "BIGINT"), ("number", "DOUBLE")}
        names = {column.name for column in columns if type(column.name) is str}
        if not 1 <= len(columns) == len(names) <= 8 or not {column[1:] for column in columns} <= sound:
            self.fail("meta", None, f"{KEY_COLUMNS} is {text!r}, not one to eight columns with name, kind and type")
        return columns

    def mixed(self, meta: dict[str, str]) -> str:
        text = meta.get("mixed")
        if text is None:
            return ""
        try:
            return "; ".join(f"{name} {', '.join(values)}" for name, values in json.loads(text).items())
        except (AttributeError, TypeError, ValueError):
            self.fail("meta", None, f"mixed is {text!r}, not lists of models and devices")

    def grouped(self, table: str, columns: Sequence[str]) -> Iterator[tuple[Key, list[Row]]]:
        """Rows per configuration, ordered by the first of the columns."""
        width = len(self.key_columns)
        rows = self.rows(table, (*(column.name for column in self.key_columns), *columns))
        for row in rows:
            for column, value in zip(self.key_columns, row, strict=False):
                sound = type(value) is _TYPES[column.type] and (type(value) is not float or math.isfinite(value))
                if not sound:
                    self.fail(table, None, f"{column.name} of the configuration {row[:width]!r} is no {column.kind}")
            if columns and row[width] is None:
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

    def curve_rows(self, table: str, at: str, *others: str) -> Iterator[tuple[Key, list[Row]]]:
        return self.grouped(table, (at, "n", "source", *others, *self.latencies))

    def curve(self, table: str, key: Key, rows: list[Row], least: int) -> Curve:
        first = len(rows[0]) - len(self.quantiles)
        self.knots(table, key, [row[0] for row in rows], least)
        for row in rows:
            where = f"at {row[0]}: "
            self.count(table, key, f"{where}n", row[1], 0)
            if row[2] not in _SOURCES:
                self.fail(table, key, f"{where}source is {row[2]!r}, not one of {', '.join(_SOURCES)}")
            self.ordered(table, key, where, row[first:])
        columns = list(zip(*rows, strict=True))
        curve = Curve(columns[0], tuple(columns[first:]), columns[1], columns[2])
        if first == 4:
            self.sums(table, key, curve, columns[3])
        return curve

    def sums(self, table: str, key: Key, curve: Curve, held: Sequence[Any]) -> None:
        values = curve.values_ms[self.median]
        expected = values[0] * curve.at[0]
        for j, (x, stored) in enumerate(zip(curve.at, held, strict=True)):
            if j:
                steps = x - curve.at[j - 1]
                slope = (values[j] - values[j - 1]) / steps
                expected += steps * values[j - 1] + slope * (steps * (steps + 1) / 2)
            if type(stored) is not float or not math.isclose(stored, expected, rel_tol=1e-9):
                self.fail(table, key, f"at {x}: p50_sum_ms is {stored!r}, but its curve sums up to {expected!r}")

    def ratios(self, key: Key, rows: list[Row]) -> TotalRatios:
        self.knots("decode_total", key, [row[0] for row in rows], 1)
        for row in rows:
            self.count("decode_total", key, f"at {row[0]}: n", row[1], 0)
            self.ordered("decode_total", key, f"at {row[0]}: ", row[2:], "ratio")
        columns = list(zip(*rows, strict=True))
        return TotalRatios(columns[0], tuple(columns[2:]), columns[1])

    def summary(self, table: str, key: Key, row: Row) -> Summary:
        n, upper, mean, *values = row
        self.count(table, key, "n", n, 1)
        self.ordered(table, key, "", values)
        for name, value in (("mean_ms", mean), *((("p95_upper_ms", upper),) if upper is not None else ())):
            if type(value) is not float or not 0.0 < value < math.inf:
                self.fail(table, key, f"{name} is {value!r}, not finite and above 0")
        return Summary(n, tuple(values), upper, mean)

    def correlations(self, key: Key, row: Row | None) -> tuple[float, ...]:
        if row is None:
            return (0.0,) * len(self.quantiles)
        held = []
        for q, value in zip(self.quantiles, row, strict=True):
            number = 0.0 if value is None and q == 0.5 else value  # the median has no deviations to combine
            if type(number) is not float or not 0.0 <= number <= 1.0:
                self.fail("total", key, f"{quantile_suffix(q)}_correlation is {value!r}, not between 0 and 1")
            held.append(number)
        return tuple(held)

    def knots(self, table: str, key: Key, at: list[Any], least: int) -> None:
        before = least - 1
        for x in at:
            if type(x) is not int or x <= before:
                self.fail(table, key, f"knot {x!r} after {before}: knots are whole numbers from {least} on, increasing")
            before = x

    def count(self, table: str, key: Key | None, name: str, value: Any, least: int) -> int:
        if type(value) is not int or value < least:
            self.fail(table, key, f"{name} is {value!r}, not a whole number from {least} on")
        return value

    def text(self, table: str, name: str, value: Any) -> str:
        if type(value) is not str:
            self.fail(table, None, f"{name} is {value!r}, not text")
        return value

    def ordered(self, table: str, key: Key, where: str, values: Sequence[Any], what: str = "ms") -> None:
        before = 0.0
        for q, value in zip(self.quantiles, values, strict=True):
            name = f"{where}{quantile_suffix(q)}_{what}"
            if type(value) is not float or not 0.0 < value < math.inf:
                self.fail(table, key, f"{name} is {value!r}, not finite and above 0")
            if value < before:
                self.fail(table, key, f"{name} is {value!r}, below the quantile before it, {before!r}")
            before = value

    def output_lengths(self) -> dict[str, tuple[tuple[int, int], ...]]:
        rows = self.rows("output_length", ("workload", "output_tokens", "n"))
        lengths: dict[str, list[tuple[int, int]]] = {}
        for workload, tokens, n in rows:
            pair = tuple(
                self.count("output_length", None, f"workload {workload!r}: {name}", value, 1)
                for name, value in (("output_tokens", tokens), ("n", n))
            )
            lengths.setdefault(self.text("output_length", "workload", workload), []).append((pair[0], pair[1]))
        for workload, pairs in lengths.items():
            pairs.sort()
            if len({tokens for tokens, _ in pairs}) < len(pairs):
                self.fail("output_length", None, f"workload {workload!r} holds a number of tokens twice")
        return {workload: tuple(lengths[workload]) for workload in sorted(lengths)}

    def qualities(self) -> tuple[Quality, ...]:
        columns = ("workload", "n", "accuracy", "accuracy_lower", "accuracy_upper")
        held = []
        for key, rows in self.grouped("quality", columns):
            for workload, n, accuracy, lower, upper in rows:
                self.count("quality", key, "n", n, 1)
                self.text("quality", "workload", workload)
                for name, value in (("accuracy", accuracy), ("accuracy_lower", lower), ("accuracy_upper", upper)):
                    missing = value is None and name != "accuracy"
                    if not missing and (type(value) is not float or not math.isfinite(value)):
                        self.fail("quality", key, f"{name} is {value!r}, not finite")
                held.append(Quality(key, workload, n, accuracy, lower, upper))
        return tuple(held)
