"""Which configuration of a table is asked for, and what to say where the table holds none such."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex, cast

from lutest.reader.errors import UnknownKeyError
from lutest.reader.figures import Key

__all__ = ["named_key", "not_measured"]


def named_key(tiers: Sequence[str], tier: object, top_k: object, num_blocks: object) -> Key:
    """The key that is asked for, measured or not: the tier by its name, numbers as ints.

    Parameters
    ----------
    tiers : sequence of str
        Those of the table.
    tier, top_k, num_blocks : object
        As a caller gave them; the tier by name or by its place among `tiers`.

    Raises
    ------
    UnknownKeyError
        No such tier, or no whole number.
    """
    numbers = [_index("top_k", top_k), _index("num_blocks", num_blocks)]
    if isinstance(tier, str):
        if tier in tiers:
            return Key(str(tier), *numbers)
    else:
        try:
            place = operator.index(cast(SupportsIndex, tier))
        except TypeError:
            place = -1
        if 0 <= place < len(tiers):
            return Key(tiers[place], *numbers)
    names = ", ".join(f"{name!r} ({place})" for place, name in enumerate(tiers))
    raise UnknownKeyError(f"tier {tier!r} is not in the table, which holds {names}")


def _index(name: str, value: object) -> int:
    try:
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise UnknownKeyError(f"{name} is {value!r}; allowed: a whole number") from None


def not_measured(keys: Sequence[Key], tiers: Sequence[str], key: Key) -> UnknownKeyError:
    """Error for a key of which a table with these keys and tiers has no runs; it names the nearest ones that have."""
    near = "; ".join(f"{k.tier!r}, {k.top_k}, {k.num_blocks}" for k in _nearest(keys, tiers, key))
    return UnknownKeyError(
        f"tier={key.tier!r}, top_k={key.top_k}, num_blocks={key.num_blocks} was not measured; "
        f"nearest measured (tier, top_k, num_blocks): {near}; load(path, missing='interpolate') fills it in"
    )


def _nearest(keys: Sequence[Key], tiers: Sequence[str], key: Key) -> list[Key]:
    tier = tiers.index(key.tier)
    return sorted(
        keys,
        key=lambda k: (
            (tiers.index(k.tier) - tier) ** 2 + (k.top_k - key.top_k) ** 2 + (k.num_blocks - key.num_blocks) ** 2
        ),
    )[:3]
