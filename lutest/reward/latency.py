"""LatencyReward: what a rollout's latency is worth, for every trainer's reward form."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast, get_args

from lutest.reader.arguments import positive_ms, quantile_index, real_number, whole_number
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError, LutestError, LutestWarning, NoDecodeDataError, UnknownKeyError
from lutest.reader.figures import Key, described_key
from lutest.reader.loading import load
from lutest.reader.table import LatencyTable
from lutest.reward import rollout
from lutest.reward.outcome import LatencyOutcome
from lutest.reward.rollout import (
    Choice,
    Columns,
    Completion,
    LengthFrom,
    Row,
    completion_text,
    refuse_misspelt,
    value_in,
)
from lutest.reward.terms import Weights, complexity, efficiency_bonus, smooth_penalty, squared_overrun

_HOPELESS = 10.0  # a budget so many times below the fastest prefill is a mistake, such as seconds
_NotPriced = (UnknownKeyError, NoDecodeDataError, ArgumentError)

UnknownLength = Literal["prefill", "expected_total", "p_within"]
OnUnknown = Literal["worst", "error", "none"] | float


class _FarError(UnknownKeyError):
    """A configuration was never measured near the prompt length."""


class _Price(NamedTuple):
    latency_ms: float
    limit_ms: float
    decided_by: str
    p_within: float | None


class _Request(NamedTuple):
    """What of a rollout decides its latency, beside the configuration."""

    budget_ms: float
    prompt_tokens: int | None
    text_tokens: int | None
    output_tokens: int | None
    workload: str | None


@dataclass(frozen=True)
class LatencyReward:
    """Prices rollouts by a latency table: immutable, thread-safe, picklable.

    Which latency decides: where the number of output tokens is known, the total at quantile `q`, against the budget.
    Where it is not, what `unknown_length` says.

    No rollout ends a run: a row with part of a configuration, or with something that cannot be right, is priced as an
    unknown configuration, with one `LutestWarning` that names the first of them; so is a prompt length that the
    configuration was never measured near (see `Entry.reach`). No token at all counts as prefill alone. Rewards are
    bounded (see `Weights`).

    Parameters
    ----------
    table : LatencyTable or str or path-like
        A table travels inside the pickle. A path is read once in each process, however many rewards are made or
        unpickled there, and read anew only for a reward made after the file was rebuilt.
    budget_ms : float, optional
        For the rows that bring no budget of their own, or none that can be read.
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
        one. ``error`` raises, ``none`` gives no reward, and a number is the reward itself. A
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
    _fastest_ms: float = field(init=False, repr=False, compare=False)
    _warned: set[str] = field(init=False, repr=False, compare=False, default_factory=set)

    def __post_init__(self) -> None:
        table = self.table
        if isinstance(table, (str, os.PathLike)):
            path = os.path.abspath(table)
            object.__setattr__(self, "table", path)
            table = _read(path)
        if not hasattr(table, "figures"):
            corrected = "; of an OnlineCalibrator, its corrected()" if hasattr(table, "corrected") else ""
            raise ArgumentError(f"table is {table!r:.80}; allowed: what lutest.load gives, or a path{corrected}")
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_fastest_ms", min(table[key].prefill_p50_ms for key in table.keys))
        quantile_index(table.quantiles, self.q)
        if self.budget_ms is not None:
            self._plausible(self.budget_ms)
        if self.workload is not None and self.workload not in table.output_lengths:
            held = ", ".join(map(repr, table.output_lengths))
            raise ArgumentError(f"workload is {self.workload!r}; allowed: {held}")
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
            None where the rollout has no configuration, or no budget that can be read and there is none for all, or an
            unknown configuration and `on_unknown` is ``none``.

        Raises
        ------
        ArgumentError
            The row has no budget at all, and there is none for all; or the text alone, of which a table whose runs do
            not hold vision and text tokens apart knows nothing.
        UnknownKeyError, NoDecodeDataError, ArgumentError
            With ``on_unknown="error"``: the configuration is not in the table, nothing is known of it there, or the row
            holds something that cannot be right.
        """
        try:
            key = self._configuration(row, completion)
            if key is None:
                return None
            request = self._request(row, completion)
            entry = self._known(key)
            prompt = self._prompt(entry, request)
            if prompt is not None and not entry.reach[0] <= prompt <= entry.reach[1]:
                far = entry.explain(prompt, 1).out_of_reach
                raise _FarError(f"{described_key(self._table.figures.key_columns, key)}: {far}")
            price = self._price(entry, request, prompt)
        except _NotPriced as error:
            return self._not_priced(row, completion, error)
        share = complexity(self._numbers(entry.key), self._largest)
        outcome = self._weighed(price, share, price.latency_ms, min(max(accuracy, 0.0), 1.0))
        is_beyond = entry.extrapolates(prompt, request.output_tokens or 1)
        return outcome._replace(extrapolated=True) if is_beyond else outcome

    def check_columns(self, given: Iterable[str]) -> None:
        """Refuse a data set that lacks a column which every row needs.

        Raises
        ------
        ArgumentError
            Naming the column, and the one that may be meant.
        """
        names, required = self.column_names, []
        if self.parse is None:
            required = list(names[: len(self._table.key_columns)])
        if self.budget_ms is None:
            required.append(self.columns.budget_ms)
        refuse_misspelt(given, required, names)

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
        if self.parse is None and not any(name in row for name in missing):
            lacking = ", ".join(map(repr, missing))
            self._warn_once("", f"no reward for a rollout without a configuration: {lacking} not in {sorted(row)}")
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
        prompt, text = value_in(row, columns.prompt_tokens), value_in(row, columns.text_tokens)
        workload = value_in(row, columns.workload)
        return _Request(
            self._budget(row),
            None if prompt is None else whole_number(columns.prompt_tokens, prompt, 0),
            None if text is None else whole_number(columns.text_tokens, text, 0),
            self._output_tokens(row, completion),
            self.workload if workload is None else str(workload),
        )

    def _budget(self, row: Row) -> float:
        given = row.get(self.columns.budget_ms)
        if given is None and self.budget_ms is not None:
            return self.budget_ms
        return self._plausible(given)

    def _plausible(self, given: object) -> float:
        budget = positive_ms(self.columns.budget_ms, given)
        if budget * _HOPELESS < self._fastest_ms:
            raise ArgumentError(
                f"{self.columns.budget_ms} is {budget:g}, but the fastest configuration needs {self._fastest_ms:.4g} "
                f"ms to its first token; allowed: milliseconds, from a {_HOPELESS:g}th of that on"
            )
        return budget

    @staticmethod
    def _prompt(entry: Entry, request: _Request) -> int | None:
        if request.prompt_tokens is None and request.text_tokens is not None:
            return entry.prompt_tokens(request.text_tokens)
        return request.prompt_tokens

    def _price(self, entry: Entry, request: _Request, prompt: int | None) -> _Price:
        budget, _, _, tokens, workload = request
        if tokens is not None:
            return _Price(entry.total_ms(prompt, tokens, self.q), budget, "total", None)
        if self.unknown_length == "prefill":
            return _Price(entry.prefill_ms(prompt, self.q), self.prefill_share * budget, "prefill", None)
        expected = entry.expected_total_ms(prompt, workload)
        if self.unknown_length == "expected_total":
            return _Price(expected, budget, "expected_total", None)
        return _Price(expected, budget, "p_within", entry.p_within(budget, prompt, workload))

    def _not_priced(self, row: Row, completion: Completion | None, error: LutestError) -> LatencyOutcome | None:
        """What a rollout gets of which nothing is known, or whose row is wrong; that is told of once."""
        columns, is_wrong = self.columns, isinstance(error, ArgumentError)
        if self.on_unknown == "error":
            raise error
        if self.budget_ms is None and columns.budget_ms not in row:
            raise ArgumentError(f"no budget: the row has no {columns.budget_ms!r}, and there is no budget_ms for all")
        if value_in(row, columns.text_tokens) is not None and value_in(row, columns.prompt_tokens) is None:
            self._table[self._table.keys[0]].prompt_tokens(0)  # an error where no row could ever be priced
        if is_wrong or isinstance(error, _FarError):
            self._warn_once(type(error).__name__, f"{error}; such rollouts count as unknown configurations")
        try:
            request = self._request(row, completion)
        except ArgumentError:  # as far as it can be read
            try:
                budget: float | None = self._budget(row)
            except ArgumentError:
                budget = self.budget_ms
            if budget is None:
                return None
            request = _Request(budget, None, None, None, None)
        outcome = self._unknown(request)
        return outcome and outcome._replace(wrong_row=is_wrong)

    def _warn_once(self, kind: str, what: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{what}; further ones are not told of", LutestWarning, stacklevel=4)

    def _unknown(self, request: _Request) -> LatencyOutcome | None:
        if self.on_unknown == "none":
            return None
        limit, slowest = request.budget_ms, 0.0
        for key in self._table.keys:
            entry = self._table[key]
            with suppress(NoDecodeDataError, ArgumentError):  # an unknown workload
                price = self._price(entry, request, self._prompt(entry, request))
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
        overrun = squared_overrun(latency, limit, weights.overrun, weights.most_overrun)
        bonus = accuracy * efficiency_bonus(latency, limit, weights.bonus)
        size = weights.complexity * share
        reward = bonus - smooth - overrun - size
        return LatencyOutcome(reward, shown_ms, limit, decided_by, p_within, smooth, overrun, bonus, size)


def checked_reward(reward: object) -> None:
    """Refuse what is no LatencyReward where a trainer's form of it is made."""
    if not isinstance(reward, LatencyReward):
        raise ArgumentError(f"reward is {reward!r:.80}; allowed: a LatencyReward, such as LatencyReward(table, 900.0)")


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
