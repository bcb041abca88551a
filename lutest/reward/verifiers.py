"""The reward form of verifiers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lutest.reader.loading import chosen_table
from lutest.reward.latency import LatencyReward, checked_reward
from lutest.reward.outcome import reward_of
from lutest.reward.rollout import held_by


@dataclass(frozen=True)
class VerifiersReward:
    """A reward of a task: ``await VerifiersReward(latency_reward)(task, trace)``.

    verifiers (0.4.0: ``Task.score`` and ``load_plugged_fn`` in ``verifiers/v1``) calls a task's method under
    ``@vf.reward``, or the function that its configuration names by ``fn``, such as ``my_rewards.py:latency`` or
    `latency` below, with the task's data and the trace, and adds what it returns, times its weight. Configuration and
    budget are read from the fields of the task's data. The output length is ``trace.num_output_tokens``, all turns
    together; the prompt's is ``trace.num_input_tokens`` where the data has none. Both are what the server reported, and
    count as unknown where it reported nothing.

    Parameters
    ----------
    reward : LatencyReward
        With `parse`, it is given what the policy wrote, ``trace.last_reply``.
    """

    reward: LatencyReward

    def __post_init__(self) -> None:
        checked_reward(self.reward)

    async def __call__(self, task: Any, trace: Any) -> float:
        """The reward of a trace; 0 for a task without a configuration.

        Raises
        ------
        ArgumentError, UnknownKeyError, NoDecodeDataError
            As `LatencyReward.judge`.
        """
        columns = self.reward.columns
        tokens = {columns.prompt_tokens: trace.num_input_tokens, columns.output_tokens: trace.num_output_tokens}
        counted = {name: count for name, count in tokens.items() if count}
        given = held_by(task)
        if given.get(columns.text_tokens) is not None:
            counted.pop(columns.prompt_tokens, None)
        row = {**counted, **{name: value for name, value in given.items() if value is not None}}
        return reward_of(self.reward.judge(row, trace.last_reply))


async def latency(task: Any, trace: Any) -> float:
    """`VerifiersReward` by configuration alone, of the table of `lutest.use`, or else of $LUTEST_TABLE::

    [env.taskset.task.rewards.latency]
    fn = "lutest.reward.verifiers:latency"
    """
    return await _of_table(chosen_table())(task, trace)


@lru_cache(maxsize=8)
def _of_table(table: Any) -> VerifiersReward:
    return VerifiersReward(LatencyReward(table))
