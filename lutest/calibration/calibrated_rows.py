"""Rows of the calibrated table: those of its parent, with the latencies mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pandas as pd

from lutest.calibration.maps import CALIBRATED, KeyMaps, mapped_figures
from lutest.reader.curves import key_pieces
from lutest.reader.figures import Curve, Figures, Key, TotalRatios
from lutest.reader.names import literal, quantile_column, quantile_suffix, quote
from lutest.tablefile.schema import TABLES

__all__ = ["write_calibrated_rows"]


def write_calibrated_rows(
    connection: duckdb.DuckDBPyConnection, parent: Path, figures: Figures, maps: Mapping[Key, KeyMaps]
) -> dict[str, str]:
    """Create a relation with the new rows of every table of the file but ``meta``.

    Sample sizes, output lengths, sources and rejected runs stay those of the profile that the shapes rest on. Minima,
    maxima and means are mapped as P50s are, standard deviations scaled; bounds of P95 are NULL.

    Parameters
    ----------
    connection : duckdb connection
        A work database.
    parent : Path
        The table file.
    figures : Figures
        What is in it.
    maps : mapping
        Configuration → its maps; every configuration of the table.

    Returns
    -------
    dict
        Table → relation.
    """
    relations = {name: f"calibrated_{name}" for name in TABLES if name != "meta"}
    connection.execute(f"ATTACH {literal(parent)} AS parent_table (READ_ONLY)")
    for name, relation in relations.items():
        connection.execute(f"CREATE TABLE {relation} AS SELECT * FROM parent_table.main.{quote(name)}")
    connection.execute("DETACH parent_table")
    _update_quantiles(connection, mapped_figures(figures, maps))
    _update_moments(connection, figures, maps)
    for name in ("prefill_curve", "decode_curve", "decode_total"):
        connection.execute(f"UPDATE calibrated_{name} SET source = ?", [CALIBRATED])
    return relations


def _update_quantiles(connection: duckdb.DuckDBPyConnection, mapped: Figures) -> None:
    names = [column.name for column in mapped.key_columns]
    columns = [quantile_column(q) for q in mapped.quantiles]
    ratios = [f"{quantile_suffix(q)}_ratio" for q in mapped.quantiles]
    correlations = [f"{quantile_suffix(q)}_correlation" for q in mapped.quantiles]
    median = mapped.quantiles.index(0.5)
    rows: dict[str, list[tuple[object, ...]]] = {name: [] for name in TABLES}
    for held in mapped.keys:
        rows["prefill"].append((*held.key, *held.prefill.quantiles_ms))
        rows["prefill_curve"] += _curve_rows(held.key, held.prefill_curve)
        rows["total"].append((*held.key, *held.correlations))
        if held.decode is None or held.decode_curve is None or held.decode_total is None:
            continue
        step = key_pieces(held, median).step
        assert step is not None
        rows["decode"].append((*held.key, *held.decode.quantiles_ms))
        curve = _curve_rows(held.key, held.decode_curve)
        rows["decode_curve"] += [(*row, total) for row, total in zip(curve, step.sums[1:], strict=True)]
        rows["decode_total"] += _ratio_rows(held.key, held.decode_total)
    for name, at, values in (
        ("prefill", [], columns),
        ("prefill_curve", ["prompt_tokens"], columns),
        ("decode", [], columns),
        ("decode_curve", ["kv_len"], [*columns, "p50_sum_ms"]),
        ("decode_total", ["decode_steps"], ratios),
        ("total", [], correlations),
    ):
        if rows[name]:
            _update(connection, f"calibrated_{name}", pd.DataFrame(rows[name], columns=[*names, *at, *values]), values)


def _curve_rows(key: Key, curve: Curve) -> list[tuple[object, ...]]:
    return [(*key, x, *values) for x, *values in zip(curve.at, *curve.values_ms, strict=True)]


def _ratio_rows(key: Key, totals: TotalRatios) -> list[tuple[object, ...]]:
    return [(*key, steps, *ratios) for steps, *ratios in zip(totals.decode_steps, *totals.ratios, strict=True)]


def _update_moments(connection: duckdb.DuckDBPyConnection, figures: Figures, maps: Mapping[Key, KeyMaps]) -> None:
    """Figures that are no quantiles: means and extremes are mapped as a P50 is, deviations scaled."""
    keys = [column.name for column in figures.key_columns]
    for name, stage, columns in (
        ("prefill", "prefill", ["mean_ms", "min_ms", "max_ms", "std_ms"]),
        ("decode", "decode_step", ["mean_ms", "std_ms"]),
    ):
        held = connection.execute(f"SELECT {', '.join(map(quote, keys + columns))} FROM calibrated_{name}").fetchall()
        rows = []
        for row in held:
            key, (*values_ms, deviation_ms) = row[: len(keys)], row[len(keys) :]
            stage_map = getattr(maps[key], stage)
            scaled = None if deviation_ms is None else stage_map.scale * deviation_ms
            rows.append((*key, *map(stage_map.p50_ms, values_ms), scaled))
        if rows:
            _update(connection, f"calibrated_{name}", pd.DataFrame(rows, columns=keys + columns), columns)
        connection.execute(f"UPDATE calibrated_{name} SET p95_upper_ms = NULL")


def _update(connection: duckdb.DuckDBPyConnection, relation: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Set columns to those of the frame where all the others are equal."""
    connection.register("mapped_frame", frame)
    changes = ", ".join(f"{quote(column)} = mapped.{quote(column)}" for column in columns)
    places = [quote(column) for column in frame.columns if column not in columns]
    same = " AND ".join(f"{relation}.{place} = mapped.{place}" for place in places)
    connection.execute(f"UPDATE {relation} SET {changes} FROM mapped_frame AS mapped WHERE {same}")
    connection.unregister("mapped_frame")
