"""The reader's verbs over arrays, in NumPy: the same numbers as Entry's, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lutest.reader.arguments import MAX_TOKENS, quantile_index
from lutest.reader.batch_arguments import broadcast_arguments, checked_extent, flat_in_shape, positive_budgets
from lutest.reader.curves import KeyPieces
from lutest.reader.errors import ArgumentError, NoDecodeDataError, UnknownKeyError
from lutest.reader.figures import Figures
from lutest.reader.grid import Floats, Ints, deviation_rows, deviation_terms, flatten

__all__ = ["Batch"]

CHUNK = 32_768  # elements at a time, so that what lies between two steps stays in the cache
_KEPT = 4  # scratch arrays that are kept for the next call: fresh memory costs more than the arithmetic in it

_Scratch = tuple[Floats, Ints]
_scratch: list[_Scratch] = []  # taken and given back with pop and append, each atomic


class Batch:
    """`table.batch`: the verbs of `Entry` over arrays of any shapes that broadcast.

    The first argument of each verb is an array of ids from `key_ids`. An id of -1, which `key_ids` gives for unknown
    keys on request, is answered with NaN (`max_output_tokens`: with -1). Results equal those of `Entry` bit for bit.
    Only measured keys have ids, also in a table that was loaded with ``missing="interpolate"``.
    """

    __slots__ = (
        "_all_decode",
        "_correlations",
        "_cube",
        "_deviations",
        "_flats",
        "_has_decode",
        "_keys",
        "_made_of",
        "_median",
        "_own",
        "_prefill",
        "_quantiles",
        "_ratio_before",
        "_sums",
        "_sums_before",
        "_tiers",
        "_typical_prompt",
        "_u",
        "_v",
        "_values_of_axes",
        "_width",
    )

    def __init__(self, figures: Figures, pieces: Sequence[KeyPieces], grid: Floats) -> None:
        self._made_of = figures, pieces, grid
        self._quantiles, self._tiers = figures.quantiles, figures.tiers
        self._median = self._quantiles.index(0.5)
        self._keys = tuple(key.key for key in figures.keys)
        self._flats = flatten(pieces, len(self._quantiles))
        self._width = grid.shape[2]
        flat, size, count = grid.reshape(-1), grid.shape[1] * grid.shape[2], len(self._quantiles)

        def row(number: int, shift: int = 0) -> Floats:
            return flat[number * size - shift : (number + 1) * size - shift]

        # shifted by one element, a row gives at x what it holds at x - 1: n tokens are n - 1 steps
        self._prefill = [row(i) for i in range(count)]
        self._sums, self._sums_before, self._ratio_before = row(count), row(count, 1), row(count + 1, 1)
        self._deviations = {
            i: (row(first), row(first + 1), row(first + 2, 1)) for i, first in deviation_rows(self._quantiles).items()
        }
        self._own = np.array([key.prefill.quantiles_ms for key in figures.keys], dtype=np.float64).T.copy()
        self._correlations = np.array([key.correlations for key in figures.keys], dtype=np.float64).T.copy()
        self._u, self._v = deviation_terms(self._own, self._own[self._median], self._correlations)
        self._typical_prompt = np.array([key.prompt_tokens_p50 for key in figures.keys], dtype=np.int64)
        self._has_decode = np.array([p.step is not None for p in pieces])
        self._all_decode = bool(self._has_decode.all())
        # not np.unique, which brings in numpy.ma at its first call
        top_ks = np.array(sorted({key.top_k for key in self._keys}))
        blocks = np.array(sorted({key.num_blocks for key in self._keys}))
        self._values_of_axes = top_ks, blocks
        # one more place along each axis stands for all values that were not measured
        self._cube = np.full((len(self._tiers) + 1, len(top_ks) + 1, len(blocks) + 1), -1, dtype=np.int64)
        for number, key in enumerate(self._keys):
            place = self._tiers.index(key.tier), np.searchsorted(top_ks, key.top_k)
            self._cube[(*place, np.searchsorted(blocks, key.num_blocks))] = number

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, self._made_of

    def key_ids(
        self,
        tiers: ArrayLike,
        top_ks: ArrayLike,
        num_blocks: ArrayLike,
        missing: Literal["error", "nan"] = "error",
    ) -> Ints:
        """Ids of configurations, for the first argument of the other verbs.

        Parameters
        ----------
        tiers : array_like of str or int
            Names, or indices into the tiers of the table.
        top_ks, num_blocks : array_like of int
            Broadcast against `tiers`.
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
            Arguments of a wrong type, or shapes that do not broadcast.
        """
        if missing not in ("error", "nan"):
            raise ArgumentError(f"missing is {missing!r}; allowed: 'error', 'nan'")
        names = np.asarray(tiers)
        places = self._tier_places(names)
        axes = []
        for name, given, known in zip(
            ("top_ks", "num_blocks"), (top_ks, num_blocks), self._values_of_axes, strict=True
        ):
            value = np.asarray(given)
            if value.dtype.kind not in "iufb":
                raise ArgumentError(f"{name} has dtype {value.dtype}; allowed: numbers")
            place = np.minimum(np.searchsorted(known, value), len(known) - 1)
            axes.append(np.where(known[place] == value, place, len(known)))
        try:
            ids: Ints = self._cube[places, axes[0], axes[1]]
        except IndexError as error:
            raise ArgumentError("tiers, top_ks and num_blocks have shapes that do not broadcast") from error
        if missing == "error" and (ids < 0).any():
            first = int(np.argmax(ids < 0))
            tier, top_k, blocks = (
                np.broadcast_to(np.asarray(a), ids.shape).flat[first] for a in (tiers, top_ks, num_blocks)
            )
            raise UnknownKeyError(
                f"element {first}: tier={tier!s}, top_k={top_k!s}, num_blocks={blocks!s} was not measured; "
                "missing='nan' answers NaN instead"
            )
        return ids

    def _tier_places(self, names: NDArray[Any]) -> Ints:
        count = len(self._tiers)
        if names.dtype.kind in "iu":
            return np.where((names >= 0) & (names < count), names, count).astype(np.int64)
        if names.dtype.kind not in "UTO":
            raise ArgumentError(f"tiers has dtype {names.dtype}; allowed: names or indices of {', '.join(self._tiers)}")
        places = np.full(names.shape, count, dtype=np.int64)
        for place, tier in enumerate(self._tiers):
            places[names == tier] = place
        return places

    def prefill_ms(self, ids: ArrayLike, prompt_tokens: ArrayLike | None = None, q: float = 0.5) -> Floats:
        """As `Entry.prefill_ms`: milliseconds, in the broadcast shape of the arguments."""
        i = quantile_index(self._quantiles, q)
        shape, key, (x,) = broadcast_arguments(ids, {"prompt_tokens": prompt_tokens})
        out = np.empty(key.size)
        for part, known, safe in self._chunks(key):
            prompt = None if x is None else x[part]
            longest = 0 if prompt is None else checked_extent("prompt_tokens", prompt, 0)[1]
            out[part] = self._prefill_of(safe, prompt, longest, i)
            _blank(out[part], known)
        return out.reshape(shape)

    def decode_step_ms(self, ids: ArrayLike, kv_len: ArrayLike, q: float = 0.5) -> Floats:
        """As `Entry.decode_step_ms`: milliseconds, in the broadcast shape of the arguments."""
        i = quantile_index(self._quantiles, q)
        shape, key, (x,) = broadcast_arguments(ids, {"kv_len": kv_len})
        assert x is not None
        out = np.empty(key.size)
        for part, known, safe in self._chunks(key):
            kv = x[part]
            checked_extent("kv_len", kv, 1)
            self._need_decode(safe, known, None)
            out[part] = self._flats.step.value(i, self._flats.step.pieces_at(safe, kv), kv)
            _blank(out[part], known)
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
        self, ids: ArrayLike, budget_ms: ArrayLike, prompt_tokens: ArrayLike | None = None, q: float = 0.5
    ) -> Ints:
        """As `Entry.max_output_tokens`, in the broadcast shape of the arguments; -1 where the id is -1."""
        i = quantile_index(self._quantiles, q)
        budgets = positive_budgets(budget_ms)
        shape, key, (x,) = broadcast_arguments(ids, {"prompt_tokens": prompt_tokens}, budgets.shape)
        budget = flat_in_shape(budgets, shape)
        prompt = x
        answer = np.full(key.size, -1, dtype=np.int64)
        known = np.flatnonzero(key >= 0)
        least = self.prefill_ms(key, prompt, q)
        answer[known] = least[known] <= budget[known]
        open_rows = known[answer[known] == 1]
        self._need_decode(key[open_rows], None, None)

        def fits(rows: Ints, n: Ints) -> NDArray[np.bool_]:
            out = np.empty(rows.size)
            self._fill(key[rows], None if prompt is None else prompt[rows], n, i, out, whole=True)
            fitting: NDArray[np.bool_] = out <= budget[rows]
            return fitting

        low = np.ones(key.size, dtype=np.int64)
        high = np.full(key.size, MAX_TOKENS + 1, dtype=np.int64)
        rows = open_rows
        reach = 2
        while rows.size and reach <= MAX_TOKENS:
            fitting = fits(rows, np.full(rows.size, reach, dtype=np.int64))
            high[rows[~fitting]] = reach
            rows = rows[fitting]
            low[rows] = reach
            reach *= 2
        rows = open_rows
        while rows.size:
            middle = (low[rows] + high[rows]) // 2
            fitting = fits(rows, middle)
            low[rows[fitting]] = middle[fitting]
            high[rows[~fitting]] = middle[~fitting]
            rows = rows[high[rows] - low[rows] > 1]
        answer[open_rows] = low[open_rows]
        return answer.reshape(shape)

    def _prefill_of(self, key: Ints, prompt: Ints | None, longest: int, i: int) -> Floats:
        if prompt is None:
            own: Floats = self._own[i][key]
            return own
        if longest < self._width:
            held: Floats = self._prefill[i][key * self._width + prompt]
            return held
        return self._flats.prefill.value(i, self._flats.prefill.pieces_at(key, prompt), prompt)

    def _runs(
        self, ids: ArrayLike, prompt_tokens: ArrayLike | None, output_tokens: ArrayLike, q: float, whole: bool
    ) -> Floats:
        i = quantile_index(self._quantiles, q)
        tokens = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        shape, key, (prompt, n) = broadcast_arguments(ids, tokens)
        assert n is not None
        out = np.empty(key.size)
        self._fill(key, prompt, n, i, out, whole)
        return out.reshape(shape)

    def _fill(self, key: Ints, prompt: Ints | None, n: Ints, i: int, out: Floats, whole: bool) -> None:
        floats, integers = scratch = _take_scratch()
        for part, known, safe in self._chunks(key):
            start, count = self._typical_prompt[safe] if prompt is None else prompt[part], n[part]
            _, longest_prompt = checked_extent("prompt_tokens", start, 0)
            fewest, most = checked_extent("output_tokens", count, 1)
            self._need_decode(safe, known, count)
            if longest_prompt + most <= self._width:
                size = safe.size
                self._look_up(
                    safe, start, prompt is None, count, i, out[part], whole, floats[:, :size], integers[:, :size]
                )
            else:
                self._compute(safe, start, prompt is None, count, i, out[part], whole)
            if whole and i != self._median and fewest == 1:
                one = np.flatnonzero(count == 1)
                out[part][one] = self._prefill_of(safe[one], None if prompt is None else start[one], longest_prompt, i)
            _blank(out[part], known)
        if len(_scratch) < _KEPT:
            _scratch.append(scratch)

    def _look_up(
        self,
        key: Ints,
        start: Ints,
        own: bool,
        n: Ints,
        i: int,
        out: Floats,
        whole: bool,
        floats: Floats,
        integers: Ints,
    ) -> None:
        """Everything from the grid, in place; the order of operations is that of Entry."""
        row, at = integers
        steps_ms, a, b, c = floats
        np.multiply(key, self._width, out=row)
        np.add(row, start, out=at)
        np.add(row, n, out=row)
        self._sums.take(at, out=a, mode="wrap")  # "wrap": all is checked, and raise would copy
        spread = None
        if whole:
            place = key if own else at
            (self._own if own else self._prefill)[self._median].take(place, out=out, mode="wrap")
        if i != self._median:
            u, v, spread = self._deviations[i]
            if whole:
                (self._u[i] if own else u).take(place, out=b, mode="wrap")
                (self._v[i] if own else v).take(place, out=c, mode="wrap")
        np.add(at, n, out=at)
        self._sums_before.take(at, out=steps_ms, mode="wrap")
        np.subtract(steps_ms, a, out=steps_ms)
        self._ratio_before.take(row, out=a, mode="wrap")
        np.multiply(steps_ms, a, out=a)
        if whole:
            np.add(out, a, out=out)
        else:
            out[:] = a
        if spread is None:
            return
        spread.take(row, out=a, mode="wrap")
        np.multiply(steps_ms, a, out=a)
        if whole:
            np.add(a, b, out=a)
            np.multiply(a, a, out=a)
            np.add(a, c, out=a)
            np.sqrt(a, out=a)
        (np.add if i > self._median else np.subtract)(out, a, out=out)

    def _compute(self, key: Ints, start: Ints, own: bool, n: Ints, i: int, out: Floats, whole: bool) -> None:
        """The same from the pieces, for lengths beyond the grid."""
        prefill, step, ratio = self._flats
        end, steps = start + n - 1, n - 1
        steps_ms = step.sum_to(self._median, step.pieces_at(key, end), end)
        steps_ms -= step.sum_to(self._median, step.pieces_at(key, start), start)
        at_ratio = ratio.pieces_at(key, steps)
        middle = ratio.value(self._median, at_ratio, steps)
        out[:] = steps_ms * middle
        if whole:
            at_prefill = prefill.pieces_at(key, start)
            median = self._own[self._median][key] if own else prefill.value(self._median, at_prefill, start)
            out += median
        if i == self._median:
            return
        deviation = steps_ms * np.abs(ratio.value(i, at_ratio, steps) - middle)
        if whole:
            if own:
                u, v = self._u[i][key], self._v[i][key]
            else:
                u, v = deviation_terms(prefill.value(i, at_prefill, start), median, self._correlations[i][key])
            deviation += u
            deviation *= deviation
            deviation += v
            np.sqrt(deviation, out=deviation)
        (np.add if i > self._median else np.subtract)(out, deviation, out=out)

    def _chunks(self, key: Ints) -> Iterator[tuple[slice, NDArray[np.bool_] | None, Ints]]:
        """Slices of the arrays, which of their ids are known (None: all), and ids with 0 for those that are not."""
        count = len(self._keys)
        size = -(-key.size // max(1, -(-key.size // CHUNK)))  # even ones: a short one costs as many calls
        for first in range(0, key.size, size or 1):
            part = slice(first, first + size)
            ids = key[part]
            if int(np.maximum.reduce(ids.view(np.uint64))) < count:  # unsigned: negative ones are large
                yield part, None, ids
                continue
            wrong = (ids < -1) | (ids >= count)
            if wrong.any():
                raise ArgumentError(f"ids holds {ids[wrong][0]}; allowed: 0 to {count - 1}, and -1 for an unknown key")
            known = ids >= 0
            yield part, known, np.where(known, ids, 0)

    def _need_decode(self, key: Ints, known: NDArray[np.bool_] | None, n: Ints | None) -> None:
        if self._all_decode:
            return
        lacking = ~self._has_decode[key]
        if known is not None:
            lacking &= known
        if n is not None:
            lacking &= n > 1
        if lacking.any():
            first = self._keys[int(key[lacking][0])]
            raise NoDecodeDataError(
                f"tier={first.tier!r}, top_k={first.top_k}, num_blocks={first.num_blocks}: all its runs have one "
                "token, so nothing is known of its decode steps; only output_tokens=1 can be answered"
            )


def _take_scratch() -> _Scratch:
    try:
        return _scratch.pop()
    except IndexError:
        return np.empty((4, CHUNK)), np.empty((2, CHUNK), dtype=np.int64)


def _blank(out: Floats, known: NDArray[np.bool_] | None) -> None:
    if known is not None:
        out[~known] = np.nan
