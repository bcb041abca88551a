"""Whether a table still holds: exceedance tests of its quantiles, at a stated rate of false alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import expm1
from typing import Any

from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Key

TOLERANCE = 0.02
MOST_UNSEEN = 0.25  # a shift of the P50 that runs must be able to show before they may say that a table holds


@dataclass(frozen=True)
class Coverage:
    """What was observed of one stage, against what the table says.

    Attributes
    ----------
    stage : str
        ``prefill``, ``decode`` or ``total``.
    key : Key or None
        The configuration; None for all together.
    n, n_table : int
        Runs that were observed, and runs behind what the table says.
    n_above : dict
        Quantile → how many of the runs lie above what would still be tolerated as slower, and above what would still
        be tolerated as faster.
    n_within : dict
        Quantile → how many lie at or below it.
    ratio : float
        Median of observed over predicted P50.
    spread : float
        Standard deviation of the logarithm of observed over predicted P50, read off its quartiles.
    design_effect : dict
        Quantile → what the variance of a share is multiplied by, as runs that follow one another are alike; 1 for runs
        that are independent, here and behind the table.
    """

    stage: str
    key: Key | None
    n: int
    n_table: int
    n_above: dict[float, tuple[int, int]]
    n_within: dict[float, int]
    ratio: float
    spread: float
    design_effect: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CoverageTest:
    """One quantile of one stage, put to the test.

    Attributes
    ----------
    coverage : Coverage
        What was observed.
    q : float
        The quantile.
    share_within : float
        Share of the runs at or below it; `q` is expected.
    p_value : float
        Probability of a share as far off if nothing has changed.
    adjusted : float
        The same, adjusted for the number of tests (Holm): to be held against the false-alarm rate.
    """

    coverage: Coverage
    q: float
    share_within: float
    p_value: float
    adjusted: float


@dataclass(frozen=True)
class Check:
    """Whether a table still holds.

    Attributes
    ----------
    table : str
        Path of the table; empty for one in memory.
    key_columns : tuple of str
        What its configurations are made of.
    n_runs : int
        Runs that the table was held against.
    left_out : dict
        Why other runs were not → how many.
    false_alarm_rate : float
        Probability of at least one alarm though nothing has changed.
    tests : tuple of CoverageTest
        Stage by stage, all configurations together first.
    detectable : dict
        Stage → the least relative shift of all its latencies that an alarm would have told in nine cases of ten; None
        where no shift would.
    """

    table: str
    key_columns: tuple[str, ...]
    n_runs: int
    left_out: dict[str, int]
    false_alarm_rate: float
    tests: tuple[CoverageTest, ...]
    detectable: dict[str, float | None]

    @property
    def alarms(self) -> tuple[CoverageTest, ...]:
        """The tests that say that the table does not hold."""
        return tuple(test for test in self.tests if test.adjusted <= self.false_alarm_rate)

    @property
    def holds(self) -> bool | None:
        """No test speaks against the table; None where so few runs would not have shown a shift by a quarter either."""
        if self.alarms:
            return False
        told = all(shift is not None and shift <= MOST_UNSEEN for shift in self.detectable.values())
        return True if told and self.detectable else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; the key of a test is None for all configurations together."""
        return {
            "table": self.table,
            "n_runs": self.n_runs,
            "left_out": self.left_out,
            "holds": self.holds,
            "false_alarm_rate": self.false_alarm_rate,
            "detectable": self.detectable,
            "tests": [
                {
                    "stage": test.coverage.stage,
                    "key": test.coverage.key and dict(zip(self.key_columns, test.coverage.key, strict=True)),
                    "n": test.coverage.n,
                    "ratio": test.coverage.ratio,
                    "q": test.q,
                    "share_within": test.share_within,
                    "p_value": test.p_value,
                    "adjusted_p_value": test.adjusted,
                    "alarm": test.adjusted <= self.false_alarm_rate,
                }
                for test in self.tests
            ],
        }


def tolerated_factors(tolerance: float) -> tuple[float, float]:
    """What a quantile is multiplied by to be tolerated as slower, and as faster.

    Raises
    ------
    ArgumentError
        Not from 0 to below 0.5.
    """
    if not (isinstance(tolerance, (int, float)) and 0.0 <= tolerance < 0.5):
        raise ArgumentError(f"tolerance is {tolerance!r}; allowed: 0 or more and below 0.5")
    return 1.0 + tolerance, 1.0 / (1.0 + tolerance)


def adjusted_tests(coverages: Sequence[Coverage], false_alarm_rate: float) -> tuple[CoverageTest, ...]:
    """Put every quantile of every stage to the test.

    Parameters
    ----------
    coverages : sequence of Coverage
        One or more runs each.
    false_alarm_rate : float
        Above 0 and below 0.5. Half of it goes to the stages as a whole, half to the configurations; among each, the
        p-values are adjusted by Holm's method, which holds however the tests depend on each other.

    Raises
    ------
    ArgumentError

    References
    ----------
    S. Holm (1979), A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6.
    """
    if not (isinstance(false_alarm_rate, (int, float)) and 0.0 < false_alarm_rate < 0.5):
        raise ArgumentError(f"false_alarm_rate is {false_alarm_rate!r}; allowed: above 0 and below 0.5")
    tests = [
        (held, q, held.n_within[q] / held.n, _p_value(above, held, q))
        for held in coverages
        for q, above in held.n_above.items()
    ]
    adjusted: dict[int, float] = {}
    families = len({held.key is None for held, *_ in tests})
    for whole in (True, False):
        family = [place for place, (held, *_) in enumerate(tests) if (held.key is None) == whole]
        largest = 0.0
        for rank, place in enumerate(sorted(family, key=lambda place: tests[place][3])):
            largest = max(largest, min(1.0, families * (len(family) - rank) * tests[place][3]))
            adjusted[place] = largest
    return tuple(CoverageTest(*test, adjusted[place]) for place, test in enumerate(tests))


def _p_value(above: tuple[int, int], held: Coverage, q: float) -> float:
    """Of both directions; a change within the tolerance makes it large in either."""
    effect = held.design_effect.get(q, 1.0)
    slower = exceedance_tail(above[0], held.n, held.n_table, q, effect, upwards=True)
    faster = exceedance_tail(above[1], held.n, held.n_table, q, effect, upwards=False)
    return min(1.0, 2.0 * min(slower, faster))


def exceedance_tail(
    n_above: int, n: int, n_table: float, q: float, design_effect: float = 1.0, *, upwards: bool
) -> float:
    """Probability that as many or more (not `upwards`: as few or fewer) of `n` runs lie above a quantile of `n_table`.

    Were the quantile the order statistic of rank q (n_table + 1), the number above it would be beta-binomial whatever
    the distribution of the runs is: the quantile is itself uncertain, and that is part of the test. Where runs that
    follow one another are alike, the variance is larger by the design effect, in both samples.

    References
    ----------
    N. Balakrishnan and H. K. T. Ng, Precedence-Type Tests and Applications (2006), chapter 3.
    L. Kish, Survey Sampling (1965), section 8.2.
    """
    import numpy as np  # here, so that an OnlineCalibrator does without both until it is asked
    from scipy.special import betaln

    alike = 1.0 / (n_table + 2.0)  # correlation of two runs, for the quantile is the same
    if n > 1:
        alike = (design_effect * (1.0 + (n - 1) * alike) - 1.0) / (n - 1)
    if alike >= 1.0:
        return 1.0
    total = 1.0 / alike - 1.0
    a, b = total * (1.0 - q), total * q
    k = np.arange(n_above, n + 1) if upwards else np.arange(n_above + 1)
    log_choose = -np.log(n + 1) - betaln(k + 1, n - k + 1)
    return min(1.0, float(np.exp(log_choose + betaln(k + a, n - k + b) - betaln(a, b)).sum()))


def detectable_shifts(
    tests: Sequence[CoverageTest], false_alarm_rate: float, tolerance: float
) -> dict[str, float | None]:
    """Stage → the shift that the test of its P50 over all runs would have told nine times of ten; None: none would.

    The alarm is raised from some number of runs above the P50 on; a shift lifts as many above it on average, and what
    the number varies by, as deviations from the P50 are about log-normal.
    """
    from scipy.special import ndtri

    wholes = [test.coverage for test in tests if test.coverage.key is None and test.q == 0.5]
    n_whole = sum(test.coverage.key is None for test in tests)
    families = len({test.coverage.key is None for test in tests})
    found: dict[str, float | None] = {}
    for held in wholes:
        effect = held.design_effect.get(0.5, 1.0)
        level = false_alarm_rate / (2.0 * families * n_whole)  # of the smallest p-value, in one direction
        least, most = held.n // 2, held.n + 1
        while least < most:
            middle = (least + most) // 2
            small = exceedance_tail(middle, held.n, held.n_table, 0.5, effect, upwards=True) <= level
            least, most = (least, middle) if small else (middle + 1, most)
        deviation = (effect * 0.25 * (1.0 / held.n + 1.0 / max(held.n_table, 1))) ** 0.5
        share = least / held.n + float(ndtri(0.9)) * deviation
        certain = least <= held.n and (share < 1.0 or least + 1 < held.n)
        shift = held.spread * float(ndtri(min(share, 1.0 - 0.5 / held.n))) if certain else None
        found[held.stage] = None if shift is None else (1.0 + tolerance) * expm1(shift) + tolerance
    return found
