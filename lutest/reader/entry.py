"""Estimates for one configuration: plain Python arithmetic on precomputed pieces and views."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import sqrt
from typing import TYPE_CHECKING, Any

from lutest.reader.arguments import positive_ms, quantile_index, whole_number
from lutest.reader.curves import KeyPieces, Pieces, key_pieces, sum_to, value_at
from lutest.reader.errors import NoDecodeDataError
from lutest.reader.evidence import curve_evidence, decode_evidence, prefill_evidence, weakest
from lutest.reader.explanation import Explanation, Part
from lutest.reader.figures import Key, KeyFigures
from lutest.reader.lengths import Lengths, lengths_of, levels_of, mean_over_lengths, share_within
from lutest.reader.rows import MOST_ROWS, NO_ROWS, total_rows
from lutest.reader.token_search import guess_tokens, most_tokens

if TYPE_CHECKING:
    from lutest.reader.rows import TotalRows, TotalViews

__all__ = ["Entry"]

_EXPECTED_TOLERANCE = 1e-4
_P_WITHIN_TOLERANCE = 4e-4


class Entry:
    """The estimates for one configuration: immutable, picklable, all verbs in plain Python floats.

    Attributes
    ----------
    key : Key
    prefill_p50_ms, prefill_p95_ms : float or None
        The configuration's own quantiles, all prompts together; None where the table holds no such quantile.
    decode_step_p50_ms, decode_step_p95_ms : float or None
        The same for one decode step, all KV lengths together; None also where no run had a step.
    n : int
        Accepted runs; 0 for a configuration that was filled in from its neighbours.
    source : str
        ``measured``, or how it was filled in: ``interpolated``, ``extrapolated``.
    """

    __slots__ = (
        "_figures",
        "_lengths",
        "_median",
        "_own_prefill",
        "_p95_rows",
        "_pieces",
        "_prefill_views",
        "_quantiles",
        "_total_views",
        "_views",
        "decode_step_p50_ms",
        "decode_step_p95_ms",
        "key",
        "n",
        "prefill_p50_ms",
        "prefill_p95_ms",
        "source",
    )

    key: Key
    prefill_p50_ms: float
    prefill_p95_ms: float | None
    decode_step_p50_ms: float | None
    decode_step_p95_ms: float | None
    n: int
    source: str
    _figures: KeyFigures
    _lengths: Mapping[str | None, Lengths]
    _quantiles: tuple[float, ...]
    _median: int
    _pieces: KeyPieces
    _own_prefill: dict[float, float]
    _views: tuple[memoryview[float], ...]
    _prefill_views: dict[float, memoryview[float]]
    _total_views: dict[float, TotalViews]
    _p95_rows: TotalRows

    def __init__(
        self,
        figures: KeyFigures,
        quantiles: tuple[float, ...],
        views: tuple[memoryview[float], ...] = (),
        pieces: KeyPieces | None = None,
        lengths: Mapping[str | None, Lengths] | None = None,
        most_rows: int = MOST_ROWS // 32,
    ) -> None:
        """Take the figures of one key and, for speed, its rows of the grid (see `lutest.grid.build_grid`).

        `lengths` are those of the table's workloads, `most_rows` how many prompt lengths have a row of their own.
        """
        median = quantiles.index(0.5)
        tail = quantiles.index(0.95) if 0.95 in quantiles else None
        prefill, decode = figures.prefill.quantiles_ms, figures.decode.quantiles_ms if figures.decode else None
        pieces = key_pieces(figures, median) if pieces is None else pieces
        prefill_views: dict[float, memoryview[float]] = {}
        total_views: dict[float, TotalViews] = {}
        if views:
            prefill_views = dict(zip(quantiles, views, strict=False))
        if views and pieces.step is not None:
            count = len(quantiles)
            p50, (sums, sums_before, ratio) = views[median], views[count : count + 3]
            total_views[0.5] = (p50, sums, sums_before, ratio, p50, p50, p50, 1.0)
            others = [q for q in quantiles if q != 0.5]
            for q, first in zip(others, range(count + 3, len(views), 3), strict=True):
                u, v, spread = views[first : first + 3]
                total_views[q] = (p50, sums, sums_before, ratio, spread, u, v, 1.0 if q > 0.5 else -1.0)
        for name, value in (
            ("key", figures.key),
            ("prefill_p50_ms", prefill[median]),
            ("prefill_p95_ms", None if tail is None else prefill[tail]),
            ("decode_step_p50_ms", None if decode is None else decode[median]),
            ("decode_step_p95_ms", None if decode is None or tail is None else decode[tail]),
            ("n", figures.prefill.n),
            ("source", figures.source),
            ("_figures", figures),
            ("_lengths", {} if lengths is None else lengths),
            ("_quantiles", quantiles),
            ("_median", median),
            ("_pieces", pieces),
            ("_own_prefill", dict(zip(quantiles, prefill, strict=True))),
            ("_views", views),
            ("_prefill_views", prefill_views),
            ("_total_views", total_views),
            ("_p95_rows", total_rows(figures, total_views[0.95], most_rows) if 0.95 in total_views else NO_ROWS),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Entry cannot be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"an Entry cannot be changed: {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        rows = tuple(view.tobytes() for view in self._views)
        return _restore_entry, (self._figures, self._quantiles, rows, dict(self._lengths))

    def __repr__(self) -> str:
        tail = "" if self.prefill_p95_ms is None else f", prefill_p95_ms={self.prefill_p95_ms:.4g}"
        step = "None" if self.decode_step_p50_ms is None else f"{self.decode_step_p50_ms:.4g}"
        return (
            f"<Entry {self.key.tier!r} top_k={self.key.top_k} num_blocks={self.key.num_blocks}: "
            f"prefill_p50_ms={self.prefill_p50_ms:.4g}{tail}, decode_step_p50_ms={step}, n={self.n}, {self.source}>"
        )

    def prefill_ms(self, prompt_tokens: int | None = None, q: float = 0.5) -> float:
        """Prefill latency: everything up to the first token.

        Parameters
        ----------
        prompt_tokens : int, optional
            Vision + text tokens, 0 or more. Left out: the configuration's own quantile, all prompts together.
        q : float
            One of the table's quantiles.

        Returns
        -------
        float
            Milliseconds.

        Raises
        ------
        ArgumentError
            An argument outside of what is allowed.
        """
        try:
            if prompt_tokens is None:
                return self._own_prefill[q]
            if prompt_tokens >= 0:
                return self._prefill_views[q][prompt_tokens]
        except (IndexError, KeyError, TypeError):
            pass  # beyond the views, or not allowed: the exact path tells
        i = quantile_index(self._quantiles, q)
        return self._prefill_at(None if prompt_tokens is None else whole_number("prompt_tokens", prompt_tokens, 0), i)

    def decode_step_ms(self, kv_len: int, q: float = 0.5) -> float:
        """Latency of the decode step that attends over `kv_len` tokens (1 or more), in milliseconds.

        Raises
        ------
        ArgumentError, NoDecodeDataError
        """
        i = quantile_index(self._quantiles, q)
        x = whole_number("kv_len", kv_len, 1)
        return value_at(self._decode_pieces()[0], i, x)

    def decode_ms(self, prompt_tokens: int | None, output_tokens: int, q: float = 0.5) -> float:
        """Latency of everything after the first token: 0.0 for one output token.

        Parameters
        ----------
        prompt_tokens : int or None
            Vision + text tokens, 0 or more; None stands for the configuration's median prompt length.
        output_tokens : int
            Generated tokens, 1 or more; the first one comes out of prefill.
        q : float
            One of the table's quantiles.

        Returns
        -------
        float
            Milliseconds.

        Raises
        ------
        ArgumentError, NoDecodeDataError
        """
        try:
            if prompt_tokens is not None and 0 <= prompt_tokens < (end := prompt_tokens + output_tokens):
                _, sums, sums_before, ratio, spread, _, _, sign = self._total_views[q]
                steps_ms = sums_before[end] - sums[prompt_tokens]
                if output_tokens == 1 or q == 0.5:
                    return steps_ms * ratio[output_tokens]
                return steps_ms * ratio[output_tokens] + sign * (steps_ms * spread[output_tokens])
        except (IndexError, KeyError, TypeError):
            pass
        i, prompt, n = self._checked(prompt_tokens, output_tokens, q)
        if n == 1:
            return 0.0
        steps_ms, middle, ratio_spread = self._decode_at(prompt, n, i)
        return middle if i == self._median else middle + (1.0 if i > self._median else -1.0) * (steps_ms * ratio_spread)

    def total_ms(self, prompt_tokens: int | None, output_tokens: int, q: float = 0.5) -> float:
        """Latency of a whole run: prefill and decode, with their deviations combined as the table was calibrated.

        Parameters
        ----------
        prompt_tokens : int or None
            Vision + text tokens, 0 or more; None: the configuration's own prefill quantiles and median prompt length.
        output_tokens : int
            Generated tokens, 1 or more.
        q : float
            One of the table's quantiles.

        Returns
        -------
        float
            Milliseconds.

        Raises
        ------
        ArgumentError, NoDecodeDataError
        """
        try:
            # one comparison for: no negative prompt, no zero tokens, no wrapped-around NumPy integer, no NaN
            if prompt_tokens is not None and 0 <= prompt_tokens < (end := prompt_tokens + output_tokens):
                at_prompt, sums_before, at_tokens = self._p95_rows
                p50, start, u, v = at_prompt[prompt_tokens]
                ratio, spread = at_tokens[output_tokens]
                steps_ms = sums_before[end] - start
                if q == 0.95:
                    shared = steps_ms * spread + u
                    return p50 + steps_ms * ratio + sqrt(shared * shared + v)
                if q == 0.5:
                    return p50 + steps_ms * ratio
        except (IndexError, TypeError, ValueError):  # ValueError: an empty row
            pass
        return self._total_anywhere(prompt_tokens, output_tokens, q)

    def _total_anywhere(self, prompt_tokens: int | None, output_tokens: int, q: float) -> float:
        """`total_ms` of whatever has no rows: from the views as far as they go, then from the pieces."""
        try:
            if prompt_tokens is not None and 0 <= prompt_tokens < (end := prompt_tokens + output_tokens):
                if q == 0.5:
                    p50, sums, sums_before, ratio, _, _, _, _ = self._total_views[q]
                    return p50[prompt_tokens] + (sums_before[end] - sums[prompt_tokens]) * ratio[output_tokens]
                if output_tokens == 1:
                    return self._prefill_views[q][prompt_tokens]
                p50, sums, sums_before, ratio, spread, u, v, sign = self._total_views[q]
                steps_ms = sums_before[end] - sums[prompt_tokens]
                shared = steps_ms * spread[output_tokens] + u[prompt_tokens]
                deviation = sqrt(shared * shared + v[prompt_tokens])
                return p50[prompt_tokens] + steps_ms * ratio[output_tokens] + sign * deviation
        except (IndexError, KeyError, TypeError):
            pass
        i, prompt, n = self._checked(prompt_tokens, output_tokens, q)
        if n == 1:
            return self._prefill_at(prompt, i)
        prefill = self._prefill_at(prompt, self._median)
        steps_ms, middle, ratio_spread = self._decode_at(prompt, n, i)
        if i == self._median:
            return prefill + middle
        deviation = abs(self._prefill_at(prompt, i) - prefill)
        correlation = self._figures.correlations[i]
        shared = steps_ms * ratio_spread + correlation * deviation
        # a² + d² + 2cad, as (d + ca)² + (1 - c²)a²: the parts of the prompt can be tabulated
        combined = sqrt(shared * shared + (1.0 - correlation * correlation) * deviation * deviation)
        return prefill + middle + (1.0 if i > self._median else -1.0) * combined

    def max_output_tokens(self, budget_ms: float, prompt_tokens: int | None = None, q: float = 0.5) -> int:
        """Largest number of output tokens whose total_ms fits the budget.

        Parameters
        ----------
        budget_ms : float
            Finite, above 0.
        prompt_tokens : int, optional
            As in `total_ms`.
        q : float
            One of the table's quantiles.

        Returns
        -------
        int
            n with ``total_ms(prompt_tokens, n, q) <= budget_ms`` and n + 1 above it, at most `MAX_TOKENS`;
            0 if not even one token fits.

        Raises
        ------
        ArgumentError, NoDecodeDataError
        """
        budget = positive_ms("budget_ms", budget_ms)
        i, prompt, _ = self._checked(prompt_tokens, 1, q)
        room = budget - self._prefill_at(prompt, i)
        if room < 0.0:
            return 0
        step, ratio = self._decode_pieces()
        start = self._figures.prompt_tokens_p50 if prompt is None else prompt
        guess = guess_tokens(step, ratio, self._median, i, start, room)
        return most_tokens(self.total_ms, prompt, q, budget, guess)

    def p_within(self, budget_ms: float, prompt_tokens: int | None = None, workload: str | None = None) -> float:
        """Probability that a run stays within a budget when nobody knows how many tokens come out.

        The sum over the table's output lengths n of P(n) · P(total_ms <= budget_ms given n). The latter is made from
        the totals at the table's quantiles: between them, latency is linear in the normal score of the level; beyond
        the outermost ones the last line is carried on, up to a normal score of 3 (see `lutest.lengths`).

        Parameters
        ----------
        budget_ms : float
            Finite, above 0.
        prompt_tokens : int, optional
            As in `total_ms`.
        workload : str, optional
            Whose output lengths to take; left out: those of all together.

        Returns
        -------
        float
            From 0 to 1, to 1e-4.

        Raises
        ------
        ArgumentError, NoDecodeDataError
        """
        budget = positive_ms("budget_ms", budget_ms)
        lengths = lengths_of(self._lengths, workload)
        prompt = None if prompt_tokens is None else whole_number("prompt_tokens", prompt_tokens, 0)
        quantiles, levels = self._quantiles, levels_of(self._quantiles)

        def within(n: int) -> float:
            totals = list(accumulate([self.total_ms(prompt, n, q) for q in quantiles], max))
            return share_within(levels, totals, budget)

        return min(1.0, max(0.0, mean_over_lengths(lengths, within, _P_WITHIN_TOLERANCE)))

    def expected_total_ms(self, prompt_tokens: int | None = None, workload: str | None = None) -> float:
        """Expected latency of a run when nobody knows how many tokens come out: the mean of what `p_within` is of.

        The sum over the table's output lengths n of P(n) · E(total_ms given n). In a table of P50 and P95 alone, the
        mean given n is the P50.

        Parameters, errors
            As in `p_within`.

        Returns
        -------
        float
            Milliseconds, to 1e-4 relative.
        """
        lengths = lengths_of(self._lengths, workload)
        prompt = None if prompt_tokens is None else whole_number("prompt_tokens", prompt_tokens, 0)
        quantiles, weights = self._quantiles, levels_of(self._quantiles).weights
        if len(quantiles) == 2:  # their line is symmetric about the median

            def mean(n: int) -> float:
                return self.total_ms(prompt, n, 0.5)

        else:

            def mean(n: int) -> float:
                totals = accumulate([self.total_ms(prompt, n, q) for q in quantiles], max)
                return sum(weight * total for weight, total in zip(weights, totals, strict=True))

        return mean_over_lengths(lengths, mean, _EXPECTED_TOLERANCE)

    def explain(self, prompt_tokens: int | None, output_tokens: int, q: float = 0.5) -> Explanation:
        """The total with every part, its sample size, its source and the bounds that are known.

        Parameters, units and errors as in `total_ms`.
        """
        i, prompt, n = self._checked(prompt_tokens, output_tokens, q)
        figures, q = self._figures, self._quantiles[i]
        start = figures.prompt_tokens_p50 if prompt is None else prompt
        behind_prefill = prefill_evidence(figures, prompt)
        prefill = Part(self._prefill_at(prompt, i), *behind_prefill, figures.prefill.p95_upper_ms)
        decode_step: Part | None = None
        decode = Part(0.0, figures.prefill.n, figures.source)
        behind_total = behind_prefill
        if figures.decode is not None and figures.decode_curve is not None and figures.decode_total is not None:
            first_ms = value_at(self._decode_pieces()[0], i, start + 1)
            behind_step = curve_evidence(figures.decode_curve, start + 1, start + 1, figures.source)
            decode_step = Part(first_ms, *behind_step, figures.decode.p95_upper_ms)
            if n > 1:
                behind_decode = decode_evidence(figures, figures.decode_curve, figures.decode_total, start, n)
                decode = Part(self.decode_ms(prompt, n, q), *behind_decode)
                behind_total = weakest(behind_prefill, behind_decode)
        total = Part(self.total_ms(prompt, n, q), *behind_total)
        return Explanation(self.key, prompt, n, q, prefill, decode_step, decode, total, figures.fill_error)

    def _checked(self, prompt_tokens: object, output_tokens: object, q: object) -> tuple[int, int | None, int]:
        i = quantile_index(self._quantiles, q)
        prompt = None if prompt_tokens is None else whole_number("prompt_tokens", prompt_tokens, 0)
        return i, prompt, whole_number("output_tokens", output_tokens, 1)

    def _prefill_at(self, prompt: int | None, i: int) -> float:
        if prompt is None:
            return self._figures.prefill.quantiles_ms[i]
        return value_at(self._pieces.prefill, i, prompt)

    def _decode_pieces(self) -> tuple[Pieces, Pieces]:
        _, step, ratio = self._pieces
        if step is None or ratio is None:
            raise NoDecodeDataError(
                f"tier={self.key.tier!r}, top_k={self.key.top_k}, num_blocks={self.key.num_blocks}: all its runs have "
                "one token, so nothing is known of its decode steps; only output_tokens=1 can be answered"
            )
        return step, ratio

    def _decode_at(self, prompt: int | None, n: int, i: int) -> tuple[float, float, float]:
        """Sum of the median steps, the median of decode_ms, and the absolute deviation of quantile i's ratio."""
        step, ratio = self._decode_pieces()
        start = self._figures.prompt_tokens_p50 if prompt is None else prompt
        steps_ms = sum_to(step, self._median, start + n - 1) - sum_to(step, self._median, start)
        middle = value_at(ratio, self._median, n - 1)
        return steps_ms, steps_ms * middle, abs(value_at(ratio, i, n - 1) - middle)


def _restore_entry(
    figures: KeyFigures, quantiles: tuple[float, ...], rows: tuple[bytes, ...], lengths: dict[str | None, Lengths]
) -> Entry:
    return Entry(figures, quantiles, tuple(memoryview(row).cast("d") for row in rows), None, lengths)
