"""The machine that runs are taken on: clocks for its stages, and what it tells of itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lutest.reader.errors import ArgumentError


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

        def mark() -> int:
            synchronize()
            return time.perf_counter_ns()

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
    clocks: dict[str, type[Clock]] = {"none": _HostClock, "synchronize": _SynchronizedClock, "events": _EventClock}
    if synchronization not in clocks:
        raise ArgumentError(f"synchronization is {synchronization!r}; it can be {', '.join(clocks)}")
    return clocks[synchronization]()


def _cuda() -> Any:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise ArgumentError("synchronization with a CUDA device needs torch: pip install 'lutest[profile]'") from None
    if not torch.cuda.is_available():
        raise ArgumentError("synchronization with a CUDA device is asked for, but torch finds none; give 'none'")
    return torch.cuda


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def device_name() -> str:
    """Name of this machine as a device of runs on its CPU."""
    return f"{cpu_name()}, {platform.machine()}"


def software() -> str:
    """Versions of what takes part in a run and is installed."""
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def clock_record() -> dict[str, object]:
    """The clock that times stages, its resolution, and how fast the processor runs just now."""
    clock = time.get_clock_info("perf_counter")
    megahertz = _cpu_field("cpu MHz")
    return {
        "clock": clock.implementation,
        "clock_resolution_ns": clock.resolution * 1e9,
        "cpu_mhz": float(megahertz) if megahertz else None,
    }


def _cpu_field(name: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
