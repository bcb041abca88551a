"""Searching all configurations: which fit a budget, which is the best of these, and what quality costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, cast

from lutest.reader.arguments import positive_ms, quantile_index, whole_number
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError, NoDecodeDataError
from lutest.reader.figures import Key, Quality

__all__ = ["Option", "Request", "best_of", "fitting", "front_of", "given_qualities", "held_qualities"]

_HOW = "give quality as a mapping (tier, top_k, num_blocks) → number, or build from runs with a column `accuracy`"


@dataclass(frozen=True)
class Option:
    """A configuration with what it costs and what it is worth.

    Attributes
    ----------
    key : Key
    latency_ms : float
        Prefill where no output length was given, else the total; at the quantile that was asked for, without margin.
    quality : float
    n : int or None
        Runs behind the quality; None for one that the caller gave.
    lower, upper : float or None
        95 % confidence interval of the quality, where it is known.
    """

    key: Key
    latency_ms: float
    quality: float
    n: int | None = None
    lower: float | None = None
    upper: float | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of every configuration; checked when made.

    Raises
    ------
    ArgumentError
    """

    quantiles: tuple[float, ...]
    prompt_tokens: int | None
    output_tokens: int | None
    q: float

    def __post_init__(self) -> None:
        quantile_index(self.quantiles, self.q)
        if self.prompt_tokens is not None:
            whole_number("prompt_tokens", self.prompt_tokens, 0)
        if self.output_tokens is not None:
            whole_number("output_tokens", self.output_tokens, 1)

    def latency_ms(self, entry: Entry) -> float | None:
        """What decides: prefill, or the total where the length is known; None where nobody can say."""
        if self.output_tokens is None:
            return entry.prefill_ms(self.prompt_tokens, self.q)
        try:
            return entry.total_ms(self.prompt_tokens, self.output_tokens, self.q)
        except NoDecodeDataError:
            return None


def fitting(
    entries: Iterable[Entry], request: Request, budget_ms: float, prefill_share: float, margin: float
) -> dict[Key, float]:
    """Configurations whose estimate, with the margin, fits the budget or prefill's share of it; with their latency.

    Raises
    ------
    ArgumentError
    """
    budget = positive_ms("budget_ms", budget_ms)
    if not 0.0 < prefill_share <= 1.0:
        raise ArgumentError(f"prefill_share is {prefill_share!r}; allowed: above 0 and at most 1")
    if not 0.0 <= margin < math.inf:
        raise ArgumentError(f"margin is {margin!r}; allowed: finite, 0 or more")
    limit = budget if request.output_tokens is not None else prefill_share * budget
    latencies = ((entry.key, request.latency_ms(entry)) for entry in entries)
    return {key: ms for key, ms in latencies if ms is not None and ms * (1.0 + margin) <= limit}


def held_qualities(rows: Sequence[Quality], workload: str | None) -> dict[Key, Quality]:
    """The table's own qualities on one workload; None: the only one that it holds.

    Raises
    ------
    ArgumentError
        No quality in the table, none on this workload, or several workloads and none named: keys that were tried on
        different requests cannot be compared.
    """
    workloads = sorted({row.workload for row in rows})
    if not workloads:
        raise ArgumentError(f"quality is None, and the table holds none: {_HOW}")
    if workload is None and len(workloads) == 1:
        workload = workloads[0]
    if workload not in workloads:
        raise ArgumentError(
            f"workload is {workload!r}; allowed: {', '.join(map(repr, workloads))}, of which the table holds a quality"
        )
    return {row.key: row for row in rows if row.workload == workload}


def given_qualities(quality: Mapping[Any, float], find: Callable[[str | int, int, int], Key]) -> dict[Key, Quality]:
    """The caller's qualities, by the table's own keys.

    Raises
    ------
    UnknownKeyError
        A configuration that was not measured.
    ArgumentError
        A key or a value of a wrong kind.
    """
    held = {}
    for given, value in quality.items():
        if not isinstance(given, tuple) or len(given) != 3:
            raise ArgumentError(f"quality has the key {given!r}; allowed: (tier, top_k, num_blocks)")
        key = find(*given)
        try:
            number = math.nan if isinstance(value, str) else float(cast(SupportsFloat, value))
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ArgumentError(f"quality of {given!r} is {value!r}; allowed: a finite number")
        held[key] = Quality(key, "", 0, number, None, None)
    if not held:
        raise ArgumentError(f"quality is empty: {_HOW}")
    return held


def best_of(latencies: Mapping[Key, float], qualities: Mapping[Key, Quality]) -> Option | None:
    """The highest quality among configurations; of equals, the fastest."""
    options = _options(latencies, qualities)
    return min(options, key=lambda option: (-option.quality, option.latency_ms), default=None)


def front_of(latencies: Mapping[Key, float], qualities: Mapping[Key, Quality]) -> list[Option]:
    """The Pareto front: options than which no other is as fast and better, or faster and as good; by latency."""
    front: list[Option] = []
    for option in sorted(_options(latencies, qualities), key=lambda o: (o.latency_ms, -o.quality)):
        if not front or option.quality > front[-1].quality:
            front.append(option)
    return front


def _options(latencies: Mapping[Key, float], qualities: Mapping[Key, Quality]) -> list[Option]:
    return [
        Option(key, ms, held.accuracy, held.n or None, held.lower, held.upper)
        for key, ms in latencies.items()
        if (held := qualities.get(key)) is not None
    ]
