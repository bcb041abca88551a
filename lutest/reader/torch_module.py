"""The table as a torch module: the arithmetic of `Batch` where tensors live, without a word to the host."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lutest.reader.arguments import MAX_TOKENS, quantile_index
from lutest.reader.arrays import SPAN, Level, Places, decode_at, flat_level, flat_places, prefill_at, steps_at, total_at
from lutest.reader.curves import key_pieces
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Figures


class LatencyModule(nn.Module):
    """Latencies of arrays of configurations, on the device that the module is on.

    ``forward`` is `total_ms`. All verbs take integer tensors that broadcast, and answer with float64, within 1e-12
    relative of `Batch`. The ids are those of ``table.batch.key_ids``, made on the host. There is no checking of values,
    as that would stop the device: what cannot be answered is NaN, which is an id that is not one of the table's (such
    as -1), a negative prompt length, no output token, or decode steps of a configuration without figures for them.

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
        i, median = quantile_index(figures.quantiles, q), figures.quantiles.index(0.5)
        self.q = figures.quantiles[i]
        self.keys = tuple(held.key for held in figures.keys)
        self._side = float((i > median) - (i < median))
        pieces = [key_pieces(held, median) for held in figures.keys]
        for name, starts in flat_places(pieces, median)._asdict().items():
            self.register_buffer(f"{name}_places", torch.from_numpy(starts))
        for name, values in flat_level(figures, pieces, i)._asdict().items():
            self.register_buffer(name, torch.from_numpy(values).clone().view(torch.int64))
        self.register_buffer("typical_prompt", torch.tensor([held.prompt_tokens_p50 for held in figures.keys]))
        self.register_buffer("has_decode", torch.tensor([held.step is not None for held in pieces]))

    def forward(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """`total_ms`."""
        return self.total_ms(ids, prompt_tokens, output_tokens)

    def total_ms(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """As `Batch.total_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        known, prefill, decode, correlated = self._request(ids, prompt_tokens, output_tokens)
        total = total_at(prefill, decode, correlated, self._side)
        return torch.where(known, total, torch.nan)

    def decode_ms(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """As `Batch.decode_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        known, _, (middle, spread), _ = self._request(ids, prompt_tokens, output_tokens)
        return torch.where(known, middle + self._side * spread, torch.nan)

    def prefill_ms(self, ids: Tensor, prompt_tokens: Tensor | None = None) -> Tensor:
        """As `Batch.prefill_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        known, (middle, apart), _, _ = self._request(ids, prompt_tokens, torch.ones_like(ids))
        return torch.where(known, middle + self._side * apart, torch.nan)

    def get_extra_state(self) -> dict[str, Any]:
        return {"keys": self.keys, "q": self.q}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.get_extra_state():
            raise ArgumentError(
                f"the state is of {len(state['keys'])} configurations at q={state['q']}, which are not those of this "
                f"module, {len(self.keys)} at q={self.q}; make the module from the same table"
            )

    def _request(
        self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """What may be answered; prefill, decode and their correlation as `total_at` takes them."""
        level = Level(*(cast(Tensor, getattr(self, name)).view(torch.float64) for name in Level._fields))
        places = Places(*(cast(Tensor, getattr(self, f"{name}_places")) for name in Places._fields))
        key, n = ids.long(), output_tokens.long()
        known = (key >= 0) & (key < len(self.keys))
        key = torch.where(known, key, 0)
        prompt = cast(Tensor, self.typical_prompt)[key] if prompt_tokens is None else prompt_tokens.long()
        known = known & (prompt >= 0) & (prompt <= MAX_TOKENS) & (n >= 1) & (n <= MAX_TOKENS)
        known = known & (cast(Tensor, self.has_decode)[key] | (n == 1))
        key, prompt, n = torch.broadcast_tensors(key, prompt.clamp(0, MAX_TOKENS), n.clamp(1, MAX_TOKENS))
        end = prompt + n - 1

        def piece(starts: Tensor, x: Tensor) -> Tensor:
            return torch.searchsorted(starts, key * SPAN + x, right=True) - 1

        at_prompt, start = piece(places.held, prompt), prompt.double()
        steps = level.steps[at_prompt]
        steps_ms = steps_at(steps, level.steps[piece(places.held, end)], start, end.double())
        decode = decode_at(level.ratio[piece(places.out, n)], n.double(), steps_ms)
        prefill = level.own[key].unbind(-1) if prompt_tokens is None else prefill_at(level.prefill[at_prompt], start)
        return known, prefill, decode, steps[..., 3]
