"""What a table says of one configuration, as plain values: what a file is read into and estimates are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

# A configuration: its values, in the order of the table's key columns.
Key: TypeAlias = tuple[str | int | float, ...]


# A configuration is taken for known from the least prompt length of its runs over this, up to the largest times this.
REACH = 2.0


class Unchanging:
    """Whatever is set in ``__init__``, up to `_made`, stays as it is."""

    _made = False

    def __setattr__(self, name: str, value: object) -> None:
        if self._made:
            raise AttributeError(f"{type(self).__name__} cannot be changed: {name}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed: {name}")


class KeyColumn(NamedTuple):
    """One of the columns that make up a configuration.

    Attributes
    ----------
    name : str
    kind : {"category", "number"}
        Whether its values are levels, or places on an axis.
    type : {"VARCHAR", "BIGINT", "DOUBLE"}
        How the file stores it: categories as text, numbers as ``BIGINT`` where all of them are whole.
    """

    name: str
    kind: Literal["category", "number"]
    type: Literal["VARCHAR", "BIGINT", "DOUBLE"]


def described_key(columns: Sequence[KeyColumn], key: Key) -> str:
    """A configuration for people: ``tier='low', top_k=8, num_blocks=16``."""
    return ", ".join(f"{column.name}={value!r}" for column, value in zip(columns, key, strict=False))


@dataclass(frozen=True)
class Summary:
    """One figure per quantile for a stage, all lengths together."""

    n: int
    quantiles_ms: tuple[float, ...]
    p95_upper_ms: float | None
    mean_ms: float


@dataclass(frozen=True)
class Curve:
    """Knots of a piecewise-linear latency curve.

    Attributes
    ----------
    at : tuple of int
        Knots (prompt_tokens or kv_len), strictly increasing.
    values_ms : tuple of tuple of float
        ``values_ms[i][j]``: the i-th quantile of the table at the j-th knot.
    n : tuple of int
        Observations behind each knot.
    source : tuple of str
        ``measured``, ``interpolated`` or ``extrapolated`` for each knot.
    """

    at: tuple[int, ...]
    values_ms: tuple[tuple[float, ...], ...]
    n: tuple[int, ...]
    source: tuple[str, ...]


@dataclass(frozen=True)
class TotalRatios:
    """Quantiles of decode_ms over the sum of its P50 steps, by number of steps (knots `decode_steps`)."""

    decode_steps: tuple[int, ...]
    ratios: tuple[tuple[float, ...], ...]
    n: tuple[int, ...]


@dataclass(frozen=True)
class FillError:
    """How far off figures are that were filled in from other configurations.

    Attributes
    ----------
    prefill, decode_step : float or None
        Root mean square of the relative difference between the plain P50 of each measured configuration of the tier
        and what the others would give for it (leave one key out); None with fewer than two of them.
    """

    prefill: float | None
    decode_step: float | None


@dataclass(frozen=True)
class KeyFigures:
    """Everything that a table says of one configuration; the decode parts are None where no run had a step.

    `vision_tokens_p50` is what it adds to a text, None where its runs do not hold the two apart. `mixed` names the
    models and devices whose runs the table mixes, where somebody asked for that.
    """

    key: Key
    prefill: Summary
    prompt_tokens_p50: int
    prompt_tokens_min: int
    prompt_tokens_max: int
    vision_tokens_p50: int | None
    prefill_curve: Curve
    decode: Summary | None
    n_decode_steps: int
    decode_curve: Curve | None
    decode_total: TotalRatios | None
    correlations: tuple[float, ...]
    source: str = "measured"
    fill_error: FillError | None = None
    mixed: str = ""

    @property
    def reach(self) -> tuple[float, float]:
        """Least and largest prompt length that searches and rewards take an answer for."""
        return self.prompt_tokens_min / REACH, self.prompt_tokens_max * REACH

    def out_of_reach(self, prompt_tokens: int) -> str:
        """What is wrong with a prompt length beyond `reach`, and how to ask instead."""
        short = prompt_tokens < self.prompt_tokens_min
        measured = f"{self.prompt_tokens_min} to {self.prompt_tokens_max}"
        instead = "" if self.vision_tokens_p50 is None else f", or give the text alone, text_tokens={prompt_tokens}"
        return (
            f"prompt_tokens={prompt_tokens} is {'less than half' if short else 'more than twice'} of what it was "
            f"measured at, {measured}: prompt_tokens counts vision and text, and each configuration takes its own"
            + (instead if short else "; measure such lengths")
        )


@dataclass(frozen=True)
class Quality:
    """Accuracy of one configuration on one workload."""

    key: Key
    workload: str
    n: int
    accuracy: float
    lower: float | None
    upper: float | None


@dataclass(frozen=True)
class Figures:
    """A whole table in memory.

    Attributes
    ----------
    quantiles : tuple of float
        Levels that the table holds, increasing; 0.5 and 0.95 are among them.
    key_columns : tuple of KeyColumn
        What a configuration is made of.
    keys : tuple of KeyFigures
        Ordered by their keys.
    output_lengths : dict
        workload → ((output_tokens, n), …), increasing in output_tokens.
    meta : dict
        The rows of ``meta``.
    """

    quantiles: tuple[float, ...]
    key_columns: tuple[KeyColumn, ...]
    keys: tuple[KeyFigures, ...]
    output_lengths: dict[str, tuple[tuple[int, int], ...]]
    qualities: tuple[Quality, ...]
    meta: dict[str, str]
