"""A table whose names are markup or read from right to left; one configuration has no decode step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lutest.builder.build import build
from tests.runs_frame import keyed, noisy_runs

STRANGE = ("</script><script>alert(1)</script>", "\"'><b>&amp;", "שלום \u202eabc", "{data} {script}")
KEY = ("<i>way</i>", "top_k", "num_blocks")


def build_strange_table(folder: Path) -> Path:
    """Build it; its own name is markup too."""
    runs = noisy_runs([(name, 4, blocks) for name in STRANGE for blocks in (12, 14)], runs_per_key=12)
    runs = keyed(runs, KEY).assign(model=STRANGE[0], device=STRANGE[2], workload=STRANGE[1])
    runs["accuracy"] = np.random.default_rng(0).uniform(size=len(runs)).round()
    short = (runs[KEY[0]] == STRANGE[0]) & (runs["num_blocks"] == 14)
    runs.loc[short, ["output_tokens", "decode_ms"]] = 1, 0.0
    runs.loc[short, "decode_steps_ms"] = None
    return build({"key": list(KEY)}, runs=runs, output=folder / "table's <img src=x>.duckdb").output
