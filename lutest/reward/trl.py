"""The reward form of TRL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lutest.reward.latency import LatencyReward, checked_reward
from lutest.reward.outcome import metrics_of
from lutest.reward.rollout import Completion, column_rows


@dataclass(frozen=True)
class TRLReward:
    """A reward function for `GRPOTrainer` and `RLOOTrainer`: ``reward_funcs=[accuracy, TRLReward(latency_reward)]``.

    TRL (1.16.0: ``GRPOTrainer._calculate_rewards``) calls it with keywords alone: ``prompts``, ``completions``,
    ``completion_ids`` (lists without padding, up to and with the end-of-sequence token), every column of the data set
    as a list of one value per completion, and ``trainer_state``, ``log_extra``, ``log_metric``, ``environments``.
    Completions are strings, or lists of messages for a conversational data set. It takes the name that it logs under
    from ``__name__``, and leaves the None of a row out of the sum of rewards.

    Where ``log_metric`` is passed, it gets the means over the batch: ``latency/ms`` and ``latency/over_limit`` (share
    of rollouts above what they were held against) of the known configurations; the shares ``latency/unknown`` (not in
    the table, or never measured near that length), ``latency/extrapolated`` (beyond measured lengths) and
    ``latency/wrong_row`` (something in the row could not be read); and each term:
    ``latency/smooth_penalty``, ``latency/squared_overrun``,
    ``latency/efficiency_bonus``, ``latency/complexity_penalty``. Where ``log_extra`` is passed, it gets the columns
    ``latency_ms`` and ``latency_decided_by``.

    Parameters
    ----------
    reward : LatencyReward
    name : str
        What TRL logs the reward under.
    """

    reward: LatencyReward
    name: str = "latency_reward"

    def __post_init__(self) -> None:
        checked_reward(self.reward)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[object]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Rewards of a batch.

        Parameters
        ----------
        prompts : sequence
            Only counted.
        completions : sequence of str or of messages
        completion_ids : sequence of sequence of int, optional
        log_extra, log_metric : callable, optional
        **columns
            Columns of the data set; those that `reward.columns` does not name are ignored.

        Returns
        -------
        list of float or None
            None for a rollout without configuration.

        Raises
        ------
        ArgumentError, UnknownKeyError, NoDecodeDataError
            As `LatencyReward.judge`.
        """
        ids = self.reward.columns.completion_ids
        given = columns if completion_ids is None else {**columns, ids: completion_ids}
        self.reward.check_columns(given)
        rows = column_rows(given, self.reward.column_names, len(prompts))
        outcomes = self.reward.judge_rows(rows, completions)
        if log_metric is not None:
            for metric, value in metrics_of([outcome for outcome in outcomes if outcome is not None]):
                log_metric(metric, value)
        if log_extra is not None:
            log_extra("latency_ms", [None if outcome is None else outcome.latency_ms for outcome in outcomes])
            log_extra("latency_decided_by", [None if outcome is None else outcome.decided_by for outcome in outcomes])
        return [None if outcome is None else outcome.reward for outcome in outcomes]
