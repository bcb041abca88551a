"""The printout of the accuracy benchmark, and what it says of the figures that the table must show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accuracy_sections import LONG_OUTPUT_TOKENS, FitTime, SubtractionBias, SubtractionCurve, UnmeasuredKey

from lutest import Key

__all__ = [
    "FAILS",
    "HOLDS",
    "LIKELY_OUT_OF_REACH",
    "NOISE",
    "OUT_OF_REACH",
    "Verdict",
    "percent",
    "print_aligned",
    "print_subtraction",
    "print_time",
    "print_unmeasured",
    "print_verdicts",
    "verdict",
]

HOLDS, FAILS = "holds", "DOES NOT HOLD"
NOISE = "cannot be told on so few runs"  # outside of what is wanted, by no more than chance alone does
OUT_OF_REACH = "out of reach for noise"
LIKELY_OUT_OF_REACH = "likely out of reach for noise"  # by the estimate of the noise, not by the bound


class Verdict(NamedTuple):
    """Whether a figure that the table must show holds: its number in the list of them, a word, and the figures."""

    number: str
    word: str
    text: str


def verdict(number: str, holds: bool, text: str) -> Verdict:
    """One that holds or does not."""
    return Verdict(number, HOLDS if holds else FAILS, text)


def print_aligned(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


def print_verdicts(verdicts: list[Verdict]) -> None:
    """What holds and what does not, as the last lines."""
    if not verdicts:
        return
    print("\nWhat must be shown")
    for number, word, text in verdicts:
        print(f"  {number}. {word}: {text}")
    counts = Counter(verdict.word for verdict in verdicts)
    print("; ".join(f"{count} {word}" for word, count in counts.most_common()))


def print_subtraction(path: Path, curves: list[SubtractionCurve], biases: list[SubtractionBias]) -> list[Verdict]:
    """Item 3."""
    print(f"\nBuilt from {path} alone: decode P50 off the table of timed steps, mean over the shared KV lengths")
    if not curves:
        print("  no configuration is in both sets")
        return []
    rows = [["", "KV lengths", "table", "of which bias", "median of decode / (n - 1)", "median of decode / n"]]
    rows += [
        [
            _shown(c.key),
            f"{c.first_kv_len}–{c.last_kv_len}",
            percent(c.table_off),
            _signed(c.table_bias),
            percent(c.median_per_step_off),
            percent(c.careless_off),
        ]
        for c in curves
    ]
    off, per_step, careless = (
        float(np.median([getattr(c, name) for c in curves]))
        for name in ("table_off", "median_per_step_off", "careless_off")
    )
    bias = float(np.median([c.table_bias for c in curves]))
    rows.append(["median over keys", "", percent(off), _signed(bias), percent(per_step), percent(careless)])
    print_aligned(rows)
    print("Median bias of P50s learnt from half of them, (predicted - observed) / observed; mean ± spread over splits")
    header = [
        "",
        "total, direct",
        f"total, direct, > {LONG_OUTPUT_TOKENS} tokens",
        "total, other half",
        "prefill, direct",
    ]
    print_aligned([header, *([b.name, *(_signed_spread(v) for v in b[1:])] for b in biases)])
    own = biases[0]
    return [
        verdict(
            "3",
            off < 0.03,
            f"decode P50 from subtraction {percent(off)} off the timed steps (median over {len(curves)} keys); "
            f"median of decode / (n - 1) {percent(per_step)}, of decode / n {percent(careless)}",
        ),
        verdict(
            "3", abs(own.direct_total[0]) < 0.02, f"P50 totals biased by {_signed(own.direct_total[0])} on direct runs"
        ),
        verdict(
            "3", abs(own.own_total[0]) < 0.02, f"P50 totals biased by {_signed(own.own_total[0])} on its other half"
        ),
    ]


def print_unmeasured(found: list[UnmeasuredKey]) -> list[Verdict]:
    """Item 4."""
    print(
        '\nA key left out of the build and filled in by load(missing="interpolate"), on its own runs: median\n'
        "difference from the table that has it, and median bias against the runs, (predicted - observed) / observed"
    )
    if not found:
        print("  no configuration has neighbours to be filled in from")
        return []
    rows = [["", "source", "prefill off", "total off", "prefill bias", "total bias", "total bias with the key"]]
    for u in found:
        biases = (u.prefill_bias, u.total_bias, u.held_total_bias)
        rows.append([_shown(u.key), u.source, percent(u.prefill_off), percent(u.total_off), *map(_signed, biases)])
    names = ("prefill_off", "total_off", "prefill_bias", "total_bias", "held_total_bias")
    medians = {name: float(np.median([abs(getattr(u, name)) for u in found])) for name in names}
    worst = {name: float(np.max([abs(getattr(u, name)) for u in found])) for name in names}
    for label, figures in (("median of sizes", medians), ("largest size", worst)):
        rows.append([label, "", *(percent(figures[name]) for name in names)])
    print_aligned(rows)
    return [
        verdict(
            "4",
            medians[f"{part}_off"] < 0.05,
            f"P50 {part} of an unmeasured key {percent(medians[f'{part}_off'])} off (median over {len(found)} keys, "
            f"largest {percent(worst[f'{part}_off'])}); {percent(medians[f'{part}_bias'])} off its runs' median",
        )
        for part in ("prefill", "total")
    ]


def print_time(taken: FitTime) -> list[Verdict]:
    """Item 6."""
    text = (
        f"{taken.keys} keys, {taken.runs:,} runs, {taken.steps:,} timed steps: fitted in {taken.fit_seconds:.1f} s, "
        f"built in {taken.seconds:.1f} s"
    )
    print(f"\nTime: {text}")
    return [verdict("6", taken.fit_seconds < 10, text)]


def _shown(key: Key) -> str:
    return f"{key[0]}, top_k {key[1]}, {key[2]} blocks"


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _signed_spread(figures: tuple[float, float]) -> str:
    return f"{100 * figures[0]:+.1f} ± {100 * figures[1]:.1f} %"
