"""What a coarse clock does to a table: the shipped `direct` runs, times rounded to 1, 5 and 10 ms.

    python benchmarks/rounding.py

Each time is rounded as a whole. Shown are the runs that cleaning takes, and how far P95 of prefill, a decode step and
totals of 2, 8 and 30 tokens move, at each configuration's median prompt length. The last lines tell what holds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from printing import Verdict, percent, print_aligned, print_verdicts, verdict

import lutest

RUNS = Path(__file__).parent.parent / "tables" / "runs" / "direct.parquet"
TICKS_MS = (1.0, 5.0, 10.0)
FIGURES = ("prefill", "step", "total of 2", "total of 8", "total of 30")
MOST_EXTRA = 0.0025  # of the runs: what rounding may add to those that cleaning takes


def built(runs: pd.DataFrame, folder: Path) -> tuple[NDArray[np.float64], float]:
    """P95s, configurations by figures, and the share of runs taken for outliers."""
    summary = lutest.build(runs=runs, output=folder / "table.duckdb")
    table, rows = lutest.load(summary.output), []
    for held in table.figures.keys:
        entry, prompt = table[held.key], held.prompt_tokens_p50
        totals = [entry.total_ms(prompt, n, 0.95) for n in (2, 8, 30)]
        rows.append([entry.prefill_ms(prompt, 0.95), entry.decode_step_ms(prompt + 5, 0.95), *totals])
    return np.array(rows), summary.rejected.get("outlier", 0) / len(runs)


def main() -> None:
    frame = duckdb.execute("SELECT * EXCLUDE (decode_steps_ms, total_ms) FROM read_parquet(?)", [str(RUNS)]).df()
    rows = [["tick", "taken", *(f"{name}: median" for name in FIGURES), *(f"{name}: largest" for name in FIGURES)]]
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as name:
        exact, share = built(frame, Path(name))
        for tick in TICKS_MS:
            rounded = {column: (frame[column] / tick).round() * tick for column in ("prefill_ms", "decode_ms")}
            values, taken = built(frame.assign(**rounded), Path(name))
            moved = np.abs(values - exact)
            figures = [*np.median(moved, axis=0), *moved.max(axis=0)]
            rows.append([f"{tick:g} ms", percent(taken), *(f"{ms:.2f} ms" for ms in figures)])
            within = float((moved <= tick).mean())
            verdicts.append(
                verdict("3", within == 1.0, f"{tick:g} ms: {percent(within)} of P95s move by a tick at most")
            )
            text = f"{tick:g} ms: {percent(taken)} of runs are taken, {percent(share)} unrounded"
            verdicts.append(verdict("3", taken - share <= MOST_EXTRA, text))
    print_aligned(rows)
    print_verdicts(verdicts)


if __name__ == "__main__":
    main()
