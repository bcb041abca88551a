"""The recorder: runs timed in one pass and kept, whatever becomes of the session."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from lutest.profile.machine import Clock, clock_record, device_name, make_clock, software
from lutest.profile.shards import RunStore
from lutest.reader.arguments import whole_number
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Key

_OVERHEAD_ROUNDS = 21
_OVERHEAD_STEPS = 200

_LENGTHS = ("prompt_tokens", "vision_tokens", "text_tokens")
_MOST_TOKENS = 2**31 - 1
_PAUSE, _VISION, _PREFILL, _STEP = range(4)

_Key = TypeVar("_Key", bound=Key)


@dataclass(frozen=True)
class StageTimes:
    """Times of a run in milliseconds.

    Attributes
    ----------
    vision_ms : float
        The vision tower; part of `prefill_ms`.
    prefill_ms : float
        Everything up to the first token, the vision tower included.
    decode_steps_ms : list of float
        Each decode step.
    total_ms : float
        From the beginning of the first stage to the end of the last one, what lies between stages included.
    """

    vision_ms: float
    prefill_ms: float
    decode_steps_ms: list[float]
    total_ms: float


class _Stage:
    """Context manager of one kind of stage."""

    __slots__ = ("_kind", "_mark", "_marks")

    def __init__(self, run: Run, kind: int) -> None:
        self._kind = kind
        self._mark = run._clock.mark
        self._marks = run._marks

    def __enter__(self) -> None:
        self._marks.append((self._kind, self._mark()))

    def __exit__(self, *_: object) -> None:
        self._marks.append((_PAUSE, self._mark()))


class Run:
    """A run that is being timed; made by `Recorder.run`.

    Enclose the stages in ``with run.vision():``, ``with run.prefill():`` and, for each token after the first one,
    ``with run.step():``. A token belongs to the stage whose forward pass it comes from, sampling included. Where
    stages cannot be enclosed, `begin_vision`, `begin_prefill` and `begin_step` each begin a stage that lasts until the
    next one begins or `end` is called.

    Attributes
    ----------
    prompt_tokens, vision_tokens, text_tokens : int or None
        Lengths, which may be set until the run ends; `prompt_tokens` is the sum of the other two if left out.
    ends_with_eos : bool or None
        Whether the last token is an end of sequence.
    warmup : bool
        Whether the run is a warm-up, which is timed but not recorded.
    times : StageTimes or None
        Set when the run has ended.
    """

    def __init__(self, clock: Clock, *, warmup: bool = False) -> None:
        self.prompt_tokens: int | None = None
        self.vision_tokens: int | None = None
        self.text_tokens: int | None = None
        self.ends_with_eos: bool | None = None
        self.warmup = warmup
        self.times: StageTimes | None = None
        self._clock = clock
        self._marks: list[tuple[int, Any]] = []
        self._vision = _Stage(self, _VISION)
        self._prefill = _Stage(self, _PREFILL)
        self._step = _Stage(self, _STEP)

    def vision(self) -> _Stage:
        """Context manager for the vision tower."""
        return self._vision

    def prefill(self) -> _Stage:
        """Context manager for projector and language model up to the first token."""
        return self._prefill

    def step(self) -> _Stage:
        """Context manager for one decode step."""
        return self._step

    def begin_vision(self) -> None:
        """Begin the vision stage, which ends any other one."""
        self._vision.__enter__()

    def begin_prefill(self) -> None:
        """Begin or go on with the prefill, which ends any other stage."""
        self._prefill.__enter__()

    def begin_step(self) -> None:
        """Begin a decode step, which ends any other stage."""
        self._step.__enter__()

    def end(self) -> None:
        """End the stage that was begun last."""
        self._marks.append((_PAUSE, self._clock.mark()))

    def finish(self) -> StageTimes:
        """Times of all stages.

        Raises
        ------
        ArgumentError
            The stages overlap, there is no prefill, or a step comes before it.
        """
        marks = self._marks
        kinds = [kind for kind, _ in marks]
        _check_order(kinds)
        at = self._clock.milliseconds([mark for _, mark in marks])
        lasted: dict[int, list[float]] = {kind: [] for kind in (_PAUSE, _VISION, _PREFILL, _STEP)}
        for kind, start, stop in zip(kinds, at, at[1:], strict=False):
            lasted[kind].append(round(stop - start, 6))
        vision, prefill = lasted[_VISION], [*lasted[_VISION], *lasted[_PREFILL]]
        self.times = StageTimes(round(sum(vision), 6), round(sum(prefill), 6), lasted[_STEP], round(at[-1], 6))
        return self.times


def _check_order(kinds: Sequence[int]) -> None:
    if _PREFILL not in kinds:
        raise ArgumentError("a run without a prefill: enclose it in `with run.prefill():`")
    if kinds[0] == _PAUSE or (_PAUSE, _PAUSE) in pairwise(kinds):
        raise ArgumentError("stages of a run overlap: end each one before the next one begins")
    if kinds[-1] != _PAUSE:
        raise ArgumentError("the last stage of a run has not ended")
    decode = kinds[kinds.index(_STEP) :] if _STEP in kinds else []
    if _VISION in decode or _PREFILL in decode:
        raise ArgumentError("a decode step comes before the end of prefill: the first token comes out of prefill")


class Recorder:
    """Records timed runs in a folder of Parquet shards, which `lutest.build` and `lutest.convert` read as they are.

    A session that was interrupted, killed even, goes on where it stopped when the recorder is opened again on the same
    folder: `plan` leaves out what is there.

    Parameters
    ----------
    folder : path
        Where the runs go.
    model : str
        What was profiled.
    key_columns : sequence of str
        What a configuration is made of, such as ``("gpu", "users")``; runs have the values under these names.
    device : str, optional
        What it ran on; the name of the CPU if left out.
    workload : str, optional
        What the requests were.
    synchronization : {"none", "synchronize", "events"}
        How stages are timed; see `make_clock`. On a CUDA device ``none`` would time how long it takes to ask for the
        work, not how long the work takes.
    settings : mapping, optional
        What else must be the same in all sessions of this folder, such as sizes and seeds.
    runs_per_shard : int
        Runs in one Parquet file.

    Attributes
    ----------
    step_overhead_us : float
        What recording adds to a decode step, in microseconds: the cost of an empty step, measured at the beginning.
    n_recorded, n_warmup : int
        Runs of this session.

    Raises
    ------
    LutestError
        The folder cannot be written or is in use, was begun with other settings, or the clock is not to be had.

    Examples
    --------
    >>> with Recorder("results/mine", model="my model") as recorder:  # doctest: +SKIP
    ...     for key, sample_id in recorder.plan([("low", 4, 12), ("low", 8, 16)], runs_per_key=100):
    ...         with recorder.run(key, sample_id=sample_id, prompt_tokens=64) as run:
    ...             with run.prefill():
    ...                 token = prefill()
    ...             while not is_end(token):
    ...                 with run.step():
    ...                     token = decode(token)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: str,
        key_columns: Sequence[str] = ("tier", "top_k", "num_blocks"),
        device: str | None = None,
        workload: str | None = None,
        synchronization: str = "none",
        settings: Mapping[str, object] | None = None,
        runs_per_shard: int = 64,
    ) -> None:
        if runs_per_shard < 1:
            raise ArgumentError(f"runs_per_shard is {runs_per_shard}; it must be at least 1")
        self._clock = make_clock(synchronization)
        self.step_overhead_us = round(measure_step_overhead(self._clock), 4)
        self.n_recorded = 0
        self.n_warmup = 0
        self._store = RunStore(Path(folder), key_columns, {"model": model, **(settings or {})}, runs_per_shard)
        self._constants = {
            "workload": workload,
            "device": device or device_name(),
            "model": model,
            "software": software(),
            "synchronization": synchronization,
            "step_overhead_us": self.step_overhead_us,
            "session": uuid.uuid4().hex[:12],
        }
        try:
            self._store.begin_session({"started_at": _now(), **self._constants, **clock_record()})
        except BaseException:
            self._store.close()
            raise

    def plan(self, keys: Sequence[_Key], runs_per_key: int, *, seed: int = 0) -> list[tuple[_Key, int]]:
        """Runs still to do, configurations interleaved in random order: (key, sample_id) each.

        Parameters
        ----------
        keys : sequence of tuple
            Configurations, each in the order of the key columns.
        runs_per_key : int
            Runs that each of them is to have in all sessions together.
        seed : int
            Of the random order; the same seed gives the same order.
        """
        for key in keys:
            self._store.checked_key(key)
        runs = interleave(keys, runs_per_key, seed)
        return [(key, sample_id) for key, sample_id in runs if (*key, sample_id) not in self._store.recorded]

    @contextlib.contextmanager
    def run(
        self,
        key: Key,
        *,
        sample_id: int | None = None,
        prompt_tokens: int | None = None,
        vision_tokens: int | None = None,
        text_tokens: int | None = None,
        warmup: bool = False,
    ) -> Iterator[Run]:
        """Time one run; it is kept when the block is left without an exception.

        Parameters
        ----------
        key : tuple
            The configuration, in the order of the key columns.
        sample_id : int, optional
            Number of the run within its configuration; the next free one if left out.
        prompt_tokens, vision_tokens, text_tokens : int, optional
            Tokens in the KV cache after prefill; may also be set on the run. The number of output tokens needs no
            telling: it is one more than the decode steps.
        warmup : bool
            Time it, but leave it out of the runs: the first runs pay for allocation and cold caches.

        Raises
        ------
        ArgumentError
            The key, `sample_id` or a length is none that could be stored (before anything is timed), the run is there
            already, its stages overlap, or its length is missing.
        """
        key = self._store.checked_key(key)
        if not warmup:
            sample_id = self._free_sample_id(key, sample_id)
        run = Run(self._clock, warmup=warmup)
        run.prompt_tokens, run.vision_tokens, run.text_tokens = prompt_tokens, vision_tokens, text_tokens
        _set_plain(run)
        started_at = _now()
        yield run
        times = run.finish()
        _set_plain(run)
        if run.prompt_tokens is None:
            if run.vision_tokens is None or run.text_tokens is None:
                raise ArgumentError("a run needs prompt_tokens, or vision_tokens and text_tokens")
            run.prompt_tokens = run.vision_tokens + run.text_tokens
        if warmup:
            self.n_warmup += 1
            return
        self._store.append(
            {
                "sample_id": sample_id,
                **dict(zip(self._store.key_columns, key, strict=True)),
                **{name: getattr(run, name) for name in (*_LENGTHS, "ends_with_eos")},
                "output_tokens": len(times.decode_steps_ms) + 1,
                **vars(times),
                "decode_ms": round(sum(times.decode_steps_ms), 6),
                **self._constants,
                "started_at": started_at,
            }
        )
        self.n_recorded += 1

    def close(self) -> None:
        """Write what is left and let go of the folder."""
        try:
            self._store.end_session({"ended_at": _now(), "runs": self.n_recorded, "warmup_runs": self.n_warmup})
        finally:
            self._store.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free_sample_id(self, key: Key, sample_id: int | None) -> int:
        if sample_id is None:
            return 1 + max((int(run[-1]) for run in self._store.recorded if run[:-1] == key), default=-1)
        sample_id = whole_number("sample_id", sample_id, 0)
        if (*key, sample_id) in self._store.recorded:
            raise ArgumentError(f"sample_id {sample_id} of {key} is recorded already; take runs from `plan`")
        return sample_id


def _set_plain(run: Run) -> None:
    """Make what was set on a run storable; ArgumentError where it is not."""
    for name in _LENGTHS:
        value = getattr(run, name)
        setattr(run, name, None if value is None else whole_number(name, value, 0, _MOST_TOKENS))
    run.ends_with_eos = None if run.ends_with_eos is None else bool(run.ends_with_eos)


def interleave(keys: Sequence[_Key], runs_per_key: int, seed: int) -> Iterator[tuple[_Key, int]]:
    """Every configuration once in random order, then every one again in another, and so on.

    Taken one after another, configurations would differ by what the machine did meanwhile: its heat, its load.
    """
    if runs_per_key < 1:
        raise ArgumentError(f"runs_per_key is {runs_per_key}; it must be at least 1")
    distinct = list(dict.fromkeys(keys))
    for sample_id in range(runs_per_key):
        order = distinct.copy()
        random.Random(f"order {seed} {sample_id}").shuffle(order)
        for key in order:
            yield key, sample_id


def measure_step_overhead(clock: Clock) -> float:
    """What recording adds to a decode step, in microseconds: the median cost of an empty step."""
    costs = []
    for _ in range(_OVERHEAD_ROUNDS):
        run = Run(clock)
        started = time.perf_counter_ns()
        for _ in range(_OVERHEAD_STEPS):
            with run.step():
                pass
        costs.append((time.perf_counter_ns() - started) / 1e3 / _OVERHEAD_STEPS)
    return statistics.median(costs)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
