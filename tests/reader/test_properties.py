"""What holds for every table: order, inverses, one answer on every way, and no dependence on order, files or units."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lutest
from lutest.builder.build import build
from lutest.reader.table import LatencyTable
from lutest.tablefile.sql import connect

NAMES = ("direct", "subtraction", "serving", "timed", "totals", "few", "tails")
# the tables are made once and never changed, so examples may share them
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
ROUNDING = 1e-12


def _frame(name: str, seed: int = 0) -> pd.DataFrame:
    """Runs at random: timed or totals alone, few per key, or with heavy tails."""
    generator = np.random.default_rng([seed, NAMES.index(name)])
    tail = 0.6 if name == "tails" else 0.05
    rows: list[tuple[object, ...]] = []
    for tier, scale in (("low", 1), ("high", 4)):
        for num_blocks in (12, 16) if name != "few" else (12,):
            for run in range({"few": 4, "tails": 40}.get(name, 18)):
                prompt, tokens = int(generator.integers(20, 200)) * scale, int(generator.integers(1, 24))
                slow = float(np.exp(generator.normal(0, tail)))
                kv = prompt + np.arange(1, tokens)
                steps = num_blocks * (1 + kv / 900) * slow * np.exp(generator.normal(0, tail / 2, tokens - 1))
                decode = float(steps.sum())
                if name == "totals":
                    decode = max(0.0, decode + float(generator.normal(5, 20)))
                prefill = (30 + num_blocks * prompt / 40) * slow * float(np.exp(generator.normal(0, 0.02)))
                shown = None if name == "totals" else steps.tolist()
                key = (tier, 4, num_blocks, f"{name}-{len(rows)}", "vqa" if run % 2 else "web")
                rows.append((*key, prompt, tokens, prefill, decode, shown))
    columns = ["tier", "top_k", "num_blocks", "sample_id", "workload", "prompt_tokens", "output_tokens"]
    return pd.DataFrame(rows, columns=[*columns, "prefill_ms", "decode_ms", "decode_steps_ms"])


@pytest.fixture(scope="module")
def tables(
    tmp_path_factory: pytest.TempPathFactory, direct_table: Path, subtraction_table: Path, serving_table: Path
) -> dict[str, LatencyTable]:
    folder = tmp_path_factory.mktemp("tables")
    shipped = (direct_table, subtraction_table, serving_table)
    built = {name: lutest.load(path) for name, path in zip(NAMES, shipped, strict=False)}
    for name in NAMES[3:]:
        config = {"quantiles": [0.1, 0.5, 0.95, 0.99]} if name == "timed" else {}
        built[name] = lutest.load(build(config, runs=_frame(name), output=folder / f"{name}.duckdb").output)
    return built


places = st.floats(0, 1)
lengths = st.one_of(st.integers(1, 40), st.integers(1, 5000))


def _prompt(table: LatencyTable, key: lutest.Key, place: float) -> int:
    """A prompt length from 0 to ten times the largest that was measured."""
    (held,) = (held for held in table.figures.keys if held.key == key)
    return int(place**3 * 10 * held.prefill_curve.at[-1])


def _chosen(tables: dict[str, LatencyTable], name: str, place: float) -> tuple[LatencyTable, lutest.Key]:
    keys = _decoding(tables[name])
    return tables[name], keys[int(place * (len(keys) - 1))]


def _decoding(table: LatencyTable) -> list[lutest.Key]:
    """Keys whose runs have decode steps."""
    return [key for key in table if table[key].decode_step_p50_ms is not None]


@settings(SETTINGS, max_examples=200)
@given(st.sampled_from(NAMES), places, places, lengths)
def test_totals_rise_with_tokens_and_quantiles_are_ordered(
    tables: dict[str, LatencyTable], name: str, key_place: float, prompt_place: float, n: int
) -> None:
    table, key = _chosen(tables, name, key_place)
    prompt = _prompt(table, key, prompt_place)
    for p in (prompt, None):
        stages = [
            [table[key].prefill_ms(p, q) for q in table.quantiles],
            [table[key].decode_step_ms(prompt + n, q) for q in table.quantiles],
            [table[key].decode_ms(p, n + 1, q) for q in table.quantiles],
            [table[key].total_ms(p, n, q) for q in table.quantiles],
            [table[key].total_ms(p, n + 1, q) for q in table.quantiles],
        ]
        for values in stages:
            assert values == sorted(values)
            assert all(0 < value < math.inf for value in values)
        for now, more in zip(*stages[-2:], strict=True):
            assert more >= now * (1 - ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_totals_rise_at_every_length(name: str, tables: dict[str, LatencyTable]) -> None:
    table = tables[name]
    n = np.arange(1, 5001)
    for key in _decoding(table):
        number = table.keys.index(key)
        for place in (0.0, 0.3, 0.47, 1.0):
            for q in table.quantiles:
                totals = table.batch.total_ms(number, _prompt(table, key, place), n, q)
                assert (np.diff(totals) >= -ROUNDING * totals[1:]).all(), (key, place, q)


@settings(SETTINGS, max_examples=6)
@given(st.sampled_from(NAMES), st.lists(st.tuples(places, places, lengths, places), min_size=1, max_size=60))
def test_scalar_batch_and_sql_say_the_same(
    tables: dict[str, LatencyTable], name: str, drawn: list[tuple[float, float, int, float]]
) -> None:
    table = tables[name]
    queries: list[tuple[lutest.Key, int, int, float]] = []
    for key_place, prompt_place, n, q_place in drawn:
        _, key = _chosen(tables, name, key_place)
        q = table.quantiles[int(q_place * (len(table.quantiles) - 1))]
        queries.append((key, _prompt(table, key, prompt_place), n, q))
    scalar = [
        (
            table[key].prefill_ms(p, q),
            table[key].decode_step_ms(p + n, q),
            table[key].decode_ms(p, n, q),
            table[key].total_ms(p, n, q),
        )
        for key, p, n, q in queries
    ]
    for q in {query[-1] for query in queries}:
        mine = [number for number, query in enumerate(queries) if query[-1] == q]
        ids = np.array([table.keys.index(queries[number][0]) for number in mine])
        prompt, n_tokens = np.array([queries[number][1:3] for number in mine]).T
        batch = zip(
            table.batch.prefill_ms(ids, prompt, q).tolist(),
            table.batch.decode_step_ms(ids, prompt + n_tokens, q).tolist(),
            table.batch.decode_ms(ids, prompt, n_tokens, q).tolist(),
            table.batch.total_ms(ids, prompt, n_tokens, q).tolist(),
            strict=True,
        )
        assert list(batch) == [pytest.approx(scalar[number], rel=1e-9) for number in mine]
    with connect(table.path) as connection:
        rows = ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * len(queries))
        answers = connection.execute(
            f"""
            SELECT prefill_ms(t, k, b, p, level), decode_step_ms(t, k, b, p + n, level),
                decode_ms(t, k, b, p, n, level), total_ms(t, k, b, p, n, level)
            FROM (
                SELECT place, t, k::INT AS k, b::INT AS b, p::BIGINT AS p, n::BIGINT AS n, level::DOUBLE AS level
                FROM (VALUES {rows}) AS drawn(place, t, k, b, p, n, level)
            )
            ORDER BY place
            """,
            [value for place, (key, *query) in enumerate(queries) for value in (place, *key, *query)],
        ).fetchall()
    for expected, answer in zip(scalar, answers, strict=True):
        assert answer == pytest.approx(expected, rel=1e-9)


@settings(SETTINGS, max_examples=200)
@given(st.sampled_from(NAMES), places, places, st.booleans(), st.floats(0.01, 1e6), lengths, st.booleans())
def test_most_tokens_is_the_inverse_of_the_total(
    tables: dict[str, LatencyTable],
    name: str,
    key_place: float,
    prompt_place: float,
    own_prompt: bool,
    budget_ms: float,
    n: int,
    exact: bool,
) -> None:
    table, key = _chosen(tables, name, key_place)
    prompt = None if own_prompt else _prompt(table, key, prompt_place)
    for q in table.quantiles:
        budget = table[key].total_ms(prompt, n, q) if exact else budget_ms
        most = table[key].max_output_tokens(budget, prompt, q)
        assert most >= n or not exact
        assert most == 0 or table[key].total_ms(prompt, most, q) <= budget
        assert table[key].total_ms(prompt, most + 1, q) > budget
        number = table.keys.index(key)
        if not exact:  # a total that equals the budget may go either way
            assert table.batch.max_output_tokens(number, budget, prompt, q) == most


@pytest.mark.parametrize(("name", "seed"), [("timed", 1), ("totals", 2), ("few", 3)])
def test_neither_order_nor_files_matter(name: str, seed: int, tmp_path: Path) -> None:
    frame = _frame(name, seed)
    expected = lutest.load(build(runs=frame, output=tmp_path / "whole.duckdb").output).figures
    shuffled = frame.sample(frac=1.0, random_state=seed)
    part = np.arange(len(frame)) % 5
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(5):
        records = shuffled[part == number].to_dict(orient="records")
        (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, records)))
    split = lutest.load(build(runs=folder, output=tmp_path / "split.duckdb").output).figures
    assert split.keys == expected.keys
    assert split.output_lengths == expected.output_lengths


@pytest.mark.parametrize(
    ("name", "factor"),
    [("timed", 1000 / 7), ("totals", 2.0**10), ("few", 1e3), ("tails", 1e-3)],
)
def test_times_in_other_units_scale_every_answer(
    name: str, factor: float, tables: dict[str, LatencyTable], tmp_path: Path
) -> None:
    frame = _frame(name)
    scaled = frame.assign(prefill_ms=frame["prefill_ms"] * factor, decode_ms=frame["decode_ms"] * factor)
    if name != "totals":
        scaled["decode_steps_ms"] = [[step * factor for step in steps] for steps in frame["decode_steps_ms"]]
    table = tables[name]
    config = {"quantiles": list(table.quantiles)}
    other = lutest.load(build(config, runs=scaled, output=tmp_path / "t.duckdb", implausible=True).output)
    tolerance = 1e-9 if math.log2(factor).is_integer() else 1e-6
    assert other.keys == table.keys
    n = np.array([1, 2, 3, 7, 24, 300, 5000])
    for number, key in enumerate(table.keys):
        for place in (0.0, 0.2, 0.35, 0.46, 1.0):
            prompt = _prompt(table, key, place)
            for q in table.quantiles:
                expected = table.batch.total_ms(number, prompt, n, q) * factor
                np.testing.assert_allclose(other.batch.total_ms(number, prompt, n, q), expected, rtol=tolerance)
                steps = table.batch.decode_step_ms(number, prompt + n, q) * factor
                np.testing.assert_allclose(other.batch.decode_step_ms(number, prompt + n, q), steps, rtol=tolerance)
                budget = 1000.0 * (1 + math.pi / 1e4)
                assert other[key].max_output_tokens(budget * factor, prompt, q) == table[key].max_output_tokens(
                    budget, prompt, q
                )
