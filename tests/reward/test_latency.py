"""The terms of a latency reward, where a rollout's configuration comes from, and what decides."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from lutest.reader.errors import ArgumentError, LutestWarning, NoDecodeDataError, TableError, UnknownKeyError
from lutest.reader.figures import Key
from lutest.reader.table import LatencyTable
from lutest.reward.latency import LatencyReward
from lutest.reward.rollout import Columns, completion_text
from lutest.reward.terms import (
    Weights,
    complexity,
    efficiency_bonus,
    smooth_penalty,
    squared_overrun,
    tensor_reward,
)
from tests.synthetic import NO_DECODE, make_figures, write_file

TABLE = LatencyTable(make_figures())
ROW: dict[str, object] = {"tier": "low", "top_k": 8, "num_blocks": 16, "prompt_tokens": 90, "budget_ms": 60.0}
ENTRY = TABLE.lookup("low", 8, 16)


def parse_words(text: str) -> tuple[object, ...] | None:
    """'… use low 8 16' → ("low", "8", "16")."""
    _, found, words = text.partition("use ")
    return tuple(words.split()) if found else None


def count_words(text: str) -> int:
    return len(text.split())


def hand_reward(latency: float, limit: float) -> float:
    over = max(0.0, latency - limit) / limit
    return -1.0 / (1.0 + math.exp(-10.0 * (latency / limit - 1.0))) - over**2


@pytest.mark.parametrize(
    ("latency", "penalty"), [(100.0, 1.0), (110.0, 2.0 / (1.0 + math.exp(-1.0))), (0.0, 2.0 / (1.0 + math.exp(10.0)))]
)
def test_the_smooth_penalty_is_a_sigmoid_around_the_budget(latency: float, penalty: float) -> None:
    assert smooth_penalty(latency, 100.0, weight=2.0, steepness=10.0) == pytest.approx(penalty, rel=1e-12)


@pytest.mark.parametrize(("latency", "penalty"), [(0.0, 0.0), (100.0, 0.0), (150.0, 0.75), (300.0, 12.0)])
def test_the_squared_overrun_counts_budgets_above_the_budget(latency: float, penalty: float) -> None:
    assert squared_overrun(latency, 100.0, weight=3.0) == pytest.approx(penalty, rel=1e-12)


@pytest.mark.parametrize(("latency", "bonus"), [(0.0, 2.0), (25.0, 1.5), (100.0, 0.0), (101.0, 0.0)])
def test_the_efficiency_bonus_is_the_share_of_the_budget_that_is_left(latency: float, bonus: float) -> None:
    assert efficiency_bonus(latency, 100.0, weight=2.0) == pytest.approx(bonus, rel=1e-12)


def test_complexity_is_the_share_of_expert_calls() -> None:
    assert complexity((8, 16), (8, 16)) == 1.0
    assert complexity((4, 12), (8, 16)) == pytest.approx(0.375)
    assert complexity((-1.0, 3.0), (0.0, 4.0)) == 0.75
    assert complexity((), ()) == 1.0


@pytest.mark.parametrize("budget", [5e-324, 1e-300, 1.0, 1e300])
@pytest.mark.parametrize("latency", [0.0, 1e-300, 1.0, 1.7e308])
def test_terms_are_finite_for_every_finite_latency(latency: float, budget: float) -> None:
    assert 0.0 <= smooth_penalty(latency, budget, steepness=1e3) <= 1.0
    assert 0.0 <= squared_overrun(latency, budget) <= 1e12
    assert 0.0 <= efficiency_bonus(latency, budget) <= 1.0


def test_penalties_rise_with_latency_and_the_bonus_falls() -> None:
    latencies = [x * 7.3 for x in range(60)]
    assert sorted(smooth_penalty(x, 100.0) for x in latencies) == [smooth_penalty(x, 100.0) for x in latencies]
    assert sorted(squared_overrun(x, 100.0) for x in latencies) == [squared_overrun(x, 100.0) for x in latencies]
    assert sorted(efficiency_bonus(-x, 100.0) for x in latencies) == [efficiency_bonus(-x, 100.0) for x in latencies]


@pytest.mark.parametrize("weights", [{"smooth": -1.0}, {"overrun": math.inf}, {"bonus": math.nan}, {"steepness": 0.0}])
def test_weights_that_cannot_be_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(weights))):
        Weights(**weights)


def test_a_known_length_is_held_to_the_total() -> None:
    outcome = LatencyReward(TABLE).judge({**ROW, "output_tokens": 9})
    assert outcome is not None
    latency = ENTRY.total_ms(90, 9, 0.95)
    assert outcome.latency_ms == latency
    assert (outcome.limit_ms, outcome.decided_by, outcome.unknown) == (60.0, "total", False)
    assert outcome.over_limit == (latency > 60.0)
    assert outcome.reward == pytest.approx(hand_reward(latency, 60.0), rel=1e-12)


def test_an_unknown_length_is_held_to_prefills_share() -> None:
    outcome = LatencyReward(TABLE, q=0.99, prefill_share=0.5).judge(ROW)
    assert outcome is not None
    assert outcome.decided_by == "prefill"
    assert outcome.latency_ms == ENTRY.prefill_ms(90, 0.99)
    assert outcome.limit_ms == 30.0
    assert outcome.reward == pytest.approx(hand_reward(ENTRY.prefill_ms(90, 0.99), 30.0), rel=1e-12)


def test_without_prompt_tokens_the_configurations_own_quantile_counts() -> None:
    row = {**ROW, "prompt_tokens": None}
    outcome = LatencyReward(TABLE).judge(row)
    assert outcome is not None
    assert outcome.latency_ms == ENTRY.prefill_p95_ms


def test_all_terms_add_up() -> None:
    weights = Weights(smooth=0.5, steepness=4.0, overrun=2.0, bonus=0.3, complexity=0.1)
    for budget in (10.0, 1000.0):
        row = {**ROW, "top_k": 4, "budget_ms": budget, "output_tokens": 9}
        outcome = LatencyReward(TABLE, weights=weights).judge(row, accuracy=0.5)
        assert outcome is not None
        latency = TABLE["low", 4, 16].total_ms(90, 9, 0.95)
        assert outcome.smooth_penalty == smooth_penalty(latency, budget, 0.5, 4.0)
        assert outcome.squared_overrun == squared_overrun(latency, budget, 2.0)
        assert outcome.efficiency_bonus == pytest.approx(0.5 * efficiency_bonus(latency, budget, 0.3))
        assert outcome.complexity_penalty == pytest.approx(0.1 * 0.5)
        penalties = outcome.smooth_penalty + outcome.squared_overrun + outcome.complexity_penalty
        assert outcome.reward == pytest.approx(outcome.efficiency_bonus - penalties)


class FakeEntry(NamedTuple):
    key: Key
    source: str = "measured"

    def prefill_ms(self, *_: object) -> float:
        return 10.0 * self.top_k

    def total_ms(self, _: object, output_tokens: int, *__: object) -> float:
        return 10.0 * self.top_k + output_tokens

    def expected_total_ms(self, _: object, workload: str | None) -> float:
        return 20.0 * self.top_k + (100.0 if workload == "web" else 0.0)

    def p_within(self, _: object, __: object, workload: str | None) -> float:
        return 0.25 if workload == "web" else 0.75

    def extrapolates(self, *_: object) -> bool:
        return False

    @property
    def top_k(self) -> float:
        return float(self.key[1])

    @property
    def prefill_p50_ms(self) -> float:
        return self.prefill_ms()

    @property
    def reach(self) -> tuple[float, float]:
        return 0.0, math.inf


class FakeTable:
    keys: tuple[Key, ...] = (("low", 4, 16), ("low", 8, 16))
    key_columns = TABLE.key_columns
    figures = TABLE.figures
    output_lengths = TABLE.output_lengths
    quantiles = (0.5, 0.95)

    def __getitem__(self, key: Key) -> FakeEntry:
        sources: dict[Key, str] = {("low", 2, 16): "extrapolated", ("low", 6, 16): "interpolated"}
        if key not in self.keys and key not in sources:
            raise UnknownKeyError("not measured")
        return FakeEntry(key, sources.get(key, "measured"))


FAKE = cast(LatencyTable, FakeTable())


def test_the_expected_total_decides_where_it_is_asked_to() -> None:
    reward = LatencyReward(FAKE, unknown_length="expected_total", workload="vqa")
    outcome, elsewhere = reward.judge(ROW), reward.judge({**ROW, "workload": "web"})
    assert outcome is not None
    assert elsewhere is not None
    assert (outcome.latency_ms, outcome.limit_ms, outcome.decided_by) == (160.0, 60.0, "expected_total")
    assert elsewhere.latency_ms == 260.0
    known = reward.judge({**ROW, "output_tokens": 3})
    assert known is not None
    assert known.decided_by == "total"


def test_the_probability_of_staying_within_takes_the_sigmoids_place() -> None:
    reward = LatencyReward(FAKE, unknown_length="p_within", workload="web", weights=Weights(smooth=2.0, overrun=0.0))
    outcome = reward.judge(ROW)
    assert outcome is not None
    assert (outcome.decided_by, outcome.p_within, outcome.latency_ms) == ("p_within", 0.25, 260.0)
    assert outcome.reward == pytest.approx(-1.5)
    invented = reward.judge({**ROW, "top_k": 7})
    assert invented is not None
    assert invented.reward == -2.0


SOURCES: dict[str, tuple[dict[str, Any], dict[str, object], str | None]] = {
    "columns": ({}, ROW, None),
    "other names": (
        {"columns": Columns(key={"tier": "t", "top_k": "k"}, prompt_tokens="p", budget_ms="limit")},
        {"t": "low", "k": 8, "num_blocks": 16, "p": 90, "limit": 60.0, "tier": "high"},
        None,
    ),
    "numbers as text": ({}, {**ROW, "top_k": " 8", "num_blocks": "16.0"}, None),
    "floats, as pandas has them beside missing values": (
        {},
        {**ROW, "top_k": 8.0, "num_blocks": 16.0, "prompt_tokens": 90.0},
        None,
    ),
    "constant budget": ({"budget_ms": 60.0}, {**ROW, "budget_ms": None}, None),
    "column before constant": ({"budget_ms": 30.0}, ROW, None),
    "policy": ({"parse": parse_words}, {"prompt_tokens": 90, "budget_ms": 60.0}, "I use low 8 16"),
    "policy before columns": ({"parse": parse_words}, {**ROW, "tier": "high"}, "use low 8 16"),
    "columns where the policy is silent": ({"parse": parse_words}, ROW, "nothing to say"),
    "policy by mapping, the rest by column": (
        {"parse": lambda _: {"top_k": 8, "budget_ms": 1e9, "prompt_tokens": 1, "output_tokens": 1}},
        {**ROW, "top_k": 4},
        "",
    ),
    "nothing written": ({"parse": parse_words}, ROW, None),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_a_configuration_gives_the_same_reward(source: str) -> None:
    options, row, completion = SOURCES[source]
    assert LatencyReward(TABLE, **options).judge(row, completion) == LatencyReward(TABLE).judge(ROW)


@pytest.mark.parametrize(
    ("options", "row", "tokens"),
    [
        ({}, {"completion_ids": [5, 6, 7], "output_tokens": 20}, 3),
        ({}, {"completion_ids": []}, 1),
        ({}, {"output_tokens": 20}, 20),
        ({}, {"output_tokens": "20"}, 20),
        ({}, {"output_tokens": math.nan}, None),
        ({}, {}, None),
        ({"count_tokens": count_words}, {}, 4),
        ({"count_tokens": count_words}, {"output_tokens": 20}, 20),
        ({"count_tokens": count_words, "length_from": "count_tokens"}, {"completion_ids": [5]}, 4),
        ({"length_from": "column"}, {"completion_ids": [5], "output_tokens": 20}, 20),
        ({"length_from": "column"}, {"completion_ids": [5]}, None),
        ({"length_from": "completion_ids"}, {"output_tokens": 20}, None),
        ({"length_from": "unknown", "count_tokens": count_words}, {"completion_ids": [5], "output_tokens": 20}, None),
        ({"columns": Columns(output_tokens="n", completion_ids="ids")}, {"n": 20, "completion_ids": [5]}, 20),
    ],
)
def test_output_tokens_come_from_where_they_are_asked_from(
    options: dict[str, Any], row: dict[str, object], tokens: int | None
) -> None:
    outcome = LatencyReward(TABLE, **options).judge({**ROW, **row}, "four words of text")
    assert outcome is not None
    expected = ENTRY.prefill_ms(90, 0.95) if tokens is None else ENTRY.total_ms(90, tokens, 0.95)
    assert outcome.latency_ms == expected
    assert outcome.decided_by == ("prefill" if tokens is None else "total")


def test_completions_may_be_messages() -> None:
    messages: list[dict[str, object]] = [
        {"role": "assistant", "content": "I use "},
        {"role": "tool", "content": "use high 8 16"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "text", "text": "low 8"}, {"type": "text", "text": " 16"}]},
    ]
    assert completion_text(messages) == "I use \nlow 8 16"
    row = {"prompt_tokens": 90, "budget_ms": 60.0}
    assert LatencyReward(TABLE, parse=parse_words).judge(row, messages) == LatencyReward(TABLE).judge(ROW)


@pytest.mark.parametrize("row", [{}, {"tier": None, "top_k": None, "num_blocks": math.nan, "budget_ms": 5.0}])
def test_a_row_without_configuration_has_no_reward(row: dict[str, object]) -> None:
    assert LatencyReward(TABLE).judge(row, "text") is None
    assert LatencyReward(TABLE, parse=parse_words).judge({**row, "tier": "low"}, "text") is None


def test_columns_with_part_of_a_configuration_count_as_an_unknown_one() -> None:
    reward = LatencyReward(TABLE)
    with pytest.warns(LutestWarning, match="part of a configuration: no value in column 'num_blocks'"):
        outcome = reward.judge({**ROW, "num_blocks": None})
    assert outcome is not None
    assert outcome == LatencyReward(TABLE).judge({**ROW, "top_k": 99})._replace(wrong_row=True)  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="'num_blocks'"):
        LatencyReward(TABLE, on_unknown="error").judge({**ROW, "num_blocks": None})


def test_a_budget_that_cannot_be_read_does_not_pass_for_the_constant_one() -> None:
    with pytest.warns(LutestWarning, match="budget_ms is nan"):
        outcome = LatencyReward(TABLE, 60.0).judge({**ROW, "budget_ms": math.nan})
    assert outcome is not None
    assert (outcome.wrong_row, outcome.unknown, outcome.limit_ms) == (True, True, 0.8 * 60.0)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"budget_ms": None}, "budget_ms"),
        ({"budget_ms": math.nan}, "budget_ms"),
        ({"budget_ms": -1.0}, "budget_ms"),
        ({"budget_ms": 0.06}, "budget_ms is 0.06, but the fastest configuration needs"),
        ({"prompt_tokens": -3}, "prompt_tokens"),
        ({"output_tokens": -1}, "output_tokens"),
        ({"top_k": "many"}, "top_k"),
        ({"tier": 0}, "tier"),
    ],
)
def test_columns_that_cannot_be_right_are_told_of_once_and_end_no_run(row: dict[str, object], named: str) -> None:
    rows, reward = [ROW, {**ROW, **row}, {**ROW, **row}], LatencyReward(TABLE)
    with pytest.warns(LutestWarning, match=named) as told:
        right, wrong, again = reward.judge_rows(rows, [None] * 3)
    assert len(told) == 1
    assert right == LatencyReward(TABLE).judge(ROW)
    assert wrong == again
    if "budget_ms" in row:
        assert wrong is None  # nothing to hold it against
    else:
        assert wrong is not None
        assert (wrong.wrong_row, wrong.unknown) == (True, True)
        assert right is not None
        assert -5.0 <= wrong.reward < right.reward
    with pytest.raises(ArgumentError, match=f"rollout 1 of the batch.*{named}"):
        LatencyReward(TABLE, on_unknown="error").judge_rows(rows, [None] * 3)


GARBAGE = [
    ("ultra", 8, 16),
    ("low", 7, 16),
    ("low", 8, "sixteen"),
    ("low", "9" * 5000, 16),
    ("low", math.inf, 16),
    ("low", -8, 16),
    ({"nested": []}, 8, 16),
    ("low", 8),
    "low 8 16",
    {},
    {"tier": "low"},
    5,
]


def worst_of_table(tokens: int | None, budget: float, keys: tuple[Key, ...] = TABLE.keys) -> float:
    rewards = []
    for key in keys:
        row = {**dict(zip(TABLE.key_columns, key, strict=True)), "output_tokens": tokens}
        outcome = LatencyReward(TABLE, on_unknown="none").judge({**row, "prompt_tokens": 90, "budget_ms": budget})
        rewards += [] if outcome is None else [outcome.reward]
    return min(rewards)


@pytest.mark.parametrize("choice", GARBAGE, ids=lambda choice: repr(choice)[:30])
def test_what_a_policy_makes_up_neither_ends_the_run_nor_pays(choice: Any) -> None:
    reward = LatencyReward(TABLE, parse=lambda _: choice)
    for tokens, budget in ((None, 20.0), (200, 20.0), (200, 1e6)):
        row = {"prompt_tokens": 90, "budget_ms": budget, "output_tokens": tokens}
        outcome = reward.judge(row, "")
        assert outcome is not None
        assert (outcome.unknown, outcome.latency_ms, outcome.over_limit) == (True, None, None)
        assert outcome.reward <= worst_of_table(tokens, budget)
        assert outcome.reward <= hand_reward(2.0 * budget, budget) + 1e-12
    assert LatencyReward(TABLE, parse=lambda _: choice, on_unknown="none").judge(row, "") is None
    penalised = LatencyReward(TABLE, parse=lambda _: choice, on_unknown=-3.0).judge(row, "")
    assert penalised is not None
    assert penalised.reward == -3.0
    with pytest.raises(UnknownKeyError):
        LatencyReward(TABLE, parse=lambda _: choice, on_unknown="error").judge(row, "")


@pytest.mark.parametrize("error", [ValueError("no number"), KeyError("tier"), AttributeError("group"), OverflowError()])
def test_a_parser_that_chokes_on_the_text_counts_as_an_unknown_configuration(error: Exception) -> None:
    def parse(_: str) -> None:
        raise error

    outcome = LatencyReward(TABLE, parse=parse).judge(ROW, "")
    assert outcome is not None
    assert outcome.unknown
    with pytest.raises(UnknownKeyError) as raised:
        LatencyReward(TABLE, parse=parse, on_unknown="error").judge(ROW, "")
    assert raised.value.__cause__ is error


def test_a_key_without_decode_figures_is_unknown_where_they_are_needed() -> None:
    row = {**ROW, **dict(zip(TABLE.key_columns, NO_DECODE, strict=True))}
    one = LatencyReward(TABLE).judge({**row, "output_tokens": 1})
    many = LatencyReward(TABLE).judge({**row, "output_tokens": 9})
    assert one is not None
    assert many is not None
    assert (one.decided_by, many.decided_by) == ("total", "unknown")
    with pytest.raises(NoDecodeDataError):
        LatencyReward(TABLE, on_unknown="error").judge({**row, "output_tokens": 9})


def test_configurations_filled_in_count_only_between_measured_ones() -> None:
    between, beyond = (LatencyReward(FAKE).judge({**ROW, "top_k": top_k}) for top_k in (6, 2))
    assert between is not None
    assert beyond is not None
    assert (between.latency_ms, between.unknown) == (60.0, False)
    assert beyond.unknown


def test_nothing_unknown_is_ever_free() -> None:
    reward = LatencyReward(TABLE, weights=Weights(bonus=5.0, complexity=0.5))
    outcome = reward.judge({**ROW, "tier": "ultra", "budget_ms": 1e9})
    assert outcome is not None
    assert outcome.efficiency_bonus == 0.0
    assert outcome.complexity_penalty == 0.5
    assert outcome.reward < -1.9


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"q": 0.42}, "q is 0.42"),
        ({"budget_ms": 0.0}, "budget_ms"),
        ({"prefill_share": 1.5}, "prefill_share"),
        ({"unknown_length": "guess"}, "unknown_length"),
        ({"length_from": "count_tokens"}, "count_tokens"),
        ({"length_from": "ids"}, "length_from"),
        ({"on_unknown": "zero"}, "on_unknown"),
        ({"on_unknown": math.nan}, "on_unknown"),
        ({"columns": Columns(key={"gpu": "device"})}, "columns.key has 'gpu'; allowed: 'tier', 'top_k', 'num_blocks'"),
    ],
)
def test_arguments_are_checked_when_the_reward_is_made(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        LatencyReward(TABLE, **options)


def test_a_reward_with_a_table_pickles_without_its_file() -> None:
    reward = LatencyReward(TABLE, 60.0, parse=parse_words, count_tokens=count_words, weights=Weights(bonus=1.0))
    buffers: list[pickle.PickleBuffer] = []
    copy = pickle.loads(pickle.dumps(reward, protocol=5, buffer_callback=buffers.append), buffers=buffers)
    row = {"prompt_tokens": 90}
    assert copy.judge(row, "use low 8 16") == reward.judge(row, "use low 8 16")
    assert copy.weights == reward.weights


def test_a_path_is_read_once_a_process_and_again_after_a_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file(make_figures(), tmp_path / "table.duckdb")
    monkeypatch.chdir(tmp_path)
    reward = LatencyReward("table.duckdb")
    assert reward.table == str(path)
    pickled = pickle.dumps(reward)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy._table is reward._table is LatencyReward(path)._table
    assert copy.judge(ROW) == reward.judge(ROW)
    write_file(make_figures(), tmp_path / "new.duckdb").replace(path)
    assert LatencyReward(path)._table is not reward._table


def test_a_missing_file_is_named() -> None:
    with pytest.raises(TableError, match=r"nowhere\.duckdb"):
        LatencyReward("nowhere.duckdb")


def test_threads_share_a_reward() -> None:
    reward = LatencyReward(TABLE, parse=parse_words)
    rows = [{"prompt_tokens": n, "budget_ms": 40.0, "output_tokens": n % 50 + 1} for n in range(400)]
    texts = [f"use {tier} {top_k} 16" for tier in ("low", "ultra") for top_k in (4, 8)] * 100
    alone = reward.judge_rows(rows, texts)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(reward.judge, rows, texts))
    assert together == alone


def test_a_reward_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        LatencyReward(TABLE).q = 0.5  # type: ignore[misc]


def test_importing_rewards_brings_in_no_trainer() -> None:
    heavy = "{'torch', 'trl', 'verl', 'ray', 'numpy', 'pandas', 'scipy', 'duckdb'}"
    forms = "lutest.reward.trl, lutest.reward.verl, lutest.reward.openrlhf"
    code = f"import sys, {forms}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_tensor_form_agrees_with_the_scalar_terms() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    accuracy = torch.tensor([0, 1, 1, 0, 1])
    latency = torch.tensor([10.0, 90.0, 100.0, 130.0, 1e30], dtype=torch.float64, requires_grad=True)
    weights = Weights(smooth=0.7, steepness=6.0, overrun=1.5, bonus=0.2)
    rewards = tensor_reward(accuracy, latency, 100.0, weights)
    for right, ms, reward in zip(accuracy.tolist(), latency.tolist(), rewards.tolist(), strict=True):
        penalties = smooth_penalty(ms, 100.0, 0.7, 6.0) + squared_overrun(ms, 100.0, 1.5)
        assert reward == pytest.approx(right + right * efficiency_bonus(ms, 100.0, 0.2) - penalties, rel=1e-12)
    rewards.sum().backward()
    assert bool(torch.isfinite(latency.grad).all())
    budgets = torch.full((5,), 100.0, dtype=torch.float64)
    assert torch.equal(tensor_reward(accuracy, latency, budgets, weights), rewards)
    default = tensor_reward(torch.zeros(1), torch.tensor([130.0]), 100.0)
    assert default.dtype == torch.float32
    assert default.item() == pytest.approx(hand_reward(130.0, 100.0), rel=1e-5)
    assert math.isnan(tensor_reward(torch.ones(1), torch.tensor([math.nan]), 100.0).item())
