"""The running median of observed over predicted latency, from a histogram that forgets."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

BINS_PER_UNIT = 100.0  # a bin is 1 % wide
MIDDLE = 208  # the bin that begins at a ratio of 1; an eighth and eightfold are the ends, where all beyond is counted
_BINS = 2 * MIDDLE
_LAST = _BINS - 1


class RatioHistogram:
    """Weights of log(observed / predicted) by bins, with the place of their median.

    Newer observations are added with larger weights, which is forgetting without touching the older ones.

    Attributes
    ----------
    counts : list of float
        Weight of each bin: bin b holds ratios from exp((b - MIDDLE) / 100) to exp((b + 1 - MIDDLE) / 100).
    total, below : float
        Weight of all bins, and of those before the bin `place`.
    place : int
        The bin of the median when it was last asked for.
    beyond_tail : float
        Weight of the observations above the tail quantile that was predicted for them.
    """

    __slots__ = ("below", "beyond_tail", "counts", "place", "total")

    def __init__(self) -> None:
        self.counts = [0.0] * _BINS
        self.total = 0.0
        self.below = 0.0
        self.place = MIDDLE
        self.beyond_tail = 0.0

    def log_median(self) -> float:
        """Logarithm of the median ratio, linear within its bin; 0 without observations."""
        if self.total <= 0.0:
            return 0.0
        counts, place, below, half = self.counts, self.place, self.below, 0.5 * self.total
        while place > 0 and below > half:
            place -= 1
            below -= counts[place]
        while place < _LAST and below + counts[place] < half:
            below += counts[place]
            place += 1
        self.place, self.below = place, below
        within = (half - below) / counts[place] if counts[place] > 0.0 else 0.5
        return (place - MIDDLE + min(max(within, 0.0), 1.0)) / BINS_PER_UNIT

    def log_quantile(self, q: float) -> float:
        """Logarithm of a quantile of the ratio, to the bin."""
        reached = accumulate(self.counts)
        return (next(place for place, sum_ in enumerate(reached) if sum_ >= q * self.total) - MIDDLE) / BINS_PER_UNIT

    def share_below(self, percent: int) -> float:
        """Share of the observations below so many percent (of a log) beyond their P50."""
        return sum(self.counts[: MIDDLE + percent]) / self.total

    def take_in(self, other: RatioHistogram, factor: float) -> None:
        """Add the weights of another, multiplied."""
        self.counts = [mine + factor * theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += factor * other.total
        self.beyond_tail += factor * other.beyond_tail
        self.below = sum(self.counts[: self.place])

    def scale(self, factor: float) -> None:
        """Multiply all weights."""
        self.counts = [count * factor for count in self.counts]
        self.total *= factor
        self.below *= factor
        self.beyond_tail *= factor

    def as_dict(self, unit: float) -> dict[str, object]:
        """Plain values, in units of a weight; bins without weight are left out."""
        bins = {str(place): count / unit for place, count in enumerate(self.counts) if count > 0.0}
        return {"beyond_tail": self.beyond_tail / unit, "bins": bins}

    @classmethod
    def from_dict(cls, held: Mapping[str, object]) -> RatioHistogram:
        """What `as_dict` gave, with a weight of 1.

        Raises
        ------
        ValueError
            It did not.
        """
        made = cls()
        bins, beyond = held["bins"], held["beyond_tail"]
        if not isinstance(bins, Mapping):
            raise ValueError(f"bins is {bins!r}")
        for name, count in bins.items():
            if not (0 <= int(name) < _BINS and 0.0 <= float(count) < 1e15):
                raise ValueError(f"bin {name!r} holds {count!r}")
            made.counts[int(name)] = float(count)
        made.total, made.below = sum(made.counts), sum(made.counts[: made.place])
        if not (isinstance(beyond, (int, float)) and 0.0 <= beyond <= made.total * (1 + 1e-9) + 1e-9):
            raise ValueError(f"beyond_tail is {beyond!r}")
        made.beyond_tail = float(beyond)
        return made


def add(one: RatioHistogram, other: RatioHistogram, place: int, weight: float, slow: bool) -> None:
    """Add an observation to two: its bin, or the end that it lies beyond, and whether it is above the tail quantile."""
    if not 0 <= place <= _LAST:
        place = 0 if place < 0 else _LAST
    for histogram in (one, other):
        histogram.counts[place] += weight
        histogram.total += weight
        if place < histogram.place:
            histogram.below += weight
        if slow:
            histogram.beyond_tail += weight
