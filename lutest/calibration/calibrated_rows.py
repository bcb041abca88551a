"""Rows of the calibrated table: those of its parent, with the latencies mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import pandas as pd

from lutest.calibration.maps import CALIBRATED, KeyMaps, StageMap, mapped_figures, mapped_quantiles
from lutest.reader.curves import key_pieces
from lutest.reader.figures import Curve, Figures, Key, TotalRatios
from lutest.reader.names import KEY_COLUMNS, quantile_column, quantile_suffix, quote
from lutest.tablefile.schema import TABLES

__all__ = ["write_calibrated_rows"]

_KEYS = list(KEY_COLUMNS)


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
    quoted = str(parent).replace("'", "''")
    connection.execute(f"ATTACH '{quoted}' AS parent_table (READ_ONLY)")
    for name, relation in relations.items():
        connection.execute(f"CREATE TABLE {relation} AS SELECT * FROM parent_table.main.{quote(name)}")
    connection.execute("DETACH parent_table")
    _update_quantiles(connection, mapped_figures(figures, maps))
    _update_stages(connection, maps)
    for name, stage in (("prefill_bins", "prefill"), ("decode_bins", "decode_step")):
        _update_bins(connection, name, {key: getattr(held, stage) for key, held in maps.items()}, figures.quantiles)
    for name in ("prefill_curve", "decode_curve", "decode_total"):
        connection.execute(f"UPDATE calibrated_{name} SET source = ?", [CALIBRATED])
    return relations


def _update_quantiles(connection: duckdb.DuckDBPyConnection, mapped: Figures) -> None:
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
            _update(connection, f"calibrated_{name}", pd.DataFrame(rows[name], columns=[*_KEYS, *at, *values]), values)


def _curve_rows(key: Key, curve: Curve) -> list[tuple[object, ...]]:
    return [(*key, x, *values) for x, *values in zip(curve.at, *curve.values_ms, strict=True)]


def _ratio_rows(key: Key, totals: TotalRatios) -> list[tuple[object, ...]]:
    return [(*key, steps, *ratios) for steps, *ratios in zip(totals.decode_steps, *totals.ratios, strict=True)]


def _update_stages(connection: duckdb.DuckDBPyConnection, maps: Mapping[Key, KeyMaps]) -> None:
    """Figures that are no quantiles."""
    names = ["scale", "offset_ms", "least_ms"]
    for stage, table, mapped in (
        ("prefill", "prefill", ("mean_ms", "min_ms", "max_ms")),
        ("decode_step", "decode", ("mean_ms",)),
    ):
        rows = [(*key, *(getattr(getattr(held, stage), name) for name in names)) for key, held in maps.items()]
        connection.register("stage_maps_frame", pd.DataFrame(rows, columns=[*_KEYS, *names]))
        changes = [f"{name} = greatest({name} * scale + offset_ms, least_ms)" for name in mapped]
        changes += ["std_ms = std_ms * scale", "p95_upper_ms = NULL"]
        connection.execute(
            f"UPDATE calibrated_{table} SET {', '.join(changes)} FROM stage_maps_frame AS maps "
            f"WHERE {_same(f'calibrated_{table}', 'maps', _KEYS)}"
        )
        connection.unregister("stage_maps_frame")


def _update_bins(
    connection: duckdb.DuckDBPyConnection, name: str, maps: Mapping[Key, StageMap], quantiles: Sequence[float]
) -> None:
    columns = [quantile_column(q) for q in quantiles]
    median = quantiles.index(0.5)
    held = connection.execute(f"SELECT {', '.join([*_KEYS, 'bin', *columns])} FROM calibrated_{name}").fetchall()
    rows = [(*row[:4], *mapped_quantiles(row[4:], maps[Key(*row[:3])], median)) for row in held]
    if rows:
        _update(connection, f"calibrated_{name}", pd.DataFrame(rows, columns=[*_KEYS, "bin", *columns]), columns)


def _update(connection: duckdb.DuckDBPyConnection, relation: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Set columns to those of the frame where all the others are equal."""
    connection.register("mapped_frame", frame)
    changes = ", ".join(f"{quote(column)} = mapped.{quote(column)}" for column in columns)
    places = [column for column in frame.columns if column not in columns]
    connection.execute(
        f"UPDATE {relation} SET {changes} FROM mapped_frame AS mapped WHERE {_same(relation, 'mapped', places)}"
    )
    connection.unregister("mapped_frame")


def _same(one: str, other: str, columns: Sequence[str]) -> str:
    return " AND ".join(f"{one}.{quote(column)} = {other}.{quote(column)}" for column in columns)
