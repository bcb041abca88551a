"""The reward form of OpenEnv."""

from __future__ import annotations

from dataclasses import dataclass

from lutest.reward.latency import LatencyReward, checked_reward
from lutest.reward.outcome import reward_of
from lutest.reward.rollout import held_by


@dataclass(frozen=True)
class OpenEnvReward:
    """The ``forward`` of a rubric::

        class Latency(Rubric):
            forward = OpenEnvReward(latency_reward)

    OpenEnv (0.10.0: ``openenv/core/rubrics/base.py``) calls ``forward(action, observation)`` after a step of an
    environment. Configuration, budget and lengths are read from the fields of the two and from their ``metadata``, in
    this order: action, its metadata, observation, its metadata.

    Parameters
    ----------
    reward : LatencyReward
        With `parse`, it is given ``action.message`` or ``action.text``, the first that there is.
    """

    reward: LatencyReward

    def __post_init__(self) -> None:
        checked_reward(self.reward)

    def __call__(self, action: object, observation: object) -> float:
        """The reward of a step; 0 where it has no configuration.

        Raises
        ------
        ArgumentError, UnknownKeyError, NoDecodeDataError
            As `LatencyReward.judge`.
        """
        row = held_by(*(part for one in (action, observation) for part in (one, getattr(one, "metadata", None))))
        text = getattr(action, "message", getattr(action, "text", None))
        return reward_of(self.reward.judge(row, text if isinstance(text, str) else None))
