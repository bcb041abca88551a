"""Runs of one source into the table ``raw_runs``: cells as text, steps as flat lists, rows in bounded batches."""

from __future__ import annotations

import json
import reprlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from lutest.reader.names import quote
from lutest.runs.parts import write_part

BATCH_ROWS = 5_000
BATCH_STEPS = 1_000_000
BATCH_CHARACTERS = 8 << 20
MOST_NAMES = 100

HELD_NULL = object()
_HELD_NULL_TEXT = "\0null"  # no readable cell holds a NUL character, so this stands for nothing else
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 40
_NUMBER_TYPES = frozenset((float, int))
_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


@dataclass(frozen=True)
class SourceFields:
    """Fields that a build needs, by the names that they have in the sources.

    Attributes
    ----------
    scalars : tuple of str
        Fields with one value a run.
    steps : tuple of str
        Fields that may hold the decode steps of a run, the preferred one first.
    """

    scalars: tuple[str, ...]
    steps: tuple[str, ...]


def field_column(name: str) -> str:
    """Column of ``raw_runs`` that holds the field `name`."""
    return f"f:{name}"


def create_raw_runs(connection: duckdb.DuckDBPyConnection, fields: SourceFields) -> None:
    """Create the empty table ``raw_runs``."""
    columns = "".join(f", {quote(field_column(name))} VARCHAR" for name in fields.scalars)
    connection.execute(
        'CREATE OR REPLACE TABLE raw_runs (source_id INTEGER, "row" BIGINT, problem VARCHAR, '
        f"steps DOUBLE[], step_positions INTEGER[], steps_problem VARCHAR{columns})"
    )


def brief(value: object) -> str:
    """One short line that shows `value`, however large or deep; null as JSON has it."""
    return "null" if value is None else _SHORT.repr(value)


def cell_text(value: object) -> str | None:
    """Write a scalar as text that converts back to exactly the same value.

    Parameters
    ----------
    value : object
        A value as `json` decodes it, or of any other type with a text of its own.

    Returns
    -------
    str or None
        None for null; JSON text for lists and objects.

    Raises
    ------
    ValueError
        The value has no such text, or one with a character that no table can hold.
    """
    kind = type(value)
    if value is None:
        return None
    if kind is float:
        text = repr(value)
        return _NON_FINITE.get(text, text)
    if kind is int:
        return str(value)
    if kind is bool:
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        try:
            text = json.dumps(value, default=str)
        except (TypeError, RecursionError):
            raise ValueError("holds a nested value that JSON has no text for") from None
    else:
        text = str(value)
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair, which is not a character")
    return text


def _plain_texts(column: Sequence[object]) -> list[str | None] | None:
    """Text of a column of nulls or of finite floats alone; None where each value needs a look."""
    kinds = set(map(type, column))
    if kinds == {type(None)}:
        return [None] * len(column)
    if kinds != {float}:
        return None
    texts: list[str | None] = list(map(repr, column))
    return None if _NON_FINITE.keys() & set(texts) else texts


def flatten_steps(name: str, value: object) -> tuple[list[float] | None, list[int] | None, str | None]:
    """Flatten the decode steps of one run.

    Parameters
    ----------
    name : str
        Field, for the message.
    value : object
        Numbers, or one list of numbers per position, or JSON text of those.

    Returns
    -------
    steps : list of float or None
        All values, position by position.
    positions : list of int or None
        Position of each value, from 1; None where position i holds the i-th value alone.
    problem : str or None
        What is wrong, in one line; then there are no steps.
    """
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            decoded = None
        if not isinstance(decoded, list):
            return None, None, f"{name} is {brief(value)}, not a list of numbers"
        value = decoded
    if not isinstance(value, list):
        return None, None, f"{name} is {brief(value)}, not a list of numbers"
    kinds = set(map(type, value))
    if kinds <= _NUMBER_TYPES:
        return _floats(value), None, None
    if kinds == {list}:
        flat = list(chain.from_iterable(value))
        if set(map(type, flat)) <= _NUMBER_TYPES:
            if len(flat) == len(value) and all(value):
                return _floats(flat), None, None
            positions = [position for position, runs in enumerate(value, 1) for _ in runs]
            return _floats(flat), positions, None
    return _flatten_slowly(value)


def _flatten_slowly(value: list[object]) -> tuple[list[float] | None, list[int] | None, str | None]:
    """Flatten steps that hold other kinds of number, or find the one that is none."""
    nested = isinstance(value[0], list)
    steps: list[float] = []
    positions: list[int] = []
    for position, item in enumerate(value, 1):
        if nested and not isinstance(item, list):
            return None, None, f"step {position} is {brief(item)}, not a list as step 1 is"
        for number in item if isinstance(item, list) and nested else [item]:
            if isinstance(number, (bool, np.bool_)) or not isinstance(number, (Real, Decimal)):
                return None, None, f"step {position} is {brief(number)}, not a number"
            steps.append(_as_float(number))
            positions.append(position)
    return steps, None if positions == list(range(1, len(value) + 1)) else positions, None


def _floats(numbers: list[float]) -> list[float]:
    try:
        return list(map(float, numbers)) if int in set(map(type, numbers)) else numbers
    except OverflowError:
        return [_as_float(number) for number in numbers]


def _as_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer beyond 1.8e308: infinite, as the literal 1e400 is
        return float("-inf") if number < 0 else float("inf")
    except ValueError:  # a signalling NaN
        return float("nan")


class RunWriter:
    """Collects the runs of one source and inserts them in batches.

    Parameters
    ----------
    connection : duckdb.DuckDBPyConnection
        Holds the table ``raw_runs``.
    source_id : int
        Number of the source.
    fields : SourceFields
        The fields of each run.
    part : Path, optional
        Where `write_part` writes the runs.

    Attributes
    ----------
    rows : int
        Runs added so far.
    tool : str or None
        The load generator that wrote the source.
    names : dict
        Names of fields that the source has, in the order in which they came, as keys.
    on_flush : callable
        Called after each batch.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        source_id: int,
        fields: SourceFields,
        part: Path | None = None,
    ) -> None:
        self.rows = 0
        self.tool: str | None = None
        self.names: dict[str, None] = {}
        self.on_flush: Callable[[], None] = lambda: None
        self.source_id = source_id
        self._connection = connection
        self._fields = fields
        self._part = part
        self._held_nulls: set[str] = set()
        self._clear()

    def note(self, names: Iterable[object]) -> None:
        """Remember names of fields, to tell people what there is."""
        for name in names:
            if len(self.names) >= MOST_NAMES:
                return
            self.names[f"{name:.80}" if isinstance(name, str) else brief(name)] = None

    def add(self, scalars: Sequence[object], steps: Sequence[object]) -> None:
        """Add a run: values in the order of the fields; of `steps` the first that is not None counts.

        `HELD_NULL` among the scalars is a null that `fill_header` leaves as it is.
        """
        for name, value in zip(self._fields.steps, steps, strict=True):
            if value is not None:
                self._append(None, scalars, *flatten_steps(name, value))
                return
        self._append(None, scalars, None, None, None)

    def add_problem(self, problem: str) -> None:
        """Add a run that cannot be read."""
        self._append(problem, [None] * len(self._fields.scalars), None, None, None)

    def fill_header(self, first_row: int, header: Mapping[str, object]) -> None:
        """Give the runs from `first_row` on header fields that stood after them, where they have none of their own."""
        texts = {name: cell_text(header[name]) for name in self._fields.scalars if name in header}
        self.flush()
        self._update(first_row, {name: text for name, text in texts.items() if text is not None}, "coalesce({}, ?)")
        self._update(first_row, dict.fromkeys(sorted(self._held_nulls), _HELD_NULL_TEXT), "nullif({}, ?)")
        self._held_nulls.clear()

    def flush(self) -> None:
        """Insert what was collected."""
        if not self._numbers:
            return
        columns = self._text_columns()
        numbers = np.array(self._numbers, dtype=np.int64)
        runs: dict[str, object] = {
            "row": numbers,
            "problem": pd.Series(self._problems, dtype=object),
            "has_steps": np.array(self._has_steps, dtype=bool),
            "has_positions": np.array(self._has_positions, dtype=bool),
            "steps_problem": pd.Series(self._steps_problems, dtype=object),
        }
        for index, column in enumerate(columns):
            runs[f"c{index}"] = pd.Series(column, dtype=object)
        steps = {
            "row": np.repeat(numbers, np.array(self._lengths, dtype=np.int64)),
            "place": np.arange(len(self._steps), dtype=np.int64),
            "step": np.frombuffer(self._steps, dtype=np.float64),
            "position": np.frombuffer(self._positions, dtype=np.intc),
        }
        cells = "".join(f", c{index}" for index in range(len(self._fields.scalars)))
        self._connection.register("_batch_runs", pd.DataFrame(runs))
        self._connection.register("_batch_steps", pd.DataFrame(steps))
        try:
            self._connection.execute(
                f"""INSERT INTO raw_runs
                SELECT ?, "row", problem, CASE WHEN has_steps THEN coalesce(steps, []::DOUBLE[]) END,
                    CASE WHEN has_positions THEN coalesce(positions, []::INTEGER[]) END, steps_problem{cells}
                FROM _batch_runs LEFT JOIN (
                    SELECT
                        "row",
                        -- DuckDB reads a NaN of pandas as NULL
                        list(coalesce(step, 'NaN'::DOUBLE) ORDER BY place) AS steps,
                        list(position ORDER BY place) AS positions
                    FROM _batch_steps
                    GROUP BY "row"
                ) USING ("row")
                ORDER BY "row" """,
                [self.source_id],
            )
        finally:
            self._connection.unregister("_batch_runs")
            self._connection.unregister("_batch_steps")
        self._clear()
        self.on_flush()

    def add_query(self, query: str) -> None:
        """Add the runs of a query, the only ones of the source, with the columns of ``raw_runs`` after the first."""
        if self._part is not None:
            self._write_part(query)
            return
        self._connection.execute(f"INSERT INTO raw_runs SELECT {self.source_id:d}, * FROM ({query})")
        counted = self._connection.execute("SELECT count(*) FROM raw_runs WHERE source_id = ?", [self.source_id])
        ((self.rows,),) = counted.fetchall()

    def write_part(self) -> None:
        """Write what was added as a part, and forget it."""
        if self._part is not None:
            self._write_part("SELECT * EXCLUDE (source_id) FROM raw_runs")
            self._connection.execute("TRUNCATE raw_runs")

    def _write_part(self, query: str) -> None:
        assert self._part is not None
        write_part(self._connection, query, self._part, tool=self.tool, fields=list(self.names))
        self._part = None

    def _clear(self) -> None:
        self._numbers: list[int] = []
        self._problems: list[str | None] = []
        self._scalars: list[Sequence[object]] = []
        self._has_steps: list[bool] = []
        self._has_positions: list[bool] = []
        self._lengths: list[int] = []
        self._steps_problems: list[str | None] = []
        self._steps = array("d")
        self._positions = array("i")
        self._characters = 0

    def _text_columns(self) -> list[list[str | None]]:
        """Text of the scalars, column by column; a run with a cell that has none becomes a problem."""
        columns: list[list[str | None]] = []
        for name, column in zip(self._fields.scalars, zip(*self._scalars, strict=True), strict=True):
            texts = _plain_texts(column)
            if texts is None:
                texts = [self._text(index, name, value) for index, value in enumerate(column)]
            columns.append(texts)
        for index, problem in enumerate(self._problems):
            if problem is not None:
                self._has_steps[index] = self._has_positions[index] = False
                self._steps_problems[index] = None
                for texts in columns:
                    texts[index] = None
        return columns

    def _text(self, index: int, name: str, value: object) -> str | None:
        if value is HELD_NULL:
            self._held_nulls.add(name)
            return _HELD_NULL_TEXT
        try:
            return cell_text(value)
        except ValueError as error:
            self._problems[index] = f"the field {name!r} {error}"
            return None

    def _append(
        self,
        problem: str | None,
        scalars: Sequence[object],
        steps: list[float] | None,
        positions: list[int] | None,
        steps_problem: str | None,
    ) -> None:
        self.rows += 1
        self._numbers.append(self.rows)
        self._problems.append(problem)
        self._scalars.append(scalars)
        self._has_steps.append(steps is not None)
        self._has_positions.append(positions is not None)
        self._steps_problems.append(steps_problem)
        length = 0 if steps is None else len(steps)
        self._lengths.append(length)
        if steps:
            self._steps.extend(steps)
            self._positions.extend(positions if positions is not None else range(1, length + 1))
        self._characters += sum([len(value) for value in scalars if type(value) is str])
        if len(self._numbers) >= BATCH_ROWS or len(self._steps) >= BATCH_STEPS or self._characters >= BATCH_CHARACTERS:
            self.flush()

    def _update(self, first_row: int, cells: Mapping[str, str], expression: str) -> None:
        if not cells or self.rows < first_row:
            return
        columns = {name: quote(field_column(name)) for name in cells}
        assignments = ", ".join(f"{column} = {expression.format(column)}" for column in columns.values())
        self._connection.execute(
            f'UPDATE raw_runs SET {assignments} WHERE source_id = ? AND "row" >= ? AND problem IS NULL',
            [*cells.values(), self.source_id, first_row],
        )
