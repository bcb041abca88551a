"""The shared estimators of quantiles."""

from __future__ import annotations

import numpy as np
import pytest

from lutest.builder.fit.quantiles import quantile_regression, weighted_quantile


def pinball(residual: np.ndarray, q: float) -> float:
    return float(np.maximum(q * residual, (q - 1) * residual).sum())


@pytest.mark.parametrize("rows", [150, 3000])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.95])
def test_quantile_regression_finds_the_line_of_the_quantile(rows: int, q: float) -> None:
    random = np.random.default_rng(rows)
    x = random.uniform(0, 10, rows)
    design = np.column_stack([np.ones(rows), x])
    response = 3 + 2 * x + (1 + 0.2 * x) * random.normal(size=rows)
    coefficients = quantile_regression(design, response, q)
    residual = response - design @ coefficients
    assert np.mean(residual <= 0) == pytest.approx(q, abs=4 / np.sqrt(rows) * 0.5)
    for step in ([0.1, 0], [-0.1, 0], [0, 0.02], [0, -0.02]):
        assert pinball(residual, q) <= pinball(response - design @ (coefficients + step), q)


def test_many_rows_and_few_rows_agree() -> None:
    # The same sample, once exactly and once twenty times over, which has the same solution.
    random = np.random.default_rng(3)
    x = random.uniform(0, 1, 151)
    design = np.column_stack([np.ones(151), x])
    response = x + random.gumbel(size=151)
    exact = quantile_regression(design, response, 0.9)
    repeated = quantile_regression(np.tile(design, (20, 1)), np.tile(response, 20), 0.9)
    assert pinball(response - design @ repeated, 0.9) == pytest.approx(
        pinball(response - design @ exact, 0.9), rel=2e-3
    )


@pytest.mark.parametrize("rows", [60, 1000])
def test_quantile_regression_takes_collinear_columns(rows: int) -> None:
    random = np.random.default_rng(1)
    x = random.uniform(0, 1, rows)
    design = np.column_stack([np.ones(rows), x, 2 * x, np.zeros(rows)])
    coefficients = quantile_regression(design, 1 + x, 0.5)
    np.testing.assert_allclose(design @ coefficients, 1 + x, atol=1e-2)


def test_weights_count_as_repetitions() -> None:
    random = np.random.default_rng(5)
    x, repeats = random.uniform(0, 1, 40), random.integers(1, 4, 40)
    design, response = np.column_stack([np.ones(40), x]), x + random.normal(size=40)
    weighted = quantile_regression(design, response, 0.7, repeats.astype(float))
    repeated = quantile_regression(np.repeat(design, repeats, axis=0), np.repeat(response, repeats), 0.7)
    np.testing.assert_allclose(
        pinball(np.repeat(response - design @ weighted, repeats), 0.7),
        pinball(np.repeat(response - design @ repeated, repeats), 0.7),
    )


def test_weighted_quantile_halves_the_weight() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0])
    assert weighted_quantile(values, weights, 0.5) == 2.0
    assert weighted_quantile(values, np.array([8.0, 1.0, 1.0]), 0.6) == 3.0
    assert weighted_quantile(values, weights, 0.0) == 1.0
