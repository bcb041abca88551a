"""The sweep of `lutest profile`: a model with random weights, run over tiers, experts and blocks."""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutest.profile.machine import cpu_name
from lutest.profile.presets import PRESETS, Preset
from lutest.profile.recorder import Recorder, StageTimes, interleave
from lutest.reader.errors import ArgumentError

_WARMUP_LENGTHS = {4: 1.0}

_Key = tuple[str, int, int]  # (tier, top_k, num_blocks)


@dataclass(frozen=True)
class SweepSummary:
    """What a session of a sweep did.

    Attributes
    ----------
    n_recorded, n_warmup, n_missing : int
        Runs recorded and warm-ups of this session, and runs still to do.
    step_overhead_us : float
        What recording adds to a decode step, in microseconds.
    step_p50_ms : float or None
        Median decode step of this session; None if it had none.
    """

    output: Path
    model: str
    device: str
    n_keys: int
    n_recorded: int
    n_warmup: int
    n_missing: int
    step_overhead_us: float
    step_p50_ms: float | None
    seconds: float


def run_sweep(
    output: str | os.PathLike[str],
    preset: str = "cpu",
    *,
    tiers: Sequence[str] | None = None,
    top_k: Sequence[int] | None = None,
    num_blocks: Sequence[int] | None = None,
    output_lengths: Mapping[int, float] | None = None,
    runs_per_key: int = 150,
    minutes: float | None = None,
    warmup_rounds: int = 1,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    synchronization: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SweepSummary:
    """Profile the model of a preset into a folder, or go on with a sweep that was interrupted.

    Parameters
    ----------
    output : path
        Folder of the runs.
    preset : str
        Sizes of the model, and what is taken for what is left out here.
    tiers, top_k, num_blocks : sequence, optional
        Sweep lists; every combination is a configuration.
    output_lengths : mapping, optional
        Output tokens → weight; the length of each run is drawn from it.
    runs_per_key : int
        Runs of each configuration in all sessions together.
    minutes : float, optional
        Stop after this time even if runs are missing.
    warmup_rounds : int
        How many short runs of every configuration come first in each session, and are left out.
    seed : int
        Of the order, of the requests and of the weights. A run's request depends on nothing but the seed, its
        configuration and its number, so an interrupted sweep ends as one that was not.
    device : str
        Torch device.
    threads : int, optional
        Threads of torch; 1 on the CPU if left out, torch's choice elsewhere.
    synchronization : str, optional
        How stages are timed; ``none`` on the CPU and ``events`` elsewhere if left out.
    progress : callable, optional
        Called after each run with the runs of all sessions and the runs wanted.

    Returns
    -------
    SweepSummary
        What this session did.

    Raises
    ------
    LutestError
        An argument is not valid, torch is missing, or the folder cannot be written or was begun otherwise.
    """
    started = time.perf_counter()
    if preset not in PRESETS:
        raise ArgumentError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    sizes = PRESETS[preset]
    try:
        import torch
    except ImportError:
        raise ArgumentError("profiling the presets needs torch: pip install 'lutest[profile]'") from None
    lengths = dict(output_lengths or sizes.output_lengths)
    keys = _keys(sizes, tiers, top_k, num_blocks)
    for what, given, least in (
        ("output lengths hold", min(lengths), 1),
        ("runs_per_key is", runs_per_key, 1),
        ("warm-up rounds are", warmup_rounds, 0),
        ("threads are", 1 if threads is None else threads, 1),
    ):
        if given < least:
            raise ArgumentError(f"{what} {given}; allowed: {least} or more")
    if minutes is not None and not minutes > 0:
        raise ArgumentError(f"minutes is {minutes:g}; it must be above 0")
    name, synchronization = _prepare_device(torch, device, threads, synchronization)
    recorder = Recorder(
        output,
        model=sizes.model_name,
        device=name,
        workload="synthetic",
        synchronization=synchronization,
        settings={"preset": preset, "seed": seed, "output_lengths": {n: float(w) for n, w in sorted(lengths.items())}},
    )
    steps_ms: list[float] = []
    with recorder, torch.inference_mode():
        from lutest.profile.model import Model

        model = Model(sizes, device=device, seed=seed)
        deadline = math.inf if minutes is None else started + 60 * minutes
        for key, number in interleave(keys, warmup_rounds, seed) if warmup_rounds else ():
            run_once(model, recorder, key, number, seed, _WARMUP_LENGTHS, warmup=True)
        plan = recorder.plan(keys, runs_per_key, seed=seed)
        wanted = len(keys) * runs_per_key
        missing = len(plan)
        for key, number in plan:
            if time.perf_counter() > deadline:
                break
            steps_ms += run_once(model, recorder, key, number, seed, lengths, warmup=False).decode_steps_ms
            missing -= 1
            if progress is not None:
                progress(wanted - missing, wanted)
    return SweepSummary(
        output=Path(output),
        model=sizes.model_name,
        device=name,
        n_keys=len(keys),
        n_recorded=recorder.n_recorded,
        n_warmup=recorder.n_warmup,
        n_missing=missing,
        step_overhead_us=recorder.step_overhead_us,
        step_p50_ms=statistics.median(steps_ms) if steps_ms else None,
        seconds=time.perf_counter() - started,
    )


def _keys(
    sizes: Preset, tiers: Sequence[str] | None, top_k: Sequence[int] | None, num_blocks: Sequence[int] | None
) -> list[_Key]:
    keys = list(itertools.product(tiers or sizes.crops, top_k or sizes.top_k, num_blocks or sizes.num_blocks))
    for tier, experts, blocks in keys:
        if tier not in sizes.crops:
            raise ArgumentError(f"there is no tier {tier!r} in {sizes.name}; there are {', '.join(sizes.crops)}")
        for what, given, most in (("top_k", experts, sizes.decoder.experts), ("blocks", blocks, sizes.decoder.blocks)):
            if not 1 <= given <= most:
                raise ArgumentError(f"{what} is {given}; in {sizes.name} it must be from 1 to {most}")
    return keys


def _prepare_device(torch: Any, device: str, threads: int | None, synchronization: str | None) -> tuple[str, str]:
    """Name of the device for the runs, and how to time on it."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ArgumentError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if kind not in ("cpu", "cuda"):
        raise ArgumentError(f"device is {device!r}; it can be cpu or cuda")
    if kind == "cpu" or threads is not None:
        torch.set_num_threads(threads or 1)
    if kind == "cpu":
        n = torch.get_num_threads()
        return f"{cpu_name()}, {n} thread{'' if n == 1 else 's'}, float32", synchronization or "none"
    if not torch.cuda.is_available():
        raise ArgumentError(f"device is {device!r}, but torch finds no CUDA device")
    if synchronization == "none":
        raise ArgumentError(
            "synchronization 'none' on a CUDA device would time how long it takes to ask for the work; "
            "it can be synchronize or events"
        )
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # where CUDA events are recorded
    return f"{torch.cuda.get_device_name(device)}, bfloat16", synchronization or "events"


def run_once(
    model: Any, recorder: Recorder, key: _Key, number: int, seed: int, lengths: Mapping[int, float], warmup: bool
) -> StageTimes:
    """Do one run, whose request depends on seed, key and number alone."""
    import torch

    sizes, (tier, top_k, num_blocks) = model.preset, key
    draw = random.Random(f"request {seed} {key} {number}")
    crops = draw.randint(*sizes.crops[tier]) + 1  # and the global one
    text_tokens = draw.randint(*sizes.text_tokens)
    output_tokens = draw.choices(list(lengths), list(lengths.values()))[0]
    vision_tokens = crops * sizes.vision.tokens_per_crop
    chance = torch.Generator(model.device).manual_seed(number)
    options = {"device": model.device, "generator": chance}
    side = sizes.vision.image_size
    pixels = torch.randn(crops, 3, side, side, dtype=model.dtype, **options)
    text = torch.randint(sizes.decoder.vocabulary, (text_tokens,), **options)
    generation = model.start(top_k, num_blocks, vision_tokens + text_tokens + output_tokens, chance)
    tokens = {"vision_tokens": vision_tokens, "text_tokens": text_tokens}
    with recorder.run(key, sample_id=number, warmup=warmup, **tokens) as run:
        with run.vision():
            features = model.vision_tower.embed(pixels)
        with run.prefill():
            token = model.prefill(generation, features, text)
        for _ in range(output_tokens - 1):
            with run.step():
                token = model.decode(generation, token)
        # the length stands for where a model would have stopped; the longest one, for a limit
        run.ends_with_eos = output_tokens < max(lengths)
    assert run.times is not None
    return run.times
