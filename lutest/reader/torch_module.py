"""The table as a torch module: the numbers of `Batch` where tensors live, without a word to the host."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lutest.reader.arguments import MAX_TOKENS, quantile_index
from lutest.reader.curves import key_pieces
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Figures
from lutest.reader.grid import SPAN, flatten

__all__ = ["LatencyModule"]


class LatencyModule(nn.Module):
    """Latencies of arrays of configurations, on the device that the module is on.

    ``forward`` is `total_ms`. All verbs take integer tensors that broadcast, and answer with float64, within 1e-12
    relative of `Batch`. The ids are those of ``table.key_ids``, made on the host. There is no checking of values, as
    that would stop the device: what cannot be answered is NaN, which is an id that is not one of the table's (such as
    -1), a negative prompt length, no output token, or decode steps of a configuration that has no figures for them.

    It works under ``torch.compile(fullgraph=True)``, has no parameters, and passes no gradients. Its figures are kept
    as the bit patterns of float64: ``half()`` or ``to(torch.bfloat16)`` on a model that holds it cannot round them.
    ``state_dict`` holds all of them, and loading refuses those of other configurations or quantiles.

    Parameters
    ----------
    figures : Figures
        Those of the table.
    q : float
        The quantile that it answers at, one of the table's.

    Raises
    ------
    ArgumentError
        The table does not hold `q`.
    """

    def __init__(self, figures: Figures, q: float) -> None:
        super().__init__()
        level, median = quantile_index(figures.quantiles, q), figures.quantiles.index(0.5)
        self.q = figures.quantiles[level]
        self.keys = tuple(tuple(key.key) for key in figures.keys)
        self._sign = float(level > median) - float(level < median)
        pieces = [key_pieces(key, median) for key in figures.keys]
        flats = flatten(pieces, len(figures.quantiles))
        curves = {"prefill": flats.prefill, "step": flats.step, "ratio": flats.ratio}
        for name, flat in curves.items():
            self.register_buffer(f"{name}_places", torch.from_numpy(flat.places.copy()))
            self.register_buffer(f"{name}_starts", torch.from_numpy(flat.starts.copy()))
            for kind, rows in (("value", flat.values), ("slope", flat.slopes)):
                self._keep(f"{name}_{kind}_p50", rows[median])
                self._keep(f"{name}_{kind}", rows[level])
        self._keep("step_sum", flats.step.sums)
        self._keep("own_p50", np.array([key.prefill.quantiles_ms[median] for key in figures.keys]))
        self._keep("own", np.array([key.prefill.quantiles_ms[level] for key in figures.keys]))
        self._keep("correlation", np.array([key.correlations[level] for key in figures.keys]))
        self.register_buffer("typical_prompt", torch.tensor([key.prompt_tokens_p50 for key in figures.keys]))
        self.register_buffer("has_decode", torch.tensor([p.step is not None for p in pieces]))

    def _keep(self, name: str, values: Any) -> None:
        bits = np.ascontiguousarray(values, dtype=np.float64).view(np.int64)
        self.register_buffer(name, torch.from_numpy(bits.copy()))

    def forward(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """`total_ms`."""
        return self.total_ms(ids, prompt_tokens, output_tokens)

    def total_ms(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """As `Batch.total_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        key, prompt, n, known = self._arguments(ids, prompt_tokens, output_tokens)
        p50, at_q = self._prefill(key, None if prompt_tokens is None else prompt)
        steps_ms, middle, ratio_spread = self._decode(key, prompt, n)
        total = p50 + steps_ms * middle
        if self._sign:
            deviation = (at_q - p50).abs()
            correlation = self._floats("correlation")[key]
            shared = steps_ms * ratio_spread + correlation * deviation
            combined = (shared * shared + (1.0 - correlation * correlation) * deviation * deviation).sqrt()
            total = torch.where(n == 1, at_q, total + self._sign * combined)
        return torch.where(known, total, torch.nan)

    def decode_ms(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """As `Batch.decode_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        key, prompt, n, known = self._arguments(ids, prompt_tokens, output_tokens)
        steps_ms, middle, ratio_spread = self._decode(key, prompt, n)
        return torch.where(known, steps_ms * middle + self._sign * (steps_ms * ratio_spread), torch.nan)

    def prefill_ms(self, ids: Tensor, prompt_tokens: Tensor | None = None) -> Tensor:
        """As `Batch.prefill_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        key, prompt, _, known = self._arguments(ids, prompt_tokens, torch.ones_like(ids))
        _, at_q = self._prefill(key, None if prompt_tokens is None else prompt)
        return torch.where(known, at_q, torch.nan)

    def get_extra_state(self) -> dict[str, Any]:
        return {"keys": self.keys, "q": self.q}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.get_extra_state():
            raise ArgumentError(
                f"the state is of {len(state['keys'])} configurations at q={state['q']}, which are not those of this "
                f"module, {len(self.keys)} at q={self.q}; make the module from the same table"
            )

    def _arguments(
        self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, prompt and tokens as int64 that are safe to look up, and where all of them may be answered."""
        key, n = ids.long(), output_tokens.long()
        known = (key >= 0) & (key < len(self.keys))
        key = torch.where(known, key, 0)
        prompt = cast(Tensor, self.typical_prompt)[key] if prompt_tokens is None else prompt_tokens.long()
        known = known & (prompt >= 0) & (prompt <= MAX_TOKENS) & (n >= 1) & (n <= MAX_TOKENS)
        known = known & (cast(Tensor, self.has_decode)[key] | (n == 1))
        key, prompt, n = torch.broadcast_tensors(key, prompt, n)
        return key, prompt.clamp(0, MAX_TOKENS), n.clamp(1, MAX_TOKENS), known

    def _prefill(self, key: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor]:
        if prompt is None:
            return self._floats("own_p50")[key], self._floats("own")[key]
        piece, distance = self._piece("prefill", key, prompt)
        return self._value("prefill", "_p50", piece, distance), self._value("prefill", "", piece, distance)

    def _decode(self, key: Tensor, prompt: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps_ms = self._sum_to(key, prompt + n - 1) - self._sum_to(key, prompt)
        piece, distance = self._piece("ratio", key, n - 1)
        middle = self._value("ratio", "_p50", piece, distance)
        return steps_ms, middle, (self._value("ratio", "", piece, distance) - middle).abs()

    def _sum_to(self, key: Tensor, x: Tensor) -> Tensor:
        piece, distance = self._piece("step", key, x)
        rise = self._floats("step_slope_p50")[piece] * (distance * (distance + 1.0) * 0.5)
        return self._floats("step_sum")[piece] + distance * self._floats("step_value_p50")[piece] + rise

    def _piece(self, curve: str, key: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        places, starts = cast(Tensor, getattr(self, f"{curve}_places")), cast(Tensor, getattr(self, f"{curve}_starts"))
        piece = torch.searchsorted(places, key * SPAN + x, right=True) - 1
        return piece, (x - starts[piece]).double()

    def _value(self, curve: str, level: str, piece: Tensor, distance: Tensor) -> Tensor:
        values, slopes = self._floats(f"{curve}_value{level}"), self._floats(f"{curve}_slope{level}")
        return values[piece] + slopes[piece] * distance

    def _floats(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name)).view(torch.float64)
