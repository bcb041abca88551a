"""Runs of a DataFrame, one a row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from lutest.reader.errors import SourceError
from lutest.runs.sources.column_places import column_places
from lutest.runs.sources.run_rows import RunWriter, SourceFields

__all__ = ["hash_frame", "read_frame"]

FRAME_BATCH_ROWS = 5_000


def read_frame(frame: pd.DataFrame, shown: str, fields: SourceFields, writer: RunWriter) -> None:
    """Read one run a row."""
    places = _frame_places(frame, shown, (*fields.scalars, *fields.steps))
    for start in range(0, len(frame), FRAME_BATCH_ROWS):
        part = frame.iloc[start : start + FRAME_BATCH_ROWS]
        absent: list[object] = [None] * len(part)
        columns = {name: [_plain(value) for value in part.iloc[:, place].tolist()] for name, place in places.items()}
        for index in range(len(part)):
            writer.add(
                [columns.get(name, absent)[index] for name in fields.scalars],
                [columns.get(name, absent)[index] for name in fields.steps],
            )


def hash_frame(frame: pd.DataFrame, shown: str, fields: SourceFields) -> str:
    """Hash of what is read of a frame: names, types and cells of the columns that are needed, in any order."""
    places = _frame_places(frame, shown, (*fields.scalars, *fields.steps))
    digest = hashlib.sha256(str(len(frame)).encode())
    for name, place in sorted(places.items()):
        column = frame.iloc[:, place]
        digest.update(repr((name, str(column.dtype))).encode())
        if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
            digest.update(column.to_numpy().tobytes())
        else:
            _hash_cells(digest.update, column, f"{shown}: the column {name!r}")
    return digest.hexdigest()


def _hash_cells(update: Callable[[bytes], None], column: pd.Series[Any], where: str) -> None:
    try:
        for start in range(0, len(column), FRAME_BATCH_ROWS):
            cells = [_plain(value) for value in column.iloc[start : start + FRAME_BATCH_ROWS].tolist()]
            update(repr(cells).encode("utf-8", "surrogatepass"))
    except RecursionError:
        raise SourceError(f"{where} holds values that are nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise SourceError(f"{where} holds a value without a text: {str(error).split(';')[0]}") from None


def _frame_places(frame: pd.DataFrame, shown: str, names: Iterable[str]) -> dict[str, int]:
    return column_places([str(name) for name in frame.columns], names, shown)


def _plain(value: object) -> object:
    """Cell of a frame as `json` would give it; a missing one, NaN too, as None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain_element(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    return value


def _plain_element(value: object) -> object:
    """Element of a list in a cell: NaN stays, as a step that is not finite."""
    if isinstance(value, float):
        return float(value)
    return _plain(value)
