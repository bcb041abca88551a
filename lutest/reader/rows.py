"""What a P95 total is made of, as rows, for the lengths that are asked for most: made from the views of an entry."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import iter_unpack
from typing import TYPE_CHECKING, Any, cast

from lutest.reader.figures import KeyFigures

if TYPE_CHECKING:
    from typing import TypeAlias

    View: TypeAlias = memoryview[float]
    # prefill P50, sums to x and x - 1, median ratio, the deviation's: ratio and two terms of prefill (not for the
    # median), sign; sums to x - 1 and ratios are by tokens, one more than steps (see lutest.grid.entry_views)
    TotalViews: TypeAlias = tuple[View, View, View, View, View, View, View, float]
    # what a P95 total is made of, as rows: by prompt P50, sum and the deviation's two terms; sums to x - 1; by tokens
    # median ratio and the deviation's; empty outside of what is asked for most (see total_rows)
    TotalRows: TypeAlias = tuple[list[tuple[float, float, float, float]], View, list[tuple[float, float]]]

__all__ = ["MOST_ROWS", "NO_ROWS", "TotalRows", "TotalViews", "most_rows", "total_rows"]

MOST_ROWS = 22_000  # prompt lengths of a whole table that have a row, 200 bytes each
_MOST_TOKENS = 256  # tokens that have a row in each entry
NO_ROWS: TotalRows = ([], memoryview(b"").cast("d"), [])


def most_rows(keys: Sequence[KeyFigures]) -> int:
    """How many rows each entry of a table may have, so that all of them have no more than `MOST_ROWS`."""
    left = MOST_ROWS
    wanted = sorted(len(_measured_prompts(figures)) for figures in keys)
    for number, rows in enumerate(wanted):
        if rows * (len(wanted) - number) > left:
            return left // (len(wanted) - number)
        left -= rows
    return wanted[-1]


def _measured_prompts(figures: KeyFigures) -> range:
    """Prompt lengths between the knots, those left aside that no run stands behind."""
    curve = figures.prefill_curve
    known = [x for x, source in zip(curve.at, curve.source, strict=True) if source != "extrapolated"] or curve.at
    return range(known[0], known[-1] + 1)


def total_rows(figures: KeyFigures, views: TotalViews, most_rows: int) -> TotalRows:
    """The views as rows, for the prompt lengths that were measured: one look instead of four."""
    p50, sums, sums_before, ratio, spread, u, v, _ = views
    prompts = _measured_prompts(figures)
    stop = min(prompts.stop, len(p50))
    first = max(min(prompts.start, stop), min(figures.prompt_tokens_p50 - most_rows // 2, stop - most_rows))
    stop = min(stop, first + most_rows)
    ratios = figures.decode_total
    last = _MOST_TOKENS if ratios is None else min(ratios.decode_steps[-1] + 2, _MOST_TOKENS)
    at_prompt = [cast("tuple[float, float, float, float]", ())] * first
    at_prompt += _side_by_side(p50[first:stop], sums[first:stop], u[first:stop], v[first:stop])
    at_tokens = [cast("tuple[float, float]", ())] * 2  # one token: prefill alone, exactly
    at_tokens += _side_by_side(ratio[2:last], spread[2:last])
    at_tokens += at_tokens[-1:] * (_MOST_TOKENS - last)  # constant from the last knot on
    return at_prompt, sums_before, at_tokens


def _side_by_side(*views: View) -> list[tuple[Any, ...]]:
    """Rows of the views, the numbers of a row next to each other in memory, so that one look brings them all."""
    table = array("d", bytes(8 * len(views) * len(views[0])))
    for column, view in enumerate(views):
        table[column :: len(views)] = array("d", view.tobytes())
    return list(iter_unpack(f"{len(views)}d", table))
