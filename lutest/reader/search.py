"""Searching all configurations: which fit a budget, which is the best of these, and what quality costs."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lutest.reader.arguments import named_key, not_measured, positive_ms, quantile_index, real_number, whole_number
from lutest.reader.errors import ArgumentError, LutestWarning, NoDecodeDataError
from lutest.reader.figures import Key, KeyColumn, Quality

if TYPE_CHECKING:
    from lutest.reader.table import LatencyTable

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
    source : str
        What the latency rests on, at these lengths: ``measured``, ``calibrated``, ``interpolated``, ``extrapolated``.
    """

    key: Key
    latency_ms: float
    quality: float
    n: int | None = None
    lower: float | None = None
    upper: float | None = None
    source: str = ""


@dataclass(frozen=True)
class _Asked:
    """What is asked of every entry; checked when made."""

    table: LatencyTable
    prompt_tokens: PromptTokens | None
    text_tokens: int | None
    output_tokens: int | None
    q: float | None
    p_at_least: float | None
    by: By | None
    workload: str | None

    def __post_init__(self) -> None:
        if self.by not in (None, "expected"):
            raise ArgumentError(f"by is {self.by!r}; allowed: 'expected', or left out")
        named = {name: getattr(self, name) for name in ("p_at_least", "by", "output_tokens", "q")}
        given = [f"{name}={value!r}" for name, value in named.items() if value is not None]
        if len(given) > 1 and not self.of_known_length:
            raise ArgumentError(
                f"{' and '.join(given)}: allowed is one of p_at_least, by='expected', and q with or without "
                "output_tokens; the first two are for an output length that nobody knows"
            )
        if self.p_at_least is not None and not 0.0 < self.p_at_least < 1.0:
            raise ArgumentError(f"p_at_least is {self.p_at_least!r}; allowed: above 0 and below 1")
        if self.prompt_tokens is not None and self.text_tokens is not None:
            raise ArgumentError(
                f"prompt_tokens={self.prompt_tokens!r} and text_tokens={self.text_tokens!r}; allowed: one of the two"
            )
        quantile_index(self.table.quantiles, self.level)
        if self.output_tokens is not None:
            whole_number("output_tokens", self.output_tokens, 1)

    @property
    def level(self) -> float:
        return BUDGET_QUANTILE if self.q is None else self.q

    @property
    def of_known_length(self) -> bool:
        """Whether a quantile decides, that of the total or of prefill, and not the table's output lengths."""
        return self.p_at_least is None and self.by is None

    def latencies(
        self, budget_ms: float = math.inf, prefill_share: float = 1.0, margin: float = 0.0
    ) -> dict[Key, float]:
        """Prefill, or the total where something is said of the output, of what fits the budget and can be said.

        What was never measured near its prompt length is left out, with a warning that says so.
        """
        prompts = self.prompts()
        limit_ms = budget_ms / (1.0 + margin)
        found, far = {}, []
        for key in self.table.keys:
            entry, prompt = self.table[key], prompts[key]
            if prompt is not None and not entry.reach[0] <= prompt <= entry.reach[1]:
                far.append(key)
                continue
            with contextlib.suppress(NoDecodeDataError):
                if self.output_tokens is not None:
                    ms = entry.total_ms(prompt, self.output_tokens, self.level)
                elif self.of_known_length:
                    ms = entry.prefill_ms(prompt, self.level)
                else:
                    ms = entry.expected_total_ms(prompt, self.workload)
                if self.p_at_least is not None:
                    fits = entry.p_within(limit_ms, prompt, self.workload) >= self.p_at_least
                else:
                    of_prefill = self.output_tokens is None and self.of_known_length
                    fits = ms <= limit_ms * (prefill_share if of_prefill else 1.0)
                if fits:
                    found[key] = ms
        if far:
            held = next(held for held in self.table.figures.keys if held.key == far[0])
            warnings.warn(
                f"left out {len(far)} of {len(self.table)} configurations, such as {far[0]!r}: "
                + held.out_of_reach(prompts[far[0]] or 0),
                LutestWarning,
                stacklevel=3,
            )
        return found

    def prompts(self) -> Mapping[Key, int | None]:
        """Prompt length of each configuration, all of them checked."""
        if self.text_tokens is not None:
            return {key: self.table[key].prompt_tokens(self.text_tokens) for key in self.table.keys}
        return _prompt_lengths(self.table.figures.key_columns, self.table.keys, self.prompt_tokens)

    def sourced(self, option: Option, prompts: Mapping[Key, int | None]) -> Option:
        """The option with what its latency rests on."""
        source = self.table[option.key].source_at(prompts[option.key], self.output_tokens or 1)
        return replace(option, source=source)


def feasible(
    table: LatencyTable,
    budget_ms: float,
    *,
    prompt_tokens: PromptTokens | None = None,
    text_tokens: int | None = None,
    output_tokens: int | None = None,
    prefill_share: float = 0.8,
    q: float | None = None,
    margin: float = 0.0,
    p_at_least: float | None = None,
    by: By | None = None,
    workload: str | None = None,
) -> list[Key]:
    """Measured configurations that fit a budget.

    Parameters
    ----------
    budget_ms : float
        Finite, above 0.
    prompt_tokens : int, mapping or callable, optional
        Vision and text together, another one in every configuration for the same request: a number for all; a
        mapping from the values of one key column, such as ``{"low": 150, "high": 510}``, or from keys; a callable of
        the key. Where the values are found in two columns, name one: ``{"users": {1: 150, 64: 150}}``. Left out: each
        configuration's own prefill quantiles.
    text_tokens : int, optional
        In place of `prompt_tokens`: the text alone, to which each configuration adds the vision tokens of its own
        runs (see `Entry.prompt_tokens`).
    output_tokens : int, optional
        Given: the total must fit. Left out: prefill must fit its share.
    prefill_share : float
        Part of the budget that prefill may take, above 0 and at most 1.
    q : float, optional
        One of the table's quantiles; 0.95 if left out.
    margin : float
        0 or more; with 0.1, the estimate times 1.1 must fit.
    p_at_least : float, optional
        With the output length unknown: the probability of staying within the budget, over the table's output
        lengths, must be at least this (see `Entry.p_within`).
    by : {"expected"}, optional
        With the output length unknown: the expected total must fit (see `Entry.expected_total_ms`).
    workload : str, optional
        Whose output lengths to take for these two; left out: those of all together.

    Returns
    -------
    list of tuple
        In the order of `keys`. One without decode figures is left out where they are needed, and so is one that was
        never measured near its prompt length (see `Entry.reach`), with a `LutestWarning`.

    Raises
    ------
    ArgumentError
        Also where `p_at_least`, `by` and `q` or `output_tokens` stand beside each other, and where a mapping of
        prompt lengths misses a measured value.

    Examples
    --------
    >>> table.feasible(1500, text_tokens=40, output_tokens=16)  # doctest: +SKIP
    >>> table.feasible(1500, prompt_tokens={"low": 150, "high": 510}, p_at_least=0.9)  # doctest: +SKIP
    """
    asked = _Asked(table, prompt_tokens, text_tokens, output_tokens, q, p_at_least, by, workload)
    return list(asked.latencies(*_checked_budget(budget_ms, prefill_share, margin)))


def best(
    table: LatencyTable,
    budget_ms: float,
    *,
    prompt_tokens: PromptTokens | None = None,
    text_tokens: int | None = None,
    output_tokens: int | None = None,
    prefill_share: float = 0.8,
    q: float | None = None,
    margin: float = 0.0,
    quality: Mapping[Any, float] | None = None,
    workload: str | None = None,
    p_at_least: float | None = None,
    by: By | None = None,
) -> Option | None:
    """The configuration of the highest quality that fits a budget; of equals, the fastest.

    Parameters
    ----------
    budget_ms, prompt_tokens, text_tokens, output_tokens, prefill_share, q, margin, p_at_least, by
        As in `feasible`.
    quality : mapping, optional
        Key → number, higher is better; only these configurations are looked at. Left out: the table's own
        accuracies.
    workload : str, optional
        Whose accuracies to take, and whose output lengths where they are unknown; needed where the table holds
        accuracies of several workloads.

    Returns
    -------
    Option or None
        None where nothing that has a quality fits: never a configuration that breaks the budget.

    Raises
    ------
    ArgumentError
        Also where there is no quality to go by.
    UnknownKeyError
        A configuration of `quality` was not measured.
    """
    asked = _Asked(table, prompt_tokens, text_tokens, output_tokens, q, p_at_least, by, workload)
    latencies = asked.latencies(*_checked_budget(budget_ms, prefill_share, margin))
    options = _options(asked, latencies, quality)
    found = min(options, key=lambda option: (-option.quality, option.latency_ms), default=None)
    return found and asked.sourced(found, asked.prompts())


def frontier(
    table: LatencyTable,
    *,
    prompt_tokens: PromptTokens | None = None,
    text_tokens: int | None = None,
    output_tokens: int | None = None,
    q: float | None = None,
    quality: Mapping[Any, float] | None = None,
    workload: str | None = None,
    by: By | None = None,
) -> list[Option]:
    """The configurations that are worth choosing: no other is as fast and better, or faster and as good.

    Parameters, errors
        As in `best`. Latency is prefill where nothing is said of the output, else the total.

    Returns
    -------
    list of Option
        By rising latency, and so by rising quality.
    """
    asked = _Asked(table, prompt_tokens, text_tokens, output_tokens, q, None, by, workload)
    front: list[Option] = []
    for option in sorted(_options(asked, asked.latencies(), quality), key=lambda o: (o.latency_ms, -o.quality)):
        if not front or option.quality > front[-1].quality:
            front.append(option)
    prompts = asked.prompts()
    return [asked.sourced(option, prompts) for option in front]


def _options(asked: _Asked, latencies: Mapping[Key, float], quality: Mapping[Any, float] | None) -> list[Option]:
    """The configurations that have a latency and a quality: the caller's, or the table's own."""
    if quality is None:
        qualities = _held_qualities(asked.table.figures.qualities, asked.workload)
    elif asked.workload is not None and asked.of_known_length:
        raise ArgumentError(f"workload is {asked.workload!r} beside a quality of your own; allowed: one of the two")
    else:
        qualities = _given_qualities(asked.table, quality)
    return [
        Option(key, ms, held.accuracy, held.n or None, held.lower, held.upper)
        for key, ms in latencies.items()
        if (held := qualities.get(key)) is not None
    ]


def _checked_budget(budget_ms: float, prefill_share: float, margin: float) -> tuple[float, float, float]:
    budget = positive_ms("budget_ms", budget_ms)
    if not 0.0 < prefill_share <= 1.0:
        raise ArgumentError(f"prefill_share is {prefill_share!r}; allowed: above 0 and at most 1")
    if not 0.0 <= margin < math.inf:
        raise ArgumentError(f"margin is {margin!r}; allowed: finite, 0 or more")
    return budget, prefill_share, margin


def _prompt_lengths(
    columns: Sequence[KeyColumn], keys: Sequence[Key], given: PromptTokens | None
) -> Mapping[Key, int | None]:
    """Prompt length of each key, all of them checked."""
    if given is None:
        return dict.fromkeys(keys)
    if isinstance(given, Mapping):
        held = {key: _mapped(columns, keys, given, key) for key in keys}
    elif callable(given):
        held = {key: given(key) for key in keys}
    else:
        held = dict.fromkeys(keys, given)
    return {key: whole_number("prompt_tokens", tokens, 0) for key, tokens in held.items()}


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


def _held_qualities(rows: Sequence[Quality], workload: str | None) -> dict[Key, Quality]:
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


def _given_qualities(table: LatencyTable, quality: Mapping[Any, float]) -> dict[Key, Quality]:
    """The caller's qualities, by the table's own keys."""
    held = {}
    for given, value in quality.items():
        key = named_key(table.figures, given if isinstance(given, tuple) else (given,), {})
        if key not in table:
            raise not_measured(table.figures, key)
        number = real_number(value)
        if not math.isfinite(number):
            raise ArgumentError(f"quality of {given!r} is {value!r}; allowed: a finite number")
        held[key] = Quality(key, "", 0, number, None, None)
    if not held:
        raise ArgumentError(f"quality is empty: {_HOW}")
    return held
