"""Requests to a server as runs: what the readers of load generators' files share.

A load generator sees chunks of a stream, not steps of a model. From the time of each chunk a run takes only what holds:

- ``prefill_ms`` is the time to the first token (TTFT): from sending the request to the first chunk with content, any
  waiting in the server's queue included.
- ``total_ms`` is the time to the last chunk with content; what it has beyond TTFT is the decode time. That is never
  made from a tool's average: what is called TPOT or inter-token latency is an average over n − 1 gaps in one tool, over
  n in another, with or without the first token.
- ``decode_steps_ms`` are the gaps between chunks where each chunk carried one token: n − 1 gaps for n tokens, none
  shorter than `CHUNKS_TOGETHER_MS`. Elsewhere (speculative decoding, servers that send several tokens at a time,
  clients that read several chunks at once) a run has its total alone.
- A run whose tokens all came at once has neither, and is left out with that reason.

What a tool knows of the load stands in three fields, for whoever names them as key columns: ``strategy``, ``rate`` in
requests a second (as asked for, else as achieved) and ``concurrency`` (requests at once, at most).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias, TypeGuard

from lutest.runs.sources.run_rows import brief

Row: TypeAlias = dict[str, object] | str  # a run, or why the request is none

# The fields that come from measurements of the tool; a file's own metadata never stand for them.
MEASURED = ("prompt_tokens", "output_tokens", "prefill_ms", "decode_ms", "decode_steps_ms", "total_ms")
CHUNKS_TOGETHER_MS = 0.05  # no model decodes 20,000 tokens a second for one request: such chunks were read together


class UnusableRequestError(Exception):
    """A request that cannot be a run, and why."""


def served_run(
    prompt_tokens: object,
    output_tokens: object,
    prefill_ms: float,
    decode_ms: float,
    gaps_ms: Sequence[float] | None = None,
    **fields: object,
) -> dict[str, object]:
    """Make a run of a request.

    Parameters
    ----------
    prompt_tokens, output_tokens : object
        As they stand in the file; a build judges them as it does those of any run.
    prefill_ms : float
        Time to the first token.
    decode_ms : float
        Time from the first token to the last.
    gaps_ms : sequence of float, optional
        Times between chunks, where the tool keeps them.
    **fields
        Other fields of the run.

    Raises
    ------
    UnusableRequestError
        All tokens came at once, or a gap is below 0.
    """
    run: dict[str, object] = {
        **fields,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prefill_ms": prefill_ms,
    }
    gaps = () if gaps_ms is None else gaps_ms
    if any(gap < 0 for gap in gaps):
        raise UnusableRequestError(f"a gap between chunks is below 0: {min(gaps):g} ms")
    if output_tokens == 1:
        run["decode_ms"] = 0.0  # what follows the only token, such as a closing chunk, is no step
    elif isinstance(output_tokens, (int, float)) and output_tokens >= 2 and 0 <= decode_ms < CHUNKS_TOGETHER_MS:
        raise UnusableRequestError(
            f"all {brief(output_tokens)} tokens came at once: the time to the first is not known; stream the answers"
        )
    elif gaps and len(gaps) + 1 == output_tokens and all(gap >= CHUNKS_TOGETHER_MS for gap in gaps):
        run["decode_steps_ms"] = list(gaps)
    else:
        run["total_ms"] = prefill_ms + decode_ms
    return run


def load_fields(strategy: object, rate: object, concurrency: object, achieved: object) -> dict[str, object]:
    """What a tool knows of the load; `achieved` requests a second stand in for a rate that was not asked for."""
    if not _is_finite(rate):
        rate = float(f"{achieved:.3g}") if _is_finite(achieved) else None
    return {"strategy": strategy, "rate": rate, "concurrency": concurrency}


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def inner(value: object, *path: str) -> Mapping[str, object]:
    """The object at a path within `value`; an empty one where there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def number(value: object, name: str) -> float:
    """A number of the file, or the reason why the request is unusable."""
    if value is None:
        raise UnusableRequestError(f"no {name}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnusableRequestError(f"{name} is {brief(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        return float("-inf") if value < 0 else float("inf")


def numbers(value: object, name: str) -> list[float]:
    """A list of numbers of the file, or the reason why the request is unusable."""
    if not isinstance(value, list):
        raise UnusableRequestError(f"{name} is {brief(value)}, not a list of numbers")
    return [number(item, f"element {place} of {name}") for place, item in enumerate(value, 1)]


def labels(metadata: Mapping[str, object], wanted: Collection[str]) -> dict[str, object]:
    """Fields such as the tier that a user gave a tool as metadata of the whole file."""
    return {
        name: value
        for name, value in metadata.items()
        if name in wanted and name not in MEASURED and isinstance(value, (str, int, float))
    }


def last_line(message: object) -> str:
    """The last line of an error message or traceback, shortened."""
    lines = [line.strip() for line in str(message or "").splitlines() if line.strip()]
    shown = f"{lines[-1]:.160}" if lines else "no reason given"
    return "".join(character if character.isprintable() else "?" for character in shown)
