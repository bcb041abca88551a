"""Entries and tables laid out in rows, for data frames, pictures, and notebooks that show them as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lutest.reader.figures import Curve, Figures, KeyFigures
from lutest.reader.names import quantile_suffix

_WHOLE = 1000  # from here on, milliseconds have no decimals
_MOST_ROWS = 60  # of a table that a notebook shows


def config_rows(figures: Figures) -> list[dict[str, Any]]:
    """A row per configuration, with the names of the view ``configs``; None where no run had a decode step."""
    suffixes = list(map(quantile_suffix, figures.quantiles))
    rows = []
    for key in figures.keys:
        named = dict(zip((column.name for column in figures.key_columns), key.key, strict=True))
        row: dict[str, Any] = {
            **named,
            "n": key.prefill.n,
            "source": key.source,
            "prompt_tokens_p50": key.prompt_tokens_p50,
        }
        for stage, held in (("prefill", key.prefill), ("decode_step", key.decode)):
            values = held.quantiles_ms if held else (None,) * len(suffixes)
            row |= {f"{stage}_{suffix}_ms": ms for suffix, ms in zip(suffixes, values, strict=True)}
            row[f"{stage}_p95_upper_ms"] = held.p95_upper_ms if held else None
        rows.append({**row, "n_decode_runs": key.decode.n if key.decode else 0, "n_decode_steps": key.n_decode_steps})
    return rows


def curve_rows(key: KeyFigures, quantiles: Sequence[float]) -> list[dict[str, Any]]:
    """A row per knot of a configuration's curves, those of prefill first."""
    suffixes = list(map(quantile_suffix, quantiles))
    stages: tuple[tuple[str, Curve | None], ...] = ("prefill", key.prefill_curve), ("decode_step", key.decode_curve)
    rows = []
    for stage, curve in stages:
        for j, tokens in enumerate(curve.at if curve else ()):
            assert curve is not None
            values = {f"{suffix}_ms": levels[j] for suffix, levels in zip(suffixes, curve.values_ms, strict=True)}
            rows.append({"stage": stage, "tokens": tokens, "n": curve.n[j], "source": curve.source[j], **values})
    return rows


def html_table(
    caption: str, rows: Sequence[Mapping[str, Any]], most: int | None = _MOST_ROWS, kind: str = "lutest"
) -> str:
    """Rows as an HTML table of a class, text escaped, and at most so many of them."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in (rows[0] if rows else ()))
    body = "".join(f"<tr>{''.join(map(_cell, row.values()))}</tr>" for row in rows[:most])
    more = f"<p>… {len(rows):,} rows in all</p>" if most is not None and len(rows) > most else ""
    return (
        f'<table class="{kind}"><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{more}"
    )


def _cell(value: object) -> str:
    if value is None:
        return "<td>–</td>"
    if isinstance(value, (int, float)):
        form = ",d" if isinstance(value, int) else ",.0f" if abs(value) >= _WHOLE else ".4g"
        return f'<td style="text-align: right">{value:{form}}</td>'
    return f'<td class="text">{_text(value)}</td>'


def _text(value: object) -> str:
    return f"<bdi>{escape(str(value))}</bdi>"
