"""The table beside plain quantiles, linear quantile regression and boosting, from few runs a key to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from held_out import QUANTILES, TARGETS, Ints, Predicted, Runs, build_table, observed, split, table_predictions
from judging import BANDS
from printing import FAILS, HOLDS, NOISE, Verdict, percent, print_aligned, verdict
from rivals import Rival

from lutest.judging.metrics import pinball_loss

__all__ = ["SIZE_RIVALS", "Cell", "print_sizes", "score_sizes"]

TABLE = "lutest"
SIZE_RIVALS = ("key quantiles", "linear quantiles", "gradient boosting")
LEAST_JUDGED = 100  # runs of a key whose coverage is looked at
FAR_OFF = 3.0  # standard errors of a coverage
CLOSE = 0.005  # of a loss: as good as the best rival


class Cell(NamedTuple):
    """One target from one number of runs a key, one way to predict it; lists have one value a split.

    `keys_off`: share of keys whose share under P95 is more than three standard errors from 95 %; `bands`: output
    """

    size: int | None
    target: str
    name: str
    pinball_p50: list[float]
    pinball_p95: list[float]
    keys_off: list[float]
    bands: dict[str, tuple[int, int]]
    fit_seconds: list[float]


def score_sizes(
    runs: Runs, sizes: Sequence[int | None], splits: int, rivals: Sequence[Rival], progress: Callable[[str], None]
) -> list[Cell]:
    """Scores of all ways on the same held-out runs, half of all, learnt from as many of the others as `sizes` say."""
    cells: dict[tuple[int | None, str, str], Cell] = {}
    for size in sizes:
        for seed in range(splits):
            train_places, _ = split(runs, seed, size)
            train, test = runs.take(train_places), runs.take(_held_out(runs, seed, train_places))
            progress(f"{size or 'all'} runs a key, split {seed + 1}")
            built = build_table(train.frame, key=runs.key_columns)
            ways: dict[str, Predicted] = {TABLE: table_predictions(built.table, test)}
            ways |= {rival.name: rival.fit(train)(test) for rival in rivals}
            for name, predicted in ways.items():
                for target in TARGETS:
                    cell = cells.setdefault((size, target, name), Cell(size, target, name, [], [], [], {}, []))
                    _judge(cell, test, predicted)
                    if name == TABLE:
                        cell.fit_seconds.append(built.fit_seconds)
    return list(cells.values())


def _held_out(runs: Runs, seed: int, train: Ints) -> Ints:
    """Half of each key's runs, the same whatever is learnt from; without decode for keys that learn little of it."""
    _, held = split(runs, seed, None)
    decoded = np.bincount(runs.keys()[train], runs.decode_steps()[train] > 0, len(np.unique(runs.keys())))
    judged = (decoded[runs.keys()[held]] > 2) | (runs.decode_steps()[held] == 0)
    return np.asarray(held[judged])


def _judge(cell: Cell, test: Runs, predicted: Predicted) -> None:
    rows, values, keys = observed(test)[cell.target]
    p50, p95 = predicted[cell.target][:, rows]
    cell.pinball_p50.append(pinball_loss(values, p50, QUANTILES[0]))
    cell.pinball_p95.append(pinball_loss(values, p95, QUANTILES[1]))
    counts = np.bincount(keys)
    under = np.bincount(keys, values <= p95)[counts >= LEAST_JUDGED]
    counts = counts[counts >= LEAST_JUDGED]
    if len(counts) and cell.target != "decode step":  # steps of a run are no independent draws
        score = np.abs(under / counts - 0.95) / np.sqrt(0.95 * 0.05 / counts)
        cell.keys_off.append(float(np.mean(score > FAR_OFF)))
    if cell.target.endswith("total"):
        tokens = test.column("output_tokens")[rows]
        for band, (least, most) in BANDS.items():
            inside = (tokens >= least) & (tokens <= most)
            if band != "1" and inside.any():
                n, below = cell.bands.get(band, (0, 0))
                cell.bands[band] = n + int(inside.sum()), below + int((values[inside] <= p95[inside]).sum())


def print_sizes(source: Path, runs: Runs, cells: Sequence[Cell]) -> list[Verdict]:
    """Print the losses, and say whether the table keeps up with the best rival in each cell."""
    print(f"\n{source}: {len(runs.frame):,} runs of {len(np.unique(runs.keys()))} configurations")
    print("pinball loss in ms, mean over splits; keys off: whose P95 covers more than 3 standard errors off 95 %")
    names = list(dict.fromkeys(cell.name for cell in cells))
    verdicts: list[Verdict] = []
    ratios: list[float] = []
    missed: list[str] = []
    for size in dict.fromkeys(cell.size for cell in cells):
        at_size = {(cell.target, cell.name): cell for cell in cells if cell.size == size}
        fit_seconds = np.mean(at_size[TARGETS[0], TABLE].fit_seconds)
        rows = [[f"{size or 'all'} runs a key", *names, "best rival / lutest"]]
        for target in TARGETS:
            for field in ("pinball_p50", "pinball_p95"):
                losses = {name: np.array(getattr(at_size[target, name], field)) for name in names}
                own = losses.pop(TABLE)
                text = [
                    f"{target} P{field[-2:]}",
                    f"{own.mean():.4g}",
                    *(f"{loss.mean():.4g}" for loss in losses.values()),
                ]
                if losses:
                    best = min(losses, key=lambda name: float(np.nan_to_num(losses[name].mean(), nan=np.inf)))
                    ratio = float(losses[best].mean() / own.mean())
                    error = np.std(losses[best] - own, ddof=1) / np.sqrt(len(own)) if len(own) > 1 else 0.0
                    text.append(f"{ratio:.3f} ± {error / own.mean():.3f}")
                    ratios.append(ratio)
                    if own.mean() > losses[best].mean() * (1 + CLOSE) + 2 * error:
                        missed.append(f"{text[0]} at {size or 'all'} (× {1 / ratio:.3f})")
                rows.append(text)
        for target in TARGETS:
            if at_size[target, TABLE].keys_off:
                off = [percent(float(np.mean(at_size[target, name].keys_off))) for name in names]
                rows.append([f"{target}, keys off", *off, ""])
        print(f"\nfit {fit_seconds:.1f} s")
        print_aligned(rows)
    if ratios:
        said = f"{source.stem}: pinball at most the best rival's + 0.5 % + 2 paired standard errors; mean ratio "
        said += f"{np.exp(np.mean(np.log(ratios))):.3f} over {len(ratios)} cells; {'; '.join(missed) or 'none missed'}"
        verdicts.append(verdict("1", not missed and float(np.mean(np.log(ratios))) > 0, said))
    return verdicts + _coverage_verdicts(source, cells)


def _coverage_verdicts(source: Path, cells: Sequence[Cell]) -> list[Verdict]:
    """Of tables from all runs: keys that are off beside plain quantiles, and every band of output lengths."""
    verdicts: list[Verdict] = []
    whole = {(cell.target, cell.name): cell for cell in cells if cell.size is None}
    plain = whole.get(("prefill", "key quantiles"))
    for target in ("prefill", "total"):
        if (target, TABLE) in whole and plain is not None and plain.keys_off:
            own, limit = (float(np.mean(cell.keys_off)) for cell in (whole[target, TABLE], plain))
            text = (
                f"{source.stem}: {percent(own)} of keys off in {target}, {percent(limit)} by plain quantiles of prefill"
            )
            verdicts.append(verdict("2", own <= limit + 0.03, text))
    for target in ("decode total", "total"):
        for band, (n, below) in whole[target, TABLE].bands.items() if (target, TABLE) in whole else ():
            judged, share = n / len(whole[target, TABLE].pinball_p50), below / n
            chance = 1.96 * np.sqrt(0.95 * 0.05 / judged)
            word = HOLDS if 0.93 <= share <= 0.97 else NOISE if judged < 500 and abs(share - 0.95) <= chance else FAILS
            text = f"{source.stem}: {percent(share)} of {target} at {band} output tokens under P95"
            text += f" ({judged:.0f} runs a split)"
            verdicts.append(Verdict("2", word, text))
    return verdicts
