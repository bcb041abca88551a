"""What pictures of a table show, as plain numbers: totals over lengths, curves, shares within budgets, qualities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutest.reader.entry import Entry
from lutest.reader.table import LatencyTable

_CLOSE = 0.003  # relative: how far a total that is interpolated along one of two lengths may be off
_FIRST_OUTPUTS = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_BESIDE, _LEAST_FILLED = 6, 0.35  # tables beside each other; share of their places that are configurations
_BEYOND = 1.25  # times the last knot: how far curves go
_DRAWN = 1.15  # times the last length that runs stand at: how far they are drawn
_BUDGETS = 48  # of P(total <= budget), for each configuration

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def common_lengths(table: LatencyTable) -> tuple[list[int], list[int]]:
    """Prompt and output lengths at which the totals of every configuration are computed."""
    keys = table.figures.keys
    knots = [place for key in keys for place in key.prefill_curve.at]
    seen = [pairs[-1][0] for pairs in table.output_lengths.values() if pairs]
    last = max([1, *seen, *(key.decode_total.decode_steps[-1] + 1 for key in keys if key.decode_total)])
    prompts = {min(knots), *(key.prompt_tokens_p50 for key in keys[:: max(1, len(keys) // 3)]), max(knots)}
    return sorted(prompts), sorted({*(n for n in _FIRST_OUTPUTS if n < last), last})


def totals(table: LatencyTable, place: int, common: tuple[Sequence[int], Sequence[int]]) -> dict[str, Any]:
    """Totals of one configuration over lengths, so close that what lies between can be interpolated.

    Parameters
    ----------
    table : LatencyTable
    place : int
        Of the configuration among the table's.
    common : pair of sequences of int
        Prompt and output lengths to have in any case.

    Returns
    -------
    dict
        ``prompts``, ``outputs``: the lengths, increasing; ``reach``: least and largest prompt length that searches take
        an answer for; ``own_ms``: totals at each quantile of the table and output length, as measured, no prompt length
        given; ``ms``: at each quantile, prompt and output length; ``error``: the largest relative error of
        interpolation that was met.
    """
    figures = table.figures.keys[place]
    knots = figures.decode_total.decode_steps if figures.decode_total else ()
    prompts = _candidates([*common[0], *figures.prefill_curve.at])
    outputs = _candidates([*common[1], *(step + 1 for step in knots)]) if knots else np.array([1])
    ids = np.array(place)
    ms = np.stack([table.batch.total_ms(ids, prompts[:, None], outputs, q) for q in table.quantiles])
    of_prompts, prompt_error = _kept(prompts, common[0], np.moveaxis(ms, 1, -1))
    of_outputs, output_error = _kept(outputs, common[1], ms)
    kept = outputs[of_outputs]
    return {
        "prompts": prompts[of_prompts].tolist(),
        "reach": figures.reach,
        "outputs": kept.tolist(),
        "own_ms": np.stack([table.batch.total_ms(ids, None, kept, q) for q in table.quantiles]),
        "ms": ms[:, of_prompts][:, :, of_outputs],
        "error": prompt_error + output_error,
    }


def _candidates(lengths: Sequence[int]) -> Ints:
    """Lengths, and more between those that lie far apart."""
    ends = sorted(set(lengths))
    between = {round(low + share * (high - low)) for low, high in pairwise(ends) for share in (0.1, 0.3, 0.5, 0.75)}
    return np.array(sorted({*ends, *between}))


def _kept(lengths: Ints, common: Sequence[int], ms: Floats) -> tuple[Ints, float]:
    """Places of the lengths between which the others can be interpolated, and the largest relative error of that."""
    kept = np.flatnonzero(np.isin(lengths, common))
    while True:
        j = np.clip(np.searchsorted(kept, np.arange(len(lengths)), side="right") - 1, 0, max(len(kept) - 2, 0))
        low, high = kept[j], kept[np.minimum(j + 1, len(kept) - 1)]
        share = (lengths - lengths[low]) / np.maximum(lengths[high] - lengths[low], 1)
        straight = ms[..., low] * (1.0 - share) + ms[..., high] * share
        errors = np.abs(straight / ms - 1.0).reshape(-1, len(lengths)).max(axis=0)
        worst = {int(part): int(np.argmax(np.where(j == part, errors, 0.0))) for part in np.unique(j)}
        more = [place for place in worst.values() if errors[place] > _CLOSE]
        if not more:
            return kept, float(errors.max())
        kept = np.union1d(kept, more)


def curve(entry: Entry, stage: str) -> dict[str, Any] | None:
    """A curve's knots by column, with P50 and P95, and a point beyond the last of them; None where there is none."""
    rows = [row for row in entry.curve() if row["stage"] == stage]
    if not rows:
        return None
    ask = entry.prefill_ms if stage == "prefill" else entry.decode_step_ms
    last = round(_BEYOND * rows[-1]["tokens"]) + 1
    beyond = {"tokens": last, "n": 0, "source": "extrapolated", "p50_ms": ask(last, 0.5), "p95_ms": ask(last, 0.95)}
    names = ("tokens", "n", "source", "p50_ms", "p95_ms")
    return {name: [row[name] for row in [*rows, beyond]] for name in names}


def shares_within(table: LatencyTable) -> list[dict[str, Any]] | None:
    """P(total <= budget) of each configuration over budgets of its own; None without output lengths."""
    lengths = [tokens for pairs in table.output_lengths.values() for tokens, _ in pairs]
    if not lengths:
        return None
    held: list[dict[str, Any]] = []
    for place, key in enumerate(table.keys):
        if table.figures.keys[place].decode_curve is None and max(lengths) > 1:
            held.append({"budget_ms": [], "share": []})
            continue
        entry = table[key]
        ends = 0.6 * entry.total_ms(None, min(lengths), 0.5), 1.3 * entry.total_ms(None, max(lengths), 0.95)
        budgets = [float(f"{budget:.3g}") for budget in np.geomspace(*ends, _BUDGETS)]
        held.append({"budget_ms": budgets, "share": table.batch.p_within(place, budgets)})
    return held


def drawn_curve(entry: Entry, stage: str) -> list[dict[str, Any]]:
    """The knots of a curve and where its drawing ends, by row.

    Beside what `Entry.curve` says: ``knot``, whether it is one; ``between``, whether it lies within the lengths that
    runs stand at, and ``beyond``, whether at their end or outside; ``part``, on which side.
    """
    rows = [row for row in entry.curve() if row["stage"] == stage]
    if not rows:
        return []
    ask = entry.prefill_ms if stage == "prefill" else entry.decode_step_ms
    at = [row["tokens"] for row in rows if row["n"] > 0] or [row["tokens"] for row in rows]
    end = round(_DRAWN * at[-1]) + 1
    held = [{**row, "knot": True} for row in rows if row["tokens"] < end]
    held.append({"tokens": end, "n": 0, "source": "extrapolated", "p50_ms": ask(end, 0.5), "p95_ms": ask(end, 0.95)})
    for row in held:
        tokens = row["tokens"]
        row.setdefault("knot", False)
        row["between"], row["beyond"] = at[0] <= tokens <= at[-1], tokens <= at[0] or tokens >= at[-1]
        row["part"] = "before" if tokens <= at[0] else "after"
    return held


def levels(table: LatencyTable, latencies: Sequence[float]) -> list[list[Any]]:
    """Values of each key column: numbers by size, categories by how fast they are."""
    found = []
    for place, column in enumerate(table.figures.key_columns):
        held: dict[Any, list[float]] = {}
        for key, ms in zip(table.keys, latencies, strict=True):
            held.setdefault(key[place], []).append(ms)
        middle = {value: float(np.median(ms)) for value, ms in held.items()}
        found.append(sorted(held, key=None if column.kind == "number" else middle.__getitem__))
    return found


def layout(table: LatencyTable, levels: Sequence[Sequence[object]]) -> tuple[int | None, int | None, list[int]]:
    """Which key column runs across a grid of configurations, which is a table of its own, and which run down.

    None of them across: where there is but one, or where most places would be empty.
    """
    columns = table.figures.key_columns
    varying = [i for i in range(len(columns)) if len(levels[i]) > 1]
    if len(varying) < 2:
        return None, None, []
    across = max(varying, key=lambda i: (columns[i].kind == "number", len(levels[i]), i))
    rest = [i for i in varying if i != across]
    few = [i for i in rest if len(levels[i]) <= _MOST_BESIDE] if len(rest) > 1 else []
    beside = min(few, key=lambda i: (columns[i].kind != "category", len(levels[i])), default=None)
    down = [i for i in rest if i != beside]
    rows = {(None if beside is None else key[beside], *(key[i] for i in down)) for key in table.keys}
    if len(table) < _LEAST_FILLED * len(rows) * len(levels[across]):
        return None, None, []
    return across, beside, down
