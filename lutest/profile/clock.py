"""Clocks for stages: the host's, the host's after the device has come to rest, or CUDA events."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lutest.reader.errors import ArgumentError

__all__ = ["SYNCHRONIZATIONS", "Clock", "make_clock"]

SYNCHRONIZATIONS = ("none", "synchronize", "events")


class Clock(Protocol):
    """Takes marks in time, and says afterwards how far apart they are."""

    def mark(self) -> Any:
        """Mark this moment."""

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        """Milliseconds from the first mark to each."""


class _HostClock:
    """`time.perf_counter_ns`: right wherever a call returns only when its work is done."""

    def __init__(self) -> None:
        self.mark: Callable[[], int] = time.perf_counter_ns

    def milliseconds(self, marks: Sequence[int]) -> list[float]:
        return [(mark - marks[0]) / 1e6 for mark in marks]


class _SynchronizedClock(_HostClock):
    """The host's clock, read once the CUDA device has done all that was asked of it."""

    def __init__(self) -> None:
        synchronize = _cuda().synchronize
        read = time.perf_counter_ns

        def mark() -> int:
            synchronize()
            return read()

        self.mark = mark


class _EventClock:
    """CUDA events: the device marks the moments itself, and the host never waits within a run."""

    def __init__(self) -> None:
        self._event = _cuda().Event

    def mark(self) -> Any:
        event = self._event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        marks[-1].synchronize()
        return [0.0, *(marks[0].elapsed_time(mark) for mark in marks[1:])]


def make_clock(synchronization: str) -> Clock:
    """Clock of one of the three ways to time.

    Parameters
    ----------
    synchronization : {"none", "synchronize", "events"}
        ``none``: the host's clock as it is, for work on the CPU. ``synchronize``: wait for the CUDA device at the
        beginning and end of every stage. ``events``: CUDA events on the current stream, without waiting.

    Raises
    ------
    ArgumentError
        Another name, or there is no torch with a CUDA device.
    """
    if synchronization not in SYNCHRONIZATIONS:
        raise ArgumentError(f"synchronization is {synchronization!r}; it can be {', '.join(SYNCHRONIZATIONS)}")
    if synchronization == "synchronize":
        return _SynchronizedClock()
    return _HostClock() if synchronization == "none" else _EventClock()


def _cuda() -> Any:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise ArgumentError("synchronization with a CUDA device needs torch: pip install 'lutest[profile]'") from None
    if not torch.cuda.is_available():
        raise ArgumentError("synchronization with a CUDA device is asked for, but torch finds none; give 'none'")
    return torch.cuda
