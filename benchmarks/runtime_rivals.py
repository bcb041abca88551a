"""What `runtime.py` times: lutest's verbs, and what one would use instead; each runs in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lutest
from lutest.reader.figures import KeyFigures

__all__ = ["BATCH", "ELEMENTS", "SCALAR", "BatchRival", "Queries", "ScalarRival", "drawn_batch", "drawn_queries"]

BLOCK = 500
ELEMENTS = 100_000
Ints = NDArray[np.int64]
Queries = list[tuple[Any, ...]]
Function = Callable[..., Any]


def drawn_queries(table: lutest.LatencyTable) -> Queries:
    """Keys in random order with prompt and output lengths as the runs have, their entries, and lengths anywhere."""
    chance = random.Random(1)
    held = [key for key in table.figures.keys if key.decode_curve is not None]
    drawn: Queries = []
    for _ in range(BLOCK):
        figures = chance.choice(held)
        prompt = chance.randint(*_measured_prompts(figures))
        anywhere = chance.randint(16, 131_072), chance.randint(1, 32_768)
        drawn.append((*figures.key, prompt, chance.randint(2, 64), table[figures.key], *anywhere))
    return drawn


def _measured_prompts(figures: KeyFigures) -> tuple[int, int]:
    curve = figures.prefill_curve
    known = [x for x, source in zip(curve.at, curve.source, strict=True) if source != "extrapolated"]
    return known[0], known[-1]


def drawn_batch(table: lutest.LatencyTable, count: int) -> tuple[Ints, Ints, Ints]:
    """Ids, prompt and output lengths, drawn like the queries."""
    chance = np.random.default_rng(1)
    known = [i for i, key in enumerate(table.figures.keys) if key.decode_curve is not None]
    ids = chance.choice(known, count)
    first, last = np.array([_measured_prompts(key) for key in table.figures.keys]).T
    return ids, chance.integers(first[ids], last[ids] + 1), chance.integers(2, 65, count)


def dict_function(table: lutest.LatencyTable) -> Function:
    held = {tuple(key): table[key].prefill_p50_ms for key in table}

    def access(tier: str, top_k: int, num_blocks: int) -> float:
        return held[tier, top_k, num_blocks]

    return access


def module_lookup(table: lutest.LatencyTable) -> Function:
    lutest.use(table)
    return lutest.lookup


def numpy_interp(table: lutest.LatencyTable) -> Function:
    held = {}
    for key in table.figures.keys:
        curve = key.prefill_curve
        held[tuple(key.key)] = (np.array(curve.at), np.array(curve.values_ms[table.quantiles.index(0.5)]))

    def interpolate(tier: str, top_k: int, num_blocks: int, prompt_tokens: int) -> Any:
        return np.interp(prompt_tokens, *held[tier, top_k, num_blocks])

    return interpolate


def _grid(table: lutest.LatencyTable, tokens: list[int]) -> Any:
    """SciPy's interpolator over tier, top_k, num_blocks, prompt and, where there are any, output tokens."""
    interpolate = import_module("scipy.interpolate")
    prompts = np.unique([x for key in table.figures.keys for x in key.prefill_curve.at])
    tiers = _tiers(table)
    top_ks, blocks = (np.unique([key[i] for key in table]) for i in (1, 2))
    axes = [np.arange(len(tiers)), top_ks, blocks, prompts, *([np.array(tokens)] if tokens else [])]
    values = np.full([len(axis) for axis in axes], np.nan)
    for number, (tier, top_k, num_blocks) in enumerate(table.keys):
        place = tiers[tier], np.searchsorted(top_ks, top_k), np.searchsorted(blocks, num_blocks)
        if tokens:
            values[place] = table.batch.total_ms(number, prompts[:, None], axes[-1], 0.95)
        else:
            values[place] = table.batch.prefill_ms(number, prompts)
    return interpolate.RegularGridInterpolator(axes, values)


def _tiers(table: lutest.LatencyTable) -> dict[Any, int]:
    return {tier: place for place, tier in enumerate(dict.fromkeys(key[0] for key in table))}


def grid_interpolator(table: lutest.LatencyTable) -> Function:
    grid = _grid(table, [])
    tiers = _tiers(table)

    def interpolate(tier: str, top_k: int, num_blocks: int, prompt_tokens: int) -> Any:
        return grid((tiers[tier], top_k, num_blocks, prompt_tokens))

    return interpolate


def duckdb_query(table: lutest.LatencyTable) -> Function:
    import duckdb

    connection = duckdb.connect(table.path, read_only=True)
    sql = "SELECT p50_ms FROM prefill WHERE tier = ? AND top_k = ? AND num_blocks = ?"

    def query(tier: str, top_k: int, num_blocks: int) -> Any:
        return connection.execute(sql, [tier, top_k, num_blocks]).fetchone()

    return query


def _network() -> tuple[Any, Any]:
    """The MLP of the accuracy benchmark, untrained: what it costs does not depend on what it says."""
    torch = import_module("torch")
    torch.set_num_threads(1)
    layers, width = [], 6
    for _ in range(2):
        layers += [torch.nn.Linear(width, 256), torch.nn.LayerNorm(256), torch.nn.ReLU()]
        width = 256
    return torch, torch.nn.Sequential(*layers, torch.nn.Linear(256, 2)).eval()


def mlp_row(table: lutest.LatencyTable) -> Function:
    torch, network = _network()
    tiers = _tiers(table)

    def predict(tier: str, top_k: int, num_blocks: int, prompt_tokens: int, output_tokens: int) -> float:
        row = torch.tensor([[prompt_tokens, 40.0, tiers[tier], top_k, num_blocks, 1.0]], dtype=torch.float32)
        with torch.inference_mode():
            prefill, step = network(row)[0].tolist()
        return float(prefill + (output_tokens - 1) * step)

    return predict


def _engine() -> Any:
    engine = import_module("aiconfigurator_core.sdk.engine")
    parallel = {"tp_size": 1, "moe_tp_size": 1, "moe_ep_size": 1}
    return engine.EngineHandle.compile("Qwen/Qwen3-30B-A3B", "h100_sxm", "vllm", **parallel)


def engine_prefill(_: lutest.LatencyTable) -> Function:
    handle = _engine()
    found: Function = handle.predict_prefill_latency
    return found


def engine_static(_: lutest.LatencyTable) -> Function:
    handle = _engine()
    found: Function = handle.run_static
    return found


@dataclass(frozen=True)
class ScalarRival:
    """What makes the function f, the call that is timed, and whether it is too slow for long blocks."""

    make: Callable[[lutest.LatencyTable], Function]
    call: str
    slow: bool = False


def table_lookup(table: lutest.LatencyTable) -> Function:
    return table.lookup


SCALAR = {
    "dict function": ScalarRival(dict_function, "f(t, k, b)"),
    "table.lookup": ScalarRival(table_lookup, "f(t, k, b)"),
    "lutest.lookup": ScalarRival(module_lookup, "f(t, k, b)"),
    "entry.prefill_ms(p)": ScalarRival(table_lookup, "e.prefill_ms(p)"),
    "entry.prefill_ms(p, 0.95)": ScalarRival(table_lookup, "e.prefill_ms(p, 0.95)"),
    "entry.total_ms(p, n)": ScalarRival(table_lookup, "e.total_ms(p, n)"),
    "entry.total_ms(p, n, 0.95)": ScalarRival(table_lookup, "e.total_ms(p, n, 0.95)"),
    "entry.total_ms(any p, any n, 0.95)": ScalarRival(table_lookup, "e.total_ms(ap, an, 0.95)"),
    "table[key].total_ms(p, n, 0.95)": ScalarRival(table_lookup, "f(t, k, b).total_ms(p, n, 0.95)"),
    "entry.max_output_tokens(500, p)": ScalarRival(table_lookup, "e.max_output_tokens(500.0, p)"),
    "entry.expected_total_ms(p)": ScalarRival(table_lookup, "e.expected_total_ms(p)", slow=True),
    "entry.p_within(1000, p)": ScalarRival(table_lookup, "e.p_within(1000.0, p)", slow=True),
    "numpy.interp": ScalarRival(numpy_interp, "f(t, k, b, p)"),
    "RegularGridInterpolator": ScalarRival(grid_interpolator, "f(t, k, b, p)", slow=True),
    "MLP, one row": ScalarRival(mlp_row, "f(t, k, b, p, n)", slow=True),
    "DuckDB query": ScalarRival(duckdb_query, "f(t, k, b)", slow=True),
    "aiconfigurator prefill": ScalarRival(engine_prefill, "f(1, p)"),
    "aiconfigurator run_static(osl=64)": ScalarRival(engine_static, "f(batch_size=1, isl=p, osl=64)"),
}


@dataclass(frozen=True)
class BatchRival:
    """What makes the function that is timed from ids, prompt and output lengths, and of how many elements."""

    make: Callable[[lutest.LatencyTable, Ints, Ints, Ints], Callable[[], Any]]
    elements: int = ELEMENTS


def bare_gather(table: lutest.LatencyTable, ids: Ints, prompts: Ints, _: Ints) -> Callable[[], Any]:
    width = int(prompts.max()) + 1
    values, place = np.random.default_rng(0).random(len(table) * width), ids * width + prompts
    return lambda: values[place]


def batch_total(q: float) -> Callable[[lutest.LatencyTable, Ints, Ints, Ints], Callable[[], Any]]:
    def make(table: lutest.LatencyTable, ids: Ints, prompts: Ints, tokens: Ints) -> Callable[[], Any]:
        return lambda: table.batch.total_ms(ids, prompts, tokens, q)

    return make


def batch_grid(table: lutest.LatencyTable, ids: Ints, prompts: Ints, tokens: Ints) -> Callable[[], Any]:
    grid = _grid(table, [1, 2, 4, 8, 16, 32, 64])
    tiers = _tiers(table)
    columns = np.array([(tiers[tier], top_k, num_blocks) for tier, top_k, num_blocks in table.keys])[ids]
    points = np.column_stack([columns, prompts, tokens]).astype(np.float64)
    return lambda: grid(points)


def batch_mlp(table: lutest.LatencyTable, ids: Ints, prompts: Ints, tokens: Ints) -> Callable[[], Any]:
    torch, network = _network()
    tiers = _tiers(table)
    columns = np.array([(tiers[tier], top_k, num_blocks) for tier, top_k, num_blocks in table.keys])[ids]
    rows = torch.tensor(np.column_stack([prompts, tokens, columns, tokens]), dtype=torch.float32)
    steps = torch.tensor(tokens - 1, dtype=torch.float32)

    def predict() -> Any:
        with torch.inference_mode():
            found = network(rows)
            return found[:, 0] + steps * found[:, 1]

    return predict


def _module(compiled: bool) -> Callable[[lutest.LatencyTable, Ints, Ints, Ints], Callable[[], Any]]:
    def make(table: lutest.LatencyTable, ids: Ints, prompts: Ints, tokens: Ints) -> Callable[[], Any]:
        torch = import_module("torch")
        on_gpu = torch.cuda.is_available()
        device = "cuda" if on_gpu else "cpu"
        torch.set_num_threads(1)
        module: Any = table.to_torch(device, 0.95)
        if compiled:
            module = torch.compile(module, fullgraph=True)
        given = [torch.as_tensor(array, device=device) for array in (ids, prompts, tokens)]

        def answer() -> Any:
            with torch.inference_mode():
                found = module(*given)
            if on_gpu:
                torch.cuda.synchronize()
            return found

        return answer

    return make


BATCH = {
    "bare NumPy gather": BatchRival(bare_gather),
    "table.batch.total_ms(…, 0.95)": BatchRival(batch_total(0.95)),
    "table.batch.total_ms(…, 0.5)": BatchRival(batch_total(0.5)),
    "to_torch, eager": BatchRival(_module(compiled=False)),
    "to_torch, torch.compile": BatchRival(_module(compiled=True)),
    "RegularGridInterpolator": BatchRival(batch_grid, 20_000),
    "MLP, one forward": BatchRival(batch_mlp, 10_000),
}
