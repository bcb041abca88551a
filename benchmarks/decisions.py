"""Does a decision keep its promise? Budgets decided by lutest, by what people use instead, and by a trained policy.

    python benchmarks/decisions.py [--only offline learned live] [--picture FILE.svg] [--json FILE]

offline: halves of the shipped runs are learnt from, requests are drawn from the others: of every configuration a run
that nobody saw, of about the same output length. Each candidate takes the most valuable configuration whose estimate
fits the budget; what that run took tells whether it kept it. learned: a policy trained on the reward, judged likewise.
live: the preset `cpu` is profiled here, and each choice is run and timed; a control, one configuration again and
again, shows how the machine drifts. Everything but `live` is seeded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import duckdb
import numpy as np
from held_out import KEYS, Built, Floats, Ints, Runs, build_table, load_runs, split
from numpy.typing import NDArray
from rivals import RIVALS, Predict, fit_careless_median

import lutest

RUNS = Path(__file__).resolve().parent.parent / "tables" / "runs"
PROMISE = 0.05
MOST_SERVING_RUNS = 300  # of a configuration, in the order of a hash

Bools = NDArray[np.bool_]


class Judged(NamedTuple):
    """Of a candidate's choices: over budget, with a 95 % interval; value and regret as shares of an oracle's value."""

    choices: int
    over: float
    low: float
    high: float
    value: float
    regret: float


@dataclass(frozen=True)
class Requests:
    """Requests and, of each configuration, the held-out run that shows what it takes: (request, configuration)."""

    held: Runs
    places: Ints
    budgets_ms: Floats
    values: Floats

    def taken(self, per_run: NDArray[Any]) -> NDArray[Any]:
        """What is known of each held-out run, for each request and configuration."""
        return per_run[self.places]

    def total_ms(self) -> Floats:
        return self.taken(self.held.column("total_ms"))

    def chosen(self, fits: Bools, estimate_ms: Floats) -> Ints:
        """The most valuable configuration that fits, the fastest of equals; -1 where none does."""
        worth = np.where(fits, self.values - 1e-9 * estimate_ms / max(float(estimate_ms.max()), 1.0), -np.inf)
        return np.where(fits.any(axis=1), worth.argmax(axis=1), -1)

    def judge(self, choice: Ints) -> Judged:
        """Requests that share a held-out run are no independent ones: the interval is by held-out run."""
        rows = np.flatnonzero(choice >= 0)
        over = self.total_ms()[rows, choice[rows]] > self.budgets_ms[rows]
        value = self.values[choice[rows]]
        best = self.chosen(self.total_ms() <= self.budgets_ms[:, None], self.total_ms())
        oracle = float(self.values[best[best >= 0]].sum())
        share = float(over.mean())
        _, run = np.unique(self.places[rows, choice[rows]], return_inverse=True)
        apart = np.bincount(run, over - share)
        error = 1.96 * float(np.sqrt((apart**2).sum())) / len(rows)
        kept = float(value[~over].sum())
        return Judged(len(rows), share, share - error, share + error, float(value.sum()) / oracle, 1.0 - kept / oracle)


def capability(runs: Runs, is_serving: bool) -> Floats:
    """Values of configurations: users that share a GPU, or tier times experts times blocks; each over the largest."""
    keys = runs.frame.drop_duplicates("key").sort_values("key")
    tier, first, second = (keys[name].to_numpy(dtype=np.float64) for name in ("tier_index", "top_k", "num_blocks"))
    worth = second / first if is_serving else (tier + 1) * first * second
    return np.asarray(worth / worth.max(), dtype=np.float64)


def drawn(held: Runs, values: Floats, count: int, seed: int, known_length: bool) -> Requests:
    """Requests: an output length, of each configuration one of the five held-out runs nearest to it (where nobody knows
    the length, any), and a budget, as likely anywhere on a logarithmic scale from the fastest runs to the slowest."""
    generator = np.random.default_rng(seed)
    tokens, keys, total = held.column("output_tokens"), held.keys(), held.column("total_ms")
    length = generator.choice(tokens, count)
    places = np.empty((count, len(values)), dtype=np.int64)
    for key in range(len(values)):
        own = np.flatnonzero(keys == key)
        own = own[np.lexsort((generator.random(len(own)), tokens[own]))]
        at = np.searchsorted(tokens[own], length, "left") + generator.integers(-2, 3, count)
        if not known_length:
            at = generator.integers(0, len(own), count)
        places[:, key] = own[np.clip(at, 0, len(own) - 1)]
    low, high = np.log(np.quantile(total, [0.02, 0.98]))
    return Requests(held, places, np.exp(generator.uniform(low, high, count)), values)


def halves(is_serving: bool, seed: int, folder: Path) -> tuple[Built, Runs, Runs, Floats]:
    """A table of half of the runs, these runs, the others, and values of the configurations."""
    source = RUNS / "cpu-preset.parquet"
    if is_serving:  # its key columns in the places of the default ones, which the rivals know
        source = folder / "serving.parquet"
        duckdb.execute(
            f"""
            COPY (SELECT gpu AS tier, n_gpus AS top_k, users AS num_blocks, * EXCLUDE (gpu, n_gpus, users, workload)
            FROM read_parquet('{RUNS / "llama-13b-serving.parquet"}') WHERE output_tokens = len(decode_steps_ms) + 1
            QUALIFY row_number() OVER (PARTITION BY gpu, n_gpus, users ORDER BY hash(sample_id)) <= {MOST_SERVING_RUNS})
            TO '{source}' (FORMAT parquet)
            """
        )
    runs = load_runs(source, folder)
    train, test = (runs.take(places) for places in split(runs, seed, None))
    built = build_table(train.frame)
    return built, train.take(built.accepted), test, capability(runs, is_serving)


def table_totals(table: lutest.LatencyTable, held: Runs, q: float) -> Floats:
    """Totals of held-out runs, as the table has them."""
    tokens = held.frame["output_tokens"].to_numpy()
    return table.batch.total_ms(ids_of(table, held), held.frame["prompt_tokens"].to_numpy(), tokens, q)


def ids_of(table: lutest.LatencyTable, held: Runs) -> Ints:
    return table.batch.key_ids(held.frame["tier"].to_numpy(dtype=object), *(held.frame[name] for name in KEYS[1:]))


def without_steps(runs: Runs) -> Runs:
    """For totals alone: the rivals learn those of runs."""
    return Runs(runs.frame, runs.steps.iloc[:0])


def rivals(train: Runs) -> Iterator[tuple[str, Predict, int]]:
    """Names, and which quantile of their totals is held against the budget."""
    yield "mean, decode / n", key_means(train), 0
    yield "P50s added up", fit_careless_median(train), 0
    for rival in RIVALS:
        if rival.is_installed():
            name = "P95s added up" if rival.name == "key mean" else f"{rival.name} P95"
            yield name, rival.fit(without_steps(train)), 1


def key_means(train: Runs) -> Predict:
    """As people do it: mean prefill, and mean decode / n times the output tokens."""
    frame = train.frame.assign(rate=train.frame["decode_ms"] / train.frame["output_tokens"])
    means = frame.groupby("key")[["prefill_ms", "rate"]].mean()

    def predict(runs: Runs) -> dict[str, Floats]:
        prefill, rate = means.reindex(runs.frame["key"]).to_numpy().T
        total = prefill + rate * runs.column("output_tokens")
        return {"total": np.array([total, total])}

    return predict


def offline(is_serving: bool, splits: int, count: int) -> dict[str, dict[str, list[Judged]]]:
    """Known and unknown lengths → candidate → what became of its choices, one a split."""
    found: dict[str, dict[str, list[Judged]]] = {"known": {}, "unknown": {}}

    def note(length: str, name: str, requests: Requests, fits: Bools, estimate_ms: Floats) -> None:
        found[length].setdefault(name, []).append(requests.judge(requests.chosen(fits, estimate_ms)))

    for seed in range(splits):
        with tempfile.TemporaryDirectory(prefix="lutest-decisions-") as folder:
            built, train, held, values = halves(is_serving, seed, Path(folder))
        table, everywhere = built.table, without_steps(held)
        known = drawn(held, values, count, seed, True)
        unknown = drawn(held, values, count, seed, False)
        budget = unknown.budgets_ms[:, None]
        estimates = {f"lutest P{100 * q:.0f}": table_totals(table, held, q) for q in (0.95, 0.5)}
        prompts, ids = unknown.taken(held.frame["prompt_tokens"].to_numpy()), unknown.taken(ids_of(table, held))
        p_within = table.batch.p_within(ids, budget, prompts)
        note("unknown", "lutest p_at_least=0.95", unknown, p_within >= 1.0 - PROMISE, 1.0 - p_within)
        expected = table.batch.expected_total_ms(ids, prompts)
        note("unknown", "lutest expected total", unknown, expected <= budget, expected)
        typical = held.frame.assign(output_tokens=round(float(train.frame["output_tokens"].mean())))
        for name, predict, level in rivals(train):
            print(f"  split {seed}: {name}", file=sys.stderr)
            estimates[name] = predict(everywhere)["total"][level]
            at_mean = unknown.taken(predict(Runs(typical, everywhere.steps))["total"][level])
            note("unknown", f"{name}, at the mean length", unknown, at_mean <= budget, at_mean)
        for name, per_run in estimates.items():
            estimate = known.taken(per_run)
            note("known", name, known, estimate <= known.budgets_ms[:, None], estimate)
    return found


def pooled(judged: list[Judged]) -> Judged:
    """Over splits, weighted by choices; the half widths as of independent ones."""
    weights = np.array([one.choices for one in judged], dtype=np.float64)
    shares = weights / weights.sum()
    over, value, regret = (
        float(shares @ [getattr(one, name) for one in judged]) for name in ("over", "value", "regret")
    )
    half = float(np.sqrt(((shares * [(one.high - one.low) / 2 for one in judged]) ** 2).sum()))
    return Judged(int(weights.sum()), over, over - half, over + half, value, regret)


def print_judged(title: str, found: Mapping[str, list[Judged]]) -> None:
    print(f"\n{title:<44}{'choices':>8}{'over %':>8}{'95 % interval':>16}{'value':>8}{'regret':>8}")
    for name, held in found.items():
        one = pooled(held)
        interval = f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        print(f"{name:<44}{one.choices:>8,}{100 * one.over:>8.1f}{interval:>16}{one.value:>8.3f}{one.regret:>8.3f}")


def run_offline(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in options.data:
        found = offline(name == "serving", options.splits, options.requests)
        for length, candidates in found.items():
            print_judged(f"{name}, output length {length}", candidates)
        result[name] = {
            length: {candidate: pooled(held)._asdict() for candidate, held in candidates.items()}
            for length, candidates in found.items()
        }
    return result


def run_learned(options: argparse.Namespace) -> dict[str, Any]:
    from decisions_acted import draw, train_policies

    with tempfile.TemporaryDirectory(prefix="lutest-decisions-") as folder:
        built, train, held, values = halves(False, 0, Path(folder))
    requests = drawn(held, values, options.requests, 0, True)
    promised = requests.taken(table_totals(built.table, held, 0.95))
    frontier = requests.judge(requests.chosen(promised <= requests.budgets_ms[:, None], promised))
    means = requests.taken(key_means(train)(held)["total"][0])
    learned = train_policies(built.table, requests, drawn(train, values, options.requests, 1, True), key_means(train))
    print(f"\n{'trained on':<28}{'steps':>7}{'over %':>8}{'value / frontier':>18}")
    for name, curve in learned.items():
        for step, over, value in curve[:: max(1, len(curve) // 8)] + curve[-1:]:
            print(f"{name:<28}{step:>7}{100 * over:>8.1f}{value / frontier.value:>18.3f}")
    by_means = requests.judge(requests.chosen(means <= requests.budgets_ms[:, None], means))
    print(f"choosing by lutest P95: {100 * frontier.over:.1f} % over, value {frontier.value:.3f} of the oracle's")
    print(f"choosing by means: {100 * by_means.over:.1f} % over, value {by_means.value:.3f} of the oracle's")
    if options.picture is not None:
        draw(learned, frontier.value, options.picture)
    return {"frontier": frontier._asdict(), "learned": learned}


def run_live(options: argparse.Namespace) -> dict[str, Any]:
    from decisions_acted import measure

    with tempfile.TemporaryDirectory(prefix="lutest-decisions-") as folder:
        found = measure(Path(folder), options.minutes, options.live_requests)
    print(f"\n{'live':<24}{'choices':>8}{'over %':>8}{'95 % interval':>16}{'value':>8}")
    for name, (choices, over, low, high, value) in found["candidates"].items():
        print(f"{name:<24}{choices:>8}{100 * over:>8.1f}{f'{100 * low:.1f} to {100 * high:.1f}':>16}{value:>8.3f}")
    print(f"control: the machine took {found['control']:.2f} times what it took under the profile")
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "offline": run_offline,
    "learned": run_learned,
    "live": run_live,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data", nargs="+", choices=("cpu", "serving"), default=["cpu", "serving"])
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--requests", type=int, default=5000, help="of each split")
    parser.add_argument("--minutes", type=float, default=6.0, help="of profiling, before the live part")
    parser.add_argument("--live-requests", type=int, default=300)
    parser.add_argument("--picture", type=Path, help="where to draw the training, SVG or PNG; needs altair")
    parser.add_argument("--json", type=Path, help="write all figures there as well")
    options = parser.parse_args()
    result = {part: PARTS[part](options) for part in options.only}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
