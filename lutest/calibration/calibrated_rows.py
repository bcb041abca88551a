"""Rows of the calibrated table: those of its parent, with the latencies mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np

from lutest.calibration.maps import CALIBRATED, KeyMaps, mapped_figures
from lutest.reader.curves import key_pieces
from lutest.reader.figures import Figures, Key
from lutest.reader.names import literal, quantile_column, quantile_suffix, quote
from lutest.tablefile.schema import TABLES

_STAGES = {"prefill": "prefill", "decode": "decode_step"}  # table → its stage in `KeyMaps`


def write_calibrated_rows(
    connection: duckdb.DuckDBPyConnection, parent: Path, figures: Figures, maps: Mapping[Key, KeyMaps]
) -> dict[str, str]:
    """Create a relation with the new rows of every table of the file but ``meta``.

    Sample sizes, output lengths, sources and rejected runs stay those of the profile that the shapes rest on. Minima,
    maxima and means are mapped as P50s are, standard deviations scaled; bounds of P95 and standard errors are NULL.

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
    keys = [column.name for column in figures.key_columns]
    columns = [quantile_column(q) for q in figures.quantiles]
    suffixes = [quantile_suffix(q) for q in figures.quantiles]
    changes: dict[str, tuple[list[str], list[str]]] = {  # table → what tells its rows of a key apart, what is new
        "prefill": ([], columns),
        "prefill_curve": (["prompt_tokens"], columns),
        "decode": ([], columns),
        "decode_curve": (["kv_len"], [*columns, "p50_sum_ms"]),
        "decode_total": (["decode_steps"], [f"{suffix}_ratio" for suffix in suffixes]),
        "total": ([], [f"{suffix}_correlation" for suffix in suffixes]),
    }
    values = _new_values(mapped_figures(figures, maps))
    connection.execute(f"ATTACH {literal(parent)} AS parent_table (READ_ONLY)")
    for name, relation in relations.items():
        if name not in changes:
            connection.execute(f"CREATE TABLE {relation} AS SELECT * FROM parent_table.main.{quote(name)}")
            continue
        frame = connection.execute(f"SELECT * FROM parent_table.main.{name}").df()
        at, changed = changes[name]
        places = list(frame[keys + at].itertuples(index=False, name=None))
        frame[changed] = np.array([values[name][place] for place in places]).reshape(len(frame), len(changed))
        frame[[column for column in frame if "_se_" in column and column not in keys]] = np.nan
        if "source" in frame:
            frame["source"] = frame["source"].where(frame["source"] == "extrapolated", CALIBRATED)
        if name in _STAGES:  # figures that are no quantiles: means and extremes are mapped as a P50 is
            stages = [getattr(maps[place], _STAGES[name]) for place in places]
            for column in frame.columns.intersection(["mean_ms", "min_ms", "max_ms"]):
                frame[column] = [stage.p50_ms(ms) for stage, ms in zip(stages, frame[column], strict=True)]
            frame["std_ms"] *= [stage.scale for stage in stages]
            frame["p95_upper_ms"] = np.nan
        connection.register("mapped_frame", frame)
        connection.execute(f"CREATE TABLE {relation} AS SELECT * FROM mapped_frame")
        connection.unregister("mapped_frame")
    connection.execute("DETACH parent_table")
    return relations


def _new_values(mapped: Figures) -> dict[str, dict[tuple[object, ...], tuple[float, ...]]]:
    """Table → place in it → its new quantiles."""
    median = mapped.quantiles.index(0.5)
    values: dict[str, dict[tuple[object, ...], tuple[float, ...]]] = {name: {} for name in TABLES}
    for held in mapped.keys:
        key, step = held.key, key_pieces(held, median).step
        values["prefill"][key] = held.prefill.quantiles_ms
        values["total"][key] = held.correlations
        curves = [("prefill_curve", held.prefill_curve.at, held.prefill_curve.values_ms)]
        if step is not None and held.decode and held.decode_curve and held.decode_total:
            values["decode"][key] = held.decode.quantiles_ms
            curves.append(("decode_curve", held.decode_curve.at, (*held.decode_curve.values_ms, step.sums[1:])))
            curves.append(("decode_total", held.decode_total.decode_steps, held.decode_total.ratios))
        for name, at, rows in curves:
            values[name] |= {(*key, x): row for x, row in zip(at, zip(*rows, strict=True), strict=True)}
    return values
