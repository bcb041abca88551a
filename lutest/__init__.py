"""Latency tables from profiled runs: built in DuckDB, read in microseconds, made for RL rewards."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lutest.current import lookup, use
from lutest.errors import (
    ArgumentError,
    BuildError,
    ConfigError,
    LutestError,
    NoDecodeDataError,
    SourceError,
    TableError,
    UnknownKeyError,
)
from lutest.estimate import Entry
from lutest.explanation import Explanation
from lutest.figures import Key
from lutest.loading import load
from lutest.table import LatencyTable

if TYPE_CHECKING:
    from lutest.build import build as build
    from lutest.calibrate import calibrate as calibrate
    from lutest.check import check as check
    from lutest.convert import convert as convert
    from lutest.diagnose import diagnose as diagnose
    from lutest.evaluate import evaluate as evaluate
    from lutest.export import export as export
    from lutest.online import OnlineCalibrator as OnlineCalibrator
    from lutest.plan import plan as plan

__version__ = "0.1.0"

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
]

# name → module of the same name: imported on first use, since they bring in pandas and SciPy
_BUILDER_VERBS = ("build", "calibrate", "check", "convert", "diagnose", "evaluate", "export", "plan")


def __getattr__(name: str) -> Any:
    if name in _BUILDER_VERBS:
        return getattr(import_module(f"lutest.{name}"), name)
    if name == "OnlineCalibrator":
        return import_module("lutest.online").OnlineCalibrator
    raise AttributeError(f"module 'lutest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Facade(ModuleType):
    """Keeps `lutest.build` the function: importing the module of that name would otherwise bind it here."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _BUILDER_VERBS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Facade
