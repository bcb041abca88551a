"""Whether a table still holds: exceedance tests of its quantiles, at a stated rate of false alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Key

TOLERANCE = 0.02


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
    """

    stage: str
    key: Key | None
    n: int
    n_table: int
    n_above: dict[float, tuple[int, int]]
    n_within: dict[float, int]
    ratio: float


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
        Probability of at least one alarm though nothing has changed, for runs that are independent of each other.
    tests : tuple of CoverageTest
        Stage by stage, all configurations together first.
    """

    table: str
    key_columns: tuple[str, ...]
    n_runs: int
    left_out: dict[str, int]
    false_alarm_rate: float
    tests: tuple[CoverageTest, ...]

    @property
    def alarms(self) -> tuple[CoverageTest, ...]:
        """The tests that say that the table does not hold."""
        return tuple(test for test in self.tests if test.adjusted <= self.false_alarm_rate)

    @property
    def holds(self) -> bool:
        """No test speaks against the table."""
        return not self.alarms

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; the key of a test is None for all configurations together."""
        return {
            "table": self.table,
            "n_runs": self.n_runs,
            "left_out": self.left_out,
            "holds": self.holds,
            "false_alarm_rate": self.false_alarm_rate,
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
    slower = exceedance_tail(above[0], held.n, held.n_table, q, upwards=True)
    faster = exceedance_tail(above[1], held.n, held.n_table, q, upwards=False)
    return min(1.0, 2.0 * min(slower, faster))


def exceedance_tail(n_above: int, n: int, n_table: int, q: float, *, upwards: bool) -> float:
    """Probability that as many or more (not `upwards`: as few or fewer) of `n` runs lie above a quantile of `n_table`.

    Were the quantile the order statistic of rank q (n_table + 1), the number above it would be beta-binomial whatever
    the distribution of the runs is: the quantile is itself uncertain, and that is part of the test.

    References
    ----------
    N. Balakrishnan and H. K. T. Ng, Precedence-Type Tests and Applications (2006), chapter 3.
    """
    import numpy as np  # here, so that an OnlineCalibrator does without both until it is asked
    from scipy.special import betaln

    a, b = (n_table + 1) * (1.0 - q), (n_table + 1) * q
    k = np.arange(n_above, n + 1) if upwards else np.arange(n_above + 1)
    log_choose = -np.log(n + 1) - betaln(k + 1, n - k + 1)
    return min(1.0, float(np.exp(log_choose + betaln(k + a, n - k + b) - betaln(a, b)).sum()))
