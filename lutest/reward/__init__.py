"""Latency rewards: the terms, `LatencyReward` that composes them, and its forms for trainers.

`TRLReward`, `VerlReward` (or `compute_score`) and `OpenRLHFReward` wrap a `LatencyReward`; `tensor_reward` is for
hand-written trainers. No trainer is imported, and torch only by the forms that return tensors, when they are called.
"""

from __future__ import annotations

from lutest.reward.latency import LatencyOutcome, LatencyReward
from lutest.reward.openrlhf import OpenRLHFReward
from lutest.reward.rollout import Columns, completion_text
from lutest.reward.tensor import tensor_reward
from lutest.reward.terms import Weights, complexity, efficiency_bonus, smooth_penalty, squared_overrun
from lutest.reward.trl import TRLReward
from lutest.reward.verl import VerlReward, compute_score

__all__ = [
    "Columns",
    "LatencyOutcome",
    "LatencyReward",
    "OpenRLHFReward",
    "TRLReward",
    "VerlReward",
    "Weights",
    "completion_text",
    "complexity",
    "compute_score",
    "efficiency_bonus",
    "smooth_penalty",
    "squared_overrun",
    "tensor_reward",
]
