"""best, frontier: the highest quality that fits a budget, and what quality costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutest import ArgumentError, LatencyTable, UnknownKeyError
from lutest.reader.figures import Key, Quality
from tests.synthetic import KEY_COLUMNS, NO_DECODE, make_figures

TABLE = LatencyTable(make_figures())
worth = st.dictionaries(st.sampled_from(TABLE.keys), st.integers(0, 4).map(float), min_size=1)
budgets = st.floats(1.0, 3000.0)
tokens = st.one_of(st.none(), st.integers(1, 60))


@given(budgets, tokens, worth, st.sampled_from([0.0, 0.1, 0.5]))
def test_the_best_fits_and_nothing_that_fits_is_better(
    budget: float, n: int | None, quality: dict[Key, float], margin: float
) -> None:
    best = TABLE.best(budget, prompt_tokens=120, output_tokens=n, margin=margin, quality=quality)
    fitting = [
        key for key in TABLE.feasible(budget, prompt_tokens=120, output_tokens=n, margin=margin) if key in quality
    ]
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
    front = TABLE.frontier(prompt_tokens=120, output_tokens=n, quality=quality)
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
    assert (best.key, best.quality, best.n, best.lower) == (("low", 8, 12), 1.0, 1, None)
    assert best.latency_ms == TABLE["low", 8, 12].prefill_ms(q=0.95)
    first, second = TABLE.frontier(workload="vqa")
    assert (first.key, first.quality, first.n, first.lower, first.upper) == (("low", 4, 12), 0.5, 40, 0.4, 0.6)
    assert second.key == ("low", 8, 12)


def test_if_nothing_fits_there_is_no_answer() -> None:
    assert TABLE.best(1e-3) is None
    assert TABLE.best(1e-3, quality={("high", 4, 12): 1.0}) is None
    assert TABLE.best(1e9, prompt_tokens=50, output_tokens=2, quality={NO_DECODE: 1.0}) is None
    assert TABLE.frontier(prompt_tokens=50, output_tokens=2, quality={NO_DECODE: 1.0}) == []


def test_a_budget_just_below_the_estimate_is_not_met() -> None:
    quality = {("low", 4, 16): 1.0}
    total = TABLE["low", 4, 16].total_ms(90, 9, 0.99)
    assert TABLE.best(total, prompt_tokens=90, output_tokens=9, q=0.99, quality=quality) is not None
    assert TABLE.best(total * 0.999999, prompt_tokens=90, output_tokens=9, q=0.99, quality=quality) is None
    assert TABLE.best(total, prompt_tokens=90, output_tokens=9, q=0.99, quality=quality, margin=1e-6) is None
    prefill = TABLE["low", 4, 16].prefill_ms(90, 0.95)
    assert TABLE.best(prefill / 0.25 * 1.000001, prompt_tokens=90, prefill_share=0.25, quality=quality) is not None
    assert TABLE.best(prefill / 0.25 * 0.999999, prompt_tokens=90, prefill_share=0.25, quality=quality) is None


def test_workloads_are_not_mixed() -> None:
    rows = (*TABLE.figures.qualities, Quality(("high", 4, 12), "web", 9, 0.9, 0.8, 1.0))
    table = LatencyTable(replace(TABLE.figures, qualities=rows))
    with pytest.raises(ArgumentError, match=r"workload is None; allowed: 'vqa', 'web', of which the table holds"):
        table.best(1e6)
    best = table.best(1e6, workload="web")
    assert best is not None
    assert best.key == ("high", 4, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workload": "huge"}, "workload is 'huge'; allowed: 'vqa'"),
        ({"quality": {}}, "quality is empty: give"),
        ({"quality": {("low", 4, 12): float("nan")}}, r"quality of \('low', 4, 12\) is nan; allowed: a finite number"),
        ({"quality": {("low", 4, 12): "0.5"}}, r"quality of \('low', 4, 12\) is '0.5'; allowed"),
        ({"quality": {"low": 1.0}}, r"the key is \('low'\); allowed: a value for each of tier, top_k, num_blocks"),
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


TIERS = {"low": 150, "medium": 300, "high": 510}


def test_every_configuration_has_its_own_prompt_length() -> None:
    by_tier = [key for key in TABLE if TABLE[key].prefill_ms(TIERS[str(key[0])], 0.95) <= 0.8 * 120.0]
    assert 0 < len(by_tier) < len(TABLE)
    assert TABLE.feasible(120.0, prompt_tokens=TIERS) == by_tier
    assert TABLE.feasible(120.0, prompt_tokens={"tier": TIERS}) == by_tier
    assert TABLE.feasible(120.0, prompt_tokens={key: TIERS[str(key[0])] for key in TABLE}) == by_tier
    assert TABLE.feasible(120.0, prompt_tokens=lambda key: TIERS[str(key[0])]) == by_tier
    best = TABLE.best(1e6, prompt_tokens=TIERS, output_tokens=4, quality={("low", 4, 12): 0.5, ("high", 4, 12): 0.7})
    assert best is not None
    assert (best.key, best.latency_ms) == (("high", 4, 12), TABLE["high", 4, 12].total_ms(510, 4, 0.95))
    front = TABLE.frontier(prompt_tokens=TIERS, quality=dict.fromkeys(TABLE, 1.0))
    assert [option.latency_ms for option in front] == [min(TABLE[k].prefill_ms(TIERS[str(k[0])], 0.95) for k in TABLE)]


@pytest.mark.parametrize(
    ("prompt_tokens", "said"),
    [
        ({"low": 150, "high": 510}, "no value for tier='medium', which was measured; tier has 'high', 'low', 'medium'"),
        ({"lo": 150}, "values of no key column; the table has tier 'high', 'low', 'medium'; top_k 4, 8"),
        ({"layers": {12: 5}}, "names the column 'layers'; allowed: tier, top_k, num_blocks"),
        ({("low", 4, 12): 5}, r"no value for \('high', 4, 12\)"),
        ({"low": 150, "medium": -1, "high": 510}, "prompt_tokens is -1; allowed"),
        (lambda key: key[0], "prompt_tokens is 'high'; allowed: a whole number"),
    ],
)
def test_prompt_lengths_that_do_not_fit_the_table(prompt_tokens: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        TABLE.feasible(100.0, prompt_tokens=prompt_tokens)


def test_values_of_two_columns_want_the_column_named() -> None:
    columns = tuple(column._replace(name=name) for column, name in zip(KEY_COLUMNS, "abc", strict=True))
    held = [replace(key, key=(key.key[0], 16, key.key[2])) for key in TABLE.figures.keys if key.key[1] == 8]
    table = LatencyTable(replace(TABLE.figures, key_columns=columns, keys=tuple(held), qualities=()))
    with pytest.raises(ArgumentError, match=r"are found in b, c; name the column: \{'b': \{…\}\}"):
        table.feasible(100.0, prompt_tokens={12: 50, 16: 60})
    by_c = [key for key in table if table[key].prefill_ms({12: 50, 16: 60}[int(key[2])], 0.95) <= 80.0]
    assert table.feasible(100.0, prompt_tokens={"c": {12: 50, 16: 60}}) == by_c != []


def test_budgets_of_an_unknown_length() -> None:
    decoding = [key for key in TABLE if key != NO_DECODE]
    likely = [key for key in decoding if TABLE[key].p_within(150.0, 90, "vqa") >= 0.9]
    assert TABLE.feasible(150.0, prompt_tokens=90, p_at_least=0.9, workload="vqa") == likely
    expected = [key for key in decoding if TABLE[key].expected_total_ms(90) * 1.1 <= 150.0]
    assert TABLE.feasible(150.0, prompt_tokens=90, by="expected", margin=0.1) == expected
    assert 0 < len(likely) < len(decoding)
    assert 0 < len(expected) < len(decoding)
    for wrong in ({"q": 0.95}, {"output_tokens": 5}, {"by": "expected"}):
        with pytest.raises(
            ArgumentError, match=r"^p_at_least=0\.9 and .*: allowed is one of p_at_least, by='expected'"
        ):
            TABLE.feasible(150.0, p_at_least=0.9, **cast(Any, wrong))
    with pytest.raises(ArgumentError, match=r"p_at_least is 1\.0; allowed: above 0 and below 1"):
        TABLE.feasible(150.0, p_at_least=1.0)
    with pytest.raises(ArgumentError, match="by is 'luck'; allowed: 'expected'"):
        TABLE.feasible(150.0, by=cast(Any, "luck"))
