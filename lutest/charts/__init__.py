"""Pictures of tables: Altair charts for notebooks and files; `lutest.report` writes a page that does without Altair."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lutest.reader.arguments import named_key
from lutest.reader.errors import ArgumentError, BuildError, LutestError, NoDecodeDataError
from lutest.reader.figures import Key
from lutest.reader.loading import load
from lutest.reader.search import BUDGET_QUANTILE
from lutest.reader.table import LatencyTable

if TYPE_CHECKING:
    import altair as alt

    from lutest.runs.configuration import Config
    from lutest.runs.sources import Source

Table: TypeAlias = LatencyTable | str | os.PathLike[str]
Chart: TypeAlias = "alt.TopLevelMixin"

# Okabe and Ito's, which the colour-blind tell apart
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
_FITS, _OVER = "#0072b2", "#d55e00"
_MOST_CURVES = len(_COLOURS)
_WIDTH, _HEIGHT, _ROW, _CELL, _MOST_CELLS_ACROSS = 460, 280, 15, 54, 16
_WANTED = "charts are drawn with Altair and vl-convert-python: pip install 'lutest[report]'"
_WHOLE = 1000  # from here on, milliseconds have no decimals
_NO_LIMIT_MS = 1e300


def prefill(table: Table, keys: Sequence[Any] | None = None) -> Chart:
    """Prefill over prompt length: P50 and P95 as a band for each configuration.

    Parameters
    ----------
    table : LatencyTable or path
    keys : sequence, optional
        Configurations to draw; left out: all of up to six, else the fastest, the median and the slowest.

    Returns
    -------
    altair chart
        Filled marks rest on runs, open ones do not; dotted lines lie beyond all runs.

    Raises
    ------
    LutestError
        Altair is not installed, or the table cannot be read.
    UnknownKeyError
        A configuration was not measured.
    """
    return _curves(table, "prefill", "prompt tokens", "prefill, ms", keys)


def decode(table: Table, keys: Sequence[Any] | None = None) -> Chart:
    """The decode step over KV length, as `prefill` draws it.

    Parameters, errors
        As in `prefill`.
    """
    return _curves(table, "decode_step", "tokens in the KV cache", "decode step, ms", keys)


def budget(
    table: Table,
    budget_ms: float | None = None,
    *,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    q: float = BUDGET_QUANTILE,
    prefill_share: float = 0.8,
) -> Chart:
    """Which configurations stay within a budget: the total where an output length is given, else prefill in its share.

    Parameters
    ----------
    table : LatencyTable or path
    budget_ms : float, optional
        Left out: one that half of the configurations stay within.
    prompt_tokens, output_tokens, q, prefill_share
        As for `LatencyTable.feasible`.

    Returns
    -------
    altair chart
        A grid of configurations, or bars where they make no grid; ✓ marks what fits.

    Raises
    ------
    LutestError
        As `prefill` and `LatencyTable.feasible`.
    """
    from lutest.charts.figures import layout, levels

    alt, held = _altair(), _loaded(table)
    latencies = _latencies(held, prompt_tokens, output_tokens, q)
    share = 1.0 if output_tokens is not None else prefill_share
    limit = budget_ms if budget_ms is not None else float(f"{1.02 * median(latencies.values()) / share:.3g}")
    fitting = set(
        held.feasible(limit, prompt_tokens=prompt_tokens, output_tokens=output_tokens, q=q, prefill_share=prefill_share)
    )
    ordered = levels(held, [latencies.get(key, math.inf) for key in held.keys])
    across, beside, down = layout(held, ordered)
    rows = []
    for key, ms in latencies.items():
        fits, form = key in fitting, ",.0f" if ms >= _WHOLE else ".3g"
        rows.append(
            {
                **{f"k{i}": value for i, value in enumerate(key)},
                "configuration": _name(key),
                "down": " · ".join(str(key[i]) for i in down),
                "ms": ms,
                "n": held[key].n,
                "over": max(-1.0, min(1.0, math.log2(max(ms, 1e-9) / (limit * share)))),
                "fits": fits,
                "shown": f"{'✓ ' if fits else ''}{ms:{form}}",
            }
        )
    within = f"{limit:,g} ms" if output_tokens is not None else f"{share:.0%} of {limit:,g} ms"
    title = f"{len(fitting)} of {len(held)} configurations fit {within}: {_asked(output_tokens, q)}"
    data, base = alt.Data(values=rows), alt.Chart().encode(tooltip=_tips("configuration", "ms", "n"))
    if across is None:
        colour = alt.Color("fits:N", scale=alt.Scale(domain=[True, False], range=[_FITS, _OVER]), title="fits")
        y = alt.Y("configuration:N", title=None, sort="x")
        bars = base.mark_bar().encode(x=alt.X("ms:Q", title=f"{_asked(output_tokens, q)}, ms"), y=y, color=colour)
        rule = alt.Chart(alt.Data(values=[{"ms": limit * share}])).mark_rule(strokeDash=[5, 4]).encode(x="ms:Q")
        return _styled(alt.layer(bars, rule, data=data).properties(title=title, width=_WIDTH, height=alt.Step(_ROW)))
    names = held.key_columns
    base = base.encode(
        x=alt.X(f"k{across}:N", title=names[across], sort=ordered[across], axis=alt.Axis(orient="top", labelAngle=0)),
        y=alt.Y("down:N", title=" · ".join(names[i] for i in down) or None, sort=None),
    )
    scale = alt.Scale(domain=[-1, 0, 1], range=[_FITS, "#f2f2f2", _OVER])
    cells = base.mark_rect(stroke="white", strokeWidth=2).encode(color=alt.Color("over:Q", scale=scale, legend=None))
    light = alt.condition("abs(datum.over) > 0.6", alt.value("white"), alt.value("black"))
    grid = alt.layer(cells, base.mark_text(fontSize=11).encode(text="shown:N", color=light), data=data)
    grid = grid.properties(width=alt.Step(_CELL), height=alt.Step(24))
    if beside is None:
        return _styled(grid.properties(title=title))
    facet = alt.Facet(f"k{beside}:N", title=None, sort=ordered[beside])
    in_a_row = max(1, _MOST_CELLS_ACROSS // len(ordered[across]))
    tables = grid.facet(facet, columns=in_a_row).properties(title=[title, f"by {names[beside]}"])
    return _styled(tables.resolve_scale(y="independent"))


def frontier(
    table: Table,
    *,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    q: float = BUDGET_QUANTILE,
    workload: str | None = None,
) -> Chart:
    """Quality over latency, and the line of those configurations that are worth choosing.

    Parameters
    ----------
    table : LatencyTable or path
        One that holds qualities.
    prompt_tokens, output_tokens, q, workload
        As for `LatencyTable.frontier`.

    Returns
    -------
    altair chart

    Raises
    ------
    LutestError
        As `prefill` and `LatencyTable.frontier`.
    """
    alt, held = _altair(), _loaded(table)
    front = held.frontier(prompt_tokens=prompt_tokens, output_tokens=output_tokens, q=q, workload=workload)
    best = {option.key for option in front}
    qualities = {row.key: row for row in held.figures.qualities if workload in (None, row.workload)}
    rows = [
        {"configuration": _name(key), "ms": ms, "quality": row.accuracy, "n": row.n, "frontier": key in best}
        for key, ms in _latencies(held, prompt_tokens, output_tokens, q).items()
        if (row := qualities.get(key)) is not None
    ]
    x = alt.X("ms:Q", title=f"{_asked(output_tokens, q)}, ms", scale=alt.Scale(zero=False, padding=50))
    y = alt.Y("quality:Q", title="quality", scale=alt.Scale(zero=False))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, tooltip=_tips("configuration", "ms", "quality", "n"))
    points = base.mark_point(color=_FITS, size=60, opacity=1).encode(
        fill=alt.condition("datum.frontier", alt.value(_FITS), alt.value("white"))
    )
    on_it = base.transform_filter("datum.frontier")
    line = on_it.mark_line(color=_FITS, interpolate="step-after")
    names = on_it.mark_text(
        align="right", dx=-7, dy=-7
    )  # nothing is as fast and better: there is room.encode(text="configuration:N")
    return _styled((line + points + names).properties(width=_WIDTH, height=_HEIGHT, title="Quality over latency"))


def coverage(
    table: Table,
    runs: Source | Sequence[Source],
    *,
    q: float = BUDGET_QUANTILE,
    stage: Literal["prefill", "decode total", "total"] = "total",
    config: Config | None = None,
) -> Chart:
    """Share of runs that stay at or below what the table says, for each configuration, with its 95 % interval.

    Parameters
    ----------
    table : LatencyTable or path
    runs, config
        As for `lutest.evaluate`.
    q : float
        The quantile, which is the share that is right.
    stage : {"prefill", "decode total", "total"}

    Returns
    -------
    altair chart

    Raises
    ------
    LutestError
        As `prefill` and `lutest.evaluate`.
    """
    from lutest.judging.evaluate import evaluate
    from lutest.judging.metrics import coverage_interval

    alt, held = _altair(), _loaded(table)
    if q not in held.quantiles:
        raise ArgumentError(f"q is {q!r}; allowed: {', '.join(map(str, held.quantiles))}, which the table holds")
    found = evaluate(held, runs, config=config)
    rows = []
    for score in found.by_key:
        if score.stage == stage and score.key is not None:
            low, high = map(float, coverage_interval(score.coverage[q], score.n))
            named = {"configuration": _name(score.key), "share": score.coverage[q], "n": score.n}
            rows.append({**named, "from": low, "to": high, "off": not low <= q <= high})
    if not rows:
        stages = ", ".join(dict.fromkeys(score.stage for score in found.by_key))
        raise ArgumentError(f"stage is {stage!r}; allowed with these runs: {stages}")
    colour = alt.Color("off:N", scale=alt.Scale(domain=[False, True], range=[_FITS, _OVER]), legend=None)
    shape = alt.Shape("off:N", scale=alt.Scale(domain=[False, True], range=["circle", "diamond"]), legend=None)
    y = alt.Y("configuration:N", title=None, sort=alt.EncodingSortField("share"))
    title = f"share of runs whose {stage} is at or below the predicted P{100 * q:g}"
    x = alt.X("from:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(format="%"))
    base = alt.Chart(alt.Data(values=rows)).encode(y=y, color=colour, tooltip=_tips("configuration", "share", "n"))
    whiskers = base.mark_rule().encode(x=x, x2="to:Q")
    points = base.mark_point(filled=True, size=45, opacity=1).encode(x="share:Q", shape=shape)
    right = alt.Chart(alt.Data(values=[{"share": q}])).mark_rule(strokeDash=[5, 4]).encode(x="share:Q")
    n_off = sum(bool(row["off"]) for row in rows)
    told = f"{found.n_runs:,} runs; {n_off} of {len(rows)} intervals leave {q:.0%} out"
    chart = (whiskers + points + right).properties(width=_WIDTH, height=alt.Step(_ROW), title=told)
    return _styled(chart)


def _curves(table: Table, stage: str, over: str, what: str, keys: Sequence[Any] | None) -> Chart:
    from lutest.charts.figures import drawn_curve

    alt, held = _altair(), _loaded(table)
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    for key in _chosen(held, keys):
        names.append(_name(key))
        rows += [{"configuration": names[-1], **row} for row in drawn_curve(held[key], stage)]
    if not rows:
        raise NoDecodeDataError(f"no run of {'; '.join(names)} had a decode step: there is nothing to draw")
    colour = alt.Color("configuration:N", scale=alt.Scale(domain=names, range=_COLOURS), title=None)
    x = alt.X("tokens:Q", title=over)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=colour)
    tips = _tips("configuration", "tokens", "p50_ms", "p95_ms", "n", "source")
    band = base.mark_area(opacity=0.13).encode(y=alt.Y("p50_ms:Q", title=what), y2="p95_ms:Q")
    layers = [band]
    within, beyond = (
        base.transform_filter("datum.between"),
        base.transform_filter("datum.beyond").encode(detail="part:N"),
    )
    for name, width, dash in (("p50_ms", 2, [1, 0]), ("p95_ms", 1.5, [6, 4])):
        layers.append(within.mark_line(strokeWidth=width, strokeDash=dash).encode(y=f"{name}:Q"))
        layers.append(beyond.mark_line(strokeWidth=width, strokeDash=[1, 3]).encode(y=f"{name}:Q"))
    knots = base.transform_filter("datum.knot").mark_point(size=40, opacity=1, strokeWidth=1.5)
    layers.append(
        knots.encode(
            y="p50_ms:Q",
            shape=alt.Shape("configuration:N", scale=alt.Scale(domain=names), title=None),
            fill=alt.condition("datum.n > 0", colour, alt.value("white")),
            tooltip=tips,
        )
    )
    title = "P50 solid, P95 dashed; open marks and dotted lines rest on no runs"
    return _styled(alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT, title=title))


def save(chart: Chart, output: str | os.PathLike[str]) -> None:
    """Write a chart as a picture; no browser is needed.

    Parameters
    ----------
    chart : altair chart
    output : path
        Ends in ``.svg`` or ``.png``; the latter has twice the pixels.

    Raises
    ------
    LutestError
        `vl-convert-python` is not installed, the ending is another one, or the file cannot be written.
    """
    from lutest.tablefile.store import PICTURE_MARK, replaceable, replacing

    path = Path(output)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ArgumentError(f"{path}: the output must end in .svg or .png")
    try:
        import vl_convert
    except ImportError as error:
        raise LutestError(_WANTED) from error
    target, specification = replaceable(path, [], "picture"), chart.to_json(format="vega")
    if path.suffix.lower() == ".svg":
        content = vl_convert.vega_to_svg(specification).encode()
    else:
        content = vl_convert.vega_to_png(specification, scale=2.0)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_bytes(content + PICTURE_MARK)
    except OSError as error:
        raise BuildError(f"{output}: cannot write the picture: {error.strerror or error}") from error


def _altair() -> Any:
    try:
        import altair
    except ImportError as error:
        raise LutestError(_WANTED) from error
    return altair


def _loaded(table: Table) -> LatencyTable:
    return table if isinstance(table, LatencyTable) else load(table)


def _chosen(table: LatencyTable, keys: Sequence[Any] | None) -> list[Key]:
    if keys is None:
        if len(table) <= _MOST_CURVES:
            return list(table.keys)
        order = sorted(table.keys, key=lambda key: table[key].prefill_p95_ms)
        return [order[0], order[len(order) // 2], order[-1]]
    if not 0 < len(keys) <= _MOST_CURVES:
        raise ArgumentError(f"keys has {len(keys)}; allowed: 1 to {_MOST_CURVES} configurations in one picture")
    asked = [named_key(table.figures, key if isinstance(key, tuple) else (key,), {}) for key in keys]
    return [table[key].key for key in asked]


def _latencies(table: LatencyTable, prompt: int | None, output: int | None, q: float) -> dict[Key, float]:
    """The latency that decides, of whatever can be said of."""
    known = table.feasible(_NO_LIMIT_MS, prompt_tokens=prompt, output_tokens=output, q=q)
    entries = {key: table[key] for key in known}
    return {
        key: entry.prefill_ms(prompt, q) if output is None else entry.total_ms(prompt, output, q)
        for key, entry in entries.items()
    }


def _asked(output_tokens: int | None, q: float) -> str:
    return f"P{100 * q:g} {'prefill' if output_tokens is None else f'total of {output_tokens:,} output tokens'}"


def _name(key: Key) -> str:
    return " · ".join(map(str, key))


def _tips(*names: str) -> list[Any]:
    """What is shown of a mark that is pointed at."""
    kinds = {"configuration": "N", "source": "N", "n": "Q", "tokens": "Q"}
    shown = [(name, kinds.get(name, "Q"), name.replace("_ms", ", ms")) for name in names]
    tip = _altair().Tooltip
    return [tip(f"{name}:{kind}", title=title, format=".4~g" if kind == "Q" else "") for name, kind, title in shown]


def _styled(chart: Any) -> Chart:
    """One look for all."""
    styled: Chart = (
        chart.configure_view(strokeOpacity=0)
        .configure_axis(grid=True, gridColor="#e3e6ea", domain=False, tickColor="#c5cad1", labelColor="#444c56")
        .configure_axisBand(grid=False)
        .configure_title(anchor="start", fontSize=12, fontWeight=500, offset=10)
        .configure_header(labelFontWeight=600)
    )
    return styled
