"""Recording of ``model.generate()`` as Hugging Face models have it."""

from __future__ import annotations

import contextlib
from typing import Any

from lutest.profile.recorder import Recorder
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Key


def record_generate(
    recorder: Recorder,
    key: Key,
    model: Any,
    *,
    vision_tower: Any = None,
    prompt_tokens: int | None = None,
    vision_tokens: int | None = None,
    sample_id: int | None = None,
    warmup: bool = False,
    **arguments: Any,
) -> Any:
    """Call ``model.generate(**arguments)`` for one request and record the run.

    The first forward pass of the model ends with the first token; each further one begins a decode step, which lasts
    until the next one begins: sampling and all that `generate` does in between belong to the token before it. What
    `generate` does before the first pass belongs to prefill. So the stages add up to the whole call.

    Parameters
    ----------
    recorder : Recorder
        Keeps the run.
    key : tuple
        The configuration that the model is set to, in the order of the recorder's key columns.
    model : module with a ``generate`` method
        Decoder-only, and called by `generate` once per token.
    vision_tower : module, optional
        The part whose time is `vision_ms`; it is called within the first forward pass or before it.
    prompt_tokens : int, optional
        Tokens in the KV cache after prefill; the length of ``input_ids`` if left out, which is right only where image
        tokens stand in it one by one.
    vision_tokens : int, optional
        How many of them come from images.
    sample_id, warmup
        As for `Recorder.run`.
    **arguments
        Of `generate`, ``input_ids`` among them.

    Returns
    -------
    object
        What `generate` returns.

    Raises
    ------
    ArgumentError
        More than one sequence came out, or the forward passes are not one per token (assisted decoding, prefill in
        chunks, a model whose `generate` goes round its hooks): then stages cannot be told apart.
    """
    input_ids = arguments.get("input_ids")
    if input_ids is None and prompt_tokens is None:
        raise ArgumentError("generate() without input_ids: give prompt_tokens")
    n_input = 0 if input_ids is None else int(input_ids.shape[-1])
    passes = 0
    with (
        contextlib.ExitStack() as hooks,
        recorder.run(
            key, sample_id=sample_id, prompt_tokens=prompt_tokens or n_input, vision_tokens=vision_tokens, warmup=warmup
        ) as run,
    ):
        if vision_tokens is not None and run.prompt_tokens is not None:
            run.text_tokens = run.prompt_tokens - vision_tokens

        def before_pass(*_: object) -> None:
            nonlocal passes
            passes += 1
            if passes > 1:
                run.begin_step()

        hooks.callback(model.register_forward_pre_hook(before_pass).remove)
        if vision_tower is not None:
            hooks.callback(vision_tower.register_forward_pre_hook(lambda *_: run.begin_vision()).remove)
            hooks.callback(vision_tower.register_forward_hook(lambda *_: run.begin_prefill()).remove)
        run.begin_prefill()
        output = model.generate(**arguments)
        run.end()

        sequences = getattr(output, "sequences", output)
        if len(sequences) != 1:
            raise ArgumentError(f"generate() made {len(sequences)} sequences: record one request at a time")
        tokens = sequences[0].tolist()
        n_output = len(tokens) - n_input
        if n_output != passes:
            raise ArgumentError(
                f"generate() made {n_output} tokens in {passes} forward passes: only one pass per token can be "
                "told apart, the first one being the prefill"
            )
        run.ends_with_eos = tokens[-1] in _end_tokens(model, arguments)
    return output


def _end_tokens(model: Any, arguments: dict[str, Any]) -> list[int | None]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = arguments.get("eos_token_id", configured)
    return [given] if given is None or isinstance(given, int) else [int(token) for token in given]
