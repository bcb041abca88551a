"""Entry: its arithmetic against the rules of the file written down the plain way."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutest import ArgumentError, Entry, NoDecodeDataError
from lutest.reader.arguments import MAX_TOKENS
from lutest.reader.figures import Curve, Key, KeyFigures, TotalRatios
from lutest.reader.table import LatencyTable
from tests.synthetic import (
    KEY_COLUMNS,
    NO_DECODE,
    QUANTILES,
    SINGLE_KNOT,
    curve_at,
    make_figures,
    make_key,
    ratio_at,
)

TABLE = LatencyTable(make_figures())
FIGURES = {held.key: held for held in TABLE.figures.keys}

keys = st.sampled_from([key for key in TABLE.keys if key != NO_DECODE])
prompts = st.integers(0, 3000)  # within the table of pieces, and beyond
tokens = st.integers(1, 300)
levels = st.sampled_from(QUANTILES)


def decode_parts(figures: KeyFigures) -> tuple[Curve, TotalRatios]:
    assert figures.decode_curve is not None
    assert figures.decode_total is not None
    return figures.decode_curve, figures.decode_total


def decode_by_loop(figures: KeyFigures, prompt: int, n: int, i: int) -> float:
    """decode_ms as the sum over every step."""
    curve, ratios = decode_parts(figures)
    steps = math.fsum(curve_at(curve, 1, prompt + step) for step in range(1, n))
    return steps * ratio_at(ratios, i, n - 1) if n > 1 else 0.0


def total_by_loop(figures: KeyFigures, prompt: int, n: int, i: int) -> float:
    prefill, prefill_i = (curve_at(figures.prefill_curve, j, prompt) for j in (1, i))
    decode, decode_i = (decode_by_loop(figures, prompt, n, j) for j in (1, i))
    a, d, c = abs(prefill_i - prefill), abs(decode_i - decode), figures.correlations[i]
    deviation = math.sqrt(a * a + d * d + 2 * c * a * d)
    return prefill + decode + (deviation if i > 1 else -deviation if i < 1 else 0.0)


@given(keys, prompts, tokens, levels)
def test_decode_is_the_sum_over_all_steps(key: Key, prompt: int, n: int, q: float) -> None:
    expected = decode_by_loop(FIGURES[key], prompt, n, QUANTILES.index(q))
    assert TABLE[key].decode_ms(prompt, n, q) == pytest.approx(expected, rel=1e-9)


@given(keys, prompts, tokens, levels)
def test_total_combines_the_deviations(key: Key, prompt: int, n: int, q: float) -> None:
    expected = total_by_loop(FIGURES[key], prompt, n, QUANTILES.index(q))
    assert TABLE[key].total_ms(prompt, n, q) == pytest.approx(expected, rel=1e-9)


@given(keys, st.one_of(st.none(), prompts), tokens, levels)
def test_totals_grow_with_the_output(key: Key, prompt: int | None, n: int, q: float) -> None:
    assert TABLE[key].total_ms(prompt, n, q) <= TABLE[key].total_ms(prompt, n + 1, q)


@given(keys, st.one_of(st.none(), prompts), levels)
def test_the_total_of_one_token_is_prefill(key: Key, prompt: int | None, q: float) -> None:
    assert TABLE[key].total_ms(prompt, 1, q) == pytest.approx(TABLE[key].prefill_ms(prompt, q), rel=1e-14)
    assert TABLE[key].decode_ms(prompt, 1, q) == 0.0


@given(keys, st.one_of(st.none(), prompts), levels, st.floats(1.0, 1e7))
def test_max_output_tokens_is_the_inverse_of_total(key: Key, prompt: int | None, q: float, budget: float) -> None:
    entry = TABLE[key]
    n = entry.max_output_tokens(budget, prompt, q)
    assert n == 0 or entry.total_ms(prompt, n, q) <= budget
    assert entry.total_ms(prompt, n + 1, q) > budget


@given(keys, prompts, tokens, levels)
def test_a_total_as_budget_gives_its_own_length(key: Key, prompt: int, n: int, q: float) -> None:
    entry = TABLE[key]
    assert entry.max_output_tokens(entry.total_ms(prompt, n, q), prompt, q) == n


def test_max_output_tokens_ends_somewhere() -> None:
    assert TABLE["low", 4, 16].max_output_tokens(1e300) == MAX_TOKENS


@pytest.mark.parametrize("key", TABLE.keys)
def test_knots_are_answered_exactly(key: Key) -> None:
    figures, entry = FIGURES[key], TABLE[key]
    for i, q in enumerate(QUANTILES):
        for x, value in zip(figures.prefill_curve.at, figures.prefill_curve.values_ms[i], strict=True):
            assert entry.prefill_ms(x, q) == value
        if figures.decode_curve is not None:
            for x, value in zip(figures.decode_curve.at, figures.decode_curve.values_ms[i], strict=True):
                assert entry.decode_step_ms(x, q) == value


@given(keys, prompts, st.integers(1, 3000), levels)
def test_between_and_beyond_knots(key: Key, prompt: int, kv_len: int, q: float) -> None:
    i, (curve, _) = QUANTILES.index(q), decode_parts(FIGURES[key])
    assert TABLE[key].prefill_ms(prompt, q) == pytest.approx(curve_at(FIGURES[key].prefill_curve, i, prompt), rel=1e-12)
    assert TABLE[key].decode_step_ms(kv_len, q) == pytest.approx(curve_at(curve, i, kv_len), rel=1e-12)


def test_a_falling_curve_stays_level_beyond_its_last_knot() -> None:
    figures = make_key(("low", 8, 16))
    falling = Curve((10, 20), tuple((f * 4.0, f * 3.0) for f in (0.8, 1.0, 1.4, 1.9)), (5, 5), ("measured",) * 2)
    entry = Entry(replace(figures, prefill_curve=falling), QUANTILES, KEY_COLUMNS)
    assert entry.prefill_ms(15) == 3.5
    assert entry.prefill_ms(10_000) == 3.0


@given(keys, prompts, tokens, levels, st.floats(0.01, 100.0))
def test_times_scale_with_the_figures(key: Key, prompt: int, n: int, q: float, c: float) -> None:
    def scaled(curve: Curve) -> Curve:
        return Curve(curve.at, tuple(tuple(c * v for v in row) for row in curve.values_ms), curve.n, curve.source)

    held = FIGURES[key]
    curve, _ = decode_parts(held)
    other = replace(held, prefill_curve=scaled(held.prefill_curve), decode_curve=scaled(curve))
    assert Entry(other, QUANTILES, KEY_COLUMNS).total_ms(prompt, n, q) == pytest.approx(
        c * TABLE[key].total_ms(prompt, n, q), rel=1e-9
    )


def test_without_a_prompt_length_the_own_quantiles_stand_in() -> None:
    held = FIGURES[("low", 8, 12)]
    entry = TABLE["low", 8, 12]
    assert entry.prefill_ms() == entry.prefill_p50_ms == held.prefill.quantiles_ms[1]
    assert entry.prefill_ms(q=0.95) == entry.prefill_p95_ms == held.prefill.quantiles_ms[2]
    assert entry.decode_ms(None, 9, 0.95) == entry.decode_ms(held.prompt_tokens_p50, 9, 0.95)
    assert entry.total_ms(None, 9) == pytest.approx(entry.prefill_p50_ms + entry.decode_ms(None, 9), rel=1e-14)


def test_figures_of_an_entry() -> None:
    entry = TABLE["medium", 4, 16]
    assert (entry.key, entry.n, entry.source) == (("medium", 4, 16), 70, "measured")
    assert entry.decode_step_p50_ms is not None
    assert entry.decode_step_p95_ms == pytest.approx(1.4 * entry.decode_step_p50_ms)


def test_a_key_with_one_token_runs_only() -> None:
    entry = TABLE[NO_DECODE]
    assert entry.decode_step_p50_ms is None
    assert entry.total_ms(500, 1, 0.95) == entry.prefill_ms(500, 0.95)
    assert entry.max_output_tokens(1e-3) == 0
    for call in (
        lambda: entry.total_ms(500, 2),
        lambda: entry.decode_ms(500, 2),
        lambda: entry.decode_step_ms(5),
        lambda: entry.max_output_tokens(1e6),
    ):
        with pytest.raises(NoDecodeDataError, match="all its runs have one token"):
            call()


@pytest.mark.parametrize(
    "wrong", [-1, -0.5, 1.5, math.nan, math.inf, "7", b"7", [7], 10**13, np.float64(2.5), np.int64(-3)]
)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("prompt_tokens", lambda e, x: e.prefill_ms(x)),
        ("prompt_tokens", lambda e, x: e.decode_ms(x, 5)),
        ("prompt_tokens", lambda e, x: e.total_ms(x, 5, 0.95)),
        ("prompt_tokens", lambda e, x: e.max_output_tokens(100, x)),
        ("output_tokens", lambda e, x: e.decode_ms(50, x)),
        ("output_tokens", lambda e, x: e.total_ms(50, x)),
        ("kv_len", lambda e, x: e.decode_step_ms(x)),
    ],
)
def test_wrong_tokens_are_named(name: str, call: Callable[[Entry, object], object], wrong: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name} is .*; allowed: a whole number from [01] to {MAX_TOKENS}$"):
        call(TABLE["low", 8, 16], wrong)


@pytest.mark.parametrize("call", ["decode_ms", "total_ms"])
def test_no_output_tokens_are_wrong(call: str) -> None:
    for wrong in (0, None):
        with pytest.raises(ArgumentError, match="output_tokens is"):
            getattr(TABLE["low", 8, 16], call)(50, wrong, 0.95)


@pytest.mark.parametrize("wrong", [0.9, 50, math.nan, "p95", None, [0.5]])
def test_wrong_quantiles_are_named(wrong: object) -> None:
    entry = TABLE["low", 8, 16]
    calls: list[Callable[..., object]] = [entry.prefill_ms, entry.decode_step_ms]
    more: list[Callable[..., object]] = [entry.decode_ms, entry.total_ms, entry.max_output_tokens]
    for call, arguments in [*((call, (50,)) for call in calls), *((call, (50, 5)) for call in more)]:
        with pytest.raises(ArgumentError, match=r"^q is .*0\.1, 0\.5, 0\.95, 0\.99$"):
            call(*arguments, wrong)


@pytest.mark.parametrize("wrong", [0, -5.0, math.nan, math.inf, "100", None])
def test_wrong_budgets_are_named(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^budget_ms is .*finite"):
        TABLE["low", 8, 16].max_output_tokens(wrong)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, np.float32, float])
def test_numpy_numbers_are_answered_like_python_ones(kind: type) -> None:
    entry = TABLE["low", 8, 16]
    for q in QUANTILES:
        with np.errstate(over="ignore"):  # 8 bits do not hold 300
            answer = entry.total_ms(kind(200), kind(100), q)
        assert isinstance(answer, float)
        assert answer == entry.total_ms(200, 100, q)
        assert entry.prefill_ms(kind(200), q) == entry.prefill_ms(200, q)


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot be changed"):
        TABLE["low", 8, 16].n = 5
    with pytest.raises(AttributeError, match="cannot be changed"):
        del TABLE["low", 8, 16].n


@pytest.mark.parametrize("key", [SINGLE_KNOT, NO_DECODE, ("medium", 8, 12)])
def test_entries_survive_pickling(key: Key) -> None:
    entry = TABLE[key]
    other = pickle.loads(pickle.dumps(entry))
    assert repr(other) == repr(entry)
    for q in QUANTILES:
        n = 1 if key == NO_DECODE else 40
        assert other.total_ms(333, n, q) == entry.total_ms(333, n, q)
        assert other.prefill_ms(333, q) == entry.prefill_ms(333, q)


def test_explain_gives_every_part() -> None:
    entry = TABLE["low", 8, 16]  # prompts at 40, 90, 160, steps at 41, 107, 250: measured, interpolated, measured
    explained = entry.explain(160, 20, 0.95)
    assert explained.total.value_ms == entry.total_ms(160, 20, 0.95)
    assert explained.prefill.value_ms == entry.prefill_ms(160, 0.95)
    assert explained.decode.value_ms == entry.decode_ms(160, 20, 0.95)
    assert explained.decode_step is not None
    assert explained.decode_step.value_ms == entry.decode_step_ms(161, 0.95)
    assert (explained.prefill.n, explained.prefill.source) == (12, "measured")
    assert (explained.decode_step.n, explained.decode.source, explained.total.source) == (23, *["interpolated"] * 2)
    assert explained.decode.n == 15
    assert explained.prefill.p95_upper_ms == FIGURES[entry.key].prefill.p95_upper_ms
    text = str(explained)
    assert [line.split()[0] for line in text.splitlines()] == [
        "tier=low,",
        "part",
        "prefill",
        "first",
        "decode",
        "total",
    ]
    assert f"{explained.total.value_ms:.3f}" in text
    assert json.loads(json.dumps(explained.as_dict()))["total"]["n"] == 12


def test_explain_says_what_is_extrapolated() -> None:
    entry = TABLE["low", 8, 16]
    assert entry.explain(39, 1).prefill.source == "extrapolated"
    assert entry.explain(161, 1).total.source == "extrapolated"
    assert entry.explain(160, 64).decode.source == "interpolated"
    assert entry.explain(160, 66).decode.source == "extrapolated"  # more steps than any run had
    assert entry.explain(160, 2).decode_step is not None
    assert entry.explain(240, 12).decode.source == "extrapolated"  # beyond KV length 250
    assert entry.explain(None, 1).prefill.n == 70
    assert TABLE[NO_DECODE].explain(600, 1, 0.95).decode_step is None


def test_a_single_ratio_stands_for_all_lengths() -> None:
    figures = FIGURES[("low", 8, 16)]
    _, ratios = decode_parts(figures)
    single = replace(ratios, decode_steps=(1,), ratios=tuple(row[:1] for row in ratios.ratios), n=(60,))
    explained = Entry(replace(figures, decode_total=single), QUANTILES, KEY_COLUMNS).explain(100, 90, 0.95)
    assert (explained.decode.n, explained.decode.source) == (60, "interpolated")
