"""The reward form of SkyRL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lutest.reward.latency import LatencyReward, checked_reward
from lutest.reward.outcome import reward_of, trainer_figures


@dataclass(frozen=True)
class SkyRLReward:
    """Adds the latency reward to what an environment's ``step`` returns::

        class MyEnv(BaseTextEnv):
            def __init__(self, env_config=None, extras={}):
                super().__init__()
                self.extras = extras

            def step(self, action):
                return price(BaseTextEnvStepOutput(...), action, self.extras)

    SkyRL (skyrl-gym 0.4.0: ``skyrl_gym/envs/base_text_env.py``) makes an environment with ``extras``, the columns of a
    row of the data set, and calls ``step(action)`` with the text that the policy wrote; each step is priced as a
    request of its own. It passes no token ids: the length comes from the row or from `LatencyReward.count_tokens`.

    Parameters
    ----------
    reward : LatencyReward
    """

    reward: LatencyReward

    def __post_init__(self) -> None:
        checked_reward(self.reward)

    def __call__(self, output: Mapping[str, Any], action: str, row: Mapping[str, object]) -> Any:
        """What the step returns, with the latency reward added.

        Parameters
        ----------
        output : BaseTextEnvStepOutput
            Its reward, held to 0 … 1, scales the efficiency bonus.
        action : str
        row : mapping
            Configuration, lengths and budget, under the names of `LatencyReward.columns`.

        Returns
        -------
        dict
            As `output`, with the sum of both rewards (without a configuration, as it was), and in ``metadata``
            ``latency_reward``, ``latency_ms``, ``latency_over_limit``, ``latency_unknown``, ``latency_extrapolated``.

        Raises
        ------
        ArgumentError, UnknownKeyError, NoDecodeDataError
            As `LatencyReward.judge`.
        """
        outcome = self.reward.judge(row, action, float(output["reward"]))
        figures = {**output["metadata"], "latency_reward": reward_of(outcome), **trainer_figures(outcome)}
        return {**output, "reward": output["reward"] + reward_of(outcome), "metadata": figures}
