"""LatencyReward: what a rollout's latency is worth, for every trainer's reward form."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast, get_args

from lutest.reader.arguments import positive_ms, quantile_index, real_number, whole_number
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError, NoDecodeDataError, UnknownKeyError
from lutest.reader.figures import Key, described_key
from lutest.reader.loading import load
from lutest.reader.table import LatencyTable
from lutest.reward import rollout
from lutest.reward.rollout import Choice, Columns, Completion, LengthFrom, Row, completion_text, value_in
from lutest.reward.terms import Weights, complexity, efficiency_bonus, smooth_penalty, squared_overrun

UnknownLength = Literal["prefill", "expected_total", "p_within"]
OnUnknown = Literal["worst", "error", "none"] | float


class LatencyOutcome(NamedTuple):
    """A latency reward with its parts: ``reward = efficiency_bonus − the three penalties``.

    Attributes
    ----------
    reward : float
    latency_ms : float or None
        The estimate that decided; None for a configuration that is not in the table.
    limit_ms : float
        What it was held against: the budget, or prefill's share of it.
    decided_by : str
        ``total``, ``prefill``, ``expected_total``, ``p_within`` or ``unknown``.
    p_within : float or None
        Probability of staying within the budget, where that decided.
    smooth_penalty, squared_overrun, efficiency_bonus, complexity_penalty : float
        The terms, weighted.
    """

    reward: float
    latency_ms: float | None
    limit_ms: float
    decided_by: str
    p_within: float | None
    smooth_penalty: float
    squared_overrun: float
    efficiency_bonus: float
    complexity_penalty: float

    @property
    def over_limit(self) -> bool | None:
        """Whether the estimate lies above its limit; None for a configuration that is not in the table."""
        return None if self.latency_ms is None else self.latency_ms > self.limit_ms

    @property
    def unknown(self) -> bool:
        """Whether the configuration is not in the table, or has no figures for what was asked."""
        return self.decided_by == "unknown"


class _Price(NamedTuple):
    latency_ms: float
    limit_ms: float
    decided_by: str
    p_within: float | None


class _Request(NamedTuple):
    """What of a rollout decides its latency, beside the configuration."""

    budget_ms: float
    prompt_tokens: int | None
    output_tokens: int | None
    workload: str | None


def trainer_figures(outcome: LatencyOutcome | None) -> dict[str, float | None]:
    """What trainers log of an outcome, None where there is no figure."""
    if outcome is None:
        return dict.fromkeys(("latency_ms", "latency_over_limit", "latency_unknown"))
    over = None if outcome.over_limit is None else float(outcome.over_limit)
    return {"latency_ms": outcome.latency_ms, "latency_over_limit": over, "latency_unknown": float(outcome.unknown)}


@dataclass(frozen=True)
class LatencyReward:
    """Prices rollouts by a latency table: immutable, thread-safe, picklable.

    Which latency decides: where the number of output tokens is known, the total at quantile `q`, against the budget.
    Where it is not, what `unknown_length` says.

    Parameters
    ----------
    table : LatencyTable or str or path-like
        A table travels inside the pickle. A path is read once in each process, however many rewards are made or
        unpickled there, and read anew only for a reward made after the file was rebuilt.
    budget_ms : float, optional
        For the rows that bring no budget of their own.
    weights : Weights
        How much each term counts.
    q : float
        One of the table's quantiles.
    prefill_share : float
        Part of the budget that prefill may take, above 0 and at most 1.
    unknown_length : {"prefill", "expected_total", "p_within"}
        Without a length, what decides: prefill at quantile `q` against its share of the budget; the expected total over
        the table's output lengths, against the budget; or the probability p of staying within the budget over these
        lengths. In the last one the smooth penalty, which is a soft version of "it missed", becomes β · (1 − p), and
        the other terms take the expected total.
    workload : str, optional
        Whose output lengths to take, for rows that name none.
    length_from : {"auto", "completion_ids", "column", "count_tokens", "unknown"}
        Where the number of output tokens comes from; ``auto`` takes the first that there is. With ``unknown`` a policy
        pays for what was known when it decided, whatever came out.
    parse : callable, optional
        Takes the completion's text and returns the policy's choice: a key of the table, such as (tier, top_k,
        num_blocks), or a mapping of its key columns with the rest in the row. None means that no choice was made. A
        policy that has to choose should not be able to get out of its penalty by garbling: let `parse` raise a
        ValueError or return ``{}``, which count as a configuration that is not in the table. To be picklable, it has to
        be a module's function.
    count_tokens : callable, optional
        Number of tokens of the completion's text; verl and OpenRLHF pass no ids.
    columns : Columns
        Names in the row, where they differ from those of the table's key columns and from `Columns`' own.
    on_unknown : {"worst", "error", "none"} or float
        What a configuration gets that is not in the table, or has no figures for what is asked. ``worst``: what the
        largest and slowest one of the table would get for this very row, and no more than twice the limit would
        get, with no chance to stay within it. So inventing configurations never pays, and a run never ends over
        one. ``error`` raises `UnknownKeyError`, ``none`` gives no reward, and a number is the reward itself. A
        configuration that a table filled in counts as known where it was interpolated, but not where it was
        extrapolated: there, a policy would find the errors of the estimate.

    Raises
    ------
    TableError
        The table cannot be read.
    ArgumentError
        An argument outside of what is allowed.
    """

    table: LatencyTable | str | os.PathLike[str]
    budget_ms: float | None = None
    _: KW_ONLY
    weights: Weights = field(default_factory=Weights)
    q: float = 0.95
    prefill_share: float = 0.8
    unknown_length: UnknownLength = "prefill"
    workload: str | None = None
    length_from: LengthFrom = "auto"
    parse: Callable[[str], Choice] | None = None
    count_tokens: Callable[[str], int] | None = None
    columns: Columns = field(default_factory=Columns)
    on_unknown: OnUnknown = "worst"
    _table: LatencyTable = field(init=False, repr=False, compare=False)
    _largest: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = self.table
        if isinstance(table, (str, os.PathLike)):
            path = os.path.abspath(table)
            object.__setattr__(self, "table", path)
            table = _read(path)
        object.__setattr__(self, "_table", table)
        quantile_index(table.quantiles, self.q)
        if self.budget_ms is not None:
            positive_ms("budget_ms", self.budget_ms)
        if not 0.0 < self.prefill_share <= 1.0:
            raise ArgumentError(f"prefill_share is {self.prefill_share!r}; allowed: above 0 and at most 1")
        _one_of("unknown_length", self.unknown_length, UnknownLength)
        _one_of("length_from", self.length_from, LengthFrom)
        given = self.on_unknown
        if given not in ("worst", "error", "none") and not math.isfinite(real_number(given)):
            raise ArgumentError(f"on_unknown is {given!r}; allowed: 'worst', 'error', 'none' or a finite number")
        if self.length_from == "count_tokens" and self.count_tokens is None:
            raise ArgumentError("length_from is 'count_tokens', but no count_tokens was given")
        unknown = [name for name in self.columns.key if name not in table.key_columns]
        if unknown:
            raise ArgumentError(f"columns.key has {unknown[0]!r}; allowed: {', '.join(map(repr, table.key_columns))}")
        largest = tuple(map(max, zip(*map(self._numbers, table.keys), strict=True)))
        object.__setattr__(self, "_largest", largest)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LatencyReward, **{f.name: getattr(self, f.name) for f in fields(self) if f.init}), ()

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names under which a row is read."""
        return self.columns.names(self._table.key_columns)

    def judge(self, row: Row, completion: Completion | None = None, accuracy: float = 1.0) -> LatencyOutcome | None:
        """Price one rollout.

        Parameters
        ----------
        row : mapping
            What is known of it under the names of `columns`, its token ids included.
        completion : str or sequence of mapping, optional
            What the policy wrote: text, or messages.
        accuracy : float
            What the efficiency bonus is multiplied by, held to 0 … 1.

        Returns
        -------
        LatencyOutcome or None
            None where the rollout has no configuration, or an unknown one and `on_unknown` is ``none``.

        Raises
        ------
        ArgumentError
            The row has no budget and there is none for all, or holds something that cannot be right.
        UnknownKeyError, NoDecodeDataError
            With ``on_unknown="error"``: the configuration is not in the table, or has no decode figures.
        """
        try:
            key = self._configuration(row, completion)
            if key is None:
                return None
            entry = self._known(key)
        except UnknownKeyError:
            if self.on_unknown == "error":
                raise
            return self._unknown(self._request(row, completion))
        request = self._request(row, completion)
        try:
            price = self._price(entry, request)
        except NoDecodeDataError:
            if self.on_unknown == "error":
                raise
            return self._unknown(request)
        share = complexity(self._numbers(entry.key), self._largest)
        return self._weighed(price, share, price.latency_ms, min(max(accuracy, 0.0), 1.0))

    def judge_rows(
        self,
        rows: Sequence[Row],
        completions: Sequence[Completion | None],
        accuracies: Sequence[float] | None = None,
    ) -> list[LatencyOutcome | None]:
        """`judge` for each rollout of a batch; an ArgumentError names the rollout."""
        outcomes: list[LatencyOutcome | None] = []
        try:
            for row, completion in zip(rows, completions, strict=True):
                accuracy = 1.0 if accuracies is None else accuracies[len(outcomes)]
                outcomes.append(self.judge(row, completion, accuracy))
        except ArgumentError as error:
            raise ArgumentError(f"rollout {len(outcomes)} of the batch: {error}") from error
        return outcomes

    def _configuration(self, row: Row, completion: Completion | None) -> Key | None:
        """The policy's choice, or what the columns say; None where neither is a configuration."""
        columns = self._table.figures.key_columns
        names = {name: self.columns.key.get(name, name) for name in self._table.key_columns}
        held = {name: value_in(row, given) for name, given in names.items()}
        if self.parse is not None and completion is not None:
            chosen = rollout.choice_in(completion_text(completion), self.parse, list(names))
            if chosen is not None:
                try:
                    return rollout.key_from(held | chosen, columns)
                except ArgumentError as error:
                    named = f"the policy's choice {chosen!r:.200} is not a configuration: {error}"
                    raise UnknownKeyError(named) from error
        missing = [names[name] for name, value in held.items() if value is None]
        if not missing:
            return rollout.key_from(held, columns)
        if len(missing) < len(held) and self.parse is None:
            lacking = ", ".join(map(repr, missing))
            raise ArgumentError(f"the row has part of a configuration: no value in column {lacking}")
        return None

    def _output_tokens(self, row: Row, completion: Completion | None) -> int | None:
        """Number of generated tokens from where `length_from` says, None where it is unknown."""
        columns, source = self.columns, self.length_from
        ids = value_in(row, columns.completion_ids)
        if ids is not None and source in ("auto", "completion_ids"):
            return max(1, len(cast(Sequence[int], ids)))  # prefill gives a token even where none was kept
        tokens = value_in(row, columns.output_tokens)
        if tokens is not None and source in ("auto", "column"):
            return rollout.output_tokens_from(columns.output_tokens, tokens)
        if self.count_tokens is not None and completion is not None and source in ("auto", "count_tokens"):
            return max(1, self.count_tokens(completion_text(completion)))
        return None

    def _known(self, key: Key) -> Entry:
        entry = self._table[key]
        if entry.source == "extrapolated":
            named = described_key(self._table.figures.key_columns, entry.key)
            raise UnknownKeyError(f"{named} lies outside of the measured configurations")
        return entry

    def _numbers(self, key: Key) -> tuple[float, ...]:
        """The values of a configuration's number columns."""
        columns = self._table.figures.key_columns
        return tuple(float(v) for column, v in zip(columns, key, strict=True) if column.kind == "number")

    def _request(self, row: Row, completion: Completion | None) -> _Request:
        columns = self.columns
        budget = value_in(row, columns.budget_ms)
        if budget is None and self.budget_ms is None:
            raise ArgumentError(f"no budget: the row has no {columns.budget_ms!r}, and there is no budget_ms for all")
        prompt = value_in(row, columns.prompt_tokens)
        workload = value_in(row, columns.workload)
        return _Request(
            positive_ms(columns.budget_ms, self.budget_ms if budget is None else budget),
            None if prompt is None else whole_number(columns.prompt_tokens, prompt, 0),
            self._output_tokens(row, completion),
            self.workload if workload is None else str(workload),
        )

    def _price(self, entry: Entry, request: _Request) -> _Price:
        budget, prompt, tokens, workload = request
        if tokens is not None:
            return _Price(entry.total_ms(prompt, tokens, self.q), budget, "total", None)
        if self.unknown_length == "prefill":
            return _Price(entry.prefill_ms(prompt, self.q), self.prefill_share * budget, "prefill", None)
        expected = entry.expected_total_ms(prompt, workload)
        if self.unknown_length == "expected_total":
            return _Price(expected, budget, "expected_total", None)
        return _Price(expected, budget, "p_within", entry.p_within(budget, prompt, workload))

    def _unknown(self, request: _Request) -> LatencyOutcome | None:
        if self.on_unknown == "none":
            return None
        limit = request.budget_ms
        slowest = 0.0
        for key in self._table.keys:
            try:
                price = self._price(self._table[key], request)
            except NoDecodeDataError:
                continue
            limit, slowest = price.limit_ms, max(slowest, price.latency_ms)
        p_within = 0.0 if request.output_tokens is None and self.unknown_length == "p_within" else None
        worst = _Price(max(slowest, 2.0 * limit), limit, "unknown", p_within)
        if self.on_unknown == "worst":
            return self._weighed(worst, 1.0, None, 0.0)
        return LatencyOutcome(float(self.on_unknown), None, limit, "unknown", p_within, 0.0, 0.0, 0.0, 0.0)

    def _weighed(self, price: _Price, share: float, shown_ms: float | None, accuracy: float) -> LatencyOutcome:
        latency, limit, decided_by, p_within = price
        weights = self.weights
        smooth = smooth_penalty(latency, limit, weights.smooth, weights.steepness)
        if p_within is not None:
            smooth = weights.smooth * (1.0 - p_within)
        overrun = squared_overrun(latency, limit, weights.overrun)
        bonus = accuracy * efficiency_bonus(latency, limit, weights.bonus)
        size = weights.complexity * share
        reward = bonus - smooth - overrun - size
        return LatencyOutcome(reward, shown_ms, limit, decided_by, p_within, smooth, overrun, bonus, size)


def _one_of(name: str, value: object, allowed: object) -> None:
    if value not in get_args(allowed):
        raise ArgumentError(f"{name} is {value!r}; allowed: {', '.join(map(repr, get_args(allowed)))}")


def _read(path: str) -> LatencyTable:
    try:
        file = os.stat(path)
    except OSError:
        return load(path)  # its error tells what is wrong
    return _read_once(path, file.st_ino, file.st_mtime_ns, file.st_size)


@lru_cache(maxsize=8)
def _read_once(path: str, _inode: int, _modified_ns: int, _size: int) -> LatencyTable:
    return load(path)
