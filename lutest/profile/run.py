"""One run on the clock: vision, prefill and every decode step, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any

from lutest.profile.machine import Clock
from lutest.reader.errors import ArgumentError

__all__ = ["Run", "StageTimes"]

_PAUSE, _VISION, _PREFILL, _STEP = range(4)


@dataclass(frozen=True)
class StageTimes:
    """Times of a run in milliseconds.

    Attributes
    ----------
    vision_ms : float
        The vision tower; part of `prefill_ms`.
    prefill_ms : float
        Everything up to the first token, the vision tower included.
    decode_steps_ms : list of float
        Each decode step.
    total_ms : float
        From the beginning of the first stage to the end of the last one, what lies between stages included.
    """

    vision_ms: float
    prefill_ms: float
    decode_steps_ms: list[float]
    total_ms: float


class _Stage:
    """Context manager of one kind of stage."""

    __slots__ = ("_kind", "_mark", "_marks")

    def __init__(self, run: Run, kind: int) -> None:
        self._kind = kind
        self._mark = run._clock.mark
        self._marks = run._marks

    def __enter__(self) -> None:
        self._marks.append((self._kind, self._mark()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._marks.append((_PAUSE, self._mark()))


class Run:
    """A run that is being timed; made by `Recorder.run`.

    Enclose the stages in ``with run.vision():``, ``with run.prefill():`` and, for each token after the first one,
    ``with run.step():``. A token belongs to the stage whose forward pass it comes from, sampling included. Where
    stages cannot be enclosed, `begin_vision`, `begin_prefill` and `begin_step` each begin a stage that lasts until the
    next one begins or `end` is called.

    Attributes
    ----------
    prompt_tokens, vision_tokens, text_tokens : int or None
        Lengths, which may be set until the run ends; `prompt_tokens` is the sum of the other two if left out.
    ends_with_eos : bool or None
        Whether the last token is an end of sequence.
    warmup : bool
        Whether the run is a warm-up, which is timed but not recorded.
    times : StageTimes or None
        Set when the run has ended.
    """

    def __init__(self, clock: Clock, *, warmup: bool = False) -> None:
        self.prompt_tokens: int | None = None
        self.vision_tokens: int | None = None
        self.text_tokens: int | None = None
        self.ends_with_eos: bool | None = None
        self.warmup = warmup
        self.times: StageTimes | None = None
        self._clock = clock
        self._marks: list[tuple[int, Any]] = []
        self._vision = _Stage(self, _VISION)
        self._prefill = _Stage(self, _PREFILL)
        self._step = _Stage(self, _STEP)

    def vision(self) -> _Stage:
        """Context manager for the vision tower."""
        return self._vision

    def prefill(self) -> _Stage:
        """Context manager for projector and language model up to the first token."""
        return self._prefill

    def step(self) -> _Stage:
        """Context manager for one decode step."""
        return self._step

    def begin_vision(self) -> None:
        """Begin the vision stage, which ends any other one."""
        self._vision.__enter__()

    def begin_prefill(self) -> None:
        """Begin or go on with the prefill, which ends any other stage."""
        self._prefill.__enter__()

    def begin_step(self) -> None:
        """Begin a decode step, which ends any other stage."""
        self._step.__enter__()

    def end(self) -> None:
        """End the stage that was begun last."""
        self._marks.append((_PAUSE, self._clock.mark()))

    def finish(self) -> StageTimes:
        """Times of all stages.

        Raises
        ------
        ArgumentError
            The stages overlap, there is no prefill, or a step comes before it.
        """
        marks = self._marks
        kinds = [kind for kind, _ in marks]
        _check_order(kinds)
        at = self._clock.milliseconds([mark for _, mark in marks])
        lasted: dict[int, list[float]] = {kind: [] for kind in (_PAUSE, _VISION, _PREFILL, _STEP)}
        for kind, start, stop in zip(kinds, at, at[1:], strict=False):
            lasted[kind].append(round(stop - start, 6))
        vision_ms = sum(lasted[_VISION])
        self.times = StageTimes(
            vision_ms=vision_ms,
            prefill_ms=vision_ms + sum(lasted[_PREFILL]),
            decode_steps_ms=lasted[_STEP],
            total_ms=round(at[-1], 6),
        )
        return self.times


def _check_order(kinds: Sequence[int]) -> None:
    if _PREFILL not in kinds:
        raise ArgumentError("a run without a prefill: enclose it in `with run.prefill():`")
    if kinds[0] == _PAUSE or (_PAUSE, _PAUSE) in pairwise(kinds):
        raise ArgumentError("stages of a run overlap: end each one before the next one begins")
    if kinds[-1] != _PAUSE:
        raise ArgumentError("the last stage of a run has not ended")
    decode = kinds[kinds.index(_STEP) :] if _STEP in kinds else []
    if _VISION in decode or _PREFILL in decode:
        raise ArgumentError("a decode step comes before the end of prefill: the first token comes out of prefill")
