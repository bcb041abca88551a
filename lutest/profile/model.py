"""An OLMoE-shaped vision-language model with random weights, in plain torch.

Latency does not depend on the values of the weights, but for the routing, which is as even as random weights make it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lutest.profile.presets import DecoderSize, Preset, VisionSize

_ROTARY_BASE = 10_000.0
_EPSILON = 1e-5


@dataclass
class Generation:
    """A request on its way: its configuration and the keys and values of each block so far.

    Attributes
    ----------
    top_k, num_blocks : int
        Experts a token, and how many of the first blocks are used.
    keys, values : tensor, shape (blocks, heads, capacity, head_dim)
        The KV cache; places from `length` on are still empty.
    chance : torch.Generator
        Draws the tokens.
    length : int
        Tokens in the cache.
    """

    top_k: int
    num_blocks: int
    keys: Any
    values: Any
    chance: Any
    length: int = 0


class Model:
    """Vision tower, projector and a decoder of mixture-of-experts blocks.

    Parameters
    ----------
    preset : Preset
        Sizes. Memory is taken here and not before: 14 GB for ``molmoe-1b`` in bfloat16.
    device : str
        Torch device. On ``meta`` the model has shapes but no memory.
    dtype : torch.dtype, optional
        float32 on the CPU, bfloat16 elsewhere, if left out.
    seed : int
        Of the weights.
    """

    def __init__(self, preset: Preset, *, device: str = "cpu", dtype: Any = None, seed: int = 0) -> None:
        self.preset = preset
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.n_parameters = 0
        generator = None if device == "meta" else torch.Generator(self.device).manual_seed(seed)

        def weight(*shape: int) -> Any:
            self.n_parameters += torch.Size(shape).numel()
            made = torch.empty(shape, device=self.device, dtype=self.dtype)
            return made.normal_(0.0, shape[-2] ** -0.5, generator=generator)

        def ones(width: int) -> Any:
            self.n_parameters += width
            return torch.ones(width, device=self.device, dtype=self.dtype)

        size = preset.decoder
        self.vision_tower = _VisionTower(preset.vision, size.hidden, weight, ones)
        self._embedding = weight(size.vocabulary, size.hidden)
        self._blocks = [_Block(size, weight, ones) for _ in range(size.blocks)]
        self._norm = ones(size.hidden)
        self._head = weight(size.hidden, size.vocabulary)

    def start(self, top_k: int, num_blocks: int, capacity: int, chance: Any) -> Generation:
        """A request of at most `capacity` tokens, prompt and output together, whose tokens `chance` draws."""
        size = self.preset.decoder
        shape = (num_blocks, size.heads, capacity, size.head_dim)
        keys, values = (torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        return Generation(top_k, num_blocks, keys, values, chance)

    def prefill(self, generation: Generation, features: Any, text: Any) -> Any:
        """First token, shape (1,), after the tokens of an image and of a text.

        Parameters
        ----------
        generation : Generation
            A request that was just started.
        features : tensor, shape (crops, patches + 1, width)
            What the vision tower made of the crops.
        text : tensor of int, shape (tokens,)
            Token ids.
        """
        return self._forward(generation, torch.cat([self.vision_tower.project(features), self._embedding[text]]))

    def decode(self, generation: Generation, token: Any) -> Any:
        """Next token, shape (1,), after one token, shape (1,)."""
        return self._forward(generation, self._embedding[token])

    def _forward(self, generation: Generation, x: Any) -> Any:
        start = generation.length
        generation.length += x.shape[0]
        rotation = _rotation(start, generation.length, self.preset.decoder.head_dim, x)
        for index, block in enumerate(self._blocks[: generation.num_blocks]):
            x = block.forward(x, rotation, generation, index)
        last = _normed(x[-1:], self._norm)
        # sampled, not the likeliest: random weights would repeat one token, and so the same experts at every step
        shares = (last @ self._head).float().softmax(dim=-1)
        return (shares / torch.empty_like(shares).exponential_(generator=generation.chance)).argmax(dim=-1)


class _VisionTower:
    """A CLIP-style vision tower and the projector behind it: crops in, embeddings of the language model's width out.

    Parameters
    ----------
    size : VisionSize
        Sizes.
    hidden : int
        Width of the language model.
    weight : callable
        Makes a random tensor of a shape, scaled by the first of its last two sizes.
    ones : callable
        Makes a tensor of ones.
    """

    def __init__(self, size: VisionSize, hidden: int, weight: Callable[..., Any], ones: Callable[[int], Any]) -> None:
        width = size.width
        self.size = size
        self._patch = weight(3 * size.patch_size**2, width)
        self._class_token = weight(1, width)
        self._positions = weight(size.patches_per_side**2 + 1, width)
        shapes = (width, 3 * width), (width, width), (width, size.mlp_width), (size.mlp_width, width)
        self._layers = [(ones(width), ones(width), *(weight(*shape) for shape in shapes)) for _ in range(size.layers)]
        self._norm = ones(width)
        self._projector = weight(width, hidden), weight(hidden, hidden)

    def embed(self, pixels: Any) -> Any:
        """Patch features, shape (crops, patches + 1, width), of crops, shape (crops, 3, side, side)."""
        size = self.size
        crops, side = pixels.shape[0], size.patches_per_side
        patches = pixels.view(crops, 3, side, size.patch_size, side, size.patch_size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(crops, side * side, -1)
        x = torch.cat([self._class_token.expand(crops, 1, -1), patches @ self._patch], dim=1) + self._positions
        for norm_1, norm_2, qkv, out, up, down in self._layers:
            y = functional.layer_norm(x, (size.width,), norm_1)
            heads = (y @ qkv).view(crops, -1, 3, size.heads, size.width // size.heads).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
            x = x + y.transpose(1, 2).reshape(crops, -1, size.width) @ out
            y = functional.layer_norm(x, (size.width,), norm_2)
            x = x + functional.gelu(y @ up) @ down
        return functional.layer_norm(x, (size.width,), self._norm)

    def project(self, features: Any) -> Any:
        """Embeddings, shape (tokens, hidden), of patch features: pooled over squares of patches, then projected."""
        size = self.size
        crops, side, pooling = features.shape[0], size.patches_per_side // size.pooling, size.pooling
        pooled = features[:, 1:].view(crops, side, pooling, side, pooling, size.width).mean(dim=(2, 4))
        up, down = self._projector
        return functional.gelu(pooled.reshape(crops * side * side, size.width) @ up) @ down


class _Block:
    """Attention with a norm of queries and keys, then a mixture of experts."""

    def __init__(self, size: DecoderSize, weight: Any, ones: Any) -> None:
        width = size.heads * size.head_dim
        self._size = size
        self._norm_1, self._norm_2 = ones(size.hidden), ones(size.hidden)
        self._query_norm, self._key_norm = ones(width), ones(width)
        self._qkv = weight(size.hidden, 3 * width)
        self._out = weight(width, size.hidden)
        self._router = weight(size.hidden, size.experts)
        self._gate_up = weight(size.experts, size.hidden, 2 * size.expert_width)
        self._down = weight(size.experts, size.expert_width, size.hidden)

    def forward(self, x: Any, rotation: Any, generation: Generation, index: int) -> Any:
        x = x + self._attend(_normed(x, self._norm_1), rotation, generation, index)
        return x + self._mix(_normed(x, self._norm_2), generation.top_k)

    def _attend(self, x: Any, rotation: Any, generation: Generation, index: int) -> Any:
        size, tokens = self._size, x.shape[0]
        query, key, value = (x @ self._qkv).chunk(3, dim=-1)
        parts = _normed(query, self._query_norm), _normed(key, self._key_norm), value
        query, key, value = (part.view(tokens, size.heads, size.head_dim).transpose(0, 1) for part in parts)
        stop = generation.length
        keys, values = generation.keys[index], generation.values[index]
        keys[:, stop - tokens : stop] = _rotate(key, rotation)
        values[:, stop - tokens : stop] = value
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, rotation)[None], keys[None, :, :stop], values[None, :, :stop], is_causal=tokens > 1
        )
        return mixed[0].transpose(0, 1).reshape(tokens, -1) @ self._out

    def _mix(self, x: Any, top_k: int) -> Any:
        shares, chosen = (x @ self._router).softmax(dim=-1).topk(top_k, dim=-1)
        if x.shape[0] == 1:  # so that no expert's number has to leave the device
            made = _gated(x, self._gate_up[chosen[0]], self._down[chosen[0]])
            return shares @ made[:, 0]
        # tokens sorted by expert, so that each expert that was chosen works on all of its tokens at once
        assigned = chosen.flatten()
        order = assigned.argsort()
        rows = order // top_k
        gathered = x[rows]
        counts = torch.bincount(assigned, minlength=self._size.experts).tolist()
        made = torch.empty_like(gathered)
        start = 0
        for expert, n in enumerate(counts):
            if n:
                made[start : start + n] = _gated(gathered[start : start + n], self._gate_up[expert], self._down[expert])
                start += n
        made *= shares.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, rows, made)


def _normed(x: Any, weight: Any) -> Any:
    return functional.rms_norm(x, weight.shape, weight, _EPSILON)


def _gated(x: Any, gate_up: Any, down: Any) -> Any:
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ down


def _rotation(start: int, stop: int, head_dim: int, like: Any) -> Any:
    """Cosine and sine, shape (2, tokens, head_dim), of rotary embeddings at the positions from start to stop."""
    frequencies = _ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(start, stop, device=like.device, dtype=torch.float32), frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]).to(like.dtype)


def _rotate(x: Any, rotation: Any) -> Any:
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat([-second, first], dim=-1) * rotation[1]
