"""best, frontier: the highest quality that fits a budget, and what quality costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutest import ArgumentError, Key, LatencyTable, UnknownKeyError
from lutest.reader.figures import Quality
from tests.synthetic import NO_DECODE, make_figures

TABLE = LatencyTable(make_figures())
worth = st.dictionaries(st.sampled_from(TABLE.keys), st.integers(0, 4).map(float), min_size=1)
budgets = st.floats(1.0, 3000.0)
tokens = st.one_of(st.none(), st.integers(1, 60))


@given(budgets, tokens, worth, st.sampled_from([0.0, 0.1, 0.5]))
def test_the_best_fits_and_nothing_that_fits_is_better(
    budget: float, n: int | None, quality: dict[Key, float], margin: float
) -> None:
    best = TABLE.best(budget, 120, n, margin=margin, quality=quality)
    fitting = [key for key in TABLE.feasible(budget, 120, n, margin=margin) if key in quality]
    if best is None:
        assert fitting == []
        return
    assert best.key in fitting
    assert best.quality == quality[best.key] == max(quality[key] for key in fitting)
    equals = [key for key in fitting if quality[key] == best.quality]
    assert best.latency_ms == min(latency(key, n) for key in equals)


@given(tokens, worth)
def test_the_front_is_what_nothing_beats(n: int | None, quality: dict[Key, float]) -> None:
    known = {key: latency(key, n) for key in quality if key != NO_DECODE or n in (None, 1)}
    front = TABLE.frontier(120, n, quality=quality)
    for option in front:
        assert (option.latency_ms, option.quality) == (known[option.key], quality[option.key])
        assert (option.n, option.lower, option.upper) == (None, None, None)
        assert not any(
            (known[key] <= option.latency_ms and quality[key] > option.quality)
            or (known[key] < option.latency_ms and quality[key] >= option.quality)
            for key in known
        )
    assert [o.latency_ms for o in front] == sorted({o.latency_ms for o in front})
    assert [o.quality for o in front] == sorted({o.quality for o in front})
    assert {o.quality for o in front} >= {max((quality[key] for key in known), default=0.0)} or not known


def latency(key: Key, n: int | None) -> float:
    return TABLE[key].prefill_ms(120, 0.95) if n is None else TABLE[key].total_ms(120, n, 0.95)


def test_quality_from_the_runs_brings_its_interval() -> None:
    best = TABLE.best(1e6)
    assert best is not None
    assert (best.key, best.quality, best.n, best.lower) == (Key("low", 8, 12), 1.0, 1, None)
    assert best.latency_ms == TABLE.prefill_ms("low", 8, 12, q=0.95)
    first, second = TABLE.frontier(workload="vqa")
    assert (first.key, first.quality, first.n, first.lower, first.upper) == (Key("low", 4, 12), 0.5, 40, 0.4, 0.6)
    assert second.key == Key("low", 8, 12)


def test_if_nothing_fits_there_is_no_answer() -> None:
    assert TABLE.best(1e-3) is None
    assert TABLE.best(1e-3, quality={("high", 4, 12): 1.0}) is None
    assert TABLE.best(1e9, 50, 2, quality={NO_DECODE: 1.0}) is None
    assert TABLE.frontier(50, 2, quality={NO_DECODE: 1.0}) == []


def test_a_budget_just_below_the_estimate_is_not_met() -> None:
    quality = {("low", 4, 16): 1.0}
    total = TABLE.total_ms("low", 4, 16, 90, 9, 0.99)
    assert TABLE.best(total, 90, 9, q=0.99, quality=quality) is not None
    assert TABLE.best(total * 0.999999, 90, 9, q=0.99, quality=quality) is None
    assert TABLE.best(total, 90, 9, q=0.99, quality=quality, margin=1e-6) is None
    prefill = TABLE.prefill_ms("low", 4, 16, 90, 0.95)
    assert TABLE.best(prefill / 0.25 * 1.000001, 90, prefill_share=0.25, quality=quality) is not None
    assert TABLE.best(prefill / 0.25 * 0.999999, 90, prefill_share=0.25, quality=quality) is None


def test_configurations_may_be_given_by_index_of_their_tier() -> None:
    best = TABLE.best(1e6, quality={(2, 8, 12): 0.3, ("low", 8, 12): 0.2})
    assert best is not None
    assert best.key == Key("high", 8, 12)


def test_workloads_are_not_mixed() -> None:
    rows = (*TABLE.figures.qualities, Quality(Key("high", 4, 12), "web", 9, 0.9, 0.8, 1.0))
    table = LatencyTable(replace(TABLE.figures, qualities=rows))
    with pytest.raises(ArgumentError, match=r"workload is None; allowed: 'vqa', 'web', of which the table holds"):
        table.best(1e6)
    best = table.best(1e6, workload="web")
    assert best is not None
    assert best.key == Key("high", 4, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workload": "huge"}, "workload is 'huge'; allowed: 'vqa'"),
        ({"quality": {}}, "quality is empty: give"),
        ({"quality": {("low", 4, 12): float("nan")}}, r"quality of \('low', 4, 12\) is nan; allowed: a finite number"),
        ({"quality": {("low", 4, 12): "0.5"}}, r"quality of \('low', 4, 12\) is '0.5'; allowed"),
        ({"quality": {"low": 1.0}}, r"quality has the key 'low'; allowed: \(tier, top_k, num_blocks\)"),
        ({"quality": {("low", 4, 12): 1.0}, "workload": "vqa"}, "workload is 'vqa' beside a quality of your own"),
        ({"q": 0.9}, r"q is 0\.9; allowed"),
        ({"prompt_tokens": -1}, "prompt_tokens is -1; allowed"),
        ({"output_tokens": 0}, "output_tokens is 0; allowed"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TABLE.best(100.0, **arguments)
    with pytest.raises(ArgumentError, match=message):
        TABLE.frontier(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"budget_ms": 0.0},
        {"budget_ms": float("inf")},
        {"budget_ms": 1.0, "margin": -1.0},
        {"budget_ms": 1.0, "prefill_share": 2.0},
    ],
)
def test_wrong_budgets_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"^(budget_ms|margin|prefill_share) is .*; allowed"):
        TABLE.best(**arguments)


def test_no_quality_at_all_says_how_to_give_it() -> None:
    table = LatencyTable(replace(TABLE.figures, qualities=()))
    for call in (lambda: table.best(100.0), table.frontier):
        with pytest.raises(
            ArgumentError, match=r"the table holds none: give quality as a mapping .* column `accuracy`"
        ):
            call()


def test_what_was_not_measured_is_not_chosen_even_when_filling_in() -> None:
    filling = LatencyTable(make_figures(), missing="interpolate")
    filling.lookup("low", 6, 14)
    with pytest.raises(UnknownKeyError, match="top_k=6, num_blocks=14 was not measured"):
        filling.best(1e6, quality={("low", 6, 14): 1.0})
