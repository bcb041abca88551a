"""A finding about a set of runs: one sentence that a person can act on, with its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

Severity = Literal["ok", "note", "warning"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    name : str
        The check.
    severity : {"ok", "note", "warning"}
        ``note``: worth knowing; ``warning``: a table built on these runs would mislead, or would rest on too little.
    sentence : str
        What was found and what to do about it.
    figures : dict
        The numbers behind it, plain values; None where one does not exist.
    """

    name: str
    severity: Severity
    sentence: str
    figures: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {name: plain(value) for name, value in vars(self).items()}


def plain(value: Any) -> Any:
    """The value in types that JSON has: None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    return value


def count(number: int, noun: str) -> str:
    """Number and noun: ``1 run``, ``2,000 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def graded(value: float, note: float, warning: float) -> Severity:
    """``warning`` from `warning` on, ``note`` from `note` on, else ``ok``."""
    return "warning" if value >= warning else "note" if value >= note else "ok"


def percent(share: float) -> str:
    """A share for people: 0.0712 → ``7.1 %``."""
    value = 100.0 * share
    if abs(value) < 1e-4:
        text = "0"
    elif abs(value) < 0.1:
        text = f"{value:.1g}"
    else:
        text = f"{value:.0f}" if abs(value) >= 20 else f"{value:.1f}".removesuffix(".0")
    return f"{text} %".replace("-", "−")


def brief_ms(value: float) -> str:
    """Milliseconds without the unit, three digits: 34.5, 46, 1234."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text if "e" in text else text.replace("-", "−")
