"""How alike configurations are: what makes it plausible that a change of device moves two of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lutest.reader.figures import Key

__all__ = ["COMPONENTS", "KeyPlaces", "key_places", "similarities", "varying_components"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Parts of log(new / old) that configurations may share: those of a tier, those along the two numbers (on the log
# scale), those of neighbours in both within a tier, and what belongs to one configuration alone.
COMPONENTS = ("tier", "top_k", "num_blocks", "neighbours", "configuration")
_REACH = 0.3  # of the whole span: how far neighbours reach


@dataclass(frozen=True)
class KeyPlaces:
    """Configurations as numbers.

    Attributes
    ----------
    tier : ndarray of int, shape (n,)
        Number of the tier.
    numbers : ndarray, shape (n, 2)
        log top_k and log num_blocks, each from -0.5 to 0.5 over the table.
    key_id : ndarray of int, shape (n,)
        Number of the configuration.
    """

    tier: Ints
    numbers: Floats
    key_id: Ints

    def of(self, key_id: Ints) -> KeyPlaces:
        """The places of these configurations."""
        return KeyPlaces(self.tier[key_id], self.numbers[key_id], self.key_id[key_id])


def key_places(keys: Sequence[Key]) -> KeyPlaces:
    """The places of all configurations of a table, in its order."""
    tiers = sorted({key.tier for key in keys})
    numbers = np.log(np.array([[max(key.top_k, 1), max(key.num_blocks, 1)] for key in keys], dtype=np.float64))
    least, largest = numbers.min(axis=0), numbers.max(axis=0)
    span = np.where(largest > least, largest - least, 1.0)
    tier = np.array([tiers.index(key.tier) for key in keys], dtype=np.int64)
    return KeyPlaces(tier, (numbers - (least + largest) / 2) / span, np.arange(len(keys), dtype=np.int64))


def similarities(a: KeyPlaces, b: KeyPlaces) -> dict[str, Floats]:
    """Covariance of two sets of configurations in each of `COMPONENTS`, at strength 1; shape (n_a, n_b)."""
    same_tier = (a.tier[:, None] == b.tier[None, :]).astype(np.float64)
    distance = ((a.numbers[:, None, :] - b.numbers[None, :, :]) ** 2).sum(axis=2)
    return {
        "tier": same_tier,
        "top_k": np.outer(a.numbers[:, 0], b.numbers[:, 0]),
        "num_blocks": np.outer(a.numbers[:, 1], b.numbers[:, 1]),
        "neighbours": same_tier * np.exp(-distance / (2 * _REACH**2)),
        "configuration": (a.key_id[:, None] == b.key_id[None, :]).astype(np.float64),
    }


def varying_components(places: KeyPlaces) -> tuple[str, ...]:
    """The components in which these configurations differ at all."""
    varies = {
        "tier": len(np.unique(places.tier)) > 1,
        "top_k": bool(np.ptp(places.numbers[:, 0]) > 0),
        "num_blocks": bool(np.ptp(places.numbers[:, 1]) > 0),
        "neighbours": len(np.unique(places.key_id)) > 2,
        "configuration": len(np.unique(places.key_id)) > 1,
    }
    return tuple(name for name in COMPONENTS if varies[name])
