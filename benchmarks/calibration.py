"""What calibrating a table costs and gains: few runs of another device, online correction, drift.

    python benchmarks/calibration.py [--public CSV] [--draws N] [--only PART …]

Tables are carried from the shipped runs of the `cpu` preset to a wider model and to two threads, and from the shipped
serving runs on A100 to those on H100, by number of GPUs and of users; with `--public`, from A100 to H100 and back, on
the measured runs of Splitwise (github.com/Mutinifni/splitwise-sim, `data/perf_model.csv`). Half of the new device's
runs judge, N of the others are learnt from, in several draws. The last lines tell which targets hold.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from calibration_drift import drift_verdicts, pair_verdicts
from calibration_online import online_verdicts
from calibration_rivals import FULL, METHODS, OURS, Prediction, Setting, by_table, plain, rebuilt
from numpy.typing import NDArray
from printing import Verdict, percent, print_aligned, print_verdicts, verdict

import lutest

RUNS = Path(__file__).parent.parent / "tables" / "runs"
SIZES = (10, 25, 50, 100)
PARTS = ("devices", "plan", "online", "drift", "pairs")


def shipped(name: str, columns: str = "tier, top_k, num_blocks, decode_ms", where: str = "true") -> pd.DataFrame:
    """Runs of a shipped file, with their totals."""
    query = f"""
        SELECT {columns}, prompt_tokens, output_tokens, prefill_ms, decode_steps_ms
        FROM read_parquet(?)
        WHERE {where}
    """
    frame = duckdb.execute(query, [str(RUNS / name)]).df()
    return frame.assign(total_ms=frame["prefill_ms"] + frame["decode_ms"])


def served(gpu: str) -> pd.DataFrame:
    columns = "n_gpus, users, coalesce(list_sum(decode_steps_ms), 0)::DOUBLE AS decode_ms"
    return shipped("llama-13b-serving.parquet", columns, f"gpu = '{gpu}'")


def public(path: str, hardware: str) -> pd.DataFrame:
    held = pd.read_csv(path)
    held = held[held["hardware"] == hardware].reset_index(drop=True)
    decode_ms = (held["token_size"] - 1) * held["token_time"]
    return pd.DataFrame(
        {
            "llm": held["model"],
            "tp": held["tensor_parallel"],
            "batch_size": held["batch_size"],
            "prompt_tokens": held["prompt_size"],
            "output_tokens": held["token_size"],
            "prefill_ms": held["prompt_time"],
            "decode_ms": decode_ms,
            "total_ms": held["prompt_time"] + decode_ms,
        }
    )


def setting_of(
    name: str,
    old: pd.DataFrame,
    new: pd.DataFrame,
    folder: Path,
    key: tuple[str, ...] = ("tier", "top_k", "num_blocks"),
) -> Setting:
    path = folder / f"{name.replace(' ', '-')}.duckdb"
    lutest.build(plain(key), runs=old, output=path)
    return Setting(path, key, new, by_table(lutest.load(path, missing="interpolate"), new))


def settings(arguments: argparse.Namespace, folder: Path) -> dict[str, Setting]:
    """Title → from one device to another."""
    old = shipped("cpu-preset.parquet")
    found = {
        "another model width": partial(setting_of, "width", old, shipped("cpu-wide-preset.parquet"), folder),
        "two threads": partial(setting_of, "threads", old, shipped("cpu-preset-2-threads.parquet"), folder),
        "served": partial(setting_of, "served", served("A100"), served("H100"), folder, ("n_gpus", "users")),
    }
    if arguments.public:
        a100, h100 = (public(arguments.public, f"{name}-80gb") for name in ("a100", "h100"))
        key = ("llm", "tp", "batch_size")
        found["A100 to H100"] = partial(setting_of, "a100-h100", a100, h100, folder, key)
        found["H100 to A100"] = partial(setting_of, "h100-a100", h100, a100, folder, key)
    return {title: made() for title, made in found.items() if arguments.setting in (None, title)}


class Errors:
    """Figures of one method at one N, over the draws.

    Errors are medians: the mean of relative errors is least where predictions are too low.
    """

    def __init__(self) -> None:
        self.figures: dict[str, list[float]] = defaultdict(list)

    def add(self, runs: pd.DataFrame, judged: NDArray[np.int64], predicted: Prediction) -> None:
        for stage in ("prefill", "total"):
            observed = runs[f"{stage}_ms"].to_numpy()[judged]
            p50_ms = getattr(predicted, f"{stage}_ms")[judged]
            self.figures[stage].append(float(np.median(np.abs(p50_ms - observed) / observed)))
            p95_ms = getattr(predicted, f"{stage}_p95_ms")
            if p95_ms is not None:
                self.figures[f"{stage} within P95"].append(float(np.mean(observed <= p95_ms[judged])))

    def mean(self, figure: str) -> float:
        held = self.figures.get(figure)
        return float(np.mean(held)) if held else float("nan")


def draw(runs: pd.DataFrame, chance: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the runs to judge by, and of those to learn from."""
    order = chance.permutation(len(runs))
    return order[: len(runs) // 2], order[len(runs) // 2 :]


def compare(title: str, setting: Setting, draws: int, folder: Path) -> list[Verdict]:
    found: dict[str, dict[int, Errors]] = {name: {n: Errors() for n in SIZES} for name in (*METHODS, FULL)}
    for number in range(draws):
        judged, pool = draw(setting.runs, np.random.default_rng(number))
        whole = rebuilt(setting, pool, folder)
        for n in SIZES:
            for name, method in METHODS.items():
                found[name][n].add(setting.runs, judged, method(setting, pool[:n], folder))
            found[FULL][n].add(setting.runs, judged, whole)
    verdicts: list[Verdict] = []
    for stage in ("prefill", "total"):
        print(f"\n{title}: median absolute percentage error of P50 {stage}, {draws} draws, by number of new runs")
        print_aligned(
            [
                ["", *(f"{n:,}" for n in SIZES)],
                *([name, *(percent(held[n].mean(stage)) for n in SIZES)] for name, held in found.items()),
            ]
        )
        ours = found[OURS]
        rivals = {n: min(found[name][n].mean(stage) for name in METHODS if name != OURS) for n in SIZES}
        worst = max(SIZES, key=lambda n: ours[n].mean(stage) / rivals[n])
        ratio = ours[worst].mean(stage) / rivals[worst]
        text = f"{title}, {stage}: {ratio:.2f} x the best of the others at the worst N, {worst}"
        verdicts.append(verdict("1", ratio <= 1.03, text))
        ratio = ours[50].mean(stage) / found[FULL][50].mean(stage)
        verdicts.append(verdict("1", ratio <= 1.4, f"{title}, {stage}: {ratio:.2f} x a full rebuild's error at N = 50"))
    print(f"\n{title}: runs within P95")
    coverage = {
        f"{name}, {stage}": [found[name][n].mean(f"{stage} within P95") for n in SIZES]
        for name in (OURS, "rebuilt from these runs", FULL, "no calibration")
        for stage in ("prefill", "total")
    }
    print_aligned([["", *(f"{n:,}" for n in SIZES)], *([name, *map(percent, row)] for name, row in coverage.items())])
    for stage in ("prefill", "total"):
        for n in SIZES:
            share = found[OURS][n].mean(f"{stage} within P95")
            text = f"{title}, {stage}: {percent(share)} within P95 at N = {n}"
            verdicts.append(verdict("2", 0.92 <= share <= 0.98, text))
    return verdicts


def planned(title: str, setting: Setting, draws: int, folder: Path) -> None:
    """Runs as `lutest.plan` proposes them, beside random ones: the nearest run to each proposal is taken."""
    rows = [["", *(f"{n:,}" for n in SIZES)]]
    figures: Mapping[str, dict[int, Errors]] = {name: {n: Errors() for n in SIZES} for name in ("planned", "random")}
    for number in range(draws):
        judged, pool = draw(setting.runs, np.random.default_rng(number))
        for n in SIZES:
            chosen = nearest(setting, pool, n)
            figures["planned"][n].add(setting.runs, judged, METHODS[OURS](setting, chosen, folder))
            figures["random"][n].add(setting.runs, judged, METHODS[OURS](setting, pool[:n], folder))
    print(f"\n{title}: the same errors of {OURS} with planned runs and random ones")
    rows += [
        [f"{name}, {stage}", *(percent(figures[name][n].mean(stage)) for n in SIZES)]
        for stage in ("prefill", "total")
        for name in figures
    ]
    print_aligned(rows)


def nearest(setting: Setting, pool: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    held = setting.runs.iloc[pool].assign(place=pool)
    left = dict(iter(held.groupby(list(setting.key))))
    chosen: list[int] = []
    for run in lutest.plan(setting.path, 4 * n).runs:
        group = left.get(run.key)
        if group is None or not len(group) or len(chosen) == n:
            continue
        best = (group["prompt_tokens"] - run.prompt_tokens).abs().idxmin()
        chosen.append(int(group.loc[best, "place"]))
        left[run.key] = group.drop(index=best)
    return np.array(chosen, dtype=np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", metavar="CSV", help="Splitwise's perf_model.csv: A100 and H100")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="draws of the new runs (default: 10)")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="pairs of one log's parts (default: 200)")
    parser.add_argument("--setting", metavar="TITLE", help="one alone of the devices, such as `served`")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    arguments = parser.parse_args()
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"devices", "plan"} & set(arguments.only):
            for title, setting in settings(arguments, folder).items():
                if "devices" in arguments.only:
                    verdicts += compare(title, setting, arguments.draws, folder)
                if "plan" in arguments.only:
                    planned(title, setting, arguments.draws, folder)
        if "online" in arguments.only:
            verdicts += online_verdicts(folder, shipped("cpu-preset.parquet"))
        if "drift" in arguments.only:
            verdicts += drift_verdicts(
                folder, {"cpu": shipped("cpu-preset.parquet"), "direct": shipped("direct.parquet")}
            )
        if "pairs" in arguments.only:
            columns = "gpu, n_gpus, users, started_ms, coalesce(list_sum(decode_steps_ms), 0)::DOUBLE AS decode_ms"
            verdicts += pair_verdicts(folder, shipped("llama-13b-serving.parquet", columns), arguments.pairs)
    print_verdicts(verdicts)


if __name__ == "__main__":
    main()
