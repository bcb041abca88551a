"""The reader's verbs over arrays, in NumPy: the same numbers as an entry's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lutest.reader.arguments import MAX_TOKENS, key_values, quantile_index
from lutest.reader.arrays import SPAN, Floats, Ints, Level, decode_at, flat_level, flat_places, prefill_at, total_at
from lutest.reader.curves import key_pieces
from lutest.reader.errors import ArgumentError, NoDecodeDataError, UnknownKeyError
from lutest.reader.figures import Figures, Key, described_key

_CHUNK = 8192  # elements at a time, so that what lies between two steps stays in the cache
_INDEX_BYTES = 4 << 20  # of the tables from (key, length) to a piece; longer lengths are searched for
_Number = TypeVar("_Number", np.float64, np.int64)
_Part = tuple[slice, Ints, NDArray[np.bool_] | None]


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
        self._has_decode = np.array([key.step is not None for key in pieces])
        self._width = max(1, min(2048, _INDEX_BYTES // (16 * len(pieces))))
        at = SPAN * np.arange(len(pieces))[:, None] + np.arange(self._width)
        self._held_index, self._out_index = (_search(places, at).reshape(-1) for places in self._places)

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
        shape, key, (prompt,) = _broadcast(ids, {"prompt_tokens": prompt_tokens})
        out = np.empty(key.size)
        for part, safe, unknown in self._parts(key):
            middle, apart = self._prefill(self._levels[i], safe, None if prompt is None else prompt[part])
            out[part] = middle + self._side(i) * apart
            _blank(out[part], unknown)
        return out.reshape(shape)

    def decode_step_ms(self, ids: ArrayLike, kv_len: ArrayLike, q: float = 0.5) -> Floats:
        """As `Entry.decode_step_ms`: milliseconds, in the broadcast shape of the arguments."""
        i = quantile_index(self._quantiles, q)
        shape, key, (kv,) = _broadcast(ids, {"kv_len": kv_len})
        assert kv is not None
        _check_lengths("kv_len", kv, 1)
        out = np.full(key.size, np.nan)
        self._need_decode(key, None)
        for number in sorted(set(key[key >= 0].tolist())):
            step, chosen = self._pieces[number].step, key == number
            assert step is not None
            starts, values, slopes = (np.array(held) for held in (step.starts, step.values[i], step.slopes[i]))
            j = _search(starts, kv[chosen])
            out[chosen] = values[j] + slopes[j] * (kv[chosen] - starts[j])
        return out.reshape(shape)

    def decode_ms(
        self, ids: ArrayLike, prompt_tokens: ArrayLike | None, output_tokens: ArrayLike, q: float = 0.5
    ) -> Floats:
        """As `Entry.decode_ms`: milliseconds, in the broadcast shape of the arguments."""
        return self._runs(ids, prompt_tokens, output_tokens, q, whole=False)

    def total_ms(
        self, ids: ArrayLike, prompt_tokens: ArrayLike | None, output_tokens: ArrayLike, q: float = 0.5
    ) -> Floats:
        """As `Entry.total_ms`: milliseconds, in the broadcast shape of the arguments."""
        return self._runs(ids, prompt_tokens, output_tokens, q, whole=True)

    def max_output_tokens(
        self, ids: ArrayLike, budget_ms: ArrayLike, prompt_tokens: ArrayLike | None = None, q: float = 0.95
    ) -> Ints:
        """As `Entry.max_output_tokens`, in the broadcast shape of the arguments; -1 where the id is -1."""
        i = quantile_index(self._quantiles, q)
        budgets = _positive("budget_ms", budget_ms)
        shape, key, (prompt,) = _broadcast(ids, {"prompt_tokens": prompt_tokens}, budgets.shape)
        budget = _flat(budgets, shape)
        answer = np.full(key.size, -1, dtype=np.int64)
        known = np.flatnonzero(key >= 0)
        one_ms = self._run_totals(key, prompt, np.ones_like(key), i, whole=True)
        answer[known] = (one_ms <= budget)[known]
        rows = opened = known[answer[known] == 1]
        self._need_decode(key[opened], None)

        def fits(rows: Ints, n: Ints) -> NDArray[np.bool_]:
            totals = self._run_totals(key[rows], None if prompt is None else prompt[rows], n, i, whole=True)
            return totals <= budget[rows]

        low, high = np.ones(key.size, dtype=np.int64), np.full(key.size, MAX_TOKENS + 1, dtype=np.int64)
        reach = 2
        while rows.size and reach <= MAX_TOKENS:
            fitting = fits(rows, np.full(rows.size, reach, dtype=np.int64))
            high[rows[~fitting]] = reach
            rows = rows[fitting]
            low[rows] = reach
            reach *= 2
        rows = opened
        while rows.size:
            middle = (low[rows] + high[rows]) // 2
            fitting = fits(rows, middle)
            low[rows[fitting]] = middle[fitting]
            high[rows[~fitting]] = middle[~fitting]
            rows = rows[high[rows] - low[rows] > 1]
        answer[opened] = low[opened]
        return answer.reshape(shape)

    def _runs(
        self, ids: ArrayLike, prompt_tokens: ArrayLike | None, output_tokens: ArrayLike, q: float, whole: bool
    ) -> Floats:
        i = quantile_index(self._quantiles, q)
        tokens = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        shape, key, (prompt, n) = _broadcast(ids, tokens)
        assert n is not None
        return self._run_totals(key, prompt, n, i, whole).reshape(shape)

    def _run_totals(self, key: Ints, prompt: Ints | None, n: Ints, i: int, whole: bool) -> Floats:
        level, side, out = self._levels[i], self._side(i), np.empty(key.size)
        for part, safe, unknown in self._parts(key):
            start, count = self._typical_prompt[safe] if prompt is None else prompt[part], n[part]
            longest_prompt = _check_lengths("prompt_tokens", start, 0)
            most = _check_lengths("output_tokens", count, 1)
            self._need_decode(key[part], count)
            end = start + count
            end -= 1
            indexed = max(longest_prompt + most, most + 1) <= self._width
            pieces = (
                self._pieces_of(self._held_index, self._places.held, safe, start, indexed),
                self._pieces_of(self._held_index, self._places.held, safe, end, indexed),
                self._pieces_of(self._out_index, self._places.out, safe, count, indexed),
            )
            lengths = start.astype(np.float64), end.astype(np.float64), count.astype(np.float64)
            middle, spread = decode_at(level, pieces, lengths)
            if whole:
                prefill = (
                    prefill_at(level, pieces[0], lengths[0])
                    if prompt is not None
                    else (level.own.take(safe), level.own_apart.take(safe))
                )
                out[part] = total_at(prefill, (middle, spread), level.correlated.take(safe), side)
            else:
                spread *= side
                middle += spread
                out[part] = middle
            _blank(out[part], unknown)
        return out

    def _prefill(self, level: Level, key: Ints, prompt: Ints | None) -> tuple[Floats, Floats]:
        if prompt is None:
            return level.own.take(key), level.own_apart.take(key)
        indexed = _check_lengths("prompt_tokens", prompt, 0) < self._width
        piece = self._pieces_of(self._held_index, self._places.held, key, prompt, indexed)
        found: tuple[Floats, Floats] = prefill_at(level, piece, prompt.astype(np.float64))
        return found

    def _pieces_of(self, index: Ints, places: Ints, key: Ints, x: Ints, indexed: bool) -> Ints:
        if not indexed:
            return _search(places, key * SPAN + x)
        at = key * self._width
        at += x
        return index.take(at)

    def _side(self, i: int) -> float:
        return float((i > self._median) - (i < self._median))

    def _parts(self, key: Ints) -> Iterator[_Part]:
        """Slices of the arrays, with ids of which those that are unknown are 0, and which these are (None: none)."""
        count = len(self._has_decode)
        for first in range(0, key.size, _CHUNK):
            part = slice(first, first + _CHUNK)
            ids = key[part]
            if int(np.maximum.reduce(ids.view(np.uint64))) < count:  # unsigned: negative ones are large
                yield part, ids, None
                continue
            wrong = (ids < -1) | (ids >= count)
            if wrong.any():
                raise ArgumentError(f"ids holds {ids[wrong][0]}; allowed: 0 to {count - 1}, and -1 for an unknown key")
            unknown = ids < 0
            yield part, np.where(unknown, 0, ids), unknown

    def _need_decode(self, key: Ints, n: Ints | None) -> None:
        if self._has_decode.all():
            return
        lacking = (key >= 0) & ~self._has_decode[key]
        if n is not None:
            lacking &= n > 1
        if lacking.any():
            first = self._figures.keys[int(key[lacking][0])].key
            raise NoDecodeDataError(
                f"{described_key(self._figures.key_columns, first)}: all its runs have one token, so nothing is known "
                "of its decode steps; only output_tokens=1 can be answered"
            )


def _search(places: Ints, at: Ints) -> Ints:
    """Piece that a length is in; before the first one, that."""
    found: Ints = np.searchsorted(places, at, side="right") - 1
    return found


def _blank(out: Floats, unknown: NDArray[np.bool_] | None) -> None:
    if unknown is not None:
        out[unknown] = np.nan


def _broadcast(
    ids: ArrayLike, tokens: Mapping[str, ArrayLike | None], like: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], Ints, list[Ints | None]]:
    """The broadcast shape, and ids and tokens in it: flat, contiguous, int64; None stays None."""
    keys = np.asarray(ids)
    if keys.dtype.kind not in "iu":
        raise ArgumentError(f"ids has dtype {keys.dtype}; allowed: the integers that key_ids gives")
    given = [None if value is None else _whole_numbers(name, value) for name, value in tokens.items()]
    shapes = [keys.shape, *(array.shape for array in given if array is not None), like]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError as error:
        listed = ", ".join(map(str, shapes))
        raise ArgumentError(f"the arguments have shapes that do not broadcast: {listed}") from error
    flat = [array if array is None else _flat(array, shape) for array in given]
    return shape, _flat(keys.astype(np.int64, copy=False), shape), flat


def _flat(array: NDArray[_Number], shape: tuple[int, ...]) -> NDArray[_Number]:
    return np.ascontiguousarray(np.broadcast_to(array, shape)).reshape(-1)


def _whole_numbers(name: str, value: ArrayLike) -> Ints:
    array = np.asarray(value)
    if array.dtype.kind in "iub" or array.size == 0:
        return array.astype(np.int64, copy=False)
    if array.dtype.kind != "f":
        raise ArgumentError(f"{name} has dtype {array.dtype}; allowed: whole numbers")
    wrong = ~((np.abs(array) <= MAX_TOKENS) & (array == np.floor(array)))
    if wrong.any():
        raise ArgumentError(f"{name} holds {array[wrong].flat[0]}; allowed: whole numbers up to {MAX_TOKENS}")
    return array.astype(np.int64)


def _positive(name: str, value: ArrayLike) -> Floats:
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf":
        raise ArgumentError(f"{name} has dtype {numbers.dtype}; allowed: numbers")
    numbers = numbers.astype(np.float64)
    wrong = ~((numbers > 0.0) & (numbers < np.inf))
    if wrong.any():
        raise ArgumentError(f"{name} holds {numbers[wrong].flat[0]}; allowed: finite milliseconds above 0")
    return numbers


def _check_lengths(name: str, x: Ints, least: int) -> int:
    """Largest of some lengths, checked."""
    # as unsigned, negative numbers are large: where 0 is allowed, one pass finds both ends
    low = int(np.minimum.reduce(x, initial=least)) if least else 0
    high = int(np.maximum.reduce(x.view(np.uint64), initial=0))
    if low < least or high > MAX_TOKENS:
        wrong = x[(x < least) | (x > MAX_TOKENS)]
        raise ArgumentError(f"{name} holds {wrong[0]}; allowed: whole numbers from {least} to {MAX_TOKENS}")
    return high
