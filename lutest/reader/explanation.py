"""An estimate taken apart: every part with its sample size, source and bounds, for people and for JSON."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, NamedTuple

from lutest.reader.figures import Curve, FillError, KeyColumn, KeyFigures

_RANK = {"measured": 0, "calibrated": 1, "interpolated": 2, "extrapolated": 3}


@dataclass(frozen=True)
class Part:
    """One part of an explained estimate.

    Attributes
    ----------
    value_ms : float
        The estimate, in milliseconds.
    n : int
        Observations behind it: those of the knots that it rests on; 0 for a configuration that was filled in.
    source : str
        ``measured``, ``calibrated``, ``interpolated`` or ``extrapolated``.
    p95_upper_ms : float or None
        95 % upper confidence bound of the configuration's own P95, all lengths together; None where not known.
    """

    value_ms: float
    n: int
    source: str
    p95_upper_ms: float | None = None


@dataclass(frozen=True)
class Explanation:
    """An estimate with all its parts.

    `key` maps the names of the key columns to the configuration's values. `decode_step` is the first step, None where
    no run had one; `fill_error` how far off a configuration is that was filled in, None for a measured one; `mixed`
    which models and devices the table mixes, where it does; `out_of_reach` why searches and rewards leave it out.
    """

    key: dict[str, str | int | float]
    prompt_tokens: int | None
    output_tokens: int
    q: float
    prefill: Part
    decode_step: Part | None
    decode: Part
    total: Part
    fill_error: FillError | None = None
    mixed: str = ""
    out_of_reach: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        prompt = "prompt tokens not given" if self.prompt_tokens is None else f"{self.prompt_tokens} prompt tokens"
        named = ", ".join(f"{name}={value}" for name, value in self.key.items())
        lines = [
            f"{named}: {prompt}, {self.output_tokens} output tokens, q={self.q:g}",
            f"  {'part':<12}{'ms':>12}{'n':>9}  {'source':<13}P95 at most",
        ]
        parts = {"prefill": self.prefill, "first step": self.decode_step, "decode": self.decode, "total": self.total}
        for name, part in parts.items():
            if part is None:
                continue
            upper = "" if part.p95_upper_ms is None else f"{part.p95_upper_ms:.3f}"
            lines.append(f"  {name:<12}{part.value_ms:>12.3f}{part.n:>9}  {part.source:<13}{upper}".rstrip())
        if self.fill_error is not None:
            errors = {"prefill": self.fill_error.prefill, "decode step": self.fill_error.decode_step}
            known = [f"{error:.1%} in {name}" for name, error in errors.items() if error is not None]
            lines.append(
                f"  not measured: P50 off by {' and '.join(known) or 'nobody knows how much'}, by leaving keys out"
            )
        if self.out_of_reach:
            lines.append(f"  left out by searches and rewards: {self.out_of_reach}")
        if self.mixed:
            lines.append(f"  of runs that are mixed: {self.mixed}")
        return "\n".join(lines)


class _Evidence(NamedTuple):
    """Observations behind an estimate, and whether they were measured there or filled in."""

    n: int
    source: str


def explained(
    figures: KeyFigures,
    key_columns: tuple[KeyColumn, ...],
    request: tuple[int | None, int, float],
    *,
    prefill_ms: float,
    step_ms: float | None,
    decode_ms: float,
    total_ms: float,
) -> Explanation:
    """The estimates of a request (prompt tokens, output tokens, quantile), each with what it rests on."""
    prompt, n, q = request
    behind_prefill, behind_decode, behind_total = evidence(figures, prompt, n)
    step = None
    if figures.decode is not None and figures.decode_curve is not None and step_ms is not None:
        first = (figures.prompt_tokens_p50 if prompt is None else prompt) + 1
        behind_step = _on_curve(figures.decode_curve, first, first, figures.source)
        step = Part(step_ms, *behind_step, figures.decode.p95_upper_ms)
    named = dict(zip((column.name for column in key_columns), figures.key, strict=True))
    prefill = Part(prefill_ms, *behind_prefill, figures.prefill.p95_upper_ms)
    decode, total = Part(decode_ms, *behind_decode), Part(total_ms, *behind_total)
    least, most = figures.reach
    far = "" if prompt is None or least <= prompt <= most else figures.out_of_reach(prompt)
    return Explanation(named, prompt, n, q, prefill, step, decode, total, figures.fill_error, figures.mixed, far)


def evidence(figures: KeyFigures, prompt: int | None, n: int) -> tuple[_Evidence, _Evidence, _Evidence]:
    """What prefill, decode and total of `n` tokens rest on."""
    start = figures.prompt_tokens_p50 if prompt is None else prompt
    own = _Evidence(figures.prefill.n, figures.source)
    prefill = own if prompt is None else _on_curve(figures.prefill_curve, prompt, prompt, figures.source)
    curve, ratios = figures.decode_curve, figures.decode_total
    if curve is None or ratios is None or n == 1:
        return prefill, own, prefill
    knots, outside = _support(ratios.decode_steps, ratios.n, n - 1, n - 1)
    beyond = outside and len(ratios.n) > 1  # a single ratio stands for all lengths
    on_the_way = _on_curve(curve, start + 1, start + n - 1, figures.source).source
    source = _worst(on_the_way, "extrapolated" if beyond else "measured")
    decode = _Evidence(sum(ratios.n[j] for j in knots), source)
    return prefill, decode, _Evidence(min(prefill.n, decode.n), _worst(prefill.source, source))


def seen_lengths(figures: KeyFigures) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Least and largest prompt and KV length, and most output tokens, up to which nothing is extrapolated."""

    def ends(curve: Curve | None) -> tuple[float, float]:
        seen = (
            [x for x, source in zip(curve.at, curve.source, strict=True) if source != "extrapolated"] if curve else []
        )
        return (seen[0], seen[-1]) if seen else (inf, -inf)

    steps = figures.decode_total.decode_steps if figures.decode_total else ()
    return ends(figures.prefill_curve), ends(figures.decode_curve), steps[-1] + 1 if len(steps) > 1 else inf


def _on_curve(curve: Curve, low: int, high: int, source: str) -> _Evidence:
    """What values of a curve on low … high rest on, `source` being that of the whole configuration."""
    knots, outside = _support(curve.at, curve.n, low, high)
    sources = [curve.source[j] for j in knots]
    return _Evidence(
        sum(curve.n[j] for j in knots), _worst(source, *sources, "extrapolated" if outside else "measured")
    )


def _support(at: tuple[int, ...], n: tuple[int, ...], low: int, high: int) -> tuple[range, bool]:
    """Knots that values on low … high rest on, and whether any of it lies outside of all knots."""
    first = max(0, bisect_right(at, low) - 1)
    last = max(0, bisect_right(at, high) - 1)
    if at[0] <= high and at[last] < high and last + 1 < len(n):
        last += 1
    return range(first, last + 1), low < at[0] or high > at[-1]


def _worst(*sources: str) -> str:
    return max(sources, key=_RANK.__getitem__)
