"""Distributions of output lengths: those of a table, or given as text."""

from __future__ import annotations

import math
from pathlib import Path

from lutest.reader.errors import ArgumentError
from lutest.tablefile.sql import connect, database_errors

__all__ = ["parse_output_lengths"]


def parse_output_lengths(given: str) -> dict[int, float]:
    """Weights by output tokens.

    Parameters
    ----------
    given : str
        ``2:30,8:10,32`` (tokens, and a weight that is 1 if left out), or the path of a table, whose ``output_length``
        is taken, all workloads together.

    Raises
    ------
    ArgumentError
        It is neither.
    TableError
        The file is no table.
    """
    if Path(given).is_file():
        return _of_table(given)
    lengths: dict[int, float] = {}
    for part in given.split(","):
        tokens, _, weight = part.partition(":")
        try:
            length, share = int(tokens), float(weight or 1)
        except ValueError:
            length, share = 0, 0.0
        if length < 1 or not 0 < share < math.inf:
            raise ArgumentError(
                f"output lengths {given!r}: {part!r} is neither the path of a table nor tokens with a weight, such as "
                "2:30,8:10,32"
            )
        lengths[length] = lengths.get(length, 0.0) + share
    return lengths


def _of_table(path: str) -> dict[int, float]:
    with connect(path) as connection, database_errors(f"{path}: has no output lengths: "):
        rows = connection.execute(
            "SELECT output_tokens, sum(n) FROM output_length GROUP BY output_tokens ORDER BY output_tokens"
        ).fetchall()
    return {int(tokens): float(n) for tokens, n in rows}
