"""The table as a torch module: the arithmetic of `Batch` where tensors live, without a word to the host."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lutest.reader.arguments import MAX_TOKENS, quantile_index
from lutest.reader.arrays import (
    SPAN,
    Level,
    Places,
    decode_at,
    deviation,
    flat_level,
    flat_places,
    prefill_at,
    steps_at,
    total_at,
)
from lutest.reader.curves import key_pieces
from lutest.reader.errors import ArgumentError
from lutest.reader.figures import Figures
from lutest.reader.lengths import Lengths, lengths_by_workload
from lutest.reader.over_lengths import ALL, LEAST_MS, MORE, levels_of, mean_of, scores_within


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
        self.q, self._i, self._normal = figures.quantiles[i], i, levels_of(figures.quantiles)
        self.keys = tuple(held.key for held in figures.keys)
        pieces = [key_pieces(held, median) for held in figures.keys]
        for name, starts in flat_places(pieces, median)._asdict().items():
            self.register_buffer(f"{name}_places", torch.from_numpy(starts))
        for j in range(len(figures.quantiles)):
            for name, values in flat_level(figures, pieces, j)._asdict().items():
                self.register_buffer(f"{name}_{j}", torch.from_numpy(values).clone().view(torch.int64))
        lengths = lengths_by_workload(figures.output_lengths).get(None, Lengths((), ()))
        self.register_buffer("output_lengths", torch.tensor(lengths.tokens, dtype=torch.int64))
        self.register_buffer("shares", torch.tensor(lengths.shares, dtype=torch.float64).view(torch.int64))
        self.register_buffer("typical_prompt", torch.tensor([held.prompt_tokens_p50 for held in figures.keys]))
        self.register_buffer("has_decode", torch.tensor([held.step is not None for held in pieces]))

    def forward(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """`total_ms`."""
        return self.total_ms(ids, prompt_tokens, output_tokens)

    def total_ms(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """As `Batch.total_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        known, prefill, decode, correlated = self._request(ids, prompt_tokens, output_tokens)
        total = total_at(prefill, decode, correlated, self._side(self._i))
        return torch.where(known, total, torch.nan)

    def decode_ms(self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor) -> Tensor:
        """As `Batch.decode_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        known, _, (middle, spread), _ = self._request(ids, prompt_tokens, output_tokens)
        return torch.where(known, middle + self._side(self._i) * spread, torch.nan)

    def prefill_ms(self, ids: Tensor, prompt_tokens: Tensor | None = None) -> Tensor:
        """As `Batch.prefill_ms` at the module's quantile: float64 milliseconds in the broadcast shape."""
        known, (middle, apart), _, _ = self._request(ids, prompt_tokens, torch.ones_like(ids))
        return torch.where(known, middle + self._side(self._i) * apart, torch.nan)

    def p_within(self, ids: Tensor, budget_ms: Tensor | float, prompt_tokens: Tensor | None = None) -> Tensor:
        """As `Batch.p_within`, over the output lengths of all workloads together."""
        known, middle, deviations = self._over_lengths(ids, prompt_tokens)
        budget = torch.as_tensor(budget_ms, dtype=torch.float64, device=middle.device)[..., None] * MORE
        score = scores_within(self._normal, budget, middle, deviations, torch)
        beyond = (score > 0).double()
        within = torch.where(score.abs() <= self._normal.outermost, torch.special.ndtr(score), beyond)
        share = within @ cast(Tensor, self.shares).view(torch.float64)
        return torch.where(known, torch.where(share < ALL, share, 1.0), torch.nan)

    def expected_total_ms(self, ids: Tensor, prompt_tokens: Tensor | None = None) -> Tensor:
        """As `Batch.expected_total_ms`, over the output lengths of all workloads together."""
        known, middle, deviations = self._over_lengths(ids, prompt_tokens)
        mean = mean_of(self._normal, middle, deviations) @ cast(Tensor, self.shares).view(torch.float64)
        return torch.where(known, mean, torch.nan)

    def _over_lengths(self, ids: Tensor, prompt_tokens: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What may be answered; along a last axis of output lengths, P50 of totals and deviations at the levels."""
        n = cast(Tensor, self.output_lengths)
        if not n.numel():
            raise ArgumentError("the table holds no output lengths: give output_tokens to total_ms instead")
        prompt = None if prompt_tokens is None else prompt_tokens[..., None]
        deviations = []
        for i in range(len(self._normal.scores)):
            known, prefill, decode, correlated = self._request(ids[..., None], prompt, n, i)
            if i == self._normal.median:
                middle = prefill[0] + decode[0]
            deviations.append(self._side(i) * deviation(prefill[1].clamp(min=LEAST_MS), decode[1], correlated))
        return known.all(-1), middle, deviations

    def _side(self, i: int) -> float:
        return float((i > self._normal.median) - (i < self._normal.median))

    def get_extra_state(self) -> dict[str, Any]:
        return {"keys": self.keys, "q": self.q}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.get_extra_state():
            raise ArgumentError(
                f"the state is of {len(state['keys'])} configurations at q={state['q']}, which are not those of this "
                f"module, {len(self.keys)} at q={self.q}; make the module from the same table"
            )

    def _request(
        self, ids: Tensor, prompt_tokens: Tensor | None, output_tokens: Tensor, i: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """What may be answered; prefill, decode and their correlation as `total_at` takes them."""
        number = self._i if i is None else i
        level = Level(*(cast(Tensor, getattr(self, f"{name}_{number}")).view(torch.float64) for name in Level._fields))
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
