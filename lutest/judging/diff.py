"""What changed between two tables, configuration by configuration, with intervals that hold together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, Literal, TypeAlias

import numpy as np

from lutest.reader.entry import Entry
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Key, described_key
from lutest.reader.file import EXPORT_ENDING
from lutest.reader.loading import load
from lutest.reader.names import quote
from lutest.reader.table import LatencyTable
from lutest.tablefile.sql import connect, database_errors

TOLERANCE = 0.05
LEVELS = (0.5, 0.95)  # quantiles that are compared
CONFIDENCE = 0.95  # that all intervals hold, half of what it leaves going to the stages as a whole

Verdict = Literal["slower", "faster", "same", "not sure"]


@dataclass(frozen=True)
class Change:
    """One figure in both tables.

    Attributes
    ----------
    stage : str
        ``prefill``, ``decode step`` or ``total``.
    key : tuple or None
        The configuration; None for the geometric mean over all of them.
    q : float
        The quantile.
    prompt_tokens, output_tokens : int or None
        Lengths at which both tables were asked: medians of the old one.
    old_ms, new_ms : float or None
        None for all configurations together.
    n_old, n_new : int
        Runs behind the figures.
    ratio, lower, upper : float
        New over old, with its interval.
    verdict : {"slower", "faster", "same", "not sure"}
        Slower or faster beyond the tolerance, or within it, with all of the interval; else not sure.
    """

    stage: str
    key: Key | None
    q: float
    prompt_tokens: int | None
    output_tokens: int | None
    old_ms: float | None
    new_ms: float | None
    n_old: int
    n_new: int
    ratio: float
    lower: float
    upper: float
    verdict: Verdict


@dataclass(frozen=True)
class Diff:
    """What `diff` found.

    Attributes
    ----------
    old, new : str
        Paths of the tables; empty for those in memory.
    key_columns : tuple of str
    tolerance : float
    changes : tuple of Change
        The surest and largest first: by what part of the change the whole interval holds, then by the change itself.
    only_old, only_new : tuple of tuple
        Configurations that one of the tables lacks.
    """

    old: str
    new: str
    key_columns: tuple[str, ...]
    tolerance: float
    changes: tuple[Change, ...]
    only_old: tuple[Key, ...]
    only_new: tuple[Key, ...]

    @property
    def slower(self) -> tuple[Change, ...]:
        """What got slower beyond the tolerance."""
        return tuple(change for change in self.changes if change.verdict == "slower")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; the key of a change is None for all configurations together."""
        return {
            **vars(self),
            "changes": [
                {**vars(change), "key": change.key and dict(zip(self.key_columns, change.key, strict=True))}
                for change in self.changes
            ],
        }


# part → knots: a length, and the relative standard error of each of the levels, None where it is not known
_Errors: TypeAlias = dict[str, list[tuple[Any, ...]]]
_PARTS = {  # part → table, length, unit
    "prefill": ("prefill_curve", "prompt_tokens", "ms"),
    "decode step": ("decode_curve", "kv_len", "ms"),
    "ratio": ("decode_total", "decode_steps", "ratio"),
}


@dataclass(frozen=True)
class _Figure:
    """A figure of both tables: log of their ratio, its standard error, and what its own runs alone make of that."""

    stage: str
    q: float
    lengths: tuple[int, int]
    ms: tuple[float, float]
    n: tuple[int, int]
    log_ratio: float
    error: float
    alone: float


def diff(
    old: LatencyTable | str | os.PathLike[str],
    new: LatencyTable | str | os.PathLike[str],
    *,
    tolerance: float = TOLERANCE,
) -> Diff:
    """Compare two tables at the same lengths.

    Parameters
    ----------
    old, new : LatencyTable or path
        Tables of the same key columns.
    tolerance : float
        How much slower or faster still counts as the same, as a fraction; 0 or more and below 0.5. Two sessions on the
        same machine differ by a percent or two.

    Returns
    -------
    Diff

    Raises
    ------
    LutestError
        A table cannot be read, they have other key columns or no configuration in common, or the tolerance is not
        allowed.

    Notes
    -----
    Standard errors of prefill and of steps are those of the curves; of a total, those of its parts, as independent of
    each other. Where a table holds none, that of a quantile is √(q (1 - q) / n) over the density there, which is taken
    from the line that P50 and P95 make over normal scores (the asymptotic variance of an order statistic). For all
    configurations together it is the latter where it is larger: what curves borrow from each other is wrong for all of
    them. Intervals are Bonferroni's: as far as these errors are right, with a probability of 95 % none is wrong.
    """
    if not (isinstance(tolerance, int | float) and 0.0 <= tolerance < 0.5):
        raise ArgumentError(f"tolerance is {tolerance!r}; allowed: 0 or more and below 0.5")
    before, after = (table if isinstance(table, LatencyTable) else load(table) for table in (old, new))
    if before.key_columns != after.key_columns:
        columns = " and ".join(", ".join(table.key_columns) for table in (before, after))
        raise ArgumentError(f"the tables have other key columns, {columns}: only the like of each other compare")
    both = [key for key in before.keys if key in after]
    if not both:
        raise ArgumentError(
            "the tables have no configuration in common: the old one has such as "
            f"{described_key(before.figures.key_columns, before.keys[0])}, the new one such as "
            f"{described_key(after.figures.key_columns, after.keys[0])}"
        )
    output = _median_length(before)
    errors = [_held_errors(table) for table in (before, after)]
    figures = {
        key: list(_figures((before[key], after[key]), output, [held.get(key, {}) for held in errors])) for key in both
    }
    changes = [
        *_changes([(None, figure) for figure in _together(figures.values())], tolerance),
        *_changes([(key, figure) for key, held in figures.items() for figure in held], tolerance),
    ]
    return Diff(
        before.path,
        after.path,
        before.key_columns,
        tolerance,
        tuple(sorted(changes, key=lambda change: (-_sure(change), -abs(math.log(change.ratio))))),
        tuple(key for key in before.keys if key not in after),
        tuple(key for key in after.keys if key not in before),
    )


def _median_length(table: LatencyTable) -> int:
    """Median output length of the runs of a table, or of what its curves reach."""
    pairs = sorted(pair for held in table.output_lengths.values() for pair in held)
    middle = sum(n for _, n in pairs) / 2
    for tokens, n in pairs:
        middle -= n
        if middle <= 0:
            return max(tokens, 2)
    return 2


def _held_errors(table: LatencyTable) -> dict[Key, _Errors]:
    """Relative standard errors that a table's file holds; of a table in memory, none."""
    found: dict[Key, _Errors] = {}
    if not Path(table.path).is_file() or table.path.lower().endswith(EXPORT_ENDING):
        return found
    key, width = ", ".join(map(quote, table.key_columns)), len(table.key_columns)
    with connect(table.path) as connection, database_errors(f"{table.path}: cannot be read as a latency table: "):
        for part, (name, at, unit) in _PARTS.items():
            errors = ", ".join(f"p{100 * q:g}_se_{unit} / nullif(p{100 * q:g}_{unit}, 0)" for q in LEVELS)
            rows = connection.execute(f"SELECT {key}, {at}, {errors} FROM {name} ORDER BY {key}, {at}").fetchall()
            for row in rows:
                found.setdefault(row[:width], {}).setdefault(part, []).append(row[width:])
    return found


def _figures(entries: tuple[Entry, Entry], output: int, errors: Sequence[_Errors]) -> Iterator[_Figure]:
    prompt = entries[0]._figures.prompt_tokens_p50
    kv_len = prompt + output // 2
    asked: dict[str, Callable[[Entry, float], float]] = {"prefill": lambda entry, q: entry.prefill_ms(prompt, q)}
    if all(entry.decode_step_p50_ms is not None for entry in entries):
        asked["decode step"] = lambda entry, q: entry.decode_step_ms(kv_len, q)
        asked["total"] = lambda entry, q: entry.total_ms(prompt, output, q)
    for stage, ask in asked.items():
        for place, q in enumerate(LEVELS):
            ms = [ask(entry, q) for entry in entries]
            if min(ms) <= 0.0:
                continue
            n, relative, alone = [], [], []
            for entry, held, value in zip(entries, errors, ms, strict=True):
                n.append(_runs(entry, stage))
                alone.append(_standard_error(ask(entry, 0.5), ask(entry, 0.95), q, n[-1]) / value)
                error = _held_error(entry, held, stage, place, (prompt, kv_len, output - 1))
                relative.append(alone[-1] if error is None else error)
            errors_of = math.hypot(*relative), math.hypot(*alone)
            yield _Figure(stage, q, (prompt, output), (ms[0], ms[1]), (n[0], n[1]), math.log(ms[1] / ms[0]), *errors_of)


def _held_error(entry: Entry, held: _Errors, stage: str, place: int, lengths: tuple[int, int, int]) -> float | None:
    """Relative standard error at a place of the levels, from those of the curves; None where one is not known."""
    parts = dict(zip(_PARTS, lengths, strict=True)) if stage == "total" else {stage: lengths[stage != "prefill"]}
    found = {part: _at(held.get(part, []), at, place) for part, at in parts.items()}
    known = {part: error for part, error in found.items() if error is not None}
    if len(known) < len(found):
        return None
    if stage != "total":
        return known[stage]
    prompt, _, steps = lengths
    prefill_ms, decode_ms = entry.prefill_ms(prompt, LEVELS[place]), entry.decode_ms(prompt, steps + 1, LEVELS[place])
    decode = decode_ms * math.hypot(known["decode step"], known["ratio"])
    return math.hypot(prefill_ms * known["prefill"], decode) / entry.total_ms(prompt, steps + 1, LEVELS[place])


def _at(knots: Sequence[tuple[Any, ...]], length: int, place: int) -> float | None:
    """An error between its knots; beyond them, that of the last one."""
    known = [(at, errors[place]) for at, *errors in knots if errors[place] is not None]
    if not known:
        return None
    lengths, errors = np.array(known, dtype=np.float64).T
    return float(np.interp(length, lengths, errors))


def _runs(entry: Entry, stage: str) -> int:
    decode = entry._figures.decode
    return entry.n if stage == "prefill" or decode is None else decode.n


def _standard_error(p50_ms: float, p95_ms: float, q: float, n: int) -> float:
    """Of a quantile, in milliseconds; of no runs at all, infinite."""
    if n == 0:
        return math.inf
    normal = NormalDist()
    slope = (p95_ms - p50_ms) / normal.inv_cdf(0.95)
    return slope * math.sqrt(q * (1.0 - q) / n) / normal.pdf(normal.inv_cdf(q))


def _together(held: Iterable[Sequence[_Figure]]) -> Iterator[_Figure]:
    """Each stage and quantile over all configurations."""
    groups: dict[tuple[str, float], list[_Figure]] = {}
    for figure in (figure for figures in held for figure in figures):
        groups.setdefault((figure.stage, figure.q), []).append(figure)
    for (stage, q), figures in groups.items():
        n = sum(figure.n[0] for figure in figures), sum(figure.n[1] for figure in figures)
        error = math.hypot(*(max(figure.error, figure.alone) for figure in figures)) / len(figures)
        nowhere = (math.nan, math.nan)
        yield _Figure(stage, q, (0, 0), nowhere, n, fmean(figure.log_ratio for figure in figures), error, error)


def _changes(figures: Sequence[tuple[Key | None, _Figure]], tolerance: float) -> Iterator[Change]:
    """A family of changes, with intervals that all hold with the probability that is left to it."""
    score = NormalDist().inv_cdf(1.0 - (1.0 - CONFIDENCE) / 4 / max(1, len(figures)))
    for key, held in figures:
        wide = score * held.error
        lower, upper = math.exp(held.log_ratio - wide), math.exp(min(held.log_ratio + wide, 700.0))
        prompt, output = held.lengths if key is not None else (None, None)
        old_ms, new_ms = held.ms if key is not None else (None, None)
        ratio = math.exp(held.log_ratio)
        verdict = _verdict(lower, upper, 1.0 + tolerance)
        at = (key, held.q, prompt, None if held.stage == "prefill" else output)
        yield Change(held.stage, *at, old_ms, new_ms, *held.n, ratio, lower, upper, verdict)


def _verdict(lower: float, upper: float, slower: float) -> Verdict:
    if lower > slower:
        return "slower"
    if upper < 1.0 / slower:
        return "faster"
    return "same" if lower >= 1.0 / slower and upper <= slower else "not sure"


def _sure(change: Change) -> float:
    """The part of a change, in logs, that the whole interval holds."""
    return max(math.log(change.lower) if change.lower > 0.0 else -math.inf, -math.log(change.upper), 0.0)
