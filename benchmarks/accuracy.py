"""The table beside what people use instead, all learnt from the same runs and judged on the same held-out runs.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/accuracy.py --json accuracy.json

Runs are split by run within each configuration, several times. All learn from the runs that the table accepted after
its own cleaning; held-out runs are judged as they are. Everything is seeded: the same runs give the same figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# read when the libraries of the rivals are loaded: their idle threads would fight over a busy machine's cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from accuracy_by_size import SIZE_RIVALS, print_sizes, score_sizes
from accuracy_sections import fit_time, subtraction_bias, subtraction_curves, unmeasured_keys
from held_out import KEYS, TARGETS, Runs, build_table, load_runs, split, table_predictions
from judging import BANDS, Limits, Scores, judge, r_squared_limits
from printing import (
    FAILS,
    HOLDS,
    LIKELY_OUT_OF_REACH,
    NOISE,
    OUT_OF_REACH,
    Verdict,
    percent,
    print_aligned,
    print_subtraction,
    print_time,
    print_unmeasured,
    print_verdicts,
    verdict,
)
from rivals import RIVALS, Rival

TABLE = "lutest"
PROTOCOLS: dict[str, int | None] = {"half of the runs": None, "10 runs a key": 10}
SECTIONS = ("splits", "sizes", "subtraction", "unmeasured", "time")
SERVING_KEY = ("gpu", "n_gpus", "users")
MOST_UNMEASURED_KEYS = 27
TABLE_RUNS = Path(__file__).resolve().parent.parent / "tables" / "runs"

Outcomes = dict[tuple[str, str, str], list[Scores]]  # (protocol, target, name) → one a split
LimitsFound = dict[tuple[str, str], list[Limits]]  # (protocol, target) → one a split


def main() -> None:
    options = _options()
    rivals = _installed([rival for rival in RIVALS if rival.name in options.rivals])
    verdicts: list[Verdict] = []
    figures: dict[str, object] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lutest-accuracy-") as folder:
        runs = load_runs(options.runs, Path(folder))
        keys = len(np.unique(runs.keys()))
        print(f"{options.runs}: {len(runs.frame):,} runs of {keys} configurations, {len(runs.steps):,} timed steps")
        if "splits" in options.sections:
            outcomes, limits = _run_splits(runs, rivals, options.splits)
            _print_splits(outcomes, limits, runs)
            verdicts += _split_verdicts(outcomes, limits, runs)
            figures["splits"] = _split_figures(outcomes, limits)
        if "sizes" in options.sections:
            by_size = [name for name in options.rivals if name in SIZE_RIVALS]
            sized = [rival for rival in rivals if rival.name in by_size]
            for what, sizes, key in (
                (options.runs, (10, 30, None), None),
                (options.preset, (10, 30, None), None),
                (options.serving, (10, 30, 100, None), SERVING_KEY),
            ):
                if what.exists():
                    judged = runs if what == options.runs else load_runs(what, Path(folder), key or KEYS)
                    found = score_sizes(judged, sizes, options.splits, sized, _progress)
                    verdicts += print_sizes(what, judged, found)
                    figures[f"sizes of {what.stem}"] = [cell._asdict() for cell in found]
        if "subtraction" in options.sections and options.subtraction.exists():
            _progress("subtraction")
            subtraction = load_runs(options.subtraction, Path(folder))
            curves = subtraction_curves(subtraction, runs)
            biases = subtraction_bias(subtraction, runs, options.splits)
            verdicts += print_subtraction(options.subtraction, curves, biases)
            figures["subtraction"] = {"curves": _plain(curves), "biases": _plain(biases)}
        if "unmeasured" in options.sections:
            _progress("unmeasured keys")
            unmeasured = unmeasured_keys(runs, 9 if options.quick else MOST_UNMEASURED_KEYS)
            verdicts += print_unmeasured(unmeasured)
            figures["unmeasured"] = _plain(unmeasured)
        if "time" in options.sections:
            _progress("fit time")
            taken = fit_time(Path(folder))
            verdicts += print_time(taken)
            figures["time"] = taken._asdict()
    seconds = time.perf_counter() - started
    print_verdicts(verdicts)
    print(f"\n{seconds:.0f} s in all")
    if options.json is not None:
        figures |= {"runs": str(options.runs), "splits_count": options.splits, "seconds": seconds}
        figures["verdicts"] = _plain(verdicts)
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=True) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [TABLE, *(rival.name for rival in RIVALS)]
    default = TABLE_RUNS / "direct.parquet"
    parser.add_argument("--runs", type=Path, default=default, help="any runs that lutest reads (default: %(default)s)")
    parser.add_argument("--subtraction", type=Path, default=TABLE_RUNS / "subtraction.parquet")
    parser.add_argument("--preset", type=Path, default=TABLE_RUNS / "cpu-preset.parquet")
    parser.add_argument("--serving", type=Path, default=TABLE_RUNS / "llama-13b-serving.parquet")
    parser.add_argument("--splits", type=int, help="how many (default: 5; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="2 splits, without the MLP, 9 unmeasured keys")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        choices=[*SECTIONS, *names],
        help=f"a part ({', '.join(SECTIONS)}), or the splits with one candidate ({', '.join(names)}); may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there as well")
    options = parser.parse_args()
    only = options.only or []
    options.rivals = [name for name in only if name in names] or names
    if options.quick and "mlp" not in only:
        options.rivals = [name for name in options.rivals if name != "mlp"]
    options.sections = [name for name in only if name in SECTIONS] or (SECTIONS if not only else ["splits"])
    if any(name in names for name in only):
        options.sections = {*options.sections, "splits"}
    options.splits = options.splits or (2 if options.quick else 5)
    return options


def _installed(rivals: list[Rival]) -> list[Rival]:
    for rival in rivals:
        if not rival.is_installed():
            print(f"{rival.name}: left out, package {rival.package} is not installed")
    return [rival for rival in rivals if rival.is_installed()]


def _run_splits(runs: Runs, rivals: list[Rival], splits: int) -> tuple[Outcomes, LimitsFound]:
    outcomes: Outcomes = defaultdict(list)
    limits: LimitsFound = defaultdict(list)
    for protocol, runs_per_key in PROTOCOLS.items():
        for seed in range(splits):
            train_places, test_places = split(runs, seed, runs_per_key)
            train, test = runs.take(train_places), runs.take(test_places)
            _progress(f"{protocol}, split {seed + 1}: {TABLE}")
            built = build_table(train.frame)
            cleaned = train.take(built.accepted)
            for target, scores in judge(test, table_predictions(built.table, test)):
                outcomes[protocol, target, TABLE].append(scores)
            for rival in rivals:
                _progress(f"{protocol}, split {seed + 1}: {rival.name}")
                for target, scores in judge(test, rival.fit(cleaned)(test)):
                    outcomes[protocol, target, rival.name].append(scores)
            for target, limit in r_squared_limits(runs, test_places).items():
                limits[protocol, target].append(limit)
    return outcomes, limits


def _named(outcomes: Outcomes, protocol: str, target: str) -> dict[str, list[Scores]]:
    return {name: scores for (p, t, name), scores in outcomes.items() if (p, t) == (protocol, target)}


def _print_splits(outcomes: Outcomes, limits: LimitsFound, runs: Runs) -> None:
    print(
        "\nMean over splits ± standard deviation over splits; `ratio` is the pinball loss over that of the table in\n"
        "the same split, above 1 where the table is better. R² of P50. The noise floor, as the R² that it leaves to\n"
        "anything smooth in the lengths: `about`, from a parabola per key (decode: steps times a line over KV length)\n"
        "fitted to all runs by weighted least squares, squared residuals over 1 - leverage (HC2); `at most`, the same\n"
        "curves fitted by least squares to the held-out runs alone, which learns their noise by heart as well."
    )
    for protocol in PROTOCOLS:
        for target in TARGETS:
            named = _named(outcomes, protocol, target)
            if not named:
                continue
            own = named[TABLE]
            n = round(np.mean([scores.n for scores in own]))
            rows = [["", "pinball P50, ms", "ratio", "pinball P95, ms", "ratio", "R²", "MAPE", "under P95"]]
            for name, scores in named.items():
                row = [name]
                for field in ("pinball_p50", "pinball_p95"):
                    row += [_spread(scores, field), "" if name == TABLE else _spread_of(_ratios(scores, own, field))]
                row += [f"{_mean(scores, 'r_squared'):.4f}", percent(_mean(scores, "mape"))]
                rows.append([*row, percent(_mean(scores, "coverage_p95"))])
            unit = "steps" if target == "decode step" else "runs"
            print(f"\n{target}, learnt from {protocol}; {len(own)} splits, {n:,} held-out {unit} each")
            print(f"R² that the noise allows: {_limits_text(limits[protocol, target])}")
            print_aligned(rows)
            if own[0].bands:
                print("share under P95 by output tokens, all splits together (below: runs that there are)")
                _print_bands(named, _band_sizes(runs))


def _print_bands(named: dict[str, list[Scores]], sizes: dict[str, int]) -> None:
    bands = [band for band in BANDS if any(band in s.bands for s in named[TABLE])]
    rows = [["", *bands]]
    for name, scores in named.items():
        shares = [_band_coverage(scores, band) for band in bands]
        rows.append([name, *(percent(share) for share in shares)])
    rows.append(["runs", *(f"{sizes[band]:,}" for band in bands)])
    print_aligned(rows)


def _band_sizes(runs: Runs) -> dict[str, int]:
    tokens = runs.column("output_tokens")
    return {band: int(((tokens >= least) & (tokens <= most)).sum()) for band, (least, most) in BANDS.items()}


def _band_coverage(scores: list[Scores], band: str) -> float:
    counts = np.sum([s.bands[band] for s in scores if band in s.bands], axis=0)
    return float(counts[1] / counts[0])


def _values(scores: list[Scores], field: str) -> list[float]:
    return [float(getattr(s, field)) for s in scores]


def _mean(scores: list[Scores], field: str) -> float:
    return float(np.mean(_values(scores, field)))


def _ratios(scores: list[Scores], own: list[Scores], field: str) -> list[float]:
    return [a / b for a, b in zip(_values(scores, field), _values(own, field), strict=True)]


def _spread(scores: list[Scores], field: str) -> str:
    return _spread_of(_values(scores, field))


def _spread_of(values: list[float]) -> str:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} ± {spread:.3f}"


def _split_verdicts(outcomes: Outcomes, limits: LimitsFound, runs: Runs) -> list[Verdict]:
    verdicts = []
    for protocol in PROTOCOLS:
        for target in TARGETS:
            named = _named(outcomes, protocol, target)
            if len(named) > 1:
                verdicts += [
                    _pinball_verdict(named, protocol, target, field) for field in ("pinball_p50", "pinball_p95")
                ]
    halves = next(iter(PROTOCOLS))
    for target, wanted in (("prefill", 0.95), ("decode total", 0.99)):
        named = _named(outcomes, halves, target)
        if named:
            reached = _mean(named[TABLE], "r_squared")
            possible = limits[halves, target]
            about, at_most = np.mean(possible, axis=0)
            unreached = FAILS if about > wanted else LIKELY_OUT_OF_REACH if at_most > wanted else OUT_OF_REACH
            word = HOLDS if reached > wanted else unreached
            text = f"R² of {target} {reached:.4f}, wanted over {wanted}; the noise allows {_limits_text(possible)}"
            verdicts.append(Verdict("1", word, text))
    for target in TARGETS:
        named = _named(outcomes, halves, target)
        if named:
            verdicts += _coverage_verdicts(target, named[TABLE], _band_sizes(runs))
    return verdicts


def _limits_text(limits: list[Limits]) -> str:
    about, at_most = np.mean(limits, axis=0)
    return f"about {about:.4f}, at most {at_most:.4f}"


def _pinball_verdict(named: dict[str, list[Scores]], protocol: str, target: str, field: str) -> Verdict:
    own = named[TABLE]
    best = min((name for name in named if name != TABLE), key=lambda name: _mean(named[name], field))
    ratios = _ratios(named[best], own, field)
    won = sum(ratio > 1 for ratio in ratios)
    text = (
        f"pinball {'P50' if field.endswith('50') else 'P95'} of {target}, {protocol}: {_spread(own, field)} ms; "
        f"best rival {best} {_spread(named[best], field)} ms, ratio {_spread_of(ratios)}, "
        f"better in {won} of {len(ratios)} splits"
    )
    return verdict("1", _mean(own, field) < _mean(named[best], field), text)


def _coverage_verdicts(target: str, scores: list[Scores], sizes: dict[str, int]) -> list[Verdict]:
    share = _mean(scores, "coverage_p95")
    verdicts = [verdict("2", 0.93 <= share <= 0.97, f"{percent(share)} of {target} under P95")]
    for band in BANDS:
        if band == "1" or not any(band in s.bands for s in scores):
            continue
        share = _band_coverage(scores, band)
        # all splits judge the same runs over and over, so they say no more than these once
        chance = 1.96 * float(np.sqrt(0.95 * 0.05 / sizes[band]))
        word = HOLDS if 0.93 <= share <= 0.97 else NOISE if abs(share - 0.95) <= chance else FAILS
        text = f"{percent(share)} of {target} at {band} output tokens under P95"
        verdicts.append(
            Verdict("2", word, f"{text} ({sizes[band]} runs: chance alone moves it by ± {percent(chance)})")
        )
    return verdicts


def _split_figures(outcomes: Outcomes, limits: LimitsFound) -> list[dict[str, object]]:
    return [
        {
            "protocol": protocol,
            "target": target,
            "name": name,
            "r_squared_limits": _plain(limits[protocol, target]),
            "splits": _plain(scores),
        }
        for (protocol, target, name), scores in outcomes.items()
    ]


def _plain(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [row._asdict() for row in rows]


def _progress(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
