"""Latency tables from profiled runs: built in DuckDB, read in microseconds, made for RL rewards."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lutest.reader import __version__
from lutest.reader.entry import Entry
from lutest.reader.errors import (
    ArgumentError,
    BuildError,
    ConfigError,
    LutestError,
    NoDecodeDataError,
    SourceError,
    TableError,
    UnknownKeyError,
)
from lutest.reader.explanation import Explanation
from lutest.reader.figures import Key
from lutest.reader.loading import load, lookup, use
from lutest.reader.table import LatencyTable

if TYPE_CHECKING:
    from lutest.builder.build import build as build
    from lutest.calibration.calibrate import calibrate as calibrate
    from lutest.calibration.check import check as check
    from lutest.calibration.online import OnlineCalibrator as OnlineCalibrator
    from lutest.calibration.plan import plan as plan
    from lutest.judging.diagnose import diagnose as diagnose
    from lutest.judging.evaluate import evaluate as evaluate
    from lutest.runs.convert import convert as convert
    from lutest.tablefile.export import export as export
    from lutest.tablefile.verify import verify as verify

__all__ = [
    "ArgumentError",
    "BuildError",
    "ConfigError",
    "Entry",
    "Explanation",
    "Key",
    "LatencyTable",
    "LutestError",
    "NoDecodeDataError",
    "OnlineCalibrator",
    "SourceError",
    "TableError",
    "UnknownKeyError",
    "__version__",
    "build",
    "calibrate",
    "check",
    "convert",
    "diagnose",
    "evaluate",
    "export",
    "load",
    "lookup",
    "plan",
    "use",
    "verify",
]

# name → module that it is imported from on first use: they bring in pandas, SciPy, DuckDB
_ON_FIRST_USE = {
    "OnlineCalibrator": "lutest.calibration.online",
    "build": "lutest.builder.build",
    "calibrate": "lutest.calibration.calibrate",
    "check": "lutest.calibration.check",
    "convert": "lutest.runs.convert",
    "diagnose": "lutest.judging.diagnose",
    "evaluate": "lutest.judging.evaluate",
    "export": "lutest.tablefile.export",
    "plan": "lutest.calibration.plan",
    "verify": "lutest.tablefile.verify",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module 'lutest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
