"""Profiling: runs timed in one pass, kept in shards that a build reads, on any model or on one that comes with it.

`Recorder` times loops that are written by hand and needs no torch; `record_generate` times ``model.generate()``;
`run_sweep` profiles a model with random weights, which needs torch.
"""

from __future__ import annotations

from lutest.profile.generate import record_generate
from lutest.profile.recorder import Recorder
from lutest.profile.run import Run, StageTimes

__all__ = ["Recorder", "Run", "StageTimes", "record_generate"]
