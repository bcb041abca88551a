"""The terms that a latency reward is made of: of plain floats, bounded for every latency, and of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lutest.reader.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 1e6  # of a weight: its square is far within float32, in which trainers add rewards up
MOST_OVERRUN = 2.0  # budgets beyond the budget: one rollout far beyond would flatten the advantages of its whole group


@dataclass(frozen=True)
class Weights:
    """How much each term counts; a weight of 0 leaves it out.

    A reward is at least ``-(smooth + overrun * most_overrun² + complexity)``, -5 by default, and at most `bonus`.

    Attributes
    ----------
    smooth : float
        β of `smooth_penalty`, its largest value.
    steepness : float
        s of `smooth_penalty`, above 0: with 10, that is 0.27 β at 10 % below the budget and 0.73 β at 10 % above.
    overrun : float
        γ of `squared_overrun`.
    most_overrun : float
        Budgets beyond the budget above which it grows no more; at most 1e6.
    bonus : float
        Of `efficiency_bonus`. A policy can earn it with short wrong answers, so it is 0 unless asked for, and the forms
        that know the accuracy multiply it by that.
    complexity : float
        Of `complexity`, as a penalty.

    Raises
    ------
    ArgumentError
        A weight that is negative or not finite, or a steepness of 0.
    """

    smooth: float = 1.0
    steepness: float = 10.0
    overrun: float = 1.0
    most_overrun: float = MOST_OVERRUN
    bonus: float = 0.0
    complexity: float = 0.0

    def __post_init__(self) -> None:
        for weight in fields(self):
            value = getattr(self, weight.name)
            if not isinstance(value, (int, float)) or not 0.0 <= value <= _LARGEST:
                raise ArgumentError(f"{weight.name} is {value!r}; allowed: a number from 0 to {_LARGEST:g}")
        if self.steepness == 0.0:
            raise ArgumentError(f"steepness is {self.steepness!r}; allowed: above 0")


def smooth_penalty(latency_ms: float, budget_ms: float, weight: float = 1.0, steepness: float = 10.0) -> float:
    """Soft step at the budget: ``weight · σ(steepness · (latency / budget − 1))``.

    Parameters
    ----------
    latency_ms, budget_ms : float
        Milliseconds; the budget is above 0.
    weight, steepness : float
        β and s.

    Returns
    -------
    float
        Half of the weight at the budget, never above the weight.
    """
    x = steepness * (latency_ms / budget_ms - 1.0)
    if x >= 0.0:
        return weight / (1.0 + math.exp(-x))
    small = math.exp(x)  # exp of what is below 0 cannot overflow
    return weight * small / (1.0 + small)


def squared_overrun(
    latency_ms: float, budget_ms: float, weight: float = 1.0, most_overrun: float = MOST_OVERRUN
) -> float:
    """What lies above the budget, in budgets, squared: ``weight · (max(0, latency − budget) / budget)²``.

    Parameters
    ----------
    latency_ms, budget_ms : float
        Milliseconds; the budget is above 0.
    weight : float
        γ.
    most_overrun : float
        Budgets beyond the budget above which it grows no more.

    Returns
    -------
    float
        0 within the budget.
    """
    overrun = min(max(0.0, latency_ms / budget_ms - 1.0), most_overrun)
    return weight * overrun * overrun


def efficiency_bonus(latency_ms: float, budget_ms: float, weight: float = 1.0) -> float:
    """Share of the budget that is left: ``weight · max(0, 1 − latency / budget)``.

    Parameters
    ----------
    latency_ms, budget_ms : float
        Milliseconds; the budget is above 0.
    weight : float
        Its largest value, for a latency of 0.

    Returns
    -------
    float
    """
    return weight * max(0.0, 1.0 - latency_ms / budget_ms)


def complexity(numbers: Iterable[float], largest: Iterable[float]) -> float:
    """How large a configuration is: the product of its numbers, each over the largest that there is.

    Of experts per token and active blocks, that is the share of expert calls of the largest configuration.

    Parameters
    ----------
    numbers, largest : iterable of float
        The values of the number columns of a configuration, and the largest of each.

    Returns
    -------
    float
        1 for the largest configuration, and where there are no numbers.
    """
    return math.prod(
        max(0.0, number) / most if most > 0.0 else 1.0 for number, most in zip(numbers, largest, strict=True)
    )


def tensor_reward(
    accuracy: Tensor, latency_ms: Tensor, budget_ms: Tensor | float, weights: Weights | None = None
) -> Tensor:
    """For hand-written trainers: accuracy plus the latency terms, element by element, on the tensors' own device.

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
        In the dtype of `latency_ms`: ``accuracy + bonus − smooth − overrun``, differentiable, without a host sync, and
        works under `torch.compile`.
    """
    import torch

    weights = Weights() if weights is None else weights
    accuracy = accuracy.to(latency_ms.dtype)
    beyond = latency_ms / budget_ms - 1.0
    smooth = weights.smooth * torch.sigmoid(weights.steepness * beyond)
    overrun = weights.overrun * beyond.clamp(0.0, weights.most_overrun).square()
    bonus = weights.bonus * accuracy.clamp(0.0, 1.0) * (-beyond).clamp(min=0.0)
    return accuracy + bonus - smooth - overrun
