"""What people use instead of a latency table, each fitted to the same runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from typing import Any

import numpy as np
import pandas as pd
from held_out import QUANTILES, TARGETS, Floats, Ints, Predicted, Runs, observed
from scipy import optimize

__all__ = ["RIVALS", "Predict", "Rival", "fit_careless_median", "fit_key_median"]

Predict = Callable[[Runs], Predicted]


@dataclass(frozen=True)
class Rival:
    """A rival by its name, and the package that it needs, if any."""

    name: str
    fit: Callable[[Runs], Predict]
    package: str | None = None

    def is_installed(self) -> bool:
        return self.package is None or util.find_spec(self.package) is not None


def _per_token_ms(runs: Runs, fencepost: int) -> Floats:
    """decode_ms of each run divided by its output tokens less `fencepost`; NaN for one token."""
    tokens = runs.column("output_tokens")
    divisor = np.where(tokens > 1, tokens - fencepost, np.nan)
    return runs.column("decode_ms") / divisor


def _by_key(keys: pd.Series[Any], values: Floats) -> Any:
    """Values grouped by key, NaN left out."""
    known = np.isfinite(values)
    return pd.Series(values[known]).groupby(keys.to_numpy()[known])


def _at(per_key: pd.Series[float], runs: Runs) -> Floats:
    return np.asarray(per_key.reindex(runs.frame["key"]), dtype=np.float64)


def fit_key_mean(train: Runs) -> Predict:
    """A dictionary of means, and of 95 % quantiles: of prefill, of steps, and of the mean step of a run."""
    prefill = _by_key(train.frame["key"], train.column("prefill_ms"))
    rate = _by_key(train.frame["key"], _per_token_ms(train, 1))
    by_key = train.frame.assign(steps=train.frame["output_tokens"] - 1).groupby("key")
    mean_step = by_key["decode_ms"].sum() / by_key["steps"].sum()
    step_p95 = rate.quantile(0.95)
    if len(train.steps):
        keys = train.frame["key"].iloc[train.steps["run"]]
        step_p95 = _by_key(keys, train.step_column("step_ms")).quantile(0.95)
    return _dictionary(prefill.mean(), prefill.quantile(0.95), mean_step, step_p95, rate.quantile(0.95), 1)


def fit_key_median(train: Runs) -> Predict:
    """A dictionary of medians, with decode_ms / (n - 1) as the time per step."""
    return _median_dictionary(train, 1)


def fit_careless_median(train: Runs) -> Predict:
    """A dictionary of medians, with decode_ms / n as the time per token: n, not the n - 1 steps that there were."""
    return _median_dictionary(train, 0)


def _median_dictionary(train: Runs, fencepost: int) -> Predict:
    prefill = _by_key(train.frame["key"], train.column("prefill_ms"))
    rate = _by_key(train.frame["key"], _per_token_ms(train, fencepost))
    p95 = rate.quantile(0.95)
    return _dictionary(prefill.median(), prefill.quantile(0.95), rate.median(), p95, p95, fencepost)


def _dictionary(
    prefill: pd.Series[float],
    prefill_p95: pd.Series[float],
    step: pd.Series[float],
    step_p95: pd.Series[float],
    rate_p95: pd.Series[float],
    fencepost: int,
) -> Predict:
    def predict(runs: Runs) -> Predicted:
        keyed = np.array([_at(values, runs) for values in (prefill, prefill_p95)])
        count = np.where(runs.column("output_tokens") > 1, runs.column("output_tokens") - fencepost, 0.0)
        decode = np.array([_at(values, runs) for values in (step, rate_p95)]) * count
        steps = np.array([_at(values, runs) for values in (step, step_p95)])[:, runs.step_runs()]
        return {
            "prefill": keyed,
            "decode step": steps,
            "decode total": decode,
            "total": keyed + np.where(count > 0, decode, 0.0),
        }

    return predict


def fit_key_quantiles(train: Runs) -> Predict:
    """A GROUP BY: type 7 quantiles of each key's prefill, steps and mean steps."""
    prefill = _by_key(train.frame["key"], train.column("prefill_ms"))
    rate = _by_key(train.frame["key"], _per_token_ms(train, 1))
    step = (
        _by_key(train.frame["key"].iloc[train.steps["run"]], train.step_column("step_ms")) if len(train.steps) else rate
    )
    levels = [[held.quantile(q) for q in QUANTILES] for held in (prefill, step, rate)]
    (prefill_p50, prefill_p95), (step_p50, step_p95), (rate_p50, rate_p95) = levels

    def predict(runs: Runs) -> Predicted:
        steps = np.array([_at(step_p50, runs), _at(step_p95, runs)])[:, runs.step_runs()]
        decode = np.array([_at(rate_p50, runs), _at(rate_p95, runs)]) * runs.decode_steps()
        first = np.array([_at(prefill_p50, runs), _at(prefill_p95, runs)])
        total = first + np.where(runs.decode_steps() > 0, decode, 0.0)
        return {"prefill": first, "decode step": steps, "decode total": decode, "total": total}

    return predict


def _linear_quantile(design: Floats, values: Floats, q: float) -> Floats:
    """Coefficients of a linear quantile regression (Koenker and Bassett 1978), by the dual linear programme."""
    scale = np.maximum(np.abs(design).max(axis=0), 1e-12)
    scaled = design / scale
    solved = optimize.linprog(-values, A_eq=scaled.T, b_eq=(1 - q) * scaled.sum(axis=0), bounds=(0, 1), method="highs")
    if solved.status != 0:
        raise RuntimeError(f"linear quantile regression on {len(values)} rows: {solved.message}")
    coefficients: Floats = -solved.eqlin.marginals / scale
    return coefficients


_MOST_ROWS = 4000  # of a key and target, evenly spaced: a linear programme of more takes minutes


def _linear_designs(runs: Runs) -> dict[str, Floats]:
    prompt, steps = runs.column("prompt_tokens"), runs.decode_steps()
    one = np.ones(len(prompt))
    mean_kv = prompt + (steps + 1) / 2
    return {
        "prefill": np.column_stack([one, prompt]),
        "decode step": np.column_stack([np.ones(len(runs.steps)), runs.step_column("kv_len")]),
        "decode total": np.column_stack([one, steps, steps * mean_kv]),
        "total": np.column_stack([one, prompt, steps]),
    }


def fit_linear_quantiles(train: Runs) -> Predict:
    """A straight line per key, target and quantile."""
    designs = _linear_designs(train)
    fitted: dict[tuple[str, int], Floats] = {}
    for target, (rows, values, keys) in observed(train).items():
        for key in np.unique(keys):
            own = np.flatnonzero(keys == key)
            own = own[:: -(-len(own) // _MOST_ROWS)]
            design = designs[target][rows[own]]
            fitted[target, int(key)] = np.array([_linear_quantile(design, values[own], q) for q in QUANTILES])

    def predict(runs: Runs) -> Predicted:
        predicted = {}
        all_keys = runs.keys()
        for target, design in _linear_designs(runs).items():
            keys = all_keys[runs.step_runs()] if target == "decode step" else all_keys
            values = np.full((2, len(keys)), np.nan)
            for key in np.unique(keys):
                if (target, int(key)) in fitted:
                    own = keys == key
                    values[:, own] = fitted[target, int(key)] @ design[own].T
            values[1] = np.maximum(values[0], values[1])  # crossing lines would only harm them
            predicted[target] = values
        return predicted

    return predict


def _tree_features(runs: Runs, target: str) -> Floats:
    names = [*(f"{name}_index" for name in runs.key_columns), "prompt_tokens", "vision_tokens", "text_tokens"]
    if target == "decode step":
        return np.column_stack([*(runs.column(name)[runs.step_runs()] for name in names), runs.step_column("kv_len")])
    if target in ("decode total", "total"):
        names.append("output_tokens")
    return np.column_stack([runs.column(name) for name in names])


def _fit_trees(train: Runs, make_model: Callable[[float, int], Any]) -> Predict:
    """One model per target and quantile, each in the form that it does best in.

    All learn logarithms. Trees cannot multiply or extrapolate, so that they would be lost at long outputs: decode_ms
    is learnt per step, and the total relative to the total that the dictionary of means gives.
    """
    key_mean = fit_key_mean(train)

    def scales(runs: Runs) -> dict[str, Floats | float]:
        per_step = np.maximum(runs.decode_steps(), 1).astype(np.float64)
        return {"prefill": 1.0, "decode step": 1.0, "decode total": per_step, "total": key_mean(runs)["total"][0]}

    models: dict[tuple[str, float], Any] = {}
    train_scales = scales(train)
    for target, (rows, values, _) in observed(train).items():
        if not len(rows):
            continue
        scale = train_scales[target]
        logs = np.log(np.maximum(values / (scale if isinstance(scale, float) else scale[rows]), 1e-3))
        features = _tree_features(train, target)[rows]
        for q in QUANTILES:
            models[target, q] = make_model(q, len(rows)).fit(features, logs)

    def predict(runs: Runs) -> Predicted:
        predicted, runs_scales = {}, scales(runs)
        for target in TARGETS:
            features = _tree_features(runs, target)
            if (target, 0.5) not in models or not len(features):
                predicted[target] = np.full((2, len(features)), np.nan)
                continue
            logs = np.array([models[target, q].predict(features) for q in QUANTILES])
            logs[1] = np.maximum(logs[0], logs[1])
            predicted[target] = np.exp(logs) * runs_scales[target]
        return predicted

    return predict


def fit_lightgbm(train: Runs) -> Predict:
    """LightGBM with a quantile objective."""
    lightgbm = import_module("lightgbm")

    def make_model(q: float, rows: int) -> Any:
        return _LightGbm(
            lightgbm,
            {
                "objective": "quantile",
                "alpha": q,
                "learning_rate": 0.05,
                "num_leaves": 15,
                "min_data_in_leaf": _least_leaf(rows),
                "deterministic": True,
                "force_row_wise": True,
                "num_threads": 1,
                "seed": 0,
                "verbosity": -1,
            },
        )

    return _fit_trees(train, make_model)


class _LightGbm:
    """The native interface of LightGBM in the shape of scikit-learn's, which it needs a second package for."""

    def __init__(self, lightgbm: Any, parameters: dict[str, Any]) -> None:
        self._lightgbm, self._parameters = lightgbm, parameters

    def fit(self, features: Floats, values: Floats) -> Any:
        return self._lightgbm.train(self._parameters, self._lightgbm.Dataset(features, values), num_boost_round=100)


def fit_gradient_boosting(train: Runs) -> Predict:
    """scikit-learn's histogram gradient boosting with a quantile loss."""
    ensemble = import_module("sklearn.ensemble")

    def make_model(q: float, rows: int) -> Any:
        return ensemble.HistGradientBoostingRegressor(
            loss="quantile",
            quantile=q,
            learning_rate=0.05,
            max_iter=100,
            max_leaf_nodes=15,
            min_samples_leaf=_least_leaf(rows),
            early_stopping=False,
            random_state=0,
        )

    return _fit_trees(train, make_model)


def _least_leaf(rows: int) -> int:
    """Rows a leaf at least: enough for a P95 where there are many, fewer where keys have 10 runs."""
    return int(np.clip(rows // 20, 20, 50))


# The MLP: as such models are trained, 50 epochs of Adam at 1e-3.
_EPOCHS = 50
_BATCH = 128


def _mlp_inputs(runs: Runs, run: Ints, position: Floats) -> Floats:
    names = ("vision_tokens", "text_tokens", *(f"{name}_index" for name in runs.key_columns))
    return np.column_stack([*(runs.column(name)[run] for name in names), np.log(position)])


def _positions(runs: Runs) -> tuple[Ints, Floats]:
    """Run and position of every decode step of the runs, timed or not."""
    counts = runs.decode_steps()
    run = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return run, (np.arange(len(run)) - first + 1).astype(np.float64)


def fit_mlp(train: Runs) -> Predict:
    """A network for the mean of prefill and decode step; P95 is P50 times the 95 % quantile of the training ratios.

    Prefill is learnt from one row a run (position 1), steps from one row a step. Runs without timed steps give one
    row, their mean step at their middle position.
    """
    torch = import_module("torch")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    first_rows = _mlp_inputs(train, np.arange(len(train.frame)), np.ones(len(train.frame)))
    if len(train.steps):
        step_run, position = train.step_runs(), train.step_column("position")
        step_ms = train.step_column("step_ms")
    else:
        step_run = np.flatnonzero(train.column("output_tokens") > 1)
        position = train.column("output_tokens")[step_run] / 2
        step_ms = _per_token_ms(train, 1)[step_run]
    inputs = np.vstack([first_rows, _mlp_inputs(train, step_run, position)])
    targets = np.zeros((len(inputs), 2))
    targets[: len(first_rows), 0] = train.column("prefill_ms")
    targets[len(first_rows) :, 1] = step_ms
    known = np.zeros((len(inputs), 2), dtype=bool)
    known[: len(first_rows), 0] = True
    known[len(first_rows) :, 1] = True
    input_mean, input_std = inputs.mean(axis=0), np.maximum(inputs.std(axis=0), 1e-9)
    target_mean = np.array([targets[known[:, j], j].mean() for j in range(2)])
    target_std = np.array([max(float(targets[known[:, j], j].std()), 1e-9) for j in range(2)])
    # a batch holds few runs and many steps: weights make either loss a mean over all of its rows
    weights = torch.tensor(known * (np.array([2.0, 1.0]) * len(inputs) / known.sum(axis=0)), dtype=torch.float32)
    x = torch.tensor((inputs - input_mean) / input_std, dtype=torch.float32)
    y = torch.tensor((targets - target_mean) / target_std, dtype=torch.float32)
    nn = torch.nn
    hidden = [
        nn.Linear(x.shape[1], 256),
        nn.LayerNorm(256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.LayerNorm(256),
        nn.ReLU(),
    ]
    network = nn.Sequential(*hidden, nn.Linear(256, 2))  # the two heads, side by side
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(x)).split(_BATCH):
            optimiser.zero_grad()
            loss = (weights[batch] * (network(x[batch]) - y[batch]) ** 2).sum(dim=1).mean()
            loss.backward()
            optimiser.step()

    def outputs(rows: Floats) -> Floats:
        with torch.no_grad():
            standard = network(torch.tensor((rows - input_mean) / input_std, dtype=torch.float32)).numpy()
        rescaled: Floats = np.asarray(standard, dtype=np.float64) * target_std + target_mean
        return rescaled

    def middle(runs: Runs) -> dict[str, Floats]:
        run, position = _positions(runs)
        prefill = outputs(_mlp_inputs(runs, np.arange(len(runs.frame)), np.ones(len(runs.frame))))[:, 0]
        each_step = outputs(_mlp_inputs(runs, run, position))[:, 1]
        decode = np.bincount(run, each_step, minlength=len(runs.frame)).astype(np.float64)
        timed = runs.step_runs(), runs.step_column("position")
        steps = outputs(_mlp_inputs(runs, *timed))[:, 1]
        return {"prefill": prefill, "decode step": steps, "decode total": decode, "total": prefill + decode}

    fitted, ratio = middle(train), {}
    for target, (rows, values, _) in observed(train).items():
        ratio[target] = float(np.quantile(values / fitted[target][rows], 0.95)) if len(rows) else 1.0

    def predict(runs: Runs) -> Predicted:
        return {target: np.array([values, values * ratio[target]]) for target, values in middle(runs).items()}

    return predict


RIVALS = (
    Rival("key mean", fit_key_mean),
    Rival("key quantiles", fit_key_quantiles),
    Rival("careless median", fit_careless_median),
    Rival("mlp", fit_mlp, "torch"),
    Rival("linear quantiles", fit_linear_quantiles),
    Rival("lightgbm", fit_lightgbm, "lightgbm"),
    Rival("gradient boosting", fit_gradient_boosting, "sklearn"),
)
