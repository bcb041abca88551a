"""Order statistics by counting: those of ``quantile_cont`` and of sorting, to the last bit."""

from __future__ import annotations

import math

import duckdb
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from lutest.builder import order_statistics
from lutest.builder.fit import upper_rank
from lutest.builder.order_statistics import write_order_statistics

QUANTILES = (0.05, 0.333, 0.5, 0.95, 0.999)
_CHANCE = np.random.default_rng(5)
_ULPS = np.nextafter(20.0, 21.0) - 20.0
VALUES = {
    "all distinct": _CHANCE.lognormal(3, 1, 5000),
    "one value": np.full(700, 46.3),
    "two values, one ulp apart": 20.0 + _ULPS * _CHANCE.integers(0, 2, 3000),
    "neighbours, one ulp apart": 20.0 + _ULPS * np.arange(4001),
    "a clock of 0.1 ms": np.round(_CHANCE.lognormal(3, 0.2, 5000), 1) + 0.1,
    "ties beside a tail": np.where(_CHANCE.uniform(size=4000) < 0.9, 25.0, _CHANCE.lognormal(5, 2, 4000)),
    "from a nanosecond to days": 10.0 ** _CHANCE.uniform(-6, 9, 2000),
    "one run": np.array([3.25]),
    "two runs": np.array([3.25, 7.1]),
}


@pytest.mark.parametrize("most_groups", [1 << 20, 5], ids=["two scans", "bit by bit"])
def test_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, most_groups: int) -> None:
    monkeypatch.setattr(order_statistics, "MOST_GROUPS", most_groups)
    frame = pd.DataFrame(
        [(key_id, i % 50 == 3, value) for key_id, held in enumerate(VALUES.values()) for i, value in enumerate(held)],
        columns=["key_id", "outlier", "step_ms"],
    ).sample(frac=1, random_state=1)
    with duckdb.connect() as connection:
        connection.register("steps", frame)
        counts = "(SELECT key_id, count(*) AS n FROM steps GROUP BY key_id)"
        write_order_statistics(connection, "figures", "steps", "step_ms", QUANTILES, upper_rank, counts)
        found = connection.execute("SELECT * FROM figures ORDER BY key_id").fetchall()
        levels = connection.execute(
            f"SELECT quantile_cont(step_ms, {list(QUANTILES)}) FROM steps GROUP BY key_id ORDER BY key_id"
        ).fetchall()
    assert len(found) == len(VALUES)
    for (name, held), row, (expected,) in zip(VALUES.items(), found, levels, strict=True):
        _, n_values, sum_ns, sum_square_ns, *quantiles, upper = row
        assert quantiles == expected, name
        rank = upper_rank(len(held))
        assert upper == (None if rank is None else np.sort(held)[rank - 1]), name
        kept = _nanoseconds(held[np.arange(len(held)) % 50 != 3])
        assert (n_values, sum_ns) == (len(kept), float(sum(kept))), name
        assert math.isclose(sum_square_ns, sum(value * value for value in kept), rel_tol=1e-15), name


def _nanoseconds(values: NDArray[np.float64]) -> list[int]:
    return [int(value) for value in np.round(values * 1e6)]
