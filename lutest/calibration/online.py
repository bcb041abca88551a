"""OnlineCalibrator: a table corrected by what is observed while it is used."""

from __future__ import annotations

import contextlib
import json
from math import exp, log
from typing import Any, NamedTuple

from lutest.calibration.drift import DRIFT_TOLERANCE, Coverage, Drift, judge_drift, tolerated_factors
from lutest.calibration.maps import KeyMaps, StageMap, mapped_figures, mapped_key
from lutest.calibration.ratio_histogram import BINS, BINS_PER_UNIT, MIDDLE, RatioHistogram
from lutest.reader.arguments import positive_ms, whole_number
from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError, NoDecodeDataError
from lutest.reader.figures import Figures, Key
from lutest.reader.search import Request, fitting
from lutest.reader.table import LatencyTable, Tier

__all__ = ["Factors", "OnlineCalibrator"]

_STATE = "lutest online calibration 1"
_LAST = BINS - 1
_OFFSET = float(MIDDLE)
_KEY_SHARE = 10.0  # observations of a configuration that count as much as all the others together
_WEIGHT_LIMIT = 2.0**200  # beyond it all weights are brought back to 1
_KEPT = 1e-3  # a corrected entry is kept while the factors stay this near

_Known = tuple[Any, Any, Any, Any, Any, Any, RatioHistogram, RatioHistogram]


class Factors(NamedTuple):
    """What the figures of a configuration are multiplied by."""

    prefill: float
    decode: float


class OnlineCalibrator:
    """A table, and how far what is observed now lies from it.

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

    __slots__ = (
        "_all",
        "_bound",
        "_entries",
        "_growth",
        "_known",
        "_table",
        "_tail",
        "_weight",
        "half_life",
        "min_samples",
        "n_observed",
    )

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
        self._table = table
        self._tail = 0.95 if 0.95 in table.quantiles else max(table.quantiles)
        self._all = (RatioHistogram(), RatioHistogram())
        self._known: dict[tuple[Tier, int, int], _Known] = {}
        self._entries: dict[Key, tuple[Factors, Entry]] = {}
        for key in table.keys:
            self._know(table[key])

    @property
    def table(self) -> LatencyTable:
        """The table as it was given."""
        return self._table

    def observe(
        self,
        key: tuple[Tier, int, int],
        prompt_tokens: int,
        output_tokens: int,
        prefill_ms: float,
        decode_ms: float = 0.0,
    ) -> None:
        """Take in a run.

        Parameters
        ----------
        key : (tier, top_k, num_blocks)
            A measured configuration of the table.
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
            if not 0 <= prompt_tokens < (end := prompt_tokens + output_tokens):
                raise ValueError
            p50, tail, steps, steps_before, ratio, spread, prefill, decode = self._known[key]
            predicted = p50[prompt_tokens]
            place = int(log(prefill_ms / predicted) * BINS_PER_UNIT + _OFFSET)
            if not 0 <= place <= _LAST:
                place = 0 if place < 0 else _LAST
            if output_tokens > 1:
                steps_ms = steps_before[end] - steps[prompt_tokens]
                middle = ratio[output_tokens]
                decode_place = int(log(decode_ms / (steps_ms * middle)) * BINS_PER_UNIT + _OFFSET)
                if not 0 <= decode_place <= _LAST:
                    decode_place = 0 if decode_place < 0 else _LAST
            elif decode_ms:
                raise ValueError
        except (IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError):
            self._observe_checked(key, prompt_tokens, output_tokens, prefill_ms, decode_ms)
            return
        weight = self._weight
        everything, every_decode = self._all
        everything.counts[place] += weight
        everything.total += weight
        if place < everything.place:
            everything.below += weight
        prefill.counts[place] += weight
        prefill.total += weight
        if place < prefill.place:
            prefill.below += weight
        if prefill_ms > tail[prompt_tokens]:
            everything.beyond_tail += weight
            prefill.beyond_tail += weight
        if output_tokens > 1:
            every_decode.counts[decode_place] += weight
            every_decode.total += weight
            if decode_place < every_decode.place:
                every_decode.below += weight
            decode.counts[decode_place] += weight
            decode.total += weight
            if decode_place < decode.place:
                decode.below += weight
            if decode_ms > steps_ms * (middle + spread[output_tokens]):
                every_decode.beyond_tail += weight
                decode.beyond_tail += weight
        self._advance()

    def factors(self, tier: Tier, top_k: int, num_blocks: int) -> Factors:
        """What the figures of a configuration are multiplied by now.

        Raises
        ------
        UnknownKeyError
        """
        known = self._known.get((tier, top_k, num_blocks))
        if known is None:
            self._table.lookup(tier, top_k, num_blocks)  # raises unless the table fills it in
            return self.overall()
        return Factors(self._factor(0, known[-2]), self._factor(1, known[-1]))

    def overall(self) -> Factors:
        """The factors of all configurations together."""
        return Factors(self._factor(0, None), self._factor(1, None))

    def lookup(self, tier: Tier, top_k: int, num_blocks: int) -> Entry:
        """The corrected entry of a configuration, with all verbs of the reader; it stays as it is.

        Raises
        ------
        UnknownKeyError
        """
        factors = self.factors(tier, top_k, num_blocks)
        entry = self._table.lookup(tier, top_k, num_blocks)
        if factors == (1.0, 1.0):
            return entry
        held = self._entries.get(entry.key)
        if held is not None and all(abs(new / old - 1.0) < _KEPT for new, old in zip(factors, held[0], strict=True)):
            return held[1]
        median = self._table.quantiles.index(0.5)
        figures = mapped_key(entry._figures, _maps(factors), median)
        corrected = Entry(figures, self._table.quantiles, lengths=entry._lengths)
        self._entries[entry.key] = factors, corrected
        return corrected

    def __getitem__(self, key: tuple[Tier, int, int]) -> Entry:
        return self.lookup(*key)

    def prefill_ms(
        self, tier: Tier, top_k: int, num_blocks: int, prompt_tokens: int | None = None, q: float = 0.5
    ) -> float:
        """`LatencyTable.prefill_ms`, corrected."""
        return self.lookup(tier, top_k, num_blocks).prefill_ms(prompt_tokens, q)

    def decode_step_ms(self, tier: Tier, top_k: int, num_blocks: int, kv_len: int, q: float = 0.5) -> float:
        """`LatencyTable.decode_step_ms`, corrected."""
        return self.lookup(tier, top_k, num_blocks).decode_step_ms(kv_len, q)

    def decode_ms(
        self, tier: Tier, top_k: int, num_blocks: int, prompt_tokens: int | None, output_tokens: int, q: float = 0.5
    ) -> float:
        """`LatencyTable.decode_ms`, corrected."""
        return self.lookup(tier, top_k, num_blocks).decode_ms(prompt_tokens, output_tokens, q)

    def total_ms(
        self, tier: Tier, top_k: int, num_blocks: int, prompt_tokens: int | None, output_tokens: int, q: float = 0.5
    ) -> float:
        """`LatencyTable.total_ms`, corrected."""
        return self.lookup(tier, top_k, num_blocks).total_ms(prompt_tokens, output_tokens, q)

    def max_output_tokens(
        self,
        tier: Tier,
        top_k: int,
        num_blocks: int,
        budget_ms: float,
        prompt_tokens: int | None = None,
        q: float = 0.5,
    ) -> int:
        """`LatencyTable.max_output_tokens`, corrected."""
        return self.lookup(tier, top_k, num_blocks).max_output_tokens(budget_ms, prompt_tokens, q)

    def feasible(
        self,
        budget_ms: float,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
        prefill_share: float = 0.8,
        q: float = 0.95,
        margin: float = 0.0,
    ) -> list[Key]:
        """`LatencyTable.feasible`, corrected."""
        request = Request(self._table.quantiles, prompt_tokens, output_tokens, q)
        entries = (self.lookup(*key) for key in self._table.keys)
        return list(fitting(entries, request, budget_ms, prefill_share, margin))

    def snapshot(self) -> LatencyTable:
        """The whole table as corrected now: a table of its own, for arrays, pickling or torch. Takes milliseconds."""
        return LatencyTable(self.corrected_figures(), self._table.path, self._table._missing)

    def corrected_figures(self) -> Figures:
        """The figures of `snapshot`."""
        return mapped_figures(self._table.figures, self.maps())

    def maps(self) -> dict[Key, KeyMaps]:
        """The correction of each measured configuration, as `lutest.calibrate` writes it."""
        return {key: _maps(self.factors(*key)) for key in self._table.keys}

    def drift(self, false_alarm_rate: float = 0.01, tolerance: float = DRIFT_TOLERANCE) -> Drift:
        """Whether the table itself, uncorrected, still holds for what is observed.

        Parameters
        ----------
        false_alarm_rate : float
            Probability of an alarm in one call though nothing has changed; above 0 and below 0.5.
        tolerance : float
            How much slower or faster the P50 may be and still count as the same, as a fraction from 0 to below 0.5;
            to the nearest percent.

        Returns
        -------
        Drift

        Notes
        -----
        Observations count as they are forgotten: of weights w, as many as (Σw)² / Σw² equal ones, at most 2.9
        half-lives.
        """
        slower, _ = tolerated_factors(tolerance)
        bins = round(log(slower) * BINS_PER_UNIT)
        found = []
        for stage, name in enumerate(("prefill", "decode")):
            found.append(self._coverage(name, None, self._all[stage], bins))
            found += [self._coverage(name, key, self._known[key][stage - 2], bins) for key in self._table.keys]
        return judge_drift([held for held in found if held is not None], false_alarm_rate)

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
        for mine, added in zip(self._all, other._all, strict=True):
            mine.add(added, factor)
        for key in other._known:
            if key not in self._known:
                self._know(self._table.lookup(*key))
        for key, theirs in other._known.items():
            if isinstance(key[0], str):  # not once more by the index of its tier
                for stage in (-2, -1):
                    self._known[key][stage].add(theirs[stage], factor)
        self.n_observed += other.n_observed

    def to_json(self) -> str:
        """The state as JSON, for `from_json`: settings, and the bins that hold anything."""
        keys = {key: known for key, known in self._known.items() if isinstance(key[0], str) and known[-2].total > 0.0}
        return json.dumps(
            {
                "format": _STATE,
                "table": self._table.meta.get("content_hash"),
                "half_life": self.half_life,
                "min_samples": self.min_samples,
                "bound": exp(self._bound),
                "n_observed": self.n_observed,
                "all": [held.as_dict(self._weight) for held in self._all],
                "configurations": [
                    {"key": list(key), "stages": [held.as_dict(self._weight) for held in known[-2:]]}
                    for key, known in keys.items()
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
            made = cls(table, half_life=state["half_life"], min_samples=state["min_samples"], bound=state["bound"])
            made.n_observed = whole_number("n_observed", state["n_observed"], 0)
            everything = [RatioHistogram.from_dict(held) for held in state["all"]]
            made._all = (everything[0], everything[1])
            configurations = [
                (tuple(held["key"]), [RatioHistogram.from_dict(stage) for stage in held["stages"]])
                for held in state["configurations"]
            ]
        except ArgumentError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"not the state of an OnlineCalibrator: {error}") from error
        if state["table"] != table.meta.get("content_hash"):
            raise ArgumentError(
                f"the state is of the table with content hash {state['table']}, "
                f"not of this one with {table.meta.get('content_hash')}"
            )
        for key, (prefill, decode) in configurations:
            made._know(table.lookup(*key), prefill, decode)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return OnlineCalibrator.from_json, (self._table, self.to_json())

    def __repr__(self) -> str:
        prefill, decode = self._factor(0, None), self._factor(1, None)
        return (
            f"<OnlineCalibrator of {self._table!r}: {self.n_observed:,} observed, prefill x {prefill:.3f}, "
            f"decode x {decode:.3f}>"
        )

    def _identity(self) -> tuple[object, ...]:
        return self._table.meta.get("content_hash"), self._table.keys, self.half_life

    def _know(
        self, entry: Entry, prefill: RatioHistogram | None = None, decode: RatioHistogram | None = None
    ) -> _Known:
        """Keep at hand what `observe` needs of a configuration."""
        views = _views(entry, self._tail)
        known = (*views, prefill or RatioHistogram(), decode or RatioHistogram())
        key = entry.key
        self._known[key] = known
        self._known[self._table.tiers.index(key.tier), key.top_k, key.num_blocks] = known
        return known

    def _observe_checked(
        self, key: tuple[Tier, int, int], prompt_tokens: object, output_tokens: object, prefill: object, decode: object
    ) -> None:
        """`observe` for lengths beyond the views, clamped decode, and whatever is not allowed."""
        prompt = whole_number("prompt_tokens", prompt_tokens, 0)
        output = whole_number("output_tokens", output_tokens, 1)
        prefill_ms = positive_ms("prefill_ms", prefill)
        decode_ms = 0.0 if decode == 0 else positive_ms("decode_ms", decode)
        if output == 1 and decode_ms:
            raise ArgumentError(f"decode_ms is {decode!r} at one output token; allowed: 0, for it has no decode step")
        entry = self._table.lookup(*key)
        known = self._known.get(entry.key) or self._know(entry)
        observed = [(0, prefill_ms, entry.prefill_ms(prompt), entry.prefill_ms(prompt, self._tail))]
        if output > 1:
            with contextlib.suppress(NoDecodeDataError):
                predicted = entry.decode_ms(prompt, output), entry.decode_ms(prompt, output, self._tail)
                observed.append((1, decode_ms, *predicted))
        for stage, observed_ms, p50_ms, tail_ms in observed:
            ratio = observed_ms / p50_ms
            place = 0 if ratio <= 0.0 else min(max(int(log(ratio) * BINS_PER_UNIT + _OFFSET), 0), _LAST)
            for histogram in (self._all[stage], known[stage - 2]):
                histogram.take_in(place, self._weight, observed_ms > tail_ms)
        self._advance()

    def _advance(self) -> None:
        self.n_observed += 1
        self._weight *= self._growth
        if self._weight > _WEIGHT_LIMIT:
            self._bring_back()

    def _bring_back(self) -> None:
        """Express all weights in units of that of the newest observation."""
        factor = 1.0 / self._weight
        for histogram in {
            id(held): held for known in (*self._known.values(), self._all) for held in known[-2:]
        }.values():
            histogram.scale(factor)
        self._weight = 1.0

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

    def _coverage(self, stage: str, key: Key | None, histogram: RatioHistogram, bins: int) -> Coverage | None:
        # of n weights that fade by the same factor: (Σw)² / Σw² = Σw · 2 / (1 + oldest), Σw in units of the newest
        oldest = 2.0 ** (-self.n_observed / self.half_life)
        n = int(histogram.total / self._weight * 2.0 / (1.0 + oldest))
        if n < 1:
            return None
        figures = self._table.figures.keys if key is None else [self._table[key]._figures]
        summaries = [held.prefill if stage == "prefill" else held.decode for held in figures]
        within = {0.5: round(n * histogram.share_below(0))}
        above = {0.5: (n - round(n * histogram.share_below(bins)), n - round(n * histogram.share_below(-bins)))}
        if self._tail > 0.5:
            beyond = round(n * histogram.beyond_tail / histogram.total)
            within[self._tail], above[self._tail] = n - beyond, (beyond, beyond)
        n_table = sum(summary.n for summary in summaries if summary is not None)
        return Coverage(stage, key, n, n_table, above, within, histogram.median())


def _views(entry: Entry, tail: float) -> tuple[Any, ...]:
    """Views of an entry as `observe` takes them: P50 and tail of prefill; sums, the same one step on, ratio, spread."""
    nothing = memoryview(b"").cast("d")
    prefill = entry._prefill_views.get(0.5, nothing), entry._prefill_views.get(tail, nothing)
    held = entry._total_views.get(tail)
    return (*prefill, *((nothing,) * 4 if held is None else held[1:5]))


def _maps(factors: Factors) -> KeyMaps:
    return KeyMaps(prefill=StageMap(factors.prefill), decode_step=StageMap(factors.decode))
