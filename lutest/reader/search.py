"""Searching all configurations: which fit a budget, which is the best of these, and what quality costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat, TypeAlias, cast

from lutest.reader.arguments import positive_ms, quantile_index, whole_number
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError, NoDecodeDataError
from lutest.reader.figures import Key, KeyColumn, Quality

__all__ = [
    "By",
    "Option",
    "PromptTokens",
    "Request",
    "best_of",
    "fitting",
    "front_of",
    "given_qualities",
    "held_qualities",
    "with_latency",
]

# One request has another prompt length in every configuration: a number for all, a mapping from the values of a key
# column or from keys (or from the column's name to such a mapping), or a callable of the key.
PromptTokens: TypeAlias = int | Mapping[Any, Any] | Callable[[Key], int]
By: TypeAlias = Literal["expected"]

BUDGET_QUANTILE = 0.95  # of whatever decides a budget
_HOW = "give quality as a mapping from keys to numbers, or build from runs with a column `accuracy`"


@dataclass(frozen=True)
class Option:
    """A configuration with what it costs and what it is worth.

    Attributes
    ----------
    key : tuple
    latency_ms : float
        What decided, without margin: the total where an output length was given or the expected total was asked for,
        else prefill.
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


class Request:
    """What is asked of every configuration; checked when made.

    Raises
    ------
    ArgumentError
        An argument outside of what is allowed, arguments that exclude each other, or prompt lengths that miss a
        measured value.
    """

    def __init__(
        self,
        columns: Sequence[KeyColumn],
        keys: Sequence[Key],
        quantiles: Sequence[float],
        prompt_tokens: PromptTokens | None,
        output_tokens: int | None,
        q: float | None,
        p_at_least: float | None = None,
        by: By | None = None,
        workload: str | None = None,
    ) -> None:
        if by not in (None, "expected"):
            raise ArgumentError(f"by is {by!r}; allowed: 'expected', or left out")
        unknown_length = [f"p_at_least={p_at_least!r}"] if p_at_least is not None else []
        unknown_length += [f"by={by!r}"] if by is not None else []
        others = [f"output_tokens={output_tokens!r}"] if output_tokens is not None else []
        others += [f"q={q!r}"] if q is not None else []
        if unknown_length and (others or len(unknown_length) > 1):
            raise ArgumentError(
                f"{' and '.join([*unknown_length, *others])}: allowed is one of p_at_least, by='expected', and q with "
                "or without output_tokens; the first two are for an output length that nobody knows"
            )
        if p_at_least is not None and not 0.0 < p_at_least < 1.0:
            raise ArgumentError(f"p_at_least is {p_at_least!r}; allowed: above 0 and below 1")
        self.q = quantiles[quantile_index(quantiles, BUDGET_QUANTILE if q is None else q)]
        self.output_tokens = None if output_tokens is None else whole_number("output_tokens", output_tokens, 1)
        self.p_at_least, self.by, self.workload = p_at_least, by, workload
        self._prompt_of = _prompt_lengths(columns, keys, prompt_tokens)

    @property
    def of_prefill(self) -> bool:
        """Whether prefill decides, for nothing is said of the output."""
        return self.output_tokens is None and self.p_at_least is None and self.by is None

    def latency_ms(self, entry: Entry) -> float | None:
        """Prefill, or the total where something is said of the output; None where nobody can say."""
        prompt = self._prompt_of(entry.key)
        try:
            if self.output_tokens is not None:
                return entry.total_ms(prompt, self.output_tokens, self.q)
            if self.of_prefill:
                return entry.prefill_ms(prompt, self.q)
            return entry.expected_total_ms(prompt, self.workload)
        except NoDecodeDataError:
            return None

    def fits(self, entry: Entry, ms: float, budget_ms: float, prefill_share: float, margin: float) -> bool:
        """Whether an entry of this latency keeps to the budget."""
        if self.p_at_least is not None:
            within = entry.p_within(budget_ms / (1.0 + margin), self._prompt_of(entry.key), self.workload)
            return within >= self.p_at_least
        return ms * (1.0 + margin) <= (prefill_share if self.of_prefill else 1.0) * budget_ms


def _prompt_lengths(
    columns: Sequence[KeyColumn], keys: Sequence[Key], given: PromptTokens | None
) -> Callable[[Key], int | None]:
    """Prompt length of each key, all of them checked."""
    if given is None:
        return lambda _: None
    if isinstance(given, Mapping):
        held = {key: _mapped(columns, keys, given, key) for key in keys}
    elif callable(given):
        held = {key: given(key) for key in keys}
    else:
        held = dict.fromkeys(keys, given)
    checked = {key: whole_number("prompt_tokens", tokens, 0) for key, tokens in held.items()}
    return checked.__getitem__


def _mapped(columns: Sequence[KeyColumn], keys: Sequence[Key], given: Mapping[Any, Any], key: Key) -> Any:
    names = [column.name for column in columns]
    if len(given) == 1 and isinstance(nested := next(iter(given.values())), Mapping):
        name = next(iter(given))
        if name not in names:
            raise ArgumentError(f"prompt_tokens names the column {name!r}; allowed: {', '.join(names)}")
        place, given = names.index(name), nested
    elif any(isinstance(value, tuple) for value in given):
        if key not in given:
            raise ArgumentError(f"prompt_tokens has no value for {key!r}, which was measured")
        return given[key]
    else:
        places = [i for i in range(len(names)) if set(given) & {key[i] for key in keys}]
        if not places:
            raise ArgumentError(
                f"prompt_tokens maps {', '.join(map(repr, given))}, which are values of no key column; the table has "
                + "; ".join(f"{name} {_values(keys, i)}" for i, name in enumerate(names))
            )
        if len(places) > 1:
            fitting = ", ".join(names[i] for i in places)
            raise ArgumentError(
                f"the values that prompt_tokens maps are found in {fitting}; name the column: "
                f"{{{names[places[0]]!r}: {{…}}}}"
            )
        place = places[0]
    if key[place] not in given:
        raise ArgumentError(
            f"prompt_tokens has no value for {names[place]}={key[place]!r}, which was measured; {names[place]} has "
            f"{_values(keys, place)}"
        )
    return given[key[place]]


def _values(keys: Sequence[Key], place: int) -> str:
    return ", ".join(repr(value) for value in dict.fromkeys(key[place] for key in keys))


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
    return {
        entry.key: ms
        for entry, ms in with_latency(entries, request)
        if request.fits(entry, ms, budget, prefill_share, margin)
    }


def with_latency(entries: Iterable[Entry], request: Request) -> Iterator[tuple[Entry, float]]:
    """Entries with the latency that decides, those left out of which nobody can say it."""
    for entry in entries:
        ms = request.latency_ms(entry)
        if ms is not None:
            yield entry, ms


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


def given_qualities(quality: Mapping[Any, float], find: Callable[[Any], Key]) -> dict[Key, Quality]:
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
        key = find(given)
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
