"""The verbs of the command line: each does its work and prints figures, for people or as JSON.

Whatever is heavy is imported inside of them, so that `--help` and mistyped arguments answer at once.
"""

from __future__ import annotations

from .building import build, convert, export, profile
from .calibrating import calibrate, check, plan
from .judging import diagnose, evaluate, verify
from .reading import feasible, info, lookup, sql

__all__ = [
    "build",
    "calibrate",
    "check",
    "convert",
    "diagnose",
    "evaluate",
    "export",
    "feasible",
    "info",
    "lookup",
    "plan",
    "profile",
    "sql",
    "verify",
]
