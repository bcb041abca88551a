"""Where a rollout's configuration, lengths and budget come from: columns, the policy's own words, token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, SupportsIndex, TypeAlias, cast

from lutest.reader.arguments import whole_number
from lutest.reader.errors import ArgumentError, UnknownKeyError

__all__ = [
    "Choice",
    "Columns",
    "Completion",
    "LengthFrom",
    "Row",
    "column_rows",
    "completion_text",
    "configuration_of",
    "output_tokens_of",
    "value_in",
]

Row: TypeAlias = Mapping[str, object]
Completion: TypeAlias = str | Sequence[Mapping[str, object]]
Choice: TypeAlias = Mapping[str, object] | Sequence[object] | None
LengthFrom = Literal["auto", "completion_ids", "column", "count_tokens", "unknown"]
Configuration: TypeAlias = tuple[str | int, int, int]

# What parsers of text raise over text that they cannot read
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_MOST_DIGITS = 18


@dataclass(frozen=True)
class Columns:
    """Names under which a rollout's row holds what a latency reward reads; rows may lack any of them.

    Attributes
    ----------
    tier, top_k, num_blocks : str
        The configuration.
    prompt_tokens : str
        Vision + text tokens; without it, the configuration's own prefill quantile counts.
    output_tokens : str
        Generated tokens, end-of-sequence included.
    completion_ids : str
        The generated token ids themselves, without padding.
    budget_ms : str
        Comes before the constant budget.
    workload : str
        Comes before the constant workload.
    """

    tier: str = "tier"
    top_k: str = "top_k"
    num_blocks: str = "num_blocks"
    prompt_tokens: str = "prompt_tokens"
    output_tokens: str = "output_tokens"
    completion_ids: str = "completion_ids"
    budget_ms: str = "budget_ms"
    workload: str = "workload"

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(getattr(self, column.name) for column in fields(self))


def column_rows(columns: Mapping[str, object], names: Iterable[str], count: int) -> list[dict[str, object]]:
    """Rows from the columns that a trainer passes: lists, arrays or tensors of `count` values, other names left out.

    Raises
    ------
    ArgumentError
        A column that is not one value a row.
    """
    held: dict[str, Sequence[object]] = {}
    for name in names:
        column = columns.get(name)
        if column is None:
            continue
        if isinstance(column, (str, bytes)) or not hasattr(column, "__getitem__") or not hasattr(column, "__len__"):
            raise ArgumentError(f"column {name!r} is {column!r}; allowed: a list of {count} values, one a rollout")
        values = cast(Sequence[object], column)
        if len(values) != count:
            raise ArgumentError(f"column {name!r} has {len(values)} values for {count} rollouts")
        held[name] = values
    return [{name: values[i] for name, values in held.items()} for i in range(count)]


def value_in(row: Row, name: str) -> object:
    """The value of a column; None where the row has none, or NaN, which is how pandas writes that."""
    value = row.get(name)
    return None if isinstance(value, float) and value != value else value


def completion_text(completion: Completion) -> str:
    """What the policy wrote: a string as it is, of messages the assistant's text, one message a line.

    Parameters
    ----------
    completion : str or sequence of mapping
        Messages have ``role`` and ``content``, the latter a string or blocks with ``text``. What tools and users say
        is left out, so that it cannot pass for the policy's choice.
    """
    if isinstance(completion, str):
        return completion
    texts: list[str] = []
    for message in completion:
        content = message.get("content")
        if message.get("role", "assistant") != "assistant" or content is None:
            continue
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, Sequence):
            texts.append("".join(str(block.get("text") or "") for block in content if isinstance(block, Mapping)))
    return "\n".join(texts)


def configuration_of(
    row: Row, completion: Completion | None, columns: Columns, parse: Callable[[str], Choice] | None
) -> Configuration | None:
    """The configuration of a rollout, or None where it has none.

    Parameters
    ----------
    row : mapping
        Columns of the data set.
    completion : str or sequence of mapping, optional
        What the policy wrote.
    columns : Columns
        Names to look under.
    parse : callable, optional
        Finds the policy's choice in its text: (tier, top_k, num_blocks), or a mapping with some of these, of which the
        row's columns give the rest; None if the rollout makes no choice, so that the columns alone decide. All other
        fields of the mapping are ignored, so that a policy cannot write itself a budget or a length.

    Raises
    ------
    UnknownKeyError
        The policy made a choice that is not a configuration, or `parse` could not read it and raised.
    ArgumentError
        The columns alone hold part of a configuration, or values that cannot be one.
    """
    held = {
        "tier": value_in(row, columns.tier),
        "top_k": value_in(row, columns.top_k),
        "num_blocks": value_in(row, columns.num_blocks),
    }
    chosen = None if parse is None or completion is None else _choice(parse, completion_text(completion))
    if chosen is not None:
        try:
            return _configuration({**held, **chosen})
        except ArgumentError as error:
            raise UnknownKeyError(f"the policy's choice {chosen!r:.200} is not a configuration: {error}") from error
    missing = [getattr(columns, name) for name, value in held.items() if value is None]
    if not missing:
        return _configuration(held)
    if len(missing) < len(held) and parse is None:
        raise ArgumentError(f"the row has part of a configuration: no value in column {', '.join(map(repr, missing))}")
    return None


def output_tokens_of(
    row: Row,
    completion: Completion | None,
    columns: Columns,
    length_from: LengthFrom,
    count_tokens: Callable[[str], int] | None,
) -> int | None:
    """Number of generated tokens, or None where it is unknown.

    Parameters
    ----------
    row, completion, columns
        As in `configuration_of`.
    length_from : {"auto", "completion_ids", "column", "count_tokens", "unknown"}
        The one source to use; ``auto`` takes the first of them that there is, in this order.
    count_tokens : callable, optional
        Counts the tokens of the policy's text, for trainers that pass no ids.

    Raises
    ------
    ArgumentError
        A value that is not a number of tokens.
    """
    if length_from in ("auto", "completion_ids"):
        ids = value_in(row, columns.completion_ids)
        if ids is not None:
            return max(1, len(cast(Sequence[int], ids)))  # prefill gives a token even where none was kept
    if length_from in ("auto", "column"):
        value = value_in(row, columns.output_tokens)
        if value is not None:
            return _whole(columns.output_tokens, value, 1)
    if length_from in ("auto", "count_tokens") and count_tokens is not None and completion is not None:
        return max(1, count_tokens(completion_text(completion)))
    return None


def _choice(parse: Callable[[str], Choice], text: str) -> dict[str, object] | None:
    try:
        choice = parse(text)
    except _UNREADABLE as error:
        raise UnknownKeyError(f"the policy's choice cannot be read: {error!r:.200}") from error
    if choice is None:
        return None
    if isinstance(choice, Mapping):
        return {name: choice[name] for name in ("tier", "top_k", "num_blocks") if choice.get(name) is not None}
    if isinstance(choice, (str, bytes)) or not isinstance(choice, Sequence) or len(choice) != 3:
        raise UnknownKeyError(f"the policy's choice is {choice!r:.200}; allowed: (tier, top_k, num_blocks)")
    return dict(zip(("tier", "top_k", "num_blocks"), choice, strict=True))


def _configuration(held: Mapping[str, object]) -> Configuration:
    tier = held.get("tier")
    if tier is None:
        raise ArgumentError("tier is None; allowed: a name, or its index")
    return (
        tier if isinstance(tier, str) else _whole("tier", tier, 0),
        _whole("top_k", held.get("top_k"), 0),
        _whole("num_blocks", held.get("num_blocks"), 0),
    )


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, str) and len(value) <= _MOST_DIGITS and value.strip().isdecimal():
        value = int(value)  # a match in a text, a cell of a CSV
    return whole_number(name, cast(SupportsIndex, value), least)
