"""The reward form of ms-swift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lutest.reward.latency import LatencyReward
from lutest.reward.rollout import Completion
from lutest.reward.trl import TRLReward


@dataclass(frozen=True)
class SwiftReward:
    """The ``__call__`` of an outcome reward, in the file that ``--external_plugins`` names::

        class Latency(ORM):
            __call__ = SwiftReward(latency_reward)

        orms["latency"] = Latency  # --reward_funcs latency

    ms-swift (4.0, as documented: ``swift/rewards/orm.py``) calls it with ``completions``, the columns of the data set
    as lists, ``trainer_state``, and ``response_token_ids``: ids without padding, in turns where there are several. It
    leaves the None of a row out of the sum of rewards, as TRL does.

    Parameters
    ----------
    reward : LatencyReward
    """

    reward: LatencyReward

    def __post_init__(self) -> None:
        TRLReward(self.reward)  # the same checks

    def __call__(
        self, completions: Sequence[Completion], response_token_ids: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """Rewards of a batch; parameters and errors as of `TRLReward`."""
        ids = None if response_token_ids is None else [_flat(of_one) for of_one in response_token_ids]
        return TRLReward(self.reward)(completions, completions, ids, **columns)


def _flat(ids: Sequence[Any]) -> Sequence[int]:
    """Ids of all turns, one after the other."""
    return [token for turn in ids for token in turn] if ids and isinstance(ids[0], Sequence) else ids
