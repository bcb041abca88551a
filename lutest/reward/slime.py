"""The reward form of slime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lutest.reward.latency import LatencyReward, checked_reward
from lutest.reward.outcome import reward_of


@dataclass(frozen=True)
class SlimeReward:
    """A custom reward function: ``latency = SlimeReward(reward)``, with ``--custom-rm-path my_rewards.latency``.

    slime (as documented: ``slime/rollout/rm_hub/__init__.py``) awaits it with its arguments and a sample, or, for
    rewards of whole groups, a list of samples. Configuration and budget are in ``sample.metadata``; where that has no
    lengths, ``sample.response_length`` and what precedes it in ``sample.tokens`` are.

    Parameters
    ----------
    reward : LatencyReward
        With `parse`, it is given ``sample.response``.
    """

    reward: LatencyReward

    def __post_init__(self) -> None:
        checked_reward(self.reward)

    async def __call__(self, _args: object, sample: Any, **_: object) -> Any:
        """The reward of a sample, or a list of those of several; 0 for one without a configuration.

        Raises
        ------
        ArgumentError, UnknownKeyError, NoDecodeDataError
            As `LatencyReward.judge`.
        """
        return [self._reward(one) for one in sample] if isinstance(sample, list) else self._reward(sample)

    def _reward(self, sample: Any) -> float:
        columns, held = self.reward.columns, sample.metadata or {}
        lengths = {columns.output_tokens: sample.response_length}
        if held.get(columns.text_tokens) is None and sample.tokens:
            lengths[columns.prompt_tokens] = len(sample.tokens) - sample.response_length
        return reward_of(self.reward.judge({**lengths, **held}, sample.response))
