"""Measures of agreement, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from lutest.judging.metrics import (
    coverage,
    mape,
    mean_absolute_error,
    median_ape,
    median_bias,
    pinball_loss,
    r_squared,
)

OBSERVED = [10.0, 20.0, 40.0]
PREDICTED = [12.0, 20.0, 30.0]


def test_values_by_hand() -> None:
    assert mean_absolute_error(OBSERVED, PREDICTED) == pytest.approx(4)
    assert mape(OBSERVED, PREDICTED) == pytest.approx((0.2 + 0 + 0.25) / 3)
    assert median_ape(OBSERVED, PREDICTED) == pytest.approx(0.2)
    assert median_bias(OBSERVED, PREDICTED) == pytest.approx(0.0)
    assert coverage(OBSERVED, PREDICTED) == pytest.approx(2 / 3)
    mean = 70 / 3
    spread = sum((value - mean) ** 2 for value in OBSERVED)
    assert r_squared(OBSERVED, PREDICTED) == pytest.approx(1 - 104 / spread)


def test_pinball_weighs_what_is_above_by_q_and_what_is_below_by_the_rest() -> None:
    assert pinball_loss([10.0], [8.0], 0.95) == pytest.approx(1.9)
    assert pinball_loss([8.0], [10.0], 0.95) == pytest.approx(0.1)
    assert pinball_loss(OBSERVED, PREDICTED, 0.5) == pytest.approx(mean_absolute_error(OBSERVED, PREDICTED) / 2)


def test_bias_is_above_zero_where_predictions_are_too_high() -> None:
    assert median_bias([10, 20, 30], [11, 22, 33]) == pytest.approx(0.1)
    assert median_bias([10, 20, 30], [9, 18, 27]) == pytest.approx(-0.1)


def test_zeros_count_in_medians_by_rank_and_not_in_the_mean() -> None:
    observed, predicted = [0.0, 10.0, 10.0], [5.0, 11.0, 9.0]
    assert mape(observed, predicted) == pytest.approx(0.1)
    assert median_ape(observed, predicted) == pytest.approx(0.1)
    assert median_bias(observed, predicted) == pytest.approx(0.1)  # -0.1, 0.1, too high without limit
    assert coverage(observed, predicted) == pytest.approx(2 / 3)
    assert median_bias([0.0, 0.0], [0.0, 0.0]) == 0.0


def test_what_does_not_exist_is_nan() -> None:
    assert math.isnan(r_squared([5.0, 5.0], [5.0, 5.0]))
    assert math.isnan(mape([0.0], [1.0]))
    assert math.isnan(median_ape([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]))
    empty: list[float] = []
    for measure in (coverage, mape, mean_absolute_error, median_ape, median_bias, r_squared):
        assert math.isnan(measure(empty, empty))
    assert math.isnan(pinball_loss(empty, empty, 0.5))


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        coverage([1.0, 2.0], [1.0])
