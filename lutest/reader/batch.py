"""The reader's verbs over arrays, in NumPy: the same numbers as an entry's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lutest.reader.arguments import MAX_TOKENS, key_values, quantile_index
from lutest.reader.arrays import (
    SPAN,
    Floats,
    Ints,
    decode_at,
    deviation,
    flat_level,
    flat_places,
    prefill_at,
    steps_at,
    total_at,
)
from lutest.reader.curves import key_pieces
from lutest.reader.errors import ArgumentError, NoDecodeDataError, UnknownKeyError
from lutest.reader.figures import Figures, Key, described_key
from lutest.reader.lengths import lengths_by_workload, lengths_of
from lutest.reader.over_lengths import ALL, LEAST_MS, MORE, levels_of, mean_of, share_within

_CHUNK = 8192  # elements at a time, so that what lies between two steps stays in the cache
_INDEX_BYTES = 4 << 20  # of the tables from (key, length) to a piece; beyond, lengths are searched for
_LEAST = {"prompt_tokens": 0, "kv_len": 1, "output_tokens": 1}
_Number = TypeVar("_Number", np.float64, np.int64)


class _Request(NamedTuple):
    """Arguments broadcast against each other, checked and laid out flat; unknown keys have the id 0 in `key`."""

    shape: tuple[int, ...]
    key: Ints
    unknown: NDArray[np.bool_]
    tokens: list[Ints | None]


class Batch:
    """`table.batch`: the verbs of `Entry` over arrays of any shapes that broadcast.

    The first argument of each verb is an array of ids from `key_ids`. An id of -1, which `key_ids` gives for unknown
    keys on request, is answered with NaN (`max_output_tokens`: with -1). Results equal those of `Entry` to 1e-12
    relative. Only measured keys have ids, also in a table that was loaded with ``missing="interpolate"``.
    """

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._quantiles, self._median = figures.quantiles, figures.quantiles.index(0.5)
        self._pieces = pieces = [key_pieces(key, self._median) for key in figures.keys]
        self._places = flat_places(pieces, self._median)
        self._levels = [flat_level(figures, pieces, i) for i in range(len(self._quantiles))]
        self._typical_prompt = np.array([key.prompt_tokens_p50 for key in figures.keys], dtype=np.int64)
        self._lengths = lengths_by_workload(figures.output_lengths)
        self._has_decode = np.array([key.step is not None for key in pieces])
        last = max(int((places % SPAN).max()) for places in self._places)
        self._width = max(1, min(last + 1, _INDEX_BYTES // (16 * len(pieces))))
        self._whole_index = last < self._width
        at = SPAN * np.arange(len(pieces))[:, None] + np.arange(self._width)
        self._indices = [_search(places, at).reshape(-1) for places in self._places]

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, (self._figures,)

    def key_ids(self, *values: ArrayLike, missing: Literal["error", "nan"] = "error", **named: ArrayLike) -> Ints:
        """Ids of configurations, for the first argument of the other verbs.

        Parameters
        ----------
        *values, **named : array_like
            The table's key columns, in their order or by their names; they broadcast against each other.
        missing : {"error", "nan"}
            Unknown configurations raise, or have the id -1, which the other verbs answer with NaN.

        Returns
        -------
        ndarray of int64
            Places in ``table.keys``.

        Raises
        ------
        UnknownKeyError
            A configuration that was not measured, unless `missing` is ``"nan"``.
        ArgumentError
            Too few or too many columns, columns of a wrong type, or shapes that do not broadcast.
        """
        if missing not in ("error", "nan"):
            raise ArgumentError(f"missing is {missing!r}; allowed: 'error', 'nan'")
        columns, keys = self._figures.key_columns, [key.key for key in self._figures.keys]
        given = [np.asarray(value) for value in key_values(columns, values, named)]
        for column, array in zip(columns, given, strict=True):
            allowed = "UTO" if column.kind == "category" else "iuf"
            if array.dtype.kind not in allowed and array.size:
                wanted = "names" if column.kind == "category" else "numbers"
                raise ArgumentError(f"{column.name} has dtype {array.dtype}; allowed: {wanted}")
        try:
            shape = np.broadcast_shapes(*(array.shape for array in given))
        except ValueError as error:
            names = ", ".join(column.name for column in columns)
            raise ArgumentError(f"{names} have shapes that do not broadcast") from error
        # from column to column, the number of the values so far among those that keys begin with; -1 once there is none
        ids = np.zeros(shape, dtype=np.int64)
        numbers: dict[Key, int] = {(): 0}
        for place, array in enumerate(given):
            levels = {value: number for number, value in enumerate(dict.fromkeys(key[place] for key in keys))}
            level_of = np.full(array.shape, -1, dtype=np.int64)
            for value, number in levels.items():
                level_of[array == value] = number
            longer: dict[Key, int] = {}
            following = np.full((len(numbers) + 1, len(levels) + 1), -1, dtype=np.int64)
            for key in keys:
                number = longer.setdefault(key[: place + 1], len(longer))
                following[numbers[key[:place]], levels[key[place]]] = number
            ids, numbers = following[ids, level_of], longer
        if missing == "error" and (ids < 0).any():
            first = int(np.argmax(ids < 0))
            wrong = tuple(np.broadcast_to(array, shape).flat[first].item() for array in given)
            raise UnknownKeyError(
                f"element {first}: {described_key(columns, wrong)} was not measured; missing='nan' answers NaN instead"
            )
        return ids

    def prefill_ms(self, ids: ArrayLike, prompt_tokens: ArrayLike | None = None, q: float = 0.5) -> Floats:
        """As `Entry.prefill_ms`: milliseconds, in the broadcast shape of the arguments."""
        i = quantile_index(self._quantiles, q)
        request = self._request(ids, {"prompt_tokens": prompt_tokens})
        (prompt,) = request.tokens

        def answer(part: slice) -> Floats:
            key, x = request.key[part], None if prompt is None else prompt[part]
            middle, apart = self._prefill(i, key, x, None if x is None else self._piece(0, key, x))
            return middle + self._side(i) * apart

        return _filled(request, answer)

    def decode_step_ms(self, ids: ArrayLike, kv_len: ArrayLike, q: float = 0.5) -> Floats:
        """As `Entry.decode_step_ms`: milliseconds, in the broadcast shape of the arguments."""
        i = quantile_index(self._quantiles, q)
        request = self._request(ids, {"kv_len": kv_len})
        (kv,) = request.tokens
        assert kv is not None
        self._need_decode(request, None)
        out = np.full(request.key.size, np.nan)
        for number in sorted(set(request.key.tolist())):
            step = self._pieces[number].step
            if step is not None:  # else only unknown keys stand for it
                chosen = request.key == number
                starts, values, slopes = (np.array(held) for held in (step.starts, step.values[i], step.slopes[i]))
                j = _search(starts, kv[chosen])
                out[chosen] = values[j] + slopes[j] * (kv[chosen] - starts[j])
        return _filled(request, out.__getitem__)

    def decode_ms(
        self, ids: ArrayLike, prompt_tokens: ArrayLike | None, output_tokens: ArrayLike, q: float = 0.5
    ) -> Floats:
        """As `Entry.decode_ms`: milliseconds, in the broadcast shape of the arguments."""
        i = quantile_index(self._quantiles, q)
        request = self._request(ids, {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens})

        def answer(part: slice) -> Floats:
            middle, spread = self._decode(i, request, part)[0]
            return middle + self._side(i) * spread

        self._need_decode(request, request.tokens[1])
        return _filled(request, answer)

    def total_ms(
        self, ids: ArrayLike, prompt_tokens: ArrayLike | None, output_tokens: ArrayLike, q: float = 0.5
    ) -> Floats:
        """As `Entry.total_ms`: milliseconds, in the broadcast shape of the arguments."""
        i = quantile_index(self._quantiles, q)
        return self._totals(i, self._request(ids, {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}))

    def max_output_tokens(
        self, ids: ArrayLike, budget_ms: ArrayLike, prompt_tokens: ArrayLike | None = None, q: float = 0.95
    ) -> Ints:
        """As `Entry.max_output_tokens`, in the broadcast shape of the arguments; -1 where the id is -1."""
        i, budgets = quantile_index(self._quantiles, q), _budgets(budget_ms)
        request = self._request(ids, {"prompt_tokens": prompt_tokens, "output_tokens": 1}, budgets.shape)
        budget = _flat(budgets.astype(np.float64), request.shape)
        prompt, one = request.tokens
        assert one is not None
        low = np.where(request.unknown, -1, (self._totals(i, request).reshape(-1) <= budget).astype(np.int64))
        high = np.full_like(low, MAX_TOKENS + 1)
        rows, reach = np.flatnonzero(low == 1), 1
        while rows.size:
            # twice as far as long as that fits, then between the two by halves
            reach = min(2 * reach, MAX_TOKENS)
            n = np.where(high[rows] > MAX_TOKENS, reach, (low[rows] + high[rows]) // 2)
            tokens = [None if prompt is None else prompt[rows], n]
            part = _Request(rows.shape, request.key[rows], request.unknown[rows], tokens)
            fitting = self._totals(i, part) <= budget[rows]
            low[rows[fitting]], high[rows[~fitting]] = n[fitting], n[~fitting]
            rows = rows[(high[rows] - low[rows] > 1) & (low[rows] < MAX_TOKENS)]
        return low.reshape(request.shape)

    def p_within(
        self,
        ids: ArrayLike,
        budget_ms: ArrayLike,
        prompt_tokens: ArrayLike | None = None,
        workload: str | None = None,
    ) -> Floats:
        """As `Entry.p_within`: probabilities, in the broadcast shape of the arguments."""
        budgets, levels = _budgets(budget_ms), levels_of(self._quantiles)
        request = self._request(ids, {"prompt_tokens": prompt_tokens}, budgets.shape)
        budget = MORE * _flat(budgets.astype(np.float64), request.shape)[:, None]
        within = self._over_lengths(request, workload, lambda part, *total: share_within(levels, budget[part], *total))
        within[within > ALL] = 1.0
        return within

    def expected_total_ms(
        self, ids: ArrayLike, prompt_tokens: ArrayLike | None = None, workload: str | None = None
    ) -> Floats:
        """As `Entry.expected_total_ms`: milliseconds, in the broadcast shape of the arguments."""
        levels = levels_of(self._quantiles)
        request = self._request(ids, {"prompt_tokens": prompt_tokens})
        return self._over_lengths(request, workload, lambda _, *total: mean_of(levels, *total))

    def _over_lengths(
        self, request: _Request, workload: str | None, of_totals: Callable[[slice, Floats, list[Floats]], Floats]
    ) -> Floats:
        """Means over the output lengths of something of totals: of their P50 and deviations from it at the levels."""
        lengths = lengths_of(self._lengths, workload)
        n, shares = np.array(lengths.tokens), np.array(lengths.shares)
        if n[-1] > 1:
            self._need_decode(request, None)

        def answer(part: slice) -> Floats:
            key, (prompt,) = request.key[part, None], request.tokens
            start = self._typical_prompt.take(key) if prompt is None else prompt[part, None]
            end = start + n - 1
            piece, at_end, at_out = (self._piece(curve, key, x) for curve, x in ((0, start), (0, end), (1, n)))
            steps = self._levels[0].steps
            lengths_ms = start.astype(np.float64), end.astype(np.float64)
            steps_ms = steps_at(steps.take(piece, 0), steps.take(at_end, 0), *lengths_ms)
            middle, deviations = np.zeros(0), []
            for i, level in enumerate(self._levels):
                prefill, apart = self._prefill(i, key, None if prompt is None else start, piece)
                decode, spread = decode_at(level.ratio.take(at_out, 0), n.astype(np.float64), steps_ms)
                if i == self._median:
                    middle = prefill + decode
                correlated = level.steps.take(piece, 0)[..., 3]
                deviations.append(self._side(i) * deviation(np.maximum(apart, LEAST_MS), spread, correlated))
            found: Floats = of_totals(part, middle, deviations) @ shares
            return found

        return _filled(request, answer, max(1, _CHUNK // len(n)))

    def _totals(self, i: int, request: _Request) -> Floats:
        def answer(part: slice) -> Floats:
            key, prompt = request.key[part], request.tokens[0]
            decode, piece, correlated = self._decode(i, request, part)
            prefill = self._prefill(i, key, None if prompt is None else prompt[part], piece)
            total: Floats = total_at(prefill, decode, correlated, self._side(i))
            return total

        self._need_decode(request, request.tokens[1])
        return _filled(request, answer)

    def _decode(self, i: int, request: _Request, part: slice) -> tuple[tuple[Floats, Floats], Ints, Floats]:
        """Median of decode and distance of its quantile; the prompts' pieces; twice the correlation with prefill."""
        key, (prompt, tokens) = request.key[part], request.tokens
        assert tokens is not None
        level, n = self._levels[i], tokens[part]
        start = self._typical_prompt.take(key) if prompt is None else prompt[part]
        end = start + n - 1
        piece, at_end, at_out = (self._piece(curve, key, x) for curve, x in ((0, start), (0, end), (1, n)))
        rows = level.steps.take(piece, 0)
        steps_ms = steps_at(rows, level.steps.take(at_end, 0), start.astype(np.float64), end.astype(np.float64))
        return decode_at(level.ratio.take(at_out, 0), n.astype(np.float64), steps_ms), piece, rows[:, 3]

    def _prefill(self, i: int, key: Ints, prompt: Ints | None, piece: Ints | None) -> tuple[Floats, Floats]:
        if prompt is None:
            own = self._levels[i].own.take(key, 0)
            return own[..., 0], own[..., 1]
        found: tuple[Floats, Floats] = prefill_at(self._levels[i].prefill.take(piece, 0), prompt.astype(np.float64))
        return found

    def _piece(self, curve: int, key: Ints, x: Ints) -> Ints:
        """Pieces of lengths, of the curves over the tokens that are held (0) or that come out (1)."""
        if not self._whole_index and x.max(initial=0) >= self._width:
            return _search(self._places[curve], key * SPAN + x)
        return self._indices[curve].take(key * self._width + np.minimum(x, self._width - 1))

    def _side(self, i: int) -> float:
        return float((i > self._median) - (i < self._median))

    def _request(self, ids: ArrayLike, tokens: Mapping[str, ArrayLike | None], like: tuple[int, ...] = ()) -> _Request:
        keys, count = np.asarray(ids), len(self._has_decode)
        if keys.dtype.kind not in "iu":
            raise ArgumentError(f"ids has dtype {keys.dtype}; allowed: the integers that key_ids gives")
        for extreme in (keys.min(initial=0), keys.max(initial=0)):
            if not -1 <= extreme < count:
                raise ArgumentError(f"ids holds {extreme}; allowed: 0 to {count - 1}, and -1 for an unknown key")
        given = [None if value is None else _whole_numbers(name, value) for name, value in tokens.items()]
        shapes = [keys.shape, *(array.shape for array in given if array is not None), like]
        try:
            shape = np.broadcast_shapes(*shapes)
        except ValueError as error:
            listed = ", ".join(map(str, shapes))
            raise ArgumentError(f"the arguments have shapes that do not broadcast: {listed}") from error
        key = _flat(keys.astype(np.int64, copy=False), shape)
        unknown = key < 0
        flat = [array if array is None else _flat(array, shape) for array in given]
        return _Request(shape, np.maximum(key, 0) if unknown.any() else key, unknown, flat)

    def _need_decode(self, request: _Request, n: Ints | None) -> None:
        if self._has_decode.all():
            return
        lacking = ~request.unknown & ~self._has_decode[request.key]
        if n is not None:
            lacking &= n > 1
        if lacking.any():
            first = self._figures.keys[int(request.key[lacking][0])].key
            raise NoDecodeDataError(
                f"{described_key(self._figures.key_columns, first)}: all its runs have one token, so nothing is known "
                "of its decode steps; only output_tokens=1 can be answered"
            )


def _filled(request: _Request, answer: Callable[[slice], Floats], at_once: int = _CHUNK) -> Floats:
    """The answers part by part, NaN for unknown keys, in the shape of the request."""
    out = np.empty(request.key.size)
    for first in range(0, out.size, at_once):
        out[first : first + at_once] = answer(slice(first, first + at_once))
    out[request.unknown] = np.nan
    return out.reshape(request.shape)


def _search(places: Ints, at: Ints) -> Ints:
    """Piece that a length is in."""
    found: Ints = np.searchsorted(places, at, side="right") - 1
    return found


def _budgets(budget_ms: ArrayLike) -> NDArray[Any]:
    budgets = np.asarray(budget_ms)
    if budgets.dtype.kind not in "iuf" or not ((budgets > 0) & (budgets < np.inf)).all():
        raise ArgumentError(f"budget_ms holds {budgets.tolist()!r:.60}; allowed: finite milliseconds above 0")
    return budgets


def _flat(array: NDArray[_Number], shape: tuple[int, ...]) -> NDArray[_Number]:
    return np.ascontiguousarray(np.broadcast_to(array, shape)).reshape(-1)


def _whole_numbers(name: str, value: ArrayLike) -> Ints:
    array = np.asarray(value)
    if array.dtype.kind not in "iubf" and array.size:
        raise ArgumentError(f"{name} has dtype {array.dtype}; allowed: whole numbers")
    least = _LEAST[name]
    if array.size and not (array.min() >= least and array.max() <= MAX_TOKENS):
        _refuse_tokens(name, array, ~((array >= least) & (array <= MAX_TOKENS)))
    if array.dtype.kind == "f":
        _refuse_tokens(name, array, array != np.floor(array))
    return array.astype(np.int64, copy=False)


def _refuse_tokens(name: str, array: NDArray[Any], wrong: NDArray[np.bool_]) -> None:
    if wrong.any():
        allowed = f"whole numbers from {_LEAST[name]} to {MAX_TOKENS}"
        raise ArgumentError(f"{name} holds {array[wrong].flat[0]}; allowed: {allowed}")
