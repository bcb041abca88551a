"""Where a rollout's configuration, lengths and budget come from: columns, the policy's own words, token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Literal, SupportsFloat, TypeAlias, cast

from lutest.reader.arguments import whole_number
from lutest.reader.errors import ArgumentError, UnknownKeyError
from lutest.reader.figures import Key, KeyColumn

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
        Vision + text tokens; without it and `text_tokens`, the configuration's own prefill quantile counts.
    text_tokens : str
        The text alone, to which each configuration adds the vision tokens of its own runs; `prompt_tokens` comes first.
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
    text_tokens: str = "text_tokens"
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


def held_by(*things: object) -> dict[str, object]:
    """A row of what mappings hold, and what objects have as attributes; the earlier ones come first."""
    row: dict[str, object] = {}
    for thing in reversed(things):
        row |= thing if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})
    return row


def refuse_misspelt(given: Iterable[str], required: Iterable[str], optional: Iterable[str]) -> None:
    """Refuse a data set without a column that is needed, or with one that is hardly other than one that is read.

    Raises
    ------
    ArgumentError
        Naming the column, and the one that may be meant.
    """
    held = set(given)
    missing = [name for name in required if name not in held]
    unread = sorted(held.difference(required, optional))
    # a column that is not needed is missed only where another one has nearly its name
    missing += [name for name in optional if name not in held and get_close_matches(name, unread, n=1, cutoff=0.9)]
    if not missing:
        return
    meant = [(name, *get_close_matches(name, unread, n=1)) for name in missing]
    named = ", ".join(f"{pair[0]!r} ({pair[1]!r}?)" if len(pair) > 1 else repr(pair[0]) for pair in meant)
    raise ArgumentError(
        f"no column {named} in the data set; not read of it: {', '.join(map(repr, unread)) or 'nothing'}; say other "
        "names with Columns, such as columns=Columns(key={'tier': 'its name'}, budget_ms='its name')"
    )


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


def choice_in(text: str, parse: Callable[[str], Choice], names: Sequence[str]) -> dict[str, object] | None:
    """The policy's choice in its text: values of these key columns; None if it makes none, so that the row decides.

    Other fields of a mapping are left out, so that a policy cannot write itself a budget or a length.

    Raises
    ------
    UnknownKeyError
        The choice is not a configuration, or `parse` could not read it and raised.
    """
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


def key_from(held: Mapping[str, object], columns: Sequence[KeyColumn]) -> Key:
    """A configuration from values of the key columns; ArgumentError where one of them cannot be right."""
    values: list[str | int | float] = []
    for name, kind, _ in columns:
        value = held.get(name)
        if kind == "number":
            values.append(_number(name, value))
        elif isinstance(value, str):
            values.append(value)
        else:
            raise ArgumentError(f"{name} is {value!r}; allowed: text, the name of a category")
    return tuple(values)


def _number(name: str, value: object) -> int | float:
    number = math.nan
    if not isinstance(value, bytes) and not (isinstance(value, str) and len(value) > _MOST_DIGITS):
        with suppress(TypeError, ValueError, OverflowError):
            number = float(cast(SupportsFloat, value))  # of text: a match, a cell of a CSV
    if not math.isfinite(number):
        raise ArgumentError(f"{name} is {value!r:.200}; allowed: a finite number")
    return int(number) if number.is_integer() else number


def output_tokens_from(name: str, value: object) -> int:
    """Number of generated tokens, which may be text; 0 counts as 1, which comes out of prefill anyway."""
    if isinstance(value, str) and len(value) <= _MOST_DIGITS and value.strip().isdecimal():
        value = int(value)  # a match in a text, a cell of a CSV
    return max(1, whole_number(name, value, 0))
