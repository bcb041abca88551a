"""OnlineCalibrator: a table corrected by what is observed while it is used."""

from __future__ import annotations

import json
from math import exp, log
from typing import Any, NamedTuple

from lutest.calibration.coverage import TOLERANCE, Check, Coverage, adjusted_tests, detectable_shifts, tolerated_factors
from lutest.calibration.maps import KeyMaps, StageMap, mapped_figures, mapped_key
from lutest.calibration.ratio_histogram import BINS_PER_UNIT, MIDDLE, RatioHistogram, add
from lutest.reader.arguments import positive_ms, whole_number
from lutest.reader.curves import sum_to, value_at
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Key
from lutest.reader.table import LatencyTable

_STATE = "lutest online calibration 2"
_TAIL = 0.95
_OFFSET = float(MIDDLE)
_KEY_SHARE = 10.0  # observations of a configuration that count as much as all the others together
_WEIGHT_LIMIT = 2.0**200  # beyond it all weights are brought back to 1
_NEAR = 5e-3  # a corrected entry is kept while the factors stay this near
_KEPT = 4096  # corrected entries, and lengths of a configuration, at most: a policy may ask for anything


class _Known(NamedTuple):
    """A configuration's entry, what it says of the lengths that were observed, for they repeat, and the observations.

    `by_prompt` holds P50 and tail of prefill and the sum of the P50 steps up to there, `steps_to` that sum up to the
    last step, and `by_output` P50 and tail of decode over the sum of its steps, None where nothing is known of decode.
    """

    entry: Entry
    by_prompt: dict[int, tuple[float, float, float]]
    steps_to: dict[int, float]
    by_output: dict[int, tuple[float, float] | None]
    prefill: RatioHistogram
    decode: RatioHistogram


def _known(entry: Entry) -> _Known:
    return _Known(entry, {}, {}, {}, RatioHistogram(), RatioHistogram())


class Factors(NamedTuple):
    """What the figures of a configuration are multiplied by."""

    prefill: float
    decode: float


class OnlineCalibrator:
    """A table, and how far what is observed now lies from it: finds corrected entries as a table finds its own.

    Per stage, the median of observed over predicted P50 in bins of 1 %, over all configurations and for each of them.
    A configuration's factor is between the two medians, on the log scale: its own counts n / (n + 10), n the weight of
    its observations. A median does not follow outliers: with 5 % of the observations ten times too slow it moves by
    less than a tenth of the spread of the rest.

    Parameters
    ----------
    table : LatencyTable
        What is corrected; it does not change itself.
    half_life : float
        Observations, of all configurations together, after which one counts half. After a step, the factors are
        within a few percent of the new ratio after three half-lives.
    min_samples : int
        Observations before the factors act; 1 until then.
    bound : float
        The factors stay between 1 / bound and bound; from above 1 to 8.

    Raises
    ------
    ArgumentError

    Notes
    -----
    One per thread or process: `observe` is not made for two at once. Bring them together with `merge`.
    """

    def __init__(
        self, table: LatencyTable, *, half_life: float = 100.0, min_samples: int = 20, bound: float = 4.0
    ) -> None:
        if not isinstance(table, LatencyTable):
            raise ArgumentError(f"table is {table!r}; allowed: what lutest.load gives")
        if not 1.0 <= half_life <= 1e9:
            raise ArgumentError(f"half_life is {half_life!r}; allowed: observations from 1 to 1e9")
        if not 1.0 < bound <= exp(MIDDLE / BINS_PER_UNIT):
            raise ArgumentError(f"bound is {bound!r}; allowed: above 1, up to 8")
        self.half_life = float(half_life)
        self.min_samples = whole_number("min_samples", min_samples, 1)
        self.n_observed = 0
        self._bound = log(bound)
        self._growth = 2.0 ** (1.0 / half_life)
        self._weight = 1.0
        self.table = table
        self._all = (RatioHistogram(), RatioHistogram())
        self._known: dict[Key, _Known] = {key: _known(table[key]) for key in table.keys}
        self._entries: dict[Key, tuple[int, Factors, Entry]] = {}

    def observe(
        self, key: Key, prompt_tokens: int, output_tokens: int, prefill_ms: float, decode_ms: float = 0.0
    ) -> None:
        """Take in a run.

        Parameters
        ----------
        key : tuple
            A configuration that the table answers for. One that the table filled in counts for all, not for itself.
        prompt_tokens, output_tokens : int
            Of the run.
        prefill_ms : float
            Latency up to the first token, finite and above 0.
        decode_ms : float
            Latency of all after it; 0 for one output token. A 0 at more tokens counts as a measurement that was
            clamped: as less than anything else.

        Raises
        ------
        ArgumentError, UnknownKeyError
            And nothing was taken in.
        """
        try:
            known = self._known[key]
        except (KeyError, TypeError):
            known = self._known_to_the_table(key)
        _, by_prompt, steps_to, by_output, own_prefill, own_decode = known
        try:
            p50_ms, tail_ms, before_ms = by_prompt[prompt_tokens]
            until_ms, ratios = steps_to[prompt_tokens + output_tokens - 1], by_output[output_tokens]
        except (KeyError, TypeError):
            (p50_ms, tail_ms, before_ms), until_ms, ratios = self._predict(known, prompt_tokens, output_tokens)
        decode_place, slow_decode = -1, False
        try:
            place = int(log(prefill_ms / p50_ms) * BINS_PER_UNIT + _OFFSET)
            if decode_ms != 0:
                if output_tokens == 1:
                    raise ArgumentError(f"decode_ms is {decode_ms!r} at one output token; allowed: 0")
                p50_ratio, tail_ratio = ratios or (1.0, 1.0)
                steps_ms = (until_ms - before_ms) or 1.0
                decode_place = int(log(decode_ms / (steps_ms * p50_ratio)) * BINS_PER_UNIT + _OFFSET)
                slow_decode = decode_ms > steps_ms * tail_ratio
        except (OverflowError, TypeError, ValueError):
            positive_ms("prefill_ms", prefill_ms)
            if output_tokens > 1:
                positive_ms("decode_ms", decode_ms)
            raise
        weight, (all_prefill, all_decode) = self._weight, self._all
        add(all_prefill, own_prefill, place, weight, prefill_ms > tail_ms)
        if ratios and output_tokens > 1:
            add(all_decode, own_decode, decode_place, weight, slow_decode)
        self.n_observed += 1
        self._weight = weight = weight * self._growth
        if weight > _WEIGHT_LIMIT:
            for histogram in self._histograms():
                histogram.scale(1.0 / weight)
            self._weight = 1.0

    def __getitem__(self, key: Key | str | int | float) -> Entry:
        return self._corrected(self.table[key])

    def lookup(self, *values: str | int | float, **named: str | int | float) -> Entry:
        """The corrected entry of a configuration, as `LatencyTable.lookup` finds the table's own.

        Its figures are those of now, and stay as they are; while the factors move by less than 0.5 %, so does
        the entry. Its `source` is ``calibrated`` once the factors act.

        Raises
        ------
        ArgumentError, UnknownKeyError
        """
        return self._corrected(self.table.lookup(*values, **named))

    def corrected(self) -> LatencyTable:
        """The whole table as corrected now, for searches, arrays, torch or another process. Takes milliseconds."""
        return LatencyTable(mapped_figures(self.table.figures, self.maps()), self.table.path, self.table._missing)

    def factors(self, *values: str | int | float, **named: str | int | float) -> Factors:
        """What the figures of a configuration are multiplied by now; of one that was filled in, those of all together.

        Raises
        ------
        ArgumentError, UnknownKeyError
        """
        return self._factors(self.table.lookup(*values, **named).key)

    def overall(self) -> Factors:
        """The factors of all configurations together."""
        return Factors(self._factor(0, None), self._factor(1, None))

    def maps(self) -> dict[Key, KeyMaps]:
        """The correction of each measured configuration, as `lutest.calibrate` writes it."""
        return {key: _maps(self._factors(key)) for key in self.table.keys}

    def check(self, false_alarm_rate: float = 0.01, tolerance: float = TOLERANCE) -> Check:
        """Whether the table itself, uncorrected, still holds for what is observed: `lutest.check` of it.

        Parameters
        ----------
        false_alarm_rate : float
            Probability of an alarm in one call though nothing has changed; above 0 and below 0.5.
        tolerance : float
            How much slower or faster the P50 may be and still count as the same, as a fraction from 0 to below 0.5;
            to the nearest percent.

        Returns
        -------
        Check

        Notes
        -----
        Observations count as they are forgotten: of weights w, as many as (Σw)² / Σw² equal ones, at most 2.9
        half-lives.
        """
        slower, _ = tolerated_factors(tolerance)
        bins = round(log(slower) * BINS_PER_UNIT)
        table, found = self.table, []
        behind = {key.key: (key.prefill.n, 0 if key.decode is None else key.decode.n) for key in table.figures.keys}
        for stage, name in enumerate(("prefill", "decode")):
            n_table = sum(counts[stage] for counts in behind.values())
            found.append(self._coverage(name, None, self._all[stage], n_table, bins))
            for key, known in self._known.items():
                found.append(self._coverage(name, key, known[-2:][stage], behind[key][stage], bins))
        tests = adjusted_tests([held for held in found if held is not None], false_alarm_rate)
        shifts = detectable_shifts(tests, false_alarm_rate, tolerance)
        return Check(table.path, table.key_columns, self.n_observed, {}, false_alarm_rate, tests, shifts)

    def merge(self, other: OnlineCalibrator) -> None:
        """Take in what another calibrator of the same table has observed, such as that of another worker.

        Neither order nor grouping of merges matters, but for rounding; to merge the same observations twice counts
        them twice.

        Raises
        ------
        ArgumentError
            It is of another table, or forgets at another rate.
        """
        if self._identity() != other._identity():
            raise ArgumentError("only calibrators of the same table with the same half-life can be merged")
        factor = self._weight / other._weight
        for mine, theirs in zip(self._histograms(), other._histograms(), strict=True):
            mine.take_in(theirs, factor)
        self.n_observed += other.n_observed
        self._entries.clear()

    def to_json(self) -> str:
        """The state as JSON, for `from_json`: settings, and the bins that hold anything."""
        return json.dumps(
            {
                "format": _STATE,
                "table": self.table.meta.get("content_hash"),
                "half_life": self.half_life,
                "min_samples": self.min_samples,
                "bound": exp(self._bound),
                "n_observed": self.n_observed,
                "all": [held.as_dict(self._weight) for held in self._all],
                "configurations": [
                    {"key": key, "stages": [held.as_dict(self._weight) for held in known[-2:]]}
                    for key, known in self._known.items()
                    if known.prefill.total > 0.0
                ],
            }
        )

    @classmethod
    def from_json(cls, table: LatencyTable, text: str) -> OnlineCalibrator:
        """The calibrator that `to_json` wrote, on the same table.

        Raises
        ------
        ArgumentError
            It is not such a text, or was written for another table.
        """
        try:
            state = json.loads(text)
            if state["format"] != _STATE:
                raise ValueError(f"format is {state['format']!r}")
            made = cls(table, **{name: state[name] for name in ("half_life", "min_samples", "bound")})
            made.n_observed = whole_number("n_observed", state["n_observed"], 0)
            own = table.meta.get("content_hash")
            if state["table"] != own:
                raise ArgumentError(f"the state is of the table with content hash {state['table']}, not of this: {own}")
            held = [(made._all, state["all"])]
            held += [(made._known[tuple(each["key"])][-2:], each["stages"]) for each in state["configurations"]]
            for histograms, written in held:
                for histogram, bins in zip(histograms, written, strict=True):
                    histogram.take_in(RatioHistogram.from_dict(bins), 1.0)
        except ArgumentError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"not the state of an OnlineCalibrator: {error}") from error
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return OnlineCalibrator.from_json, (self.table, self.to_json())

    def __repr__(self) -> str:
        factors = "prefill x {:.3f}, decode x {:.3f}".format(*self.overall())
        return f"<OnlineCalibrator of {self.table!r}: {self.n_observed:,} observed, {factors}>"

    def _identity(self) -> tuple[object, ...]:
        return self.table.meta.get("content_hash"), self.table.keys, self.half_life

    def _histograms(self) -> list[RatioHistogram]:
        return [*self._all, *(held for known in self._known.values() for held in known[-2:])]

    def _known_to_the_table(self, key: Key) -> _Known:
        """What is known of a key that is written in another way, or filled in: of such a one, nothing is kept."""
        entry = self.table[key]
        return self._known.get(entry.key) or _known(entry)

    def _predict(
        self, known: _Known, prompt_tokens: int, output_tokens: int
    ) -> tuple[tuple[float, float, float], float, tuple[float, float] | None]:
        """What is known of lengths that were not observed yet, after checking them."""
        start = whole_number("prompt_tokens", prompt_tokens, 0)
        n = whole_number("output_tokens", output_tokens, 1)
        entry, (_, step, ratio) = known.entry, known.entry._pieces
        median, tail = (self.table.quantiles.index(q) for q in (0.5, _TAIL))
        before_ms, until_ms = (0.0 if step is None else sum_to(step, median, x) for x in (start, start + n - 1))
        at_prompt = entry.prefill_ms(start), entry.prefill_ms(start, _TAIL), before_ms
        ratios = ratio and (value_at(ratio, median, n - 1), value_at(ratio, tail, n - 1))
        if max(len(known.by_prompt), len(known.steps_to)) < _KEPT:
            known.by_prompt[start], known.steps_to[start + n - 1], known.by_output[n] = at_prompt, until_ms, ratios
        return at_prompt, until_ms, ratios

    def _corrected(self, entry: Entry) -> Entry:
        held = self._entries.get(entry.key)
        if held is not None and held[0] == self.n_observed:
            return held[2]
        factors = self._factors(entry.key)
        if factors == (1.0, 1.0):
            return entry
        if held is not None and all(abs(new / old - 1.0) < _NEAR for new, old in zip(factors, held[1], strict=True)):
            self._entries[entry.key] = self.n_observed, held[1], held[2]
            return held[2]
        table = self.table
        figures = mapped_key(entry._figures, _maps(factors), table.quantiles.index(0.5))
        corrected = Entry(figures, table.quantiles, table.figures.key_columns, entry._lengths)
        if len(self._entries) >= _KEPT:
            self._entries.clear()
        self._entries[entry.key] = self.n_observed, factors, corrected
        return corrected

    def _factors(self, key: Key) -> Factors:
        known = self._known.get(key)
        own = (None, None) if known is None else known[-2:]
        return Factors(self._factor(0, own[0]), self._factor(1, own[1]))

    def _factor(self, stage: int, own: RatioHistogram | None) -> float:
        """The correction of a stage, for a configuration with observations of its own."""
        everything = self._all[stage]
        if self.n_observed < self.min_samples or everything.total <= 0.0:
            return 1.0
        level = everything.log_median()
        if own is not None and own.total > 0.0:
            count = own.total / self._weight
            level += count / (count + _KEY_SHARE) * (own.log_median() - level)
        return exp(min(max(level, -self._bound), self._bound))

    def _coverage(
        self, stage: str, key: Key | None, histogram: RatioHistogram, n_table: int, bins: int
    ) -> Coverage | None:
        # of n weights that fade by the same factor: (Σw)² / Σw² = Σw · 2 / (1 + oldest), Σw in units of the newest
        oldest = 2.0 ** (-self.n_observed / self.half_life)
        n = int(histogram.total / self._weight * 2.0 / (1.0 + oldest))
        if n < 1:
            return None
        beyond = round(n * histogram.beyond_tail / histogram.total)
        above = n - round(n * histogram.share_below(bins)), n - round(n * histogram.share_below(-bins))
        within = {0.5: round(n * histogram.share_below(0)), _TAIL: n - beyond}
        ratio = exp(histogram.log_median())
        spread = (histogram.log_quantile(0.75) - histogram.log_quantile(0.25)) / 1.349  # of a normal distribution
        return Coverage(stage, key, n, n_table, {0.5: above, _TAIL: (beyond, beyond)}, within, ratio, spread)


def _maps(factors: Factors) -> KeyMaps:
    return KeyMaps(prefill=StageMap(factors.prefill), decode_step=StageMap(factors.decode))
