"""Made-up wrong mappings, units, columns and calls, from a seed: none ends in a number without a word."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest

import lutest
from tests.conftest import Tally

NAMES = {
    "prompt_tokens": "n_in",
    "output_tokens": "n_out",
    "prefill_ms": "ttft",
    "decode_ms": "after",
    "total_ms": "all",
}
TIMES = ["ttft", "after", "all", "each"]
MAPPINGS: dict[str, dict[str, str]] = {
    "the whole for decode": {"decode_ms": "all"},
    "the whole for decode, alone": {"decode_ms": "all", "total_ms": "none"},
    "the whole for prefill": {"prefill_ms": "all", "decode_ms": "none"},
    "the whole for prefill, beside decode": {"prefill_ms": "all", "total_ms": "none"},
    "prefill for decode": {"decode_ms": "ttft", "total_ms": "none"},
    "decode for prefill": {"prefill_ms": "after", "decode_ms": "ttft"},
    "a time per token for decode": {"decode_ms": "each", "total_ms": "none"},
    "the prompt's tokens for the output's": {"output_tokens": "n_in", "prompt_tokens": "n_out"},
    "all tokens for the output's": {"output_tokens": "n_all", "total_ms": "none"},
    "the text for the prompt": {"prompt_tokens": "text_tokens"},
    "no such column": {"prefill_ms": "tttf"},
}
UNITS: dict[str, tuple[float, list[str]]] = {
    "seconds": (1e-3, TIMES),
    "microseconds": (1e3, TIMES),
    "nanoseconds": (1e6, TIMES),
    "prefill in seconds": (1e-3, ["ttft"]),
    "decode in seconds": (1e-3, ["after", "each"]),
}


def misspelt(generator: random.Random, name: str) -> str:
    at = generator.randrange(1, len(name) - 1)
    return generator.choice([name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name + "s"])


def wrong_calls(table: lutest.LatencyTable, generator: random.Random) -> dict[str, Callable[[], object]]:
    loose = cast(Any, table)
    large = generator.choice([key for key in table if key[0] != "low"])
    text = generator.randrange(1, 80)
    tokens = generator.choice([-1, 2.5, "many", float("nan")])
    budget = generator.choice([0.0, -5.0, float("nan"), float("inf"), "fast"])
    reward = lutest.LatencyReward(table, 1500.0)
    batch: dict[str, Any] = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1] * 8]}
    row: dict[str, Any] = dict(zip(table.key_columns, large, strict=True))
    columns: dict[str, Any] = {name: [value] for name, value in row.items()}
    wrong = generator.choice(list(columns))
    renamed: dict[str, Any] = {
        misspelt(generator, name) if name == wrong else name: value for name, value in columns.items()
    }
    return {
        "text for the prompt": lambda: table.feasible(1500, prompt_tokens=text),
        "text for the prompt of a reward": lambda: lutest.TRLReward(reward)(**batch, **columns, prompt_tokens=[text]),
        "a length by place": lambda: loose.feasible(1500, text),
        "no number of tokens": lambda: loose[large].total_ms(tokens, 8),
        "no budget": lambda: loose.feasible(budget),
        "a budget in seconds": lambda: lutest.LatencyReward(table, generator.uniform(0.5, 9.0)),
        "an unknown tier": lambda: table[misspelt(generator, "medium"), 8, 16],
        "an unknown quantile": lambda: table[large].total_ms(300, 8, 0.97),
        "a misspelt column": lambda: lutest.TRLReward(reward)(**batch, **renamed),
        "part of a configuration": lambda: reward.judge({**row, wrong: None}),
        "a wrong value in a row": lambda: reward.judge({**row, "budget_ms": float("nan"), "output_tokens": 8}),
        "a table for a reward": lambda: lutest.TRLReward(loose),
    }


def is_silent(use: Callable[[], object]) -> bool:
    """Whether a use ends without an error or a warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            use()
        except (lutest.LutestError, TypeError):
            return False
    return not any(issubclass(warning.category, lutest.LutestWarning) for warning in said)


@pytest.fixture(scope="module")
def logs(direct_frame: pd.DataFrame) -> pd.DataFrame:
    few = direct_frame[(direct_frame["tier"] == "low") & (direct_frame["num_blocks"] == 16)]
    few = few[["tier", "top_k", "num_blocks", "vision_tokens", "text_tokens", *list(NAMES)[:4]]].rename(columns=NAMES)
    return few.assign(
        all=few["ttft"] + few["after"], each=few["after"] / few["n_out"], n_all=few["n_in"] + few["n_out"]
    )


def test_no_wrong_use_ends_in_a_number_without_a_word(
    direct_table: Path, logs: pd.DataFrame, tmp_path: Path, long: bool, tally: Tally
) -> None:
    table, counts = lutest.load(direct_table), Counter[str]()
    for seed in range(200 if long else 24):
        generator = random.Random(seed)
        calls = wrong_calls(table, generator)
        drawn = generator.choice([*(calls if seed % 2 else ()), *(() if seed % 2 else (*MAPPINGS, *UNITS))])
        if drawn in calls:
            use = calls[drawn]
        else:
            factor, wrong = UNITS.get(drawn, (1.0, TIMES))
            speed = generator.uniform(0.3, 3.0)
            runs = logs.assign(**{name: logs[name] * speed * (factor if name in wrong else 1.0) for name in TIMES})
            columns = NAMES | ({} if drawn in UNITS else MAPPINGS[drawn])
            if drawn.endswith("in seconds"):
                columns["total_ms"] = "none"
            if drawn != "the text for the prompt":
                runs = runs.drop(columns=["vision_tokens", "text_tokens"])

            def use(columns: dict[str, str] = columns, runs: pd.DataFrame = runs) -> object:
                return lutest.build({"columns": columns}, runs=runs, output=tmp_path / "t.duckdb")

        counts["wrong uses"] += 1
        if is_silent(use):
            counts[f"silent: {drawn}"] += 1
    tally["wrong uses"] = counts
    assert not [name for name in counts if name.startswith("silent")], counts
