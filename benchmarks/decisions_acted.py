"""Decisions that are carried out: a policy trained on rewards, and choices that are really run and timed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from decisions import Requests, capability, key_means, table_totals
from held_out import Floats, Ints, Runs, load_runs
from rivals import Predict

import lutest
from lutest.profile.presets import PRESETS
from lutest.profile.recorder import Recorder
from lutest.profile.sweep import run_once, run_sweep
from lutest.reward.terms import smooth_penalty, squared_overrun

BUDGETS, GROUP, BATCH, STEPS, RATE = 24, 16, 64, 400, 0.5
# A next better one is worth 0.2 more at most, and must not pay where it breaks the budget in 5 % of cases.
WEIGHTS = lutest.Weights(smooth=0.2 / 0.05, steepness=50.0)
Curve = list[tuple[int, float, float]]  # steps, share over budget, value as a share of the oracle's


class Contexts(NamedTuple):
    """What a policy sees: classes of output lengths and budgets, taken from the requests that it is trained on."""

    lengths: Floats
    budgets_ms: Floats

    def of(self, requests: Requests) -> Ints:
        """The context of each request, by the run of its first configuration."""
        tokens = requests.taken(requests.held.column("output_tokens"))[:, 0]
        length = np.searchsorted(self.lengths, tokens, "right")
        return length * (len(self.budgets_ms) + 1) + np.searchsorted(self.budgets_ms, requests.budgets_ms, "right")


def train_policies(table: lutest.LatencyTable, judged: Requests, trained: Requests, means: Predict) -> dict[str, Curve]:
    """A softmax policy over configurations, or none, for each context, trained by group-relative advantages (GRPO).

    Its reward is what a configuration is worth plus the latency reward: lutest's, or one of means by the same terms.

    Parameters
    ----------
    table : LatencyTable
    judged, trained : Requests
        Held-out requests, and requests of the runs that the table rests on.
    means : callable
        Totals of runs as means have them.
    """
    columns = {name: trained.held.frame[name].to_numpy(dtype=object) for name in table.key_columns}
    columns |= {name: trained.held.frame[name].to_numpy() for name in ("prompt_tokens", "output_tokens")}
    reward = lutest.TRLReward(lutest.LatencyReward(table, weights=WEIGHTS))
    mean_ms = means(trained.held)["total"][0]

    def by_table(runs: Ints, budgets_ms: Floats) -> Floats:
        batch = {name: values[runs].tolist() for name, values in columns.items()}
        given = reward(runs.tolist(), [""] * len(runs), budget_ms=budgets_ms.tolist(), **batch)
        return np.array(given, dtype=np.float64)

    def by_means(runs: Ints, budgets_ms: Floats) -> Floats:
        pairs = zip(mean_ms[runs].tolist(), budgets_ms.tolist(), strict=True)
        terms = [
            smooth_penalty(ms, budget, WEIGHTS.smooth, WEIGHTS.steepness) + squared_overrun(ms, budget)
            for ms, budget in pairs
        ]
        return -np.array(terms)

    return {
        "LatencyReward": _trained(judged, trained, by_table),
        "reward of means": _trained(judged, trained, by_means),
    }


def _trained(judged: Requests, trained: Requests, latency_reward: Callable[[Ints, Floats], Floats]) -> Curve:
    tokens = np.unique(trained.held.column("output_tokens"))
    lengths = tokens if len(tokens) <= BUDGETS else np.quantile(tokens, np.arange(1, BUDGETS) / BUDGETS)
    contexts = Contexts(lengths, np.quantile(trained.budgets_ms, np.arange(1, BUDGETS) / BUDGETS))
    seen, of_judged = contexts.of(trained), contexts.of(judged)
    generator = np.random.default_rng(0)
    none = len(trained.values)  # the choice to decline, worth nothing
    scores = np.zeros(((len(lengths) + 1) * BUDGETS, none + 1))
    curve: Curve = []
    for step in range(STEPS + 1):
        if step % (STEPS // 20) == 0:
            preferred = scores[of_judged].argmax(axis=1)
            found = judged.judge(np.where(preferred == none, -1, preferred))
            curve.append((step, found.over, found.value))
        rows = generator.integers(0, len(seen), BATCH)
        at = seen[rows]
        chances = np.exp(scores[at] - scores[at].max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        drawn = (generator.random((BATCH, GROUP, 1)) > chances.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
        runs = trained.places[rows[:, None], drawn % none].reshape(-1)
        latency = latency_reward(runs, np.repeat(trained.budgets_ms[rows], GROUP)).reshape(BATCH, GROUP)
        worth = np.where(drawn == none, 0.0, trained.values[drawn % none] + latency)
        advantage = (worth - worth.mean(axis=1, keepdims=True)) / (worth.std(axis=1, keepdims=True) + 1e-6)
        gradient = np.zeros_like(chances)
        for member in range(GROUP):
            gradient[np.arange(BATCH), drawn[:, member]] += advantage[:, member]
        gradient -= chances * advantage.sum(axis=1, keepdims=True)
        np.add.at(scores, at, RATE * gradient / GROUP)
    return curve


def draw(learned: dict[str, Curve], frontier: float, path: Path) -> None:
    """Share over budget, and value, over the steps of training."""
    import altair as alt
    import pandas as pd

    rows = [(name, *point) for name, curve in learned.items() for point in curve]
    frame = pd.DataFrame(rows, columns=["reward", "step", "over budget, %", "value, % of the frontier"])
    frame["over budget, %"] *= 100.0
    frame["value, % of the frontier"] *= 100.0 / frontier
    panels = []
    for name, promise in (("over budget, %", 5.0), ("value, % of the frontier", 100.0)):
        lines = alt.Chart(frame).mark_line().encode(x="step", y=alt.Y(name), color="reward")
        rule = alt.Chart(pd.DataFrame({"at": [promise]})).mark_rule(strokeDash=[4, 4]).encode(y="at")
        panels.append((lines + rule).properties(width=300, height=220))
    alt.hconcat(*panels).save(str(path))


def measure(folder: Path, minutes: float, count: int) -> dict[str, Any]:
    """Profile the `cpu` preset, then run what each candidate chooses for the same requests.

    Returns
    -------
    dict
        ``candidates``: name → choices, share over budget, its 95 % interval (Wilson), mean value of the choices;
        ``control``: time of one configuration between the choices, over the median of the table.
    """
    import torch

    from lutest.profile.model import Model

    run_sweep(folder / "profile", "cpu", minutes=minutes, warmup_rounds=1)
    profiled = load_runs(folder / "profile", folder)
    lutest.build(runs=folder / "profile", output=folder / "table.duckdb")
    table = lutest.load(folder / "table.duckdb")
    values, sizes = capability(profiled, False), PRESETS["cpu"]
    low, high = np.log(np.quantile(profiled.column("total_ms"), [0.05, 0.95]))
    chance, model = random.Random(0), Model(sizes, device="cpu", seed=0)
    keys = profiled.frame.drop_duplicates("key").sort_values("key").reset_index(drop=True)
    control = keys.iloc[len(keys) // 2]
    outcomes: dict[str, list[tuple[bool, float]]] = {}
    ratios: list[float] = []
    with ExitStack() as opened, torch.inference_mode():
        recorders: dict[str, Recorder] = {}  # each candidate's own: the same run may be chosen by several

        def timed(name: str, row: Any, number: int, tokens: int) -> float:
            if name not in recorders:
                recorder = Recorder(folder / f"live {len(recorders)}", model=sizes.model_name, device="this one")
                recorders[name] = opened.enter_context(recorder)
            key = (row.tier, int(row.top_k), int(row.num_blocks))
            return run_once(model, recorders[name], key, number, 0, {tokens: 1.0}, warmup=False).total_ms

        for number in range(count):
            tokens = chance.choices(list(sizes.output_lengths), list(sizes.output_lengths.values()))[0]
            budget = float(np.exp(chance.uniform(low, high)))
            asked = Runs(keys.assign(output_tokens=tokens), profiled.steps.iloc[:0])
            estimates = {
                "lutest P95": table_totals(table, asked, 0.95),
                "mean, decode / n": key_means(profiled)(asked)["total"][0],
                "the table's own runs": _own_runs(profiled, len(keys), tokens),
            }
            for name in chance.sample(list(estimates), len(estimates)):
                fitting = np.where(estimates[name] <= budget, values, -1.0)
                if fitting.max() >= 0.0:
                    chosen = int(fitting.argmax())
                    taken = timed(name, keys.iloc[chosen], number, tokens)
                    outcomes.setdefault(name, []).append((taken > budget, float(values[chosen])))
            if number % 5 == 0:
                entry = table[control.tier, int(control.top_k), int(control.num_blocks)]
                ratios.append(timed("control", control, number, 8) / entry.total_ms(None, 8, 0.5))
    return {
        "candidates": {name: _rate(held) for name, held in outcomes.items()},
        "control": float(np.median(ratios)),
    }


def _own_runs(profiled: Runs, count: int, tokens: int) -> Floats:
    """P95 of the 20 runs of each configuration that are nearest in output length."""
    of, total, keys = profiled.column("output_tokens"), profiled.column("total_ms"), profiled.keys()
    nearest = [np.flatnonzero(keys == key)[np.abs(of[keys == key] - tokens).argsort()[:20]] for key in range(count)]
    return np.array([np.quantile(total[runs], 0.95) for runs in nearest])


def _rate(held: Sequence[tuple[bool, float]]) -> tuple[int, float, float, float, float]:
    n, over, z = len(held), sum(broke for broke, _ in held) / len(held), 1.96
    middle, half = (over + z * z / (2 * n)), z * float(np.sqrt(over * (1 - over) / n + z * z / (4 * n * n)))
    scale = 1 + z * z / n
    return n, over, (middle - half) / scale, (middle + half) / scale, float(np.mean([value for _, value in held]))
