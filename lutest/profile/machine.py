"""What runs were taken on: device, clocks, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import time
from pathlib import Path

__all__ = ["clock_record", "cpu_name", "device_name", "software"]

_PACKAGES = ("torch", "transformers", "vllm")


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def device_name() -> str:
    """Name of this machine as a device of runs on its CPU."""
    return f"{cpu_name()}, {platform.machine()}"


def software() -> str:
    """Versions of what takes part in a run and is installed."""
    found = [(package, _version(package)) for package in _PACKAGES]
    named = [f"{package} {version}" for package, version in found if version]
    return ", ".join([f"Python {platform.python_version()}", *named])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
