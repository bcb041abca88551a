"""The reward form of OpenRLHF."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lutest.reward.latency import LatencyReward, checked_reward
from lutest.reward.outcome import trainer_figures
from lutest.reward.rollout import column_rows


@dataclass(frozen=True)
class OpenRLHFReward:
    """A reward function for OpenRLHF, which takes the place of its reward model.

    OpenRLHF (0.11.2: ``SingleTurnAgentExecutor`` in ``openrlhf/utils/agent.py``) loads the file that is given as the
    remote reward model's URL and takes its ``reward_func``::

        reward_func = OpenRLHFReward(LatencyReward("table.duckdb", 500.0), score=my_accuracy)

    It calls it with three positional lists of one string each, from threads: the query, which is prompt and completion
    decoded together, special tokens included; the prompt; and the label of the data set. Of a data set's columns it
    passes the label alone, so that is where configuration and budget go: a label that is a mapping, or a string with a
    JSON object, holds them under the names of `LatencyReward.columns`; columns by keyword, as lists or tensors, are
    taken too and come before it. The completion is what follows the prompt in the query; a query without its prompt
    (OpenRLHF cuts long ones) counts as one without completion. The length comes from the columns or from
    `LatencyReward.count_tokens`. OpenRLHF logs an exception of a reward function and goes on without reward, so look
    into its log where rewards are missing.

    Parameters
    ----------
    reward : LatencyReward
    score : callable, optional
        Called with the same arguments; returns one score per query, or the dict that OpenRLHF takes. Its scores count
        in full and, held to 0 … 1, scale the efficiency bonus.
    without_configuration : float
        Latency reward of a row that has none; OpenRLHF takes no None.
    """

    reward: LatencyReward
    score: Callable[..., Any] | None = None
    without_configuration: float = 0.0

    def __post_init__(self) -> None:
        checked_reward(self.reward)

    def __call__(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object], **columns: object
    ) -> dict[str, Any]:
        """Rewards of a batch.

        Parameters
        ----------
        queries, prompts, labels
            As OpenRLHF passes them.
        **columns
            Lists or tensors of one value per query; other names are handed on to `score` and ignored here.

        Returns
        -------
        dict
            ``rewards``: float tensor, one per query, the sum of what `score` gives and the latency reward; ``scores``:
            float tensor, what `score` gave, which OpenRLHF filters by, or the rewards where there is no `score`;
            ``extra_logs``: a dict of float tensors ``latency_reward``, ``latency_ms``, ``latency_over_limit``,
            ``latency_unknown``, ``latency_extrapolated``, NaN where there is no figure, and those that `score` gave.

        Raises
        ------
        ArgumentError, UnknownKeyError, NoDecodeDataError
            As `LatencyReward.judge`.
        """
        import torch

        scores: list[float] | None = None
        logs: dict[str, Any] = {}
        if self.score is not None:
            scored = self.score(queries, prompts, labels, **columns)
            if isinstance(scored, Mapping):
                logs = dict(scored.get("extra_logs") or {})
                scored = scored["rewards"]
            scores = [float(value) for value in scored]
        rows = column_rows(columns, self.reward.column_names, len(queries))
        rows = [{**_held(label), **row} for label, row in zip(labels, rows, strict=True)]
        completions = [_completion(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
        outcomes = self.reward.judge_rows(rows, completions, scores)
        rewards = [self.without_configuration if outcome is None else outcome.reward for outcome in outcomes]
        totals = rewards if scores is None else [sum(both) for both in zip(scores, rewards, strict=True)]
        figures = {"latency_reward": rewards}
        for name in trainer_figures(None):
            held = [trainer_figures(outcome)[name] for outcome in outcomes]
            figures[name] = [math.nan if value is None else value for value in held]
        return {
            "rewards": torch.tensor(totals, dtype=torch.float32),
            "scores": torch.tensor(totals if scores is None else scores, dtype=torch.float32),
            "extra_logs": logs | {name: torch.tensor(v, dtype=torch.float32) for name, v in figures.items()},
        }


def _held(label: object) -> Mapping[str, object]:
    """The columns in a label: a mapping, or a string with a JSON object; any other label has none."""
    if isinstance(label, str) and label.lstrip().startswith("{"):
        try:
            label = json.loads(label)
        except ValueError:
            return {}  # an answer that starts with a brace
    return label if isinstance(label, Mapping) else {}


def _completion(query: str, prompt: str) -> str | None:
    """What follows the prompt; special tokens may stand before it."""
    start = query.find(prompt)
    return None if start < 0 else query[start + len(prompt) :]
