"""The reward form for hand-written trainers: tensors in, a tensor out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lutest.reward.terms import LARGEST_OVERRUN, Weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["tensor_reward"]


def tensor_reward(
    accuracy: Tensor, latency_ms: Tensor, budget_ms: Tensor | float, weights: Weights | None = None
) -> Tensor:
    """Accuracy plus the latency terms, element by element, on the tensors' own device and without a host sync.

    Parameters
    ----------
    accuracy : Tensor
        Any shape and dtype, in rewards; held to 0 … 1, it scales the efficiency bonus.
    latency_ms : Tensor
        Floating point milliseconds, in a shape that broadcasts with it. NaN, for an unknown configuration, stays NaN.
    budget_ms : Tensor or float
        Above 0; broadcasts likewise.
    weights : Weights, optional
        `complexity` is left out: nothing is known of it here.

    Returns
    -------
    Tensor
        In the dtype of `latency_ms`: ``accuracy + bonus − smooth − overrun``, differentiable, and works under
        `torch.compile`.
    """
    import torch

    weights = Weights() if weights is None else weights
    accuracy = accuracy.to(latency_ms.dtype)
    beyond = latency_ms / budget_ms - 1.0
    smooth = weights.smooth * torch.sigmoid(weights.steepness * beyond)
    overrun = weights.overrun * beyond.clamp(0.0, LARGEST_OVERRUN).square()
    bonus = weights.bonus * accuracy.clamp(0.0, 1.0) * (-beyond).clamp(min=0.0)
    return accuracy + bonus - smooth - overrun
