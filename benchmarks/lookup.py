"""What one answer costs: lutest beside a dict access, numpy.interp, SciPy's grid interpolator and a DuckDB query.

    python benchmarks/lookup.py [TABLE] [--json]

Every rival runs in a process of its own, over the same shuffled queries, in blocks. Printed:
median and p99 over the blocks, and the median as a multiple of the dict function's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lutest

BLOCK, BLOCKS = 500, 400
SLOW_BLOCK, SLOW_BLOCKS = 20, 20
TABLE = Path(__file__).parent.parent / "tables" / "olmoe-cpu-direct.duckdb"


def queries(table: lutest.LatencyTable) -> list[tuple[object, ...]]:
    """Keys in random order with their entries, and prompt and output lengths as the runs have them."""
    chance = random.Random(1)
    held = [key for key in table.figures.keys if key.decode_curve is not None]
    drawn: list[tuple[object, ...]] = []
    for _ in range(BLOCK):
        figures = chance.choice(held)
        at = figures.prefill_curve.at
        drawn.append((*figures.key, chance.randint(at[0], at[-1]), chance.randint(2, 64), table[figures.key]))
    return drawn


def dict_function(table: lutest.LatencyTable) -> Callable[..., object]:
    held = {tuple(key): table[key].prefill_p50_ms for key in table}

    def access(tier: str, top_k: int, num_blocks: int) -> float:
        return held[tier, top_k, num_blocks]

    return access


def module_lookup(table: lutest.LatencyTable) -> Callable[..., object]:
    lutest.use(table)
    return lutest.lookup


def numpy_interp(table: lutest.LatencyTable) -> Callable[..., object]:
    held = {}
    for key in table.figures.keys:
        curve = key.prefill_curve
        held[tuple(key.key)] = (np.array(curve.at), np.array(curve.values_ms[table.quantiles.index(0.5)]))

    def interpolate(tier: str, top_k: int, num_blocks: int, prompt_tokens: int) -> object:
        return np.interp(prompt_tokens, *held[tier, top_k, num_blocks])

    return interpolate


def grid_interpolator(table: lutest.LatencyTable) -> Callable[..., object]:
    from scipy.interpolate import RegularGridInterpolator

    prompts = np.unique([x for key in table.figures.keys for x in key.prefill_curve.at])
    top_ks, blocks = (np.unique([key[i] for key in table]) for i in (1, 2))
    values = np.full((len(table.tiers), len(top_ks), len(blocks), len(prompts)), np.nan)
    for key in table:
        place = table.tiers.index(key.tier), np.searchsorted(top_ks, key.top_k), np.searchsorted(blocks, key.num_blocks)
        values[place] = [table[key].prefill_ms(int(x)) for x in prompts]
    grid = RegularGridInterpolator((np.arange(len(table.tiers)), top_ks, blocks, prompts), values)
    tiers = {tier: place for place, tier in enumerate(table.tiers)}

    def interpolate(tier: str, top_k: int, num_blocks: int, prompt_tokens: int) -> object:
        return grid((tiers[tier], top_k, num_blocks, prompt_tokens))

    return interpolate


def duckdb_query(table: lutest.LatencyTable) -> Callable[..., object]:
    import duckdb

    connection = duckdb.connect(table.path, read_only=True)
    sql = "SELECT p50_ms FROM prefill WHERE tier = ? AND top_k = ? AND num_blocks = ?"

    def query(tier: str, top_k: int, num_blocks: int) -> object:
        return connection.execute(sql, [tier, top_k, num_blocks]).fetchone()

    return query


# name → what makes the function f, the call that is timed, and whether it is too slow for long blocks
RIVALS: dict[str, tuple[Callable[[lutest.LatencyTable], Callable[..., object]], str, bool]] = {
    "dict function": (dict_function, "f(t, k, b)", False),
    "table.lookup": (lambda table: table.lookup, "f(t, k, b)", False),
    "lutest.lookup": (module_lookup, "f(t, k, b)", False),
    "entry.prefill_ms()": (lambda table: table.lookup, "e.prefill_ms()", False),
    "entry.prefill_ms(p)": (lambda table: table.lookup, "e.prefill_ms(p)", False),
    "table.prefill_ms(key, p)": (lambda table: table.prefill_ms, "f(t, k, b, p)", False),
    "entry.total_ms(p, n)": (lambda table: table.lookup, "e.total_ms(p, n)", False),
    "entry.total_ms(p, n, 0.95)": (lambda table: table.lookup, "e.total_ms(p, n, 0.95)", False),
    "table.total_ms(key, p, n, 0.95)": (lambda table: table.total_ms, "f(t, k, b, p, n, 0.95)", False),
    "numpy.interp": (numpy_interp, "f(t, k, b, p)", False),
    "entry.max_output_tokens(500, p)": (lambda table: table.lookup, "e.max_output_tokens(500.0, p)", False),
    "RegularGridInterpolator": (grid_interpolator, "f(t, k, b, p)", True),
    "DuckDB query": (duckdb_query, "f(t, k, b)", True),
}
_LOOP = """
def loop(block, f, clock):
    start = clock()
    for t, k, b, p, n, e in block:
        {call}
    return clock() - start
"""


def timed_loop(call: str) -> Callable[..., int]:
    namespace: dict[str, Callable[..., int]] = {}
    exec(_LOOP.format(call=call), namespace)
    return namespace["loop"]


def measure(name: str, path: str) -> dict[str, float]:
    """Nanoseconds per call, median and p99 over the blocks."""
    table = lutest.load(path)
    make, call, slow = RIVALS[name]
    function, loop = make(table), timed_loop(call)
    size, blocks = (SLOW_BLOCK, SLOW_BLOCKS) if slow else (BLOCK, BLOCKS)
    block = queries(table)[:size]
    loop(block, function, time.perf_counter_ns)
    costs = [loop(block, function, time.perf_counter_ns) / size for _ in range(blocks)]
    return {"median_ns": statistics.median(costs), "p99_ns": float(np.quantile(costs, 0.99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", default=str(TABLE), help="a table file")
    parser.add_argument("--rounds", type=int, default=3, help="processes per rival, one after the other")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rival", choices=RIVALS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival:
        print(json.dumps(measure(arguments.rival, arguments.table)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in RIVALS}
    for _ in range(arguments.rounds):  # rivals take turns, so that a slow minute of the machine hits all of them
        for name in RIVALS:
            command = [sys.executable, __file__, arguments.table, "--rival", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds[name].append(json.loads(done.stdout))
    result = {
        name: {figure: statistics.median(r[figure] for r in held) for figure in held[0]}
        for name, held in rounds.items()
    }
    base = result["dict function"]["median_ns"]
    if arguments.json:
        print(
            json.dumps({name: {**held, "ratio": held["median_ns"] / base} for name, held in result.items()}, indent=2)
        )
        return
    print(f"{'':<34}{'median ns':>12}{'p99 ns':>12}{'ratio':>9}")
    for name, held in result.items():
        print(f"{name:<34}{held['median_ns']:>12.0f}{held['p99_ns']:>12.0f}{held['median_ns'] / base:>9.2f}")


if __name__ == "__main__":
    main()
