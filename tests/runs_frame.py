"""Made-up runs for tests, as a DataFrame of canonical columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

__all__ = ["BOTH_KEYS", "DEFAULT_KEY", "constant_step_runs", "keyed", "noisy_runs"]

DEFAULT_KEY = ("tier", "top_k", "num_blocks")
BOTH_KEYS = (DEFAULT_KEY, ("gpu", "n_gpus", "users"))  # what the core of the tests runs on


def keyed(frame: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The runs of `frame` with other names for its key columns."""
    return frame.rename(columns=dict(zip(DEFAULT_KEY, key, strict=True)))


def constant_step_runs(step_ms: float = 46.0, lengths: Sequence[int] = tuple(range(2, 65))) -> pd.DataFrame:
    """Run totals of a decode step that never changes."""
    n = np.asarray(lengths)
    return pd.DataFrame(
        {
            "tier": "low",
            "top_k": 4,
            "num_blocks": 12,
            "prompt_tokens": 100,
            "output_tokens": n,
            "prefill_ms": 200.0,
            "decode_ms": step_ms * (n - 1),
        }
    )


def noisy_runs(
    keys: Sequence[tuple[str, int, int]] = (("low", 4, 12), ("low", 8, 12), ("high", 4, 12)),
    runs_per_key: int = 40,
    seed: int = 0,
) -> pd.DataFrame:
    """Runs with timed steps: lognormal noise per run and per step, prefill and step growing with length."""
    generator = np.random.default_rng(seed)
    rows = []
    for tier, top_k, num_blocks in keys:
        for _ in range(runs_per_key):
            prompt = int(generator.integers(50, 150)) * (4 if tier == "high" else 1)
            tokens = int(generator.integers(1, 20))
            slow = float(np.exp(generator.normal(0, 0.05)))
            kv = prompt + np.arange(1, tokens)
            steps = (10 + num_blocks + top_k + kv / 100) * slow * np.exp(generator.normal(0, 0.05, tokens - 1))
            prefill = (20 + num_blocks * prompt / 50 + top_k) * slow
            rows.append((tier, top_k, num_blocks, prompt, tokens, prefill, float(steps.sum()), steps.tolist()))
    names = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms"]
    return pd.DataFrame(rows, columns=[*names, "decode_steps_ms"])
