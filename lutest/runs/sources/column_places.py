"""Where the columns that are needed stand in the header of a CSV file or of a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lutest.reader.errors import SourceError

__all__ = ["column_places"]


def column_places(header: Sequence[str], names: Iterable[str], shown: str) -> dict[str, int]:
    """Places of the columns that are needed, by name."""
    wanted = set(names)
    places: dict[str, int] = {}
    for place, name in enumerate(header):
        if name not in wanted:
            continue
        if name in places:
            raise SourceError(f"{shown}: two columns are named {name!r}; which one counts is not clear")
        places[name] = place
    return places
