"""Where a rollout's configuration, lengths and budget come from: columns, the policy's own words, token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, SupportsFloat, SupportsIndex, TypeAlias, cast

from lutest.reader.arguments import whole_number
from lutest.reader.errors import ArgumentError, UnknownKeyError
from lutest.reader.figures import Key, KeyColumn

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
Choice: TypeAlias = Mapping[str, object] | Sequence[object] | str | float | None
LengthFrom = Literal["auto", "completion_ids", "column", "count_tokens", "unknown"]

# What parsers of text raise over text that they cannot read
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_MOST_DIGITS = 18


@dataclass(frozen=True)
class Columns:
    """Names under which a rollout's row holds what a latency reward reads; rows may lack any of them.

    Attributes
    ----------
    key : mapping
        Key column of the table → its name in the row, for those that have another name there.
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

    key: Mapping[str, str] = field(default_factory=dict, hash=False)
    prompt_tokens: str = "prompt_tokens"
    output_tokens: str = "output_tokens"
    completion_ids: str = "completion_ids"
    budget_ms: str = "budget_ms"
    workload: str = "workload"

    def names(self, key_columns: Iterable[str]) -> tuple[str, ...]:
        """All that is read of a row, for a table with these key columns."""
        others = (getattr(self, column.name) for column in fields(self) if column.name != "key")
        return (*(self.key.get(name, name) for name in key_columns), *others)


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
    row: Row,
    completion: Completion | None,
    columns: Columns,
    key_columns: Sequence[KeyColumn],
    parse: Callable[[str], Choice] | None,
) -> Key | None:
    """The configuration of a rollout, or None where it has none.

    Parameters
    ----------
    row : mapping
        Columns of the data set.
    completion : str or sequence of mapping, optional
        What the policy wrote.
    columns : Columns
        Names to look under.
    key_columns : sequence of KeyColumn
        What a configuration of the table is made of.
    parse : callable, optional
        Finds the policy's choice in its text: a key, or a mapping with some of the key columns, of which the row gives
        the rest; None if the rollout makes no choice, so that the columns alone decide. All other fields of the mapping
        are ignored, so that a policy cannot write itself a budget or a length.

    Raises
    ------
    UnknownKeyError
        The policy made a choice that is not a configuration, or `parse` could not read it and raised.
    ArgumentError
        The columns alone hold part of a configuration, or values that cannot be one.
    """
    names = {column.name: columns.key.get(column.name, column.name) for column in key_columns}
    held = {name: value_in(row, given) for name, given in names.items()}
    chosen = None if parse is None or completion is None else _choice(parse, completion_text(completion), list(names))
    if chosen is not None:
        try:
            return _key({**held, **chosen}, key_columns)
        except ArgumentError as error:
            raise UnknownKeyError(f"the policy's choice {chosen!r:.200} is not a configuration: {error}") from error
    missing = [names[name] for name, value in held.items() if value is None]
    if not missing:
        return _key(held, key_columns)
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


def _choice(parse: Callable[[str], Choice], text: str, names: list[str]) -> dict[str, object] | None:
    try:
        choice = parse(text)
    except _UNREADABLE as error:
        raise UnknownKeyError(f"the policy's choice cannot be read: {error!r:.200}") from error
    if choice is None:
        return None
    if isinstance(choice, Mapping):
        return {name: choice[name] for name in names if choice.get(name) is not None}
    values = [choice] if isinstance(choice, (str, bytes)) or not isinstance(choice, Sequence) else choice
    if len(values) != len(names):
        raise UnknownKeyError(f"the policy's choice is {choice!r:.200}; allowed: ({', '.join(names)})")
    return dict(zip(names, values, strict=True))


def _key(held: Mapping[str, object], columns: Sequence[KeyColumn]) -> Key:
    return tuple(
        _text(column.name, held.get(column.name))
        if column.kind == "category"
        else _number(column.name, held.get(column.name))
        for column in columns
    )


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ArgumentError(f"{name} is {value!r}; allowed: text, the name of a category")
    return value


def _number(name: str, value: object) -> int | float:
    number = math.nan
    if not isinstance(value, bytes) and not (isinstance(value, str) and len(value) > _MOST_DIGITS):
        try:
            number = float(cast(SupportsFloat, value))  # of text: a match, a cell of a CSV
        except (TypeError, ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise ArgumentError(f"{name} is {value!r:.200}; allowed: a finite number")
    return int(number) if number.is_integer() else number


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, str) and len(value) <= _MOST_DIGITS and value.strip().isdecimal():
        value = int(value)  # a match in a text, a cell of a CSV
    return whole_number(name, cast(SupportsIndex, value), least)
