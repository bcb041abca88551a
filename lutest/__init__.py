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
    LutestWarning,
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
    from lutest import charts as charts
    from lutest.builder.build import append as append
    from lutest.builder.build import build as build
    from lutest.calibration.calibrate import calibrate as calibrate
    from lutest.calibration.check import check as check
    from lutest.calibration.online import OnlineCalibrator as OnlineCalibrator
    from lutest.calibration.plan import plan as plan
    from lutest.charts.report import report as report
    from lutest.judging.diagnose import diagnose as diagnose
    from lutest.judging.diff import diff as diff
    from lutest.judging.evaluate import evaluate as evaluate
    from lutest.profile.generate import record_generate as record_generate
    from lutest.profile.recorder import Recorder as Recorder
    from lutest.reward.latency import LatencyReward as LatencyReward
    from lutest.reward.openenv import OpenEnvReward as OpenEnvReward
    from lutest.reward.openrlhf import OpenRLHFReward as OpenRLHFReward
    from lutest.reward.outcome import LatencyOutcome as LatencyOutcome
    from lutest.reward.rollout import Columns as Columns
    from lutest.reward.skyrl import SkyRLReward as SkyRLReward
    from lutest.reward.slime import SlimeReward as SlimeReward
    from lutest.reward.swift import SwiftReward as SwiftReward
    from lutest.reward.terms import Weights as Weights
    from lutest.reward.terms import tensor_reward as tensor_reward
    from lutest.reward.trl import TRLReward as TRLReward
    from lutest.reward.verifiers import VerifiersReward as VerifiersReward
    from lutest.reward.verl import VerlReward as VerlReward
    from lutest.runs.convert import convert as convert
    from lutest.tablefile.export import export as export
    from lutest.tablefile.verify import verify as verify

__all__ = [
    "ArgumentError",
    "BuildError",
    "Columns",
    "ConfigError",
    "Entry",
    "Explanation",
    "Key",
    "LatencyOutcome",
    "LatencyReward",
    "LatencyTable",
    "LutestError",
    "LutestWarning",
    "NoDecodeDataError",
    "OnlineCalibrator",
    "OpenRLHFReward",
    "Recorder",
    "SourceError",
    "TRLReward",
    "TableError",
    "UnknownKeyError",
    "VerifiersReward",
    "VerlReward",
    "Weights",
    "__version__",
    "append",
    "build",
    "calibrate",
    "charts",
    "check",
    "convert",
    "diagnose",
    "diff",
    "evaluate",
    "export",
    "load",
    "lookup",
    "plan",
    "record_generate",
    "report",
    "tensor_reward",
    "use",
    "verify",
]

# name → module that it is imported from on first use: they bring in pandas, SciPy, DuckDB
_ON_FIRST_USE = {
    "Columns": "lutest.reward.rollout",
    "LatencyOutcome": "lutest.reward.outcome",
    "LatencyReward": "lutest.reward.latency",
    "OnlineCalibrator": "lutest.calibration.online",
    "OpenRLHFReward": "lutest.reward.openrlhf",
    "Recorder": "lutest.profile.recorder",
    "TRLReward": "lutest.reward.trl",
    "VerifiersReward": "lutest.reward.verifiers",
    "OpenEnvReward": "lutest.reward.openenv",
    "SkyRLReward": "lutest.reward.skyrl",
    "SwiftReward": "lutest.reward.swift",
    "SlimeReward": "lutest.reward.slime",
    "VerlReward": "lutest.reward.verl",
    "Weights": "lutest.reward.terms",
    "append": "lutest.builder.build",
    "build": "lutest.builder.build",
    "calibrate": "lutest.calibration.calibrate",
    "check": "lutest.calibration.check",
    "convert": "lutest.runs.convert",
    "diagnose": "lutest.judging.diagnose",
    "diff": "lutest.judging.diff",
    "evaluate": "lutest.judging.evaluate",
    "export": "lutest.tablefile.export",
    "plan": "lutest.calibration.plan",
    "record_generate": "lutest.profile.generate",
    "report": "lutest.charts.report",
    "tensor_reward": "lutest.reward.terms",
    "verify": "lutest.tablefile.verify",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    if name == "charts":
        return import_module("lutest.charts")
    raise AttributeError(f"module 'lutest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
