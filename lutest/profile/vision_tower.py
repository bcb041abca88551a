"""A CLIP-style vision tower with random weights, and the projector behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lutest.profile.presets import VisionSize

__all__ = ["VisionTower"]


class VisionTower:
    """Crops in, embeddings of the language model's width out.

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
        self._layers = [
            (
                ones(width),
                weight(width, 3 * width),
                weight(width, width),
                ones(width),
                weight(width, size.mlp_width),
                weight(size.mlp_width, width),
            )
            for _ in range(size.layers)
        ]
        self._norm = ones(width)
        self._projector = weight(width, hidden), weight(hidden, hidden)

    def embed(self, pixels: Any) -> Any:
        """Patch features, shape (crops, patches + 1, width), of crops, shape (crops, 3, side, side)."""
        size = self.size
        crops, side = pixels.shape[0], size.patches_per_side
        patches = pixels.view(crops, 3, side, size.patch_size, side, size.patch_size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(crops, side * side, -1)
        x = torch.cat([self._class_token.expand(crops, 1, -1), patches @ self._patch], dim=1) + self._positions
        for norm_1, qkv, out, norm_2, up, down in self._layers:
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
