"""Latency tables from profiled runs: built in DuckDB, read in microseconds, made for RL rewards."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
from lutest.table import LatencyTable, load, lookup, use

if TYPE_CHECKING:
    from lutest.build import build as build
    from lutest.convert import convert as convert
    from lutest.diagnose import diagnose as diagnose
    from lutest.evaluate import evaluate as evaluate
    from lutest.export import export as export

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
    "SourceError",
    "TableError",
    "UnknownKeyError",
    "__version__",
    "build",
    "convert",
    "diagnose",
    "evaluate",
    "export",
    "load",
    "lookup",
    "use",
]

# name → module of the same name: imported on first use, since they bring in pandas and SciPy
_BUILDER_VERBS = ("build", "convert", "diagnose", "evaluate", "export")


def __getattr__(name: str) -> Any:
    if name in _BUILDER_VERBS:
        return getattr(import_module(f"lutest.{name}"), name)
    raise AttributeError(f"module 'lutest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Facade(ModuleType):
    """Keeps `lutest.build` the function: importing the module of that name would otherwise bind it here."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _BUILDER_VERBS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Facade
