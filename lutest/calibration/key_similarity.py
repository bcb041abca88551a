"""How alike configurations are: what makes it plausible that a change of device moves two of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lutest.reader.figures import Key, KeyColumn

__all__ = ["EACH", "NEAR", "KeyPlaces", "key_places", "similarities", "varying_components"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Parts of log(new / old) that configurations may share, beside one for each key column (the levels of a category, the
# axis of a number): those of neighbours on all axes within the same categories, and what belongs to one alone.
NEAR, EACH = "near configurations", "each configuration"
_REACH = 0.3  # of the whole span: how far neighbours reach


@dataclass(frozen=True)
class KeyPlaces:
    """Configurations as numbers.

    Attributes
    ----------
    columns : tuple of KeyColumn
        What a configuration is made of.
    values : ndarray, shape (n, n_columns)
        Of a category, which of its levels; of a number, its place from -0.5 to 0.5 over the table, on a log axis where
        all are positive.
    key_id : ndarray of int, shape (n,)
        Number of the configuration.
    """

    columns: tuple[KeyColumn, ...]
    values: Floats
    key_id: Ints

    def of(self, key_id: Ints) -> KeyPlaces:
        """The places of these configurations."""
        return KeyPlaces(self.columns, self.values[key_id], self.key_id[key_id])


def key_places(columns: tuple[KeyColumn, ...], keys: Sequence[Key]) -> KeyPlaces:
    """The places of all configurations of a table, in its order."""
    values = [
        _levels(held) if column.kind == "category" else _axis(np.array(held, dtype=np.float64))
        for column, held in zip(columns, zip(*keys, strict=True), strict=True)
    ]
    return KeyPlaces(columns, np.column_stack(values), np.arange(len(keys), dtype=np.int64))


def _levels(values: Sequence[object]) -> Floats:
    return np.unique(np.array(values, dtype=str), return_inverse=True)[1].astype(np.float64)


def _axis(values: Floats) -> Floats:
    places = np.log(values) if values.min() > 0.0 else values
    least, largest = places.min(), places.max()
    return np.asarray((places - (least + largest) / 2) / ((largest - least) or 1.0))


def similarities(a: KeyPlaces, b: KeyPlaces) -> dict[str, Floats]:
    """Covariance of two sets of configurations in each component, at strength 1; shape (n_a, n_b)."""
    found: dict[str, Floats] = {}
    alike = np.ones((len(a.key_id), len(b.key_id)))
    distance = np.zeros_like(alike)
    for column, x, y in zip(a.columns, a.values.T[:, :, None], b.values.T[:, None, :], strict=True):
        if column.kind == "category":
            found[column.name] = (x == y).astype(np.float64)
            alike = alike * found[column.name]
        else:
            found[column.name] = x * y
            distance = distance + (x - y) ** 2
    found[NEAR] = alike * np.exp(-distance / (2 * _REACH**2))
    found[EACH] = (a.key_id[:, None] == b.key_id[None, :]).astype(np.float64)
    return found


def varying_components(places: KeyPlaces) -> tuple[str, ...]:
    """The components in which these configurations differ at all."""
    n_keys = len(np.unique(places.key_id))
    varying = [
        column.name
        for column, values in zip(places.columns, places.values.T, strict=True)
        if len(np.unique(values)) > 1
    ]
    if n_keys > 2 and any(column.kind == "number" for column in places.columns):
        varying.append(NEAR)
    return (*varying, EACH) if n_keys > 1 else tuple(varying)
