"""How alike configurations are: what makes it plausible that a change of device moves two of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lutest.reader.figures import Key, KeyColumn

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Parts of log(new / old) that configurations may share, beside one for each key column (the levels of a category, the
# axis of a number): those of neighbours on all axes within the same categories, and what belongs to one alone.
NEAR, EACH = "near configurations", "each configuration"
_REACH = 0.3  # of the whole span: how far neighbours reach


def similarities(columns: Sequence[KeyColumn], keys: Sequence[Key]) -> dict[str, Floats]:
    """Covariance of the configurations of a table in each component, at strength 1; shape (n_keys, n_keys).

    A number has its place from -0.5 to 0.5 over the table, on a log axis where all are positive.
    """
    found: dict[str, Floats] = {}
    alike = np.ones((len(keys), len(keys)))
    distance = np.zeros_like(alike)
    for column, held in zip(columns, zip(*keys, strict=True), strict=True):
        if column.kind == "category":
            levels = np.array(held, dtype=str)
            found[column.name] = (levels[:, None] == levels).astype(np.float64)
            alike *= found[column.name]
        else:
            places = _axis(np.array(held, dtype=np.float64))
            found[column.name] = np.outer(places, places)
            distance += np.subtract.outer(places, places) ** 2
    found[NEAR] = alike * np.exp(-distance / (2 * _REACH**2))
    found[EACH] = np.eye(len(keys))
    return found


def _axis(values: Floats) -> Floats:
    places = np.log(values) if values.min() > 0.0 else values
    least, largest = places.min(), places.max()
    return np.asarray((places - (least + largest) / 2) / ((largest - least) or 1.0))


def varying_components(parts: Mapping[str, Floats], key_id: Ints) -> tuple[str, ...]:
    """The components in which these configurations differ at all; neighbours are three or more, on axes of numbers."""
    among = np.unique(key_id)
    varying = [name for name, part in parts.items() if np.ptp(part[np.ix_(among, among)]) > 0.0]
    if NEAR in varying and (len(among) <= 2 or np.array_equal(parts[NEAR], parts[EACH])):
        varying.remove(NEAR)
    return tuple(varying)
