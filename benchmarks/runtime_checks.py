"""What `runtime.py` measures beside time per call: import, load, memory, workers under fire, budgets against draws."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

import lutest
from lutest.tablefile.schema import TABLES

__all__ = ["bare_read_s", "build_table", "draws", "hammered", "load_s", "resident_mb"]

READ = [name for name in TABLES if name not in ("sources", "rejected_runs", "prefill_bins", "decode_bins")]
WORKERS = 16
HAMMER_S = 10.0


def build_table(path: Path) -> Path:
    """A table of 75 configurations from made-up runs."""
    chance = np.random.default_rng(0)
    runs = []
    for tier, (least, most) in {"low": (80, 200), "medium": (180, 420), "high": (350, 800)}.items():
        for top_k in (2, 4, 6, 8, 12):
            for blocks in (8, 10, 12, 14, 16):
                prompts, tokens = chance.integers(least, most, 40), 1 + chance.geometric(0.08, 40)
                step = 0.2 * blocks * (1 + 0.1 * top_k) * chance.lognormal(0.0, 0.08, 40)
                prefill = step * (5 + 0.05 * prompts) * chance.lognormal(0.0, 0.05, 40)
                columns = {"prompt_tokens": prompts, "output_tokens": tokens, "prefill_ms": prefill}
                keys = {"tier": tier, "top_k": top_k, "num_blocks": blocks}
                runs.append(pd.DataFrame({**keys, **columns, "decode_ms": step * (tokens - 1)}))
    whole = pd.concat(runs)
    return lutest.build(runs=whole.assign(total_ms=whole.prefill_ms + whole.decode_ms), output=path).output


def bare_read_s(path: str) -> float:
    """Open, SELECT everything that a load reads, close: with DuckDB alone."""
    import duckdb

    start = time.perf_counter()
    with duckdb.connect(path, read_only=True, config={"threads": "1"}) as connection:
        for name in READ:
            connection.execute(f"SELECT * FROM {name}").fetchall()
    return time.perf_counter() - start


def load_s(path: str) -> float:
    start = time.perf_counter()
    lutest.load(path)
    return time.perf_counter() - start


def resident_mb(path: str, with_lutest: bool) -> float:
    """Memory of this process once it has read the table, by DuckDB and NumPy alone or by lutest, and used it."""
    import duckdb

    if with_lutest:
        table = lutest.load(path)
        table.batch.total_ms(np.arange(len(table)), 200, 20, 0.95)
        held: Any = table
    else:
        with duckdb.connect(path, read_only=True, config={"threads": "1"}) as connection:
            held = [connection.execute(f"SELECT * FROM {name}").fetchnumpy() for name in READ]
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    assert held
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def hammered(path: str) -> dict[str, Any]:
    """16 threads and 16 processes on one handle while the file is replaced by two tables in turn."""
    with tempfile.TemporaryDirectory() as folder:
        other = _slower(path, Path(folder) / "other.duckdb")
        place = Path(folder) / "table.duckdb"
        shutil.copyfile(path, place)
        table = lutest.load(place, reload=True)
        expected = [_answers(lutest.load(file)) for file in (path, other)]
        children, queues, results = [], [], []
        for number in range(WORKERS):
            context: Any = multiprocessing.get_context("fork" if number % 2 else "spawn")
            queues.append(context.Queue())
            children.append(context.Process(target=_work_apart, args=(table, expected, queues[-1])))
        for child in children:
            child.start()
        threads = [threading.Thread(target=lambda: results.append(_work(table, expected))) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        rebuilds = 0
        while any(worker.is_alive() for worker in threads):
            rebuilds += 1
            temporary = place.with_suffix(".new")
            shutil.copyfile((path, other)[rebuilds % 2], temporary)
            temporary.replace(place)
            time.sleep(0.2)
        results += [queue.get(timeout=120) for queue in queues]
        for child in children:
            child.join()
    lost = 2 * WORKERS - len(results)
    return {
        "answers": sum(r["answers"] for r in results),
        "torn": sum(r["torn"] for r in results),
        "errors": [e for r in results for e in r["errors"]] + ["a thread died"] * lost,
        "changes_seen": sum(r["changes"] for r in results),
        "rebuilds": rebuilds,
    }


def _slower(path: str, place: Path) -> Path:
    """The same table with other figures, so that a torn answer would show."""
    import duckdb

    shutil.copyfile(path, place)
    with duckdb.connect(str(place)) as connection:
        for name, columns in (
            ("prefill_curve", ("p50_ms", "p95_ms")),
            ("decode_curve", ("p50_ms", "p95_ms", "p50_sum_ms")),
        ):
            connection.execute(f"UPDATE {name} SET {', '.join(f'{c} = 2 * {c}' for c in columns)}")
    return place


def _answers(table: Any) -> list[float]:
    found: list[float] = table.batch.total_ms(np.arange(len(table)), 200, 20, 0.95).tolist()
    return found


def _work(table: Any, expected: list[list[float]]) -> dict[str, Any]:
    counted: dict[str, Any] = {"answers": 0, "torn": 0, "errors": [], "changes": 0}
    stop, before = time.monotonic() + HAMMER_S, None
    key = tuple(table.keys[0])
    singles = {answers[0] for answers in expected}
    while time.monotonic() < stop:
        try:
            answers, single = _answers(table), table.total_ms(*key, 200, 20, 0.95)
        except (lutest.LutestError, OSError, RuntimeError) as error:
            counted["errors"].append(repr(error))
            continue
        counted["answers"] += 2
        counted["torn"] += (answers not in expected) + (single not in singles)
        counted["changes"] += before is not None and answers != before
        before = answers
    return counted


def _work_apart(table: Any, expected: list[list[float]], queue: Any) -> None:
    queue.put(_work(table, expected))


def draws(path: str, count: int = 1_000_000) -> list[dict[str, float]]:
    """p_within and expected_total_ms beside draws of their distribution, and how many standard errors lie between."""
    table = lutest.load(path)
    chance = np.random.default_rng(0)
    workload = max(table.output_lengths, key=lambda name: len(table.output_lengths[name]))
    tokens, runs = np.array(table.output_lengths[workload]).T
    scores = np.array([NormalDist().inv_cdf(q) for q in table.quantiles])
    found = []
    known = [held for held in table.figures.keys if held.decode_curve is not None]
    for held in (known[0], known[len(known) // 2], known[-1]):
        key, prompt = held.key, held.prompt_tokens_p50
        number = table.keys.index(key)
        drawn = chance.choice(len(tokens), count, p=runs / runs.sum())
        levels = np.array([table.batch.total_ms(number, prompt, tokens, q) for q in table.quantiles])
        score = np.clip(chance.standard_normal(count), -3.0, 3.0)
        piece = np.clip(np.searchsorted(scores, score) - 1, 0, len(scores) - 2)
        low, high = levels[piece, drawn], levels[piece + 1, drawn]
        totals = low + (high - low) * (score - scores[piece]) / (scores[piece + 1] - scores[piece])
        expected = table[key].expected_total_ms(prompt, workload)
        error = float(totals.std()) / math.sqrt(count)
        found.append(
            {"held": expected, "drawn": float(totals.mean()), "errors": (expected - float(totals.mean())) / error}
        )
        for share in (0.05, 0.5, 0.95):
            budget = float(np.quantile(totals, share))
            within = table[key].p_within(budget, prompt, workload)
            error = math.sqrt(share * (1 - share) / count)
            found.append({"held": within, "drawn": share, "errors": (within - share) / error})
    return found
