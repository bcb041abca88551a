"""Estimates for one configuration, in plain Python arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from math import sqrt
from operator import index as whole
from typing import TYPE_CHECKING, Any, TypeAlias

from lutest.reader.arguments import MAX_TOKENS, positive_ms, quantile_index, whole_number
from lutest.reader.curves import by_length, key_pieces, sum_to, value_at
from lutest.reader.errors import ArgumentError, NoDecodeDataError
from lutest.reader.explanation import Explanation, evidence, explained, seen_lengths
from lutest.reader.figures import KeyColumn, KeyFigures, Unchanging, described_key
from lutest.reader.lengths import Lengths, lengths_of

if TYPE_CHECKING:
    from lutest.reader.over_lengths import OverLengths

_INDEXED = 2048  # lengths whose piece is looked up in a table of bytes; beyond, it is found by bisection
_FARTHEST = 2 * MAX_TOKENS
_SECANTS = 8  # of the search for the most tokens, before it goes on by halves


# Rows of `by_length` for held tokens, the sums among them, and place by length; rows and place for tokens that come
# out; twice the correlation of prefill and decode; the side of the median; the row that stands for no prompt given.
_Level: TypeAlias = tuple[Any, ...]


class Entry(Unchanging):
    """The estimates for one configuration: immutable, picklable, all verbs in plain Python floats.

    Attributes
    ----------
    key : tuple
        The configuration, in the order of `key_columns`.
    key_columns : tuple of str
    prefill_p50_ms, prefill_p95_ms : float
        The configuration's own quantiles, all prompts together.
    decode_step_p50_ms, decode_step_p95_ms : float or None
        The same for one decode step, all KV lengths together; None where no run had a step.
    n : int
        Accepted runs; 0 for a configuration that was filled in from its neighbours.
    source : str
        ``measured``, ``calibrated``, or how it was filled in: ``interpolated``, ``extrapolated``.
    reach : tuple of float
        Least and largest prompt length that searches and rewards take an answer for: half of the least and twice the
        largest of the configuration's own runs. Beyond, an answer here is a guess.
    """

    def __init__(
        self,
        figures: KeyFigures,
        quantiles: tuple[float, ...],
        key_columns: tuple[KeyColumn, ...],
        lengths: Mapping[str | None, Lengths] | None = None,
    ) -> None:
        median, tail = quantiles.index(0.5), quantiles.index(0.95)
        pieces, prefill = key_pieces(figures, median), figures.prefill.quantiles_ms
        step = figures.decode.quantiles_ms if figures.decode else None
        levels: dict[float, _Level] = {}
        at, curves = figures.prompt_tokens_p50, [by_length(pieces, median, i) for i in range(len(quantiles))]
        self._starts, index = _indexed(curves[0].held)
        self._out_starts, out_index = _indexed(curves[0].out)
        for i, (q, (held, out)) in enumerate(zip(quantiles, curves, strict=True)):
            side = float((i > median) - (i < median))
            sums = tuple(row[5:] for row in held)
            own_prefill = prefill[median], 0.0, side * (prefill[i] - prefill[median]), 0.0
            own = (at, *own_prefill, *held[bisect_right(self._starts, at) - 1][5:])
            levels[q] = (held, sums, index, out, out_index, 2.0 * figures.correlations[i], side, own)
        self.key, self.n, self.source = figures.key, figures.prefill.n, figures.source
        self.key_columns = tuple(column.name for column in key_columns)
        self.prefill_p50_ms, self.prefill_p95_ms = prefill[median], prefill[tail]
        self.decode_step_p50_ms = step[median] if step else None
        self.decode_step_p95_ms = step[tail] if step else None
        self._figures, self._quantiles, self._columns, self._lengths = figures, quantiles, key_columns, lengths or {}
        self._pieces, self._levels, self._own_prefill = pieces, levels, dict(zip(quantiles, prefill, strict=True))
        curve = pieces.prefill
        self.reach, self._seen, self._start = figures.reach, seen_lengths(figures), figures.prompt_tokens_p50
        self._prefill = {q: (curve.starts, curve.values[i], curve.slopes[i]) for i, q in enumerate(quantiles)}
        self._held: dict[str | None, OverLengths] = {}  # what was asked for
        self._made = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Entry, (self._figures, self._quantiles, self._columns, dict(self._lengths))

    def __repr__(self) -> str:
        step = "None" if self.decode_step_p50_ms is None else f"{self.decode_step_p50_ms:.4g}"
        return (
            f"<Entry {described_key(self._columns, self.key)}: prefill_p50_ms={self.prefill_p50_ms:.4g}, "
            f"prefill_p95_ms={self.prefill_p95_ms:.4g}, decode_step_p50_ms={step}, n={self.n}, {self.source}>"
        )

    def _repr_html_(self) -> str:
        from lutest.reader.rows import html_table

        caption = f"{described_key(self._columns, self.key)}: {self.n:,} runs, {self.source}; latencies in ms"
        return html_table(caption, self.curve())

    def curve(self) -> list[dict[str, Any]]:
        """The knots of the latency curves, as rows for a data frame.

        Returns
        -------
        list of dict
            ``stage`` (``prefill``, ``decode_step``), ``tokens`` (prompt length, KV length), ``n``, ``source`` and, for
            each quantile of the table, milliseconds, such as ``p95_ms``. Between knots a curve is linear.
        """
        from lutest.reader.rows import curve_rows

        return curve_rows(self._figures, self._quantiles)

    def prompt_tokens(self, text_tokens: int) -> int:
        """Vision + text tokens of a prompt with this text: the median of what its runs had beside the text is added.

        Raises
        ------
        ArgumentError
            No whole number of 0 or more, or the runs of the table do not hold vision and text tokens apart.
        """
        text, own = whole_number("text_tokens", text_tokens, 0), self._figures.vision_tokens_p50
        if own is None:
            raise ArgumentError(
                f"text_tokens is {text}, but the runs of {described_key(self._columns, self.key)} do not hold vision "
                "and text tokens apart: give prompt_tokens, vision and text together"
            )
        return own + text

    def source_at(self, prompt_tokens: int | None = None, output_tokens: int = 1) -> str:
        """What the total at these lengths rests on: ``measured``, ``calibrated``, ``interpolated`` or ``extrapolated``.

        Parameters and errors as in `total_ms`.
        """
        prompt, n, _ = self._checked(prompt_tokens, output_tokens, 0.5)
        return evidence(self._figures, prompt, n)[2].source

    def extrapolates(self, prompt_tokens: int | None, output_tokens: int) -> bool:
        """Whether `source_at` of these lengths is ``extrapolated``, in less time; they are not checked."""
        prompts, kv_lengths, outputs = self._seen
        start, n = self._start if prompt_tokens is None else prompt_tokens, output_tokens
        if prompt_tokens is not None and not prompts[0] <= prompt_tokens <= prompts[1]:
            return True
        inside = n == 1 or (kv_lengths[0] <= start + 1 and start + n - 1 <= kv_lengths[1] and n <= outputs)
        return self.source == "extrapolated" or not inside

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
            if 0 <= prompt_tokens <= MAX_TOKENS:
                starts, values, slopes = self._prefill[q]
                j = bisect_right(starts, whole(prompt_tokens)) - 1
                return values[j] + (prompt_tokens - starts[j]) * slopes[j]
        except (KeyError, TypeError):
            pass  # not allowed, or a whole number of another type
        prompt, _, level = self._checked(prompt_tokens, 1, q)
        return self.prefill_ms(prompt, level)

    def decode_step_ms(self, kv_len: int, q: float = 0.5) -> float:
        """Latency of the decode step that attends over `kv_len` tokens (1 or more), in milliseconds.

        Raises
        ------
        ArgumentError, NoDecodeDataError
        """
        i, x = quantile_index(self._quantiles, q), whole_number("kv_len", kv_len, 1)
        if self._pieces.step is None:
            raise self._no_decode()
        return value_at(self._pieces.step, i, x)

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
        prompt, n, level = self._checked(prompt_tokens, output_tokens, q)
        if n == 1:
            return 0.0
        _, step, ratio = self._pieces
        if step is None or ratio is None:
            raise self._no_decode()
        median, i = self._quantiles.index(0.5), self._quantiles.index(level)
        start = self._figures.prompt_tokens_p50 if prompt is None else prompt
        steps_ms = sum_to(step, median, start + n - 1) - sum_to(step, median, start)
        return steps_ms * value_at(ratio, i, n - 1)

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

        Notes
        -----
        With d the deviation of decode at `q` from its P50, a that of prefill, and c their correlation, a total deviates
        from the sum of the P50s by √(a² + d² + 2cad). Decode is the sum of its P50 steps times a ratio that depends on
        the number of steps (see `lutest.builder.fit`).
        """
        try:
            rows, sums, index, out_rows, out_index, correlated, side, own = self._levels[q]
            prompt = own[0] if prompt_tokens is None else prompt_tokens
            # one comparison for: no negative prompt, no zero tokens, no wrapped-around NumPy integer, no NaN
            if 0 <= prompt < (end := prompt + output_tokens) <= _FARTHEST:
                end -= 1
                if end < _INDEXED:  # and so are the others
                    held, last, out = index[prompt], index[end], out_index[output_tokens]
                else:
                    held, last = bisect_right(self._starts, prompt) - 1, bisect_right(self._starts, whole(end)) - 1
                    out = bisect_right(self._out_starts, output_tokens) - 1
                _, p0, p1, a0, a1, b0, b1, b2 = own if prompt_tokens is None else rows[held]
                e0, e1, e2 = sums[last]
                _, r0, r1, d0, d1 = out_rows[out]
                steps_ms = (e0 + end * (e1 + end * e2)) - (b0 + prompt * (b1 + prompt * b2))
                a, d = a0 + prompt * a1, steps_ms * (d0 + output_tokens * d1)
                middle = p0 + prompt * p1 + steps_ms * (r0 + output_tokens * r1)
                total: float = middle + side * sqrt(d * d + a * (a + correlated * d))
                return total
        except (IndexError, KeyError, TypeError):
            pass  # not allowed, or a whole number of another type, or nothing is known of decode
        prompt_tokens, n, q = self._checked(prompt_tokens, output_tokens, q)
        if n == 1:
            return self.prefill_ms(prompt_tokens, q)
        if self._pieces.step is None:
            raise self._no_decode()
        return self.total_ms(prompt_tokens, n, q)

    def max_output_tokens(self, budget_ms: float, prompt_tokens: int | None = None, q: float = 0.95) -> int:
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
        prompt, _, level = self._checked(prompt_tokens, 1, q)
        at_low = self.total_ms(prompt, 1, level)
        if at_low > budget:
            return 0
        low, high, tries, slope = 1, MAX_TOKENS + 1, 0, self.total_ms(prompt, 2, level) - at_low
        while high - low > 1:
            middle = (low + high) // 2
            if slope > 0.0 and tries < _SECANTS:  # nearly a line: a few secants find it
                middle = low + int(min((budget - at_low) / slope, float(MAX_TOKENS)))
                middle = min(max(middle, low + 1), high - 1)
            ms = self.total_ms(prompt, middle, level)
            tries, slope = tries + 1, (ms - at_low) / (middle - low)
            if ms <= budget:
                low, at_low = middle, ms
            else:
                high = middle
        return low

    def p_within(self, budget_ms: float, prompt_tokens: int | None = None, workload: str | None = None) -> float:
        """Probability that a run stays within a budget when nobody knows how many tokens come out.

        The sum over the table's output lengths n of P(n) · P(total_ms <= budget_ms given n). The latter is made from
        the totals at the table's quantiles: between them, latency is linear in the normal score of the level; beyond
        the outermost ones the last line is carried on, up to a normal score of 3 (see `lutest.reader.over_lengths`).

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
            From 0 to 1, to 1e-7; of more than 256 lengths, to 1e-3.

        Raises
        ------
        ArgumentError, NoDecodeDataError
        """
        budget = positive_ms("budget_ms", budget_ms)
        prompt, _, _ = self._checked(prompt_tokens, 1, 0.5)
        return self._over_lengths(workload).p_within(budget, prompt)

    def expected_total_ms(self, prompt_tokens: int | None = None, workload: str | None = None) -> float:
        """Expected latency of a run when nobody knows how many tokens come out: the mean of what `p_within` is of.

        The sum over the table's output lengths n of P(n) · E(total_ms given n). In a table of P50 and P95 alone, the
        mean given n is the P50.

        Parameters, errors
            As in `p_within`.

        Returns
        -------
        float
            Milliseconds; of more than 256 lengths, to 2e-4 relative.
        """
        prompt, _, _ = self._checked(prompt_tokens, 1, 0.5)
        return self._over_lengths(workload).expected_ms(prompt)

    def explain(self, prompt_tokens: int | None, output_tokens: int, q: float = 0.5) -> Explanation:
        """The total with every part, its sample size, its source and the bounds that are known.

        Parameters, units and errors as in `total_ms`.
        """
        prompt, n, level = self._checked(prompt_tokens, output_tokens, q)
        start = self._figures.prompt_tokens_p50 if prompt is None else prompt
        step_ms = None if self._pieces.step is None else self.decode_step_ms(start + 1, level)
        return explained(
            self._figures,
            self._columns,
            (prompt, n, level),
            prefill_ms=self.prefill_ms(prompt, level),
            step_ms=step_ms,
            decode_ms=self.decode_ms(prompt, n, level),
            total_ms=self.total_ms(prompt, n, level),
        )

    def _over_lengths(self, workload: str | None) -> OverLengths:
        lengths = lengths_of(self._lengths, workload)
        held = self._held.get(workload)
        if held is None:
            if self._pieces.step is None and lengths.tokens != (1,):
                raise self._no_decode()
            from lutest.reader.over_lengths import OverLengths, levels_of  # here, as they need NumPy

            median = self._quantiles.index(0.5)
            curves = [by_length(self._pieces, median, i) for i in range(len(self._quantiles))]
            correlated, own = ([self._levels[q][i] for q in self._quantiles] for i in (5, 7))
            held = self._held[workload] = OverLengths(lengths, levels_of(self._quantiles), curves, correlated, own)
        return held

    def _checked(self, prompt_tokens: object, output_tokens: object, q: object) -> tuple[int | None, int, float]:
        level = self._quantiles[quantile_index(self._quantiles, q)]
        prompt = None if prompt_tokens is None else whole_number("prompt_tokens", prompt_tokens, 0)
        return prompt, whole_number("output_tokens", output_tokens, 1), level

    def _no_decode(self) -> NoDecodeDataError:
        return NoDecodeDataError(
            f"{described_key(self._columns, self.key)}: all its runs have one token, so nothing is known of its decode "
            "steps; only output_tokens=1 can be answered"
        )


def _indexed(rows: Sequence[tuple[Any, ...]]) -> tuple[list[int], Sequence[int]]:
    """Starts of pieces, and length → place of its piece, for lengths up to `_INDEXED`."""
    starts = [row[0] for row in rows]
    ends = [min(start, _INDEXED + 1) for start in (*starts[1:], _INDEXED + 1)]
    places = [j for j, end in enumerate(ends) for _ in range(end - (ends[j - 1] if j else 0))]
    return starts, bytes(places) if len(starts) <= 256 else tuple(places)
