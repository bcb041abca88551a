"""An estimate taken apart: every part with its sample size, source and bounds, for people and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lutest.reader.figures import FillError, Key

__all__ = ["Explanation", "Part"]


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
        ``measured``, ``interpolated`` or ``extrapolated``.
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

    `decode_step` is the first step, None where no run had one; `fill_error` how far off a configuration is that was
    filled in, None for a measured one.
    """

    key: Key
    prompt_tokens: int | None
    output_tokens: int
    q: float
    prefill: Part
    decode_step: Part | None
    decode: Part
    total: Part
    fill_error: FillError | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON."""
        return {**asdict(self), "key": self.key._asdict()}

    def __str__(self) -> str:
        prompt = "prompt tokens not given" if self.prompt_tokens is None else f"{self.prompt_tokens} prompt tokens"
        lines = [
            f"{self.key.tier} top_k={self.key.top_k} num_blocks={self.key.num_blocks}: {prompt}, "
            f"{self.output_tokens} output tokens, q={self.q:g}",
            f"  {'part':<12}{'ms':>12}{'n':>9}  {'source':<13}P95 at most",
        ]
        for name in ("prefill", "decode_step", "decode", "total"):
            part: Part | None = getattr(self, name)
            if part is None:
                continue
            upper = "" if part.p95_upper_ms is None else f"{part.p95_upper_ms:.3f}"
            label = "first step" if name == "decode_step" else name
            lines.append(f"  {label:<12}{part.value_ms:>12.3f}{part.n:>9}  {part.source:<13}{upper}".rstrip())
        if self.fill_error is not None:
            errors = {"prefill": self.fill_error.prefill, "decode step": self.fill_error.decode_step}
            known = [f"{error:.1%} in {name}" for name, error in errors.items() if error is not None]
            lines.append(
                f"  not measured: P50 off by {' and '.join(known) or 'nobody knows how much'}, by leaving keys out"
            )
        return "\n".join(lines)
