"""Order statistics of many values by key, exact, in memory that does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import duckdb
import numpy as np
import pandas as pd

from lutest.reader.names import quantile_column

MOST_GROUPS = 1 << 20  # of one counting: as many values are told apart to the last bit at once
_FIRST_SHIFT = 44  # of 64 bits: sign, exponent, and 8 of the significand, buckets 0.4 % wide
_NEXT_BITS = 12  # by which buckets that hold too many values are told apart


def _moments(value: str) -> str:
    nanoseconds = f"CAST(round({value} * 1e6) AS HUGEINT)"
    return (
        f"sum({nanoseconds}) FILTER (NOT outlier) AS sum_ns, "
        f"sum({nanoseconds} * {nanoseconds}) FILTER (NOT outlier) AS sum_square_ns"
    )


def write_order_statistics(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    relation: str,
    value: str,
    quantiles: Sequence[float],
    upper_rank: Callable[[int], int | None],
    n_independent: str,
) -> None:
    """Create the table `name`: quantiles of a value, the upper bound of its P95, and what means are made of, by key.

    Parameters
    ----------
    connection : duckdb connection
        Holds `relation`.
    name : str
        Of the table: ``key_id``, ``n_values``, ``sum_ns`` and ``sum_square_ns`` of values that are no outliers, one
        column per quantile of all values, and ``p95_upper_ms``.
    relation : str
        Has ``key_id``, ``outlier``, and the value.
    value : str
        Its column, in ms; finite and above 0.
    quantiles : sequence of float
        Levels, each in (0, 1).
    upper_rank : callable
        Sample size → rank (from 1) of the order statistic that bounds P95 from above, or None.
    n_independent : str
        Relation of ``key_id`` and ``n``, independent observations: the bound has the rank that as many would give.

    Notes
    -----
    The bits of positive floats are in the order of their values. So values are counted by their first bits, and then
    within the buckets that hold a wanted rank, by further bits to the last: a scan for each, two where buckets hold
    few values. Quantiles are those of ``quantile_cont`` to the last bit (type 7).
    """
    bits = f"{value}::BIT::UBIGINT"
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE counted AS
        SELECT
            key_id, 0::UBIGINT AS prefix, {bits} >> {_FIRST_SHIFT} AS bucket,
            count(*) AS n, count(*) FILTER (NOT outlier) AS n_values, {_moments(value)}
        FROM {relation}
        GROUP BY ALL
        """
    )
    of_keys = connection.execute(
        f"""
        WITH moments AS (
            SELECT
                key_id, CAST(sum(n) AS BIGINT) AS n_all, CAST(sum(n_values) AS BIGINT) AS n_values,
                CAST(sum(sum_ns) AS DOUBLE) AS sum_ns, CAST(sum(sum_square_ns) AS DOUBLE) AS sum_square_ns
            FROM counted GROUP BY key_id
        )
        SELECT moments.*, independent.n FROM moments JOIN {n_independent} AS independent USING (key_id) ORDER BY key_id
        """
    ).df()
    wanted: dict[tuple[int, int], float] = {}
    places = []
    for key_id, n_all, n in zip(of_keys["key_id"], of_keys["n_all"], of_keys["n"], strict=True):
        rank = upper_rank(int(n))
        # in proportion, rounded up; the term keeps products that are whole but for their last bit
        upper = None if rank is None else math.ceil(rank / int(n) * int(n_all) - 1e-9) - 1
        levels = [(int(n_all) - 1) * q for q in quantiles]
        places.append((int(key_id), levels, upper))
        for level in levels:
            wanted[int(key_id), math.floor(level)] = wanted[int(key_id), math.ceil(level)] = math.nan
        if upper is not None:
            wanted[int(key_id), upper] = math.nan
    if wanted:
        _select(connection, relation, bits, wanted)
    between = _between(connection)

    def quantile(key_id: int, level: float) -> float:
        low, high = wanted[key_id, math.floor(level)], wanted[key_id, math.ceil(level)]
        return low if level == math.floor(level) else between(low, high, level - math.floor(level))

    figures = of_keys.drop(columns=["n_all", "n"])
    for place, q in enumerate(quantiles):
        figures[quantile_column(q)] = [quantile(key_id, levels[place]) for key_id, levels, _ in places]
    figures["p95_upper_ms"] = [math.nan if upper is None else wanted[key_id, upper] for key_id, _, upper in places]
    connection.register("figures_frame", figures)
    columns = ", ".join([*map(quantile_column, quantiles), "p95_upper_ms"])
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE {name} AS
        SELECT key_id, n_values, sum_ns, sum_square_ns, {columns} FROM figures_frame
        """
    )
    connection.unregister("figures_frame")


def _between(connection: duckdb.DuckDBPyConnection) -> Callable[[float, float, float], float]:
    """How this DuckDB interpolates between two values: newer ones round a product and a sum at once."""
    low, high, share = 1.1, 2.0, 0.3  # where the two differ
    (own,) = connection.execute(
        f"SELECT quantile_cont(x, {share}) FROM (VALUES ({low}e0), ({high}e0)) AS two(x)"
    ).fetchall()

    def rounded_twice(low: float, high: float, share: float) -> float:
        return low * (1.0 - share) + high * share

    def rounded_once(low: float, high: float, share: float) -> float:
        return float(Fraction(low) * Fraction(1.0 - share) + Fraction(high * share))

    return rounded_twice if own[0] == rounded_twice(low, high, share) else rounded_once


def _select(
    connection: duckdb.DuckDBPyConnection, relation: str, bits: str, wanted: dict[tuple[int, int], float]
) -> None:
    """Fill in the values of the ranks (from 0) of keys, of which ``counted`` has the buckets of `_FIRST_SHIFT`."""
    ranks = pd.DataFrame(list(wanted), columns=["key_id", "rank"]).assign(prefix=np.uint64(0))
    ranks["within"] = ranks["rank"]
    shift = _FIRST_SHIFT
    while True:
        connection.register("ranks_frame", ranks)
        # of each rank its bucket, its place within that, and the values of it
        ranks = connection.execute(
            """
            WITH summed AS (
                SELECT *, sum(n) OVER (PARTITION BY key_id, prefix ORDER BY bucket) AS upto FROM counted
            )
            SELECT
                key_id, rank, bucket AS prefix, CAST(within - (upto - summed.n) AS BIGINT) AS within, summed.n
            FROM ranks_frame JOIN summed USING (key_id, prefix)
            WHERE within < upto AND within >= upto - summed.n
            """
        ).df()
        connection.unregister("ranks_frame")
        if shift == 0:
            break
        n_held = int(ranks.drop_duplicates(["key_id", "prefix"])["n"].sum())
        before, shift = shift, 0 if n_held <= MOST_GROUPS else max(shift - _NEXT_BITS, 0)
        connection.register("ranks_frame", ranks[["key_id", "prefix"]].drop_duplicates())
        connection.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE counted AS
            SELECT key_id, prefix, bits >> {shift} AS bucket, count(*) AS n
            FROM (SELECT key_id, {bits} AS bits, bits >> {before} AS prefix FROM {relation})
            JOIN ranks_frame USING (key_id, prefix)
            GROUP BY ALL
            """
        )
        connection.unregister("ranks_frame")
    values = ranks["prefix"].to_numpy(dtype=np.uint64).view(np.float64)
    for key_id, rank, found in zip(ranks["key_id"], ranks["rank"], values, strict=True):
        wanted[int(key_id), int(rank)] = float(found)
