"""The reward form of verl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from lutest.reader.errors import ArgumentError
from lutest.reward.latency import LatencyReward, checked_reward
from lutest.reward.outcome import trainer_figures
from lutest.reward.rollout import Columns
from lutest.reward.terms import Weights

Score = Callable[..., float | dict[str, Any]]

_OF_REWARD_MODEL = ("reward_router_address", "reward_model_tokenizer")


@dataclass(frozen=True)
class VerlReward:
    """A custom reward function for verl, which takes the place of its whole score.

    verl (0.9.1: ``get_custom_reward_fn`` in ``verl/trainer/ppo/reward.py`` and its reward managers) loads a file by its
    path and takes an object of it by name::

        compute_score = VerlReward(LatencyReward("table.duckdb", 500.0), score=my_accuracy)

    It calls it with the keywords ``data_source``, ``solution_str`` (special tokens left out), ``ground_truth`` and
    ``extra_info``, with ``reward_kwargs`` of its configuration, and where it runs a reward model also with
    ``reward_router_address`` and ``reward_model_tokenizer``; from a thread pool, or from Ray actors to which it was
    pickled. It passes no token ids: the length comes from `extra_info` or from `LatencyReward.count_tokens`.

    Parameters
    ----------
    reward : LatencyReward
        Reads the configuration from ``extra_info``, under the names of its columns.
    score : callable, optional
        Called as verl would call it; its score counts in full and, held to 0 … 1, scales the efficiency bonus.
    without_configuration : float
        Latency reward of a row that has none; verl takes no None.
    """

    reward: LatencyReward
    score: Score | None = None
    without_configuration: float = 0.0

    def __post_init__(self) -> None:
        checked_reward(self.reward)

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: object,
        extra_info: Mapping[str, object] | None = None,
        **reward_kwargs: object,
    ) -> dict[str, Any]:
        """Score of a rollout.

        Parameters
        ----------
        data_source, solution_str, ground_truth, extra_info
            As verl passes them.
        **reward_kwargs
            Handed on to `score`.

        Returns
        -------
        dict
            ``score``: what verl trains on, the sum of what `score` gives and the latency reward; ``acc``: what `score`
            gave, for verl's validation; ``latency_reward``, ``latency_ms``, ``latency_limit_ms``,
            ``latency_over_limit``, ``latency_unknown``; and the other fields that `score` gave. Always the same keys,
            which verl relies on; None, which verl leaves out of its means, where there is no figure.

        Raises
        ------
        ArgumentError, UnknownKeyError, NoDecodeDataError
            As `LatencyReward.judge`.
        """
        given: dict[str, Any] = {"score": 0.0}
        accuracy = 1.0
        if self.score is not None:
            run = {"data_source": data_source, "solution_str": solution_str, "ground_truth": ground_truth}
            scored = self.score(**run, extra_info=extra_info, **reward_kwargs)
            given = dict(scored) if isinstance(scored, Mapping) else {"score": scored}
            accuracy = float(given["score"])
            given.setdefault("acc", accuracy)
        outcome = self.reward.judge(extra_info or {}, solution_str, accuracy)
        reward = self.without_configuration if outcome is None else outcome.reward
        figures = {"latency_limit_ms": outcome and outcome.limit_ms, **trainer_figures(outcome)}
        return {**given, "score": float(given["score"]) + reward, "latency_reward": reward, **figures}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: Mapping[str, object] | None = None,
    **reward_kwargs: object,
) -> dict[str, Any]:
    """`VerlReward` from verl's configuration alone, without a file of one's own.

    Parameters
    ----------
    data_source, solution_str, ground_truth, extra_info
        As verl passes them.
    **reward_kwargs
        What verl passes for its reward model, handed on to `score`; and arguments of `LatencyReward`, `table` among
        them, and of `VerlReward`. Functions may be given as
        ``"package.module:name"``, `weights` and `columns` as mappings. Made once per process for the same arguments::

            reward.custom_reward_function:
              path: pkg://lutest.reward.verl
              name: compute_score
              reward_kwargs: {table: table.duckdb, budget_ms: 500, score: "my_project.rewards:accuracy"}

    Returns
    -------
    dict
        As `VerlReward`.

    Raises
    ------
    TableError, ArgumentError, UnknownKeyError, NoDecodeDataError
    """
    passed = {name: reward_kwargs.pop(name) for name in _OF_REWARD_MODEL if name in reward_kwargs}
    try:
        options: dict[str, Any] = {name: _option(name, value) for name, value in reward_kwargs.items()}
        reward = _reward(**options)
    except TypeError as error:
        raise ArgumentError(f"reward_kwargs: {error}") from error
    return reward(data_source, solution_str, ground_truth, extra_info, **passed)


def _option(name: str, value: object) -> object:
    if name in ("weights", "columns") and isinstance(value, Mapping):
        return (Weights if name == "weights" else Columns)(**value)
    if name in ("parse", "count_tokens", "score") and isinstance(value, str):
        module, separator, function = value.partition(":")
        if not separator or not module or not function:
            raise ArgumentError(f"{name} is {value!r}; allowed: a function, or 'package.module:name'")
        return getattr(import_module(module), function)
    return value


@lru_cache(maxsize=16)
def _reward(score: Score | None = None, without_configuration: float = 0.0, **options: Any) -> VerlReward:
    return VerlReward(LatencyReward(**options), score, without_configuration)
