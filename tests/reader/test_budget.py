"""p_within and expected_total_ms: budgets when nobody knows how many tokens will come out."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

import lutest
from lutest import ArgumentError, Entry, LatencyTable, NoDecodeDataError
from lutest.reader.figures import Figures
from lutest.reader.over_lengths import OUTERMOST_SCORE, levels_of
from tests.synthetic import NO_DECODE, QUANTILES, make_figures, within_of

Floats = NDArray[np.float64]

TABLE = LatencyTable(make_figures())
FREE = {"vqa": ((1, 5), (2, 30), (48, 4)), "web": ((7, 1),)}
KEY = ("medium", 8, 12)
levels = st.sampled_from([(0.5, 0.95), (0.1, 0.5, 0.95), QUANTILES])


def with_quantiles(levels: tuple[float, ...], lengths: dict[str, tuple[tuple[int, int], ...]]) -> LatencyTable:
    """The synthetic table with some of its quantiles and other output lengths."""
    chosen = [QUANTILES.index(q) for q in levels]

    def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[i] for i in chosen)

    keys = []
    for held in make_figures().keys:
        if held.decode is None or held.decode_curve is None or held.decode_total is None:
            continue
        keys.append(
            replace(
                held,
                prefill=replace(held.prefill, quantiles_ms=pick(held.prefill.quantiles_ms)),
                prefill_curve=replace(held.prefill_curve, values_ms=pick(held.prefill_curve.values_ms)),
                decode=replace(held.decode, quantiles_ms=pick(held.decode.quantiles_ms)),
                decode_curve=replace(held.decode_curve, values_ms=pick(held.decode_curve.values_ms)),
                decode_total=replace(held.decode_total, ratios=pick(held.decode_total.ratios)),
                correlations=pick(held.correlations),
            )
        )
    return LatencyTable(Figures(levels, make_figures().key_columns, tuple(keys), lengths, (), {}))


def at_score(entry: Entry, quantiles: tuple[float, ...], prompt: int | None, n: int, scores: Floats) -> Floats:
    """Totals of n tokens at normal scores: the rule of the module, written down the plain way."""
    totals = np.maximum.accumulate([entry.total_ms(prompt, n, q) for q in quantiles])
    held = norm.ppf(quantiles)
    if len(held) == 1:
        return np.full(scores.shape, totals[0])
    outermost = max(OUTERMOST_SCORE, *np.abs(held))
    z = np.clip(scores, -outermost, outermost)
    j = np.clip(np.searchsorted(held, z) - 1, 0, len(held) - 2)
    slope = (totals[j + 1] - totals[j]) / (held[j + 1] - held[j])
    found: Floats = totals[j] + slope * (z - held[j])
    return found


def expected_by_sum(entry: Entry, quantiles: tuple[float, ...], prompt: int | None, counts: dict[int, int]) -> float:
    """Sum over the lengths of the integral over the scores."""
    z = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    runs = sum(counts.values())
    return sum(n / runs * float(at_score(entry, quantiles, prompt, t, z).mean()) for t, n in counts.items())


def within_by_sum(
    entry: Entry, quantiles: tuple[float, ...], prompt: int | None, counts: dict[int, int], budget: float
) -> float:
    z = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    runs = sum(counts.values())
    return sum(n / runs * float((at_score(entry, quantiles, prompt, t, z) <= budget).mean()) for t, n in counts.items())


@given(levels, st.one_of(st.none(), st.integers(0, 1000)), st.floats(10.0, 20_000.0))
def test_both_are_sums_over_the_output_lengths(quantiles: tuple[float, ...], prompt: int | None, budget: float) -> None:
    table = with_quantiles(quantiles, FREE)
    entry = table[KEY]
    for workload, counts in ((None, {1: 5, 2: 30, 7: 1, 48: 4}), ("vqa", dict(FREE["vqa"])), ("web", {7: 1})):
        expected = expected_by_sum(entry, quantiles, prompt, counts)
        assert entry.expected_total_ms(prompt, workload) == pytest.approx(expected, rel=2e-4)
        within = within_by_sum(entry, quantiles, prompt, counts, budget)
        assert entry.p_within(budget, prompt, workload) == pytest.approx(within, abs=2e-4)


def test_simulation_agrees() -> None:
    chance = np.random.default_rng(0)
    lengths = {"long": tuple((n, int(2000 / n) + 1) for n in range(1, 1500, 3)), "short": ((1, 400), (3, 100))}
    entry = with_quantiles(QUANTILES, lengths)[KEY]
    tokens, counts = np.array(lengths["long"]).T
    drawn = chance.choice(tokens, 40_000, p=counts / counts.sum())
    totals = np.empty(len(drawn))
    for n in np.unique(drawn):
        here = drawn == n
        totals[here] = at_score(entry, QUANTILES, 250, int(n), chance.standard_normal(int(here.sum())))
    error = totals.std() / math.sqrt(len(totals))
    assert abs(entry.expected_total_ms(250, "long") - totals.mean()) < 4 * error
    for share in (0.02, 0.3, 0.5, 0.9, 0.99):
        budget = float(np.quantile(totals, share))
        error = math.sqrt(share * (1 - share) / len(totals))
        assert abs(entry.p_within(budget, 250, "long") - share) < 4 * error + 1e-4


def test_thousands_of_lengths_are_summed_in_groups() -> None:
    table = with_quantiles((0.5, 0.95), {"a": tuple((n, 1 + 20_000 // n) for n in range(1, 20_000))})
    entry, counts = table[KEY], dict(table.output_lengths["a"])
    totals = np.array([[entry.total_ms(200, n, q) for q in (0.5, 0.95)] for n in counts])
    shares = np.array(list(counts.values())) / sum(counts.values())
    assert entry.expected_total_ms(200) == pytest.approx(float(totals[:, 0] @ shares), rel=2e-4)
    for budget in np.geomspace(totals[0, 0], totals[-1, 0], 100):
        within = norm.cdf((budget - totals[:, 0]) / (totals[:, 1] - totals[:, 0]) * norm.ppf(0.95))
        assert entry.p_within(budget, 200) == pytest.approx(float(within @ shares), abs=1e-3)


def test_p_within_grows_from_0_to_1_with_the_budget() -> None:
    entry = TABLE[KEY]
    found = [entry.p_within(budget, 200) for budget in np.geomspace(1.0, 1e6, 300)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0.0, 1.0)


def test_a_total_at_a_level_is_within_with_that_probability() -> None:
    entry = TABLE[KEY]
    for q in QUANTILES:
        assert entry.p_within(entry.total_ms(200, 7, q), 200, "web") == pytest.approx(q, abs=1e-12)


def test_equal_levels_are_a_single_value() -> None:
    held = make_figures().keys[0]
    flat = replace(held, prefill_curve=replace(held.prefill_curve, values_ms=(held.prefill_curve.values_ms[1],) * 4))
    figures = replace(make_figures(), keys=(flat,), output_lengths={"one": ((1, 9),)})
    entry = LatencyTable(figures)[flat.key]
    prefill = entry.prefill_ms(50)
    assert entry.p_within(prefill, 50) == 1.0
    assert entry.p_within(prefill * 0.999, 50) == 0.0
    assert entry.expected_total_ms(50) == pytest.approx(prefill, rel=1e-12)


@given(st.sets(st.integers(1, 9999), min_size=2, max_size=6))
def test_weights_of_the_mean_keep_constants_and_lines(ten_thousandths: set[int]) -> None:
    quantiles = tuple(place / 10_000 for place in sorted({5_000, *ten_thousandths}))
    held = levels_of(quantiles)
    assert sum(held.weights) == pytest.approx(1.0, abs=1e-6)
    if len(quantiles) > 1:  # the mean score of a normal distribution is 0
        mean = sum(weight * score for weight, score in zip(held.weights, held.scores, strict=True))
        assert mean == pytest.approx(0.0, abs=1e-6)


def test_the_table_and_the_pickled_entry_say_the_same() -> None:
    entry = TABLE[KEY]
    assert TABLE[KEY].p_within(200.0, 99, "vqa") == entry.p_within(200.0, 99, "vqa")
    assert TABLE[KEY].expected_total_ms(99, "vqa") == entry.expected_total_ms(99, "vqa")
    other = pickle.loads(pickle.dumps(entry))
    assert other.p_within(200.0, 99) == entry.p_within(200.0, 99)
    filled = LatencyTable(make_figures(), missing="interpolate").lookup("medium", 6, 14)
    assert filled.expected_total_ms(99) > filled.prefill_ms(99)


def test_what_is_not_held_is_said() -> None:
    entry = TABLE[KEY]
    calls: tuple[Callable[[Any], float], ...] = (
        lambda w: entry.p_within(9.0, None, w),
        lambda w: entry.expected_total_ms(None, w),
    )
    for call in calls:
        with pytest.raises(ArgumentError, match=r"workload is 'huge'; allowed: 'vqa', 'web', or None for all together"):
            call("huge")
        with pytest.raises(ArgumentError, match=r"workload is \['vqa'\]; allowed"):
            call(["vqa"])
    bare = with_quantiles((0.5, 0.95), {})
    with pytest.raises(ArgumentError, match="holds no output lengths: give output_tokens"):
        bare[KEY].expected_total_ms()
    with pytest.raises(ArgumentError, match="holds no output lengths"):
        bare[KEY].p_within(100.0, None, "vqa")
    with pytest.raises(NoDecodeDataError):
        TABLE[NO_DECODE].p_within(100.0)
    with pytest.raises(ArgumentError, match="budget_ms is nan"):
        entry.p_within(math.nan)
    wrong: Any
    for wrong in (-1, 2.5, "5"):
        with pytest.raises(ArgumentError, match="prompt_tokens is"):
            entry.p_within(9.0, wrong)
        with pytest.raises(ArgumentError, match="prompt_tokens is"):
            entry.expected_total_ms(wrong)


@pytest.mark.parametrize("name", ["direct", "subtraction", "serving"])
def test_shipped_tables_keep_to_the_stated_tolerance(name: str, request: pytest.FixtureRequest) -> None:
    table = lutest.load(request.getfixturevalue(f"{name}_table"))
    counts: Counter[int] = Counter()
    for pairs in table.output_lengths.values():
        counts.update(dict(pairs))
    for entry in (table[key] for key in table if table[key].decode_step_p50_ms is not None):
        totals = {n: [entry.total_ms(None, n, q) for q in table.quantiles] for n in counts}
        expected = sum(counts[n] * held[0] for n, held in totals.items()) / counts.total()
        assert entry.expected_total_ms() == pytest.approx(expected, rel=1e-4)
        within = sum(counts[n] * within_of(held, table.quantiles, expected) for n, held in totals.items())
        assert entry.p_within(expected) == pytest.approx(within / counts.total(), abs=1e-4)
