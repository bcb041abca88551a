"""What the runtime costs: answers, batches, import, load, memory; workers under fire; budgets against simulation.

    python benchmarks/runtime.py [TABLE] [--rounds N] [--only PART …] [--json]

Every rival runs in a process of its own, over the same shuffled queries; printed are the median and the 99th percentile
over blocks. In each process the thing that ratios are to takes turns with the rival, block by block, so that a slow
minute of the machine hits both. Without a table, one of 75 configurations is built from made-up
runs. A rival whose package is missing is left out with a line that says so. The last lines tell which targets hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from runtime_checks import bare_read_s, build_table, draws, hammered, load_s, resident_mb
from runtime_rivals import BATCH, SCALAR, BatchRival, ScalarRival, drawn_batch, drawn_queries

import lutest

BLOCKS = 400
SLOW_BLOCK, SLOW_BLOCKS = 20, 20
REPEATS = 30
PARTS = ("scalar", "batch", "start", "workers", "budget")
IMPORTS = ("numpy", "lutest")
BASES = ("dict function", "bare NumPy gather", "bare DuckDB", "import numpy")
_LOOP = """
def loop(block, f, clock):
    start = clock()
    for t, k, b, p, n, e, ap, an in block:
        {call}
    return clock() - start
"""
Figures = dict[str, float]


def timed_loop(call: str) -> Callable[..., int]:
    namespace: dict[str, Callable[..., int]] = {}
    exec(_LOOP.format(call=call), namespace)
    return namespace["loop"]


def measure_scalar(name: str, path: str) -> Figures:
    """Nanoseconds per call."""
    table = lutest.load(path)
    queries = drawn_queries(table)

    def block_of(rival: ScalarRival) -> Callable[[], float]:
        function, loop = rival.make(table), timed_loop(rival.call)
        block = queries[:SLOW_BLOCK] if rival.slow else queries
        return lambda: loop(block, function, time.perf_counter_ns) / len(block)

    rival = SCALAR[name]
    return in_turns(block_of(rival), block_of(SCALAR["dict function"]), SLOW_BLOCKS if rival.slow else BLOCKS)


def measure_batch(name: str, path: str) -> Figures:
    """Nanoseconds per element."""
    table = lutest.load(path)

    def call_of(rival: BatchRival) -> Callable[[], float]:
        function = rival.make(table, *drawn_batch(table, rival.elements))
        return lambda: elapsed_ns(function) / rival.elements

    return in_turns(call_of(BATCH[name]), call_of(BATCH["bare NumPy gather"]), REPEATS)


def measure_start(name: str, path: str) -> Figures:
    """Nanoseconds of a load, or of reading the same with DuckDB alone; MB of memory after it."""
    if name.startswith("memory"):
        memory = resident_mb(path, name == "memory, lutest")
        return {"median": memory, "p99": memory, "ratio": 1.0}
    read = load_s if name == "lutest.load" else bare_read_s
    return in_turns(lambda: read(path) * 1e9, lambda: bare_read_s(path) * 1e9, REPEATS)


def elapsed_ns(function: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    function()
    return time.perf_counter_ns() - start


def in_turns(rival: Callable[[], float], base: Callable[[], float], times: int) -> Figures:
    """Median and p99 of the rival's costs, and its median over that of the base beside it."""
    rival()
    base()
    costs = [(rival(), base()) for _ in range(times)]
    median, beside = (statistics.median(column) for column in zip(*costs, strict=True))
    return {"median": median, "p99": float(np.quantile([cost for cost, _ in costs], 0.99)), "ratio": median / beside}


START = ("bare DuckDB", "lutest.load", "memory, DuckDB and NumPy", "memory, lutest")
MEASURES: dict[str, tuple[tuple[str, ...], Callable[[str, str], Figures]]] = {
    "scalar": (tuple(SCALAR), measure_scalar),
    "batch": (tuple(BATCH), measure_batch),
    "start": (START, measure_start),
}


def in_child(part: str, name: str, path: str) -> Figures | None:
    """What a process of its own measured; None where the rival's package is not installed."""
    command = [sys.executable, __file__, path, "--child", part, "--rival", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        return None
    if done.returncode:
        raise RuntimeError(f"{part}, {name}: {done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def import_ns(module: str) -> float:
    code = f"import time; s = time.perf_counter_ns(); import {module}; print(time.perf_counter_ns() - s)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def measured(part: str, path: str, rounds: int) -> dict[str, Figures]:
    """Every rival of a part, in a process of its own for each round."""
    names, _ = MEASURES[part]
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if (figures := in_child(part, name, path)) is not None:
                found[name].append(figures)
    if part == "start":
        for module in IMPORTS:
            found[f"import {module}"] = [
                in_turns(partial(import_ns, module), partial(import_ns, IMPORTS[0]), 5 * rounds)
            ]
    return {
        name: {figure: statistics.median(held[figure] for held in each) for figure in each[0]} if each else {}
        for name, each in found.items()
    }


def print_rivals(title: str, unit: str, scale: float, found: dict[str, Figures]) -> None:
    print(f"\n{title:<38}{'median ' + unit:>14}{'p99 ' + unit:>14}{'ratio':>10}")
    for name, held in found.items():
        if held:
            print(f"{name:<38}{held['median'] / scale:>14.4g}{held['p99'] / scale:>14.4g}{held['ratio']:>10.2f}")
        else:
            print(f"{name:<38}  left out: its package is not installed")


def targets(result: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """What was wanted, what was measured, and the limit, of the parts that were run."""
    wanted: list[tuple[str, float, str, float]] = []

    def ratio(part: str, name: str, base: str, limit: float, sign: str = "≤") -> None:
        if part in result and result[part][name] and result[part][base]:
            own = base in BASES  # what it took turns with
            figure = result[part][name]["ratio"] / (1.0 if own else result[part][base]["ratio"])
            wanted.append((f"{name} / {base}", figure, sign, limit))

    for name, limit in (
        ("table.lookup", 1.3),
        ("lutest.lookup", 1.3),
        ("entry.prefill_ms(p, 0.95)", 5.0),
        ("entry.total_ms(p, n, 0.95)", 7.0),
        ("entry.total_ms(any p, any n, 0.95)", 9.0),
    ):
        ratio("scalar", name, "dict function", limit)
    batch = "table.batch.total_ms(…, 0.95)"
    ratio("batch", batch, "bare NumPy gather", 15.0)
    ratio("batch", "RegularGridInterpolator", batch, 20.0, "≥")
    ratio("batch", "MLP, one forward", batch, 100.0, "≥")
    ratio("start", "import lutest", "import numpy", 1.1)
    ratio("start", "lutest.load", "bare DuckDB", 3.0)
    if "start" in result:
        more = result["start"]["memory, lutest"]["median"] - result["start"]["memory, DuckDB and NumPy"]["median"]
        wanted.append(("MB above DuckDB and NumPy alone", more, "≤", 15.0))
    if "workers" in result:
        wanted.append(("errors of workers", float(len(result["workers"]["errors"])), "≤", 0.0))
        wanted.append(("torn answers", float(result["workers"]["torn"]), "≤", 0.0))
    if "budget" in result:
        worst = max(abs(row["errors"]) for row in result["budget"])
        wanted.append(("off simulation, standard errors, worst of 12", worst, "≤", 4.0))
    return wanted


def run(path: str, parts: list[str], rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {part: measured(part, path, rounds) for part in MEASURES if part in parts}
    if "workers" in parts:
        result["workers"] = hammered(path)
    if "budget" in parts:
        result["budget"] = draws(path)
    return result


def show(result: dict[str, Any]) -> None:
    if "scalar" in result:
        print_rivals("one answer, shuffled keys", "ns", 1.0, result["scalar"])
    if "batch" in result:
        print_rivals("one element of a batch", "ns", 1.0, result["batch"])
    if "start" in result:
        times = {name: held for name, held in result["start"].items() if not name.startswith("memory")}
        print_rivals("start", "ms", 1e6, times)
        for name in START[2:]:
            print(f"{name:<38}{result['start'][name]['median']:>14.1f} MB")
    if "workers" in result:
        print("\n16 threads and 16 processes on one table that is rebuilt: ", end="")
        print(", ".join(f"{name} {len(v) if isinstance(v, list) else v}" for name, v in result["workers"].items()))
    if "budget" in result:
        print("\nexpected_total_ms and p_within beside 1e6 draws (difference in standard errors of the draws)")
        for row in result["budget"]:
            print(f"{row['held']:>14.6g}{row['drawn']:>14.6g}{row['errors']:>8.2f}")
    print("\ntargets")
    for name, figure, sign, limit in targets(result):
        holds = figure <= limit if sign == "≤" else figure >= limit
        print(f"{'holds' if holds else 'MISSED':<8}{name:<56}{figure:>10.2f} {sign} {limit:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", help="a table file; left out, one is built")
    parser.add_argument("--rounds", type=int, default=3, help="processes per rival, one after the other")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        try:
            print(json.dumps(MEASURES[arguments.child][1](arguments.rival, arguments.table)))
        except ModuleNotFoundError as error:
            print(error, file=sys.stderr)
            sys.exit(3)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.table or str(build_table(Path(folder) / "table.duckdb"))
        result = run(path, arguments.only, arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
