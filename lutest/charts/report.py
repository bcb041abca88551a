"""A table as one HTML file: pictures and the numbers behind them, which needs nothing outside of itself."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from lutest.charts.figures import common_lengths, curve, layout, levels, shares_within, totals
from lutest.charts.judged import judged
from lutest.judging.diff import Diff, diff
from lutest.judging.finding import count
from lutest.reader.errors import BuildError
from lutest.reader.loading import load
from lutest.reader.rows import html_table
from lutest.reader.search import BUDGET_QUANTILE
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import Config
from lutest.runs.sources import Progress, Source
from lutest.tablefile.description import describe
from lutest.tablefile.store import replaceable, replacing

PREFILL_SHARE = 0.8  # of the budget, where the output length is not known: the default of `table.feasible`
_DIGITS = 9  # significant, of every number in the page
_MOST_LISTED = 8
_OF_CHANGE = ("stage", "q", "old_ms", "new_ms", "n_old", "n_new", "ratio", "lower", "upper", "verdict")


@dataclass(frozen=True)
class ReportSummary:
    """What was written: the file, its size, and how long it took."""

    output: Path
    size_bytes: int
    seconds: float


def report(
    table: LatencyTable | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    runs: Source | Sequence[Source] | None = None,
    against: LatencyTable | str | os.PathLike[str] | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
) -> ReportSummary:
    """Write a table as one HTML file that opens from a disk or an e-mail, without a network.

    Parameters
    ----------
    table : LatencyTable or path
        A table that was read from a table file.
    output : path
        The HTML file to write.
    runs : path, DataFrame, or sequence of them, optional
        Runs to judge the table by, as `evaluate` and `diagnose` do.
    against : LatencyTable or path, optional
        An older table, to show what changed since, as `diff` does.
    config : path, mapping or BuildConfig, optional
        How the runs are read, as for `evaluate`.
    progress : callable, optional
        Called with (what, done, total) now and then while runs are read.

    Returns
    -------
    ReportSummary

    Raises
    ------
    LutestError
        A table or the runs cannot be read, or the file not be written; as `evaluate` and `diff`.
    """
    started = time.monotonic()
    held = table if isinstance(table, LatencyTable) else load(table)
    target = replaceable(Path(output), [Path(held.path)], "report")
    content = page_content(held)
    if runs is not None:
        content["judged"] = judged(held, runs, config, progress)
    if against is not None:
        content["changes"] = _changes(held, diff(against, held))
    text = _page(held, content)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BuildError(f"{output}: cannot write the report: {error.strerror or error}") from error
    return ReportSummary(Path(output), target.stat().st_size, time.monotonic() - started)


def _page(table: LatencyTable, content: Mapping[str, Any]) -> str:
    description = describe(table)
    models, devices = (_named(description["meta"].get(name)) for name in ("model", "device"))
    heading = f"{'; '.join(models) or 'A model'} on {'; '.join(devices) or 'a device that the runs do not name'}"
    parts = {
        "title": escape(f"{heading}: latency"),
        "heading": f"<bdi>{escape(heading)}</bdi>",
        "subheading": _subheading(table, description),
        "figures": _headline(table, description),
        "about": _about(table, description),
        "style": _file("page.css"),
        "script": _file("page.js"),
        "data": _embedded(content),
    }
    return re.sub(r"\{(\w+)\}", lambda name: parts[name[1]], _file("page.html"))


def _file(name: str) -> str:
    return files("lutest.charts").joinpath(name).read_text(encoding="utf-8").strip()


def _embedded(content: Mapping[str, Any]) -> str:
    """JSON that no HTML parser takes for anything else."""
    text = json.dumps(_rounded(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _rounded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _rounded(held) for name, held in value.items()}
    return [_rounded(held) for held in value] if isinstance(value, list | tuple) else value


def page_content(table: LatencyTable) -> dict[str, Any]:
    """The numbers that the page draws, of which every one is the library's."""
    common = common_lengths(table)
    held = [totals(table, place, common) for place in range(len(table))]
    lengths: dict[int, int] = {}
    for tokens, n in (pair for pairs in table.output_lengths.values() for pair in pairs):
        lengths[tokens] = lengths.get(tokens, 0) + n
    typical = int(np.median(np.repeat(list(lengths), list(lengths.values())))) if lengths else None
    tail = table.quantiles.index(BUDGET_QUANTILE)
    own = [np.interp(typical or 1, one["outputs"], one["own_ms"][tail]) for one in held]
    order = [int(place) for place in np.argsort(own, kind="stable")]
    ends = min(float(one["own_ms"].min()) for one in held), max(float(one["own_ms"].max()) for one in held)
    quality: dict[str, list[dict[str, Any]]] = {}
    places = {key: place for place, key in enumerate(table.keys)}
    for row in table.figures.qualities:
        shown = {"quality": row.accuracy, "n": row.n, "lower": row.lower, "upper": row.upper}
        quality.setdefault(row.workload, []).append({"key": places[row.key], **shown})
    ordered = levels(table, own)
    vision = [key.vision_tokens_p50 for key in table.figures.keys]
    return {
        "columns": [{"name": column.name, "kind": column.kind} for column in table.figures.key_columns],
        "levels": ordered,
        "layout": dict(zip(("across", "beside", "down"), layout(table, ordered), strict=True)),
        "keys": [list(key) for key in table.keys],
        "n": [table[key].n for key in table.keys],
        "vision": None if None in vision else vision,
        "quantiles": list(table.quantiles),
        "prefill_share": PREFILL_SHARE,
        "common": {"prompts": common[0], "outputs": common[1]},
        "start": {
            "output": typical,
            "budget": float(f"{own[order[len(order) // 2]] * 1.02:.3g}"),
            "budgets": [float(f"{0.8 * ends[0]:.2g}") or 0.1, float(f"{1.1 * ends[1]:.2g}")],
            "chosen": list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]])),
        },
        "error": max(one["error"] for one in held),
        "totals": [{name: one[name] for name in ("prompts", "reach", "outputs", "own_ms", "ms")} for one in held],
        "curves": [{stage: curve(table[key], stage) for stage in ("prefill", "decode_step")} for key in table.keys],
        "quality": quality,
        "lengths": {workload: list(map(list, pairs)) for workload, pairs in table.output_lengths.items()},
        "shares": shares_within(table),
    }


def _changes(table: LatencyTable, found: Diff) -> dict[str, Any]:
    """What changed since an older table, a configuration by its place in the new one."""
    places = {key: place for place, key in enumerate(table.keys)}
    rows = [
        {
            **{name: value for name, value in vars(change).items() if name != "key"},
            "place": change.key and places[change.key],
        }
        for change in found.changes
    ]
    only = {name: [list(key) for key in getattr(found, name)] for name in ("only_old", "only_new")}
    return {
        "old": Path(found.old).name,
        "new": Path(found.new).name,
        "tolerance": found.tolerance,
        "rows": rows,
        **only,
    }


def _named(text: str | None) -> list[str]:
    return [str(name) for name in json.loads(text or "[]")]


def _subheading(table: LatencyTable, description: Mapping[str, Any]) -> str:
    meta = description["meta"]
    built = f"built {meta.get('built_at')} by lutest {meta.get('lutest_version')}"
    names = ", ".join(f"<bdi>{escape(name)}</bdi>" for name in table.key_columns)
    parent = meta.get("parent_content_hash")
    carried = f", carried over from the table {escape(parent)}" if parent else ""
    return f"{count(len(table), 'configuration')} of {names}; {escape(built)}{carried}"


def _headline(table: LatencyTable, description: Mapping[str, Any]) -> str:
    used, rejected = (sum(source[name] for source in description["sources"]) for name in ("rows_used", "rows_rejected"))
    thin = sum(key["runs_wanted"] > 0 for key in description["keys"])
    fastest = min((table[key] for key in table.keys), key=lambda entry: entry.prefill_p95_ms)
    figures = [
        (f"{len(table):,}", "configurations"),
        (f"{used:,}", "runs used"),
        (f"{rejected:,}", "runs rejected, each with a reason"),
        (f"{thin:,}", "thin configurations"),
        (f"{fastest.prefill_p95_ms:.4g} ms", f"fastest P95 prefill: {_name(fastest.key)}, n = {fastest.n:,}"),
    ]
    return "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in figures)


def _name(key: Sequence[object]) -> str:
    return " · ".join(f"\u2068{value}\u2069" for value in key)


def _about(table: LatencyTable, description: Mapping[str, Any]) -> str:
    meta, keys, sources = (description[name] for name in ("meta", "keys", "sources"))
    rejected = ", ".join(f"{n:,} {reason}" for reason, n in description["rejected"].items())
    thin = [
        f"{_name([key[name] for name in table.key_columns])} ({key['n']}, {key['runs_wanted']} more wanted)"
        for key in keys
        if key["runs_wanted"]
    ]
    facts = {
        "file": Path(table.path).name,
        "device": "; ".join(_named(meta.get("device"))) or "not said by the runs",
        "quantiles": ", ".join(map(str, table.quantiles)),
        "runs": f"{sum(source['rows_read'] for source in sources):,} read, "
        f"{sum(source['rows_used'] for source in sources):,} used",
        "rejected": rejected or "none",
        "thin": "; ".join(thin[:_MOST_LISTED]) + (f"; {len(thin)} in all" if len(thin) > _MOST_LISTED else "")
        or "none: every configuration has the 59 runs that bound a P95",
        "content hash": meta.get("content_hash"),
    }
    listed = "".join(f"<dt>{name}</dt><dd><bdi>{escape(str(value))}</bdi></dd>" for name, value in facts.items())
    shown = {
        "n": "n",
        "prefill_p50_ms": "prefill P50",
        "prefill_p95_ms": "P95",
        "prefill_p95_upper_ms": "P95 at most",
        "decode_step_p50_ms": "step P50",
        "decode_step_p95_ms": "step P95",
    }
    rows = []
    for key in keys:
        row = {name: key[name] for name in table.key_columns} | {title: key[name] for name, title in shown.items()}
        row["prompt tokens"] = f"{key['prompt_tokens_min']}–{key['prompt_tokens_max']}"
        row["KV length"] = None if key["kv_len_min"] is None else f"{key['kv_len_min']}–{key['kv_len_max']}"
        rows.append(row)
    titled = [(f"{count(len(rows), 'configuration')}: latencies in ms", rows), (count(len(sources), "source"), sources)]
    tables = "".join(
        f"<details><summary>{title}</summary>"
        f'<div class="scroll">{html_table(title, held, None, "data")}</div></details>'
        for title, held in titled
    )
    return f"<dl>{listed}</dl>{tables}"
