"""One request has another prompt in every tier: command line, Python, SQL and reward choose the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import lutest
from lutest.cli.main import main
from lutest.tablefile.sql import connect

Asked = tuple[dict[str, int], int, float]  # prompt tokens of each tier, output tokens, budget


@pytest.fixture(scope="module")
def asked(direct_table: Path, long: bool) -> list[Asked]:
    table, chance = lutest.load(direct_table), random.Random(0)
    requests = []
    for _ in range(1000 if long else 12):
        text = chance.randint(10, 90)
        tokens = {tier: table[tier, 8, 16].prompt_tokens(text) for tier in ("low", "medium", "high")}
        requests.append((tokens, chance.randint(1, 40), round(chance.uniform(150, 4000), 1)))
    return requests


@pytest.fixture(scope="module")
def in_python(direct_table: Path, asked: list[Asked]) -> list[set[lutest.Key]]:
    table = lutest.load(direct_table)
    found = [set(table.feasible(ms, prompt_tokens=tokens, output_tokens=n)) for tokens, n, ms in asked]
    assert len({len(fitting) for fitting in found}) > 5  # they are worth comparing
    return found


def test_the_command_line(
    direct_table: Path, asked: list[Asked], in_python: list[set[lutest.Key]], capsys: pytest.CaptureFixture[str]
) -> None:
    for (tokens, n, ms), fitting in zip(asked, in_python, strict=True):
        by_tier = ",".join(f"{tier}={held}" for tier, held in tokens.items())
        lengths = ["--prompt-tokens", by_tier, "--output-tokens", str(n)]
        assert main(["feasible", str(direct_table), str(ms), *lengths, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["feasible"]
        assert {(row["tier"], row["top_k"], row["num_blocks"]) for row in rows} == fitting


def test_sql(direct_table: Path, asked: list[Asked], in_python: list[set[lutest.Key]]) -> None:
    query = "SELECT tier, top_k, num_blocks FROM feasible(?, output_tokens := ?, prompt_tokens_by := ?)"
    with connect(direct_table) as connection:
        for (tokens, n, ms), fitting in zip(asked, in_python, strict=True):
            assert set(connection.execute(query, [ms, n, tokens]).fetchall()) == fitting


def test_rewards(direct_table: Path, asked: list[Asked], in_python: list[set[lutest.Key]]) -> None:
    table = lutest.load(direct_table)
    reward = lutest.LatencyReward(table)
    for (tokens, n, ms), fitting in zip(asked, in_python, strict=True):
        within = set()
        for tier, top_k, num_blocks in table:
            row = {"tier": tier, "top_k": top_k, "num_blocks": num_blocks, "prompt_tokens": tokens[str(tier)]}
            outcome = reward.judge({**row, "output_tokens": n, "budget_ms": ms})
            assert outcome is not None
            if outcome.over_limit is False:
                within.add((tier, top_k, num_blocks))
        assert within == fitting
