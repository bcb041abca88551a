"""The output lengths that a table holds, by workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import NamedTuple

from lutest.reader.errors import ArgumentError

_FEW = 256  # so many lengths are all asked for; more, in groups of like share and length, of which as many make
_GROUPS = 128  # … these shares of the runs, and these parts of the longest on a log scale


class Lengths(NamedTuple):
    """How many tokens come out: distinct lengths, increasing, and which share of the runs has each."""

    tokens: tuple[int, ...]
    shares: tuple[float, ...]


def lengths_by_workload(output_lengths: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str | None, Lengths]:
    """The lengths of each workload, and under None those of all runs together."""
    together: dict[int, int] = {}
    for pairs in output_lengths.values():
        for tokens, n in pairs:
            together[tokens] = together.get(tokens, 0) + n
    held: dict[str | None, Lengths] = {}
    for workload, pairs in (*output_lengths.items(), (None, sorted(together.items()))):
        if pairs:
            runs = sum(n for _, n in pairs)
            shares = {tokens: n / runs for tokens, n in pairs}
            if len(shares) > _FEW:
                shares = _grouped(shares)
            held[workload] = Lengths(tuple(shares), tuple(shares.values()))
    return held


def _grouped(shares: Mapping[int, float]) -> dict[int, float]:
    """Fewer lengths, of the same mean in every group."""
    groups: dict[tuple[int, int], list[float]] = {}
    below, longest = 0.0, log(max(shares))
    for tokens, share in shares.items():
        group = int(_GROUPS * (below + 0.5 * share)), int(_GROUPS * log(tokens) / longest)
        held = groups.setdefault(group, [0.0, 0.0])
        held[0], held[1], below = held[0] + share, held[1] + share * tokens, below + share
    found: dict[int, float] = {}
    for share, weighted in groups.values():
        low = int(weighted / share)
        above = weighted - share * low
        found[low] = found.get(low, 0.0) + share - above
        found[low + 1] = found.get(low + 1, 0.0) + above
    return dict(sorted(found.items()))


def lengths_of(held: Mapping[str | None, Lengths], workload: str | None) -> Lengths:
    """Lengths of a workload; None: of all together.

    Raises
    ------
    ArgumentError
        The table does not hold the workload, or no output lengths at all.
    """
    try:
        return held[workload]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in held if name is not None)
    if not names:
        raise ArgumentError("the table holds no output lengths: give output_tokens to total_ms instead")
    raise ArgumentError(f"workload is {workload!r}; allowed: {names}, or None for all together")
