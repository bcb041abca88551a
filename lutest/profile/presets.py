"""Sizes of the model that `lutest profile` runs, and what it sweeps over unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lutest.reader.errors import ArgumentError

# Short answers mostly, as to questions about images: 9 tokens on average.
_SHORT_ANSWERS = {1: 8, 2: 30, 3: 8, 4: 8, 6: 8, 8: 10, 12: 8, 16: 8, 24: 6, 32: 4, 48: 1, 96: 1}
_CROPS = {"low": (1, 3), "medium": (4, 8), "high": (9, 15)}


@dataclass(frozen=True)
class VisionSize:
    """Sizes of a CLIP-style vision tower.

    Attributes
    ----------
    image_size, patch_size : int
        Pixels along a side of a crop, and of a patch.
    pooling : int
        Patches along a side that become one token.
    width, layers, heads, mlp_width : int
        Of the transformer.
    """

    image_size: int
    patch_size: int
    pooling: int
    width: int
    layers: int
    heads: int
    mlp_width: int

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a crop."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_crop(self) -> int:
        """Tokens that the language model sees of a crop."""
        return (self.patches_per_side // self.pooling) ** 2


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a decoder with mixture-of-experts blocks."""

    vocabulary: int
    hidden: int
    heads: int
    head_dim: int
    blocks: int
    experts: int
    expert_width: int


@dataclass(frozen=True)
class Preset:
    """A model, and what is swept over.

    Attributes
    ----------
    name : str
        Name of the preset.
    vision, decoder : VisionSize, DecoderSize
        Sizes.
    crops : dict
        Tier → least and largest number of crops; one global crop comes on top.
    text_tokens : (int, int)
        Least and largest number of text tokens of a prompt.
    top_k, num_blocks : tuple of int
        Sweep lists.
    output_lengths : dict
        Output tokens → weight.
    """

    name: str
    vision: VisionSize
    decoder: DecoderSize
    crops: Mapping[str, tuple[int, int]] = field(default_factory=_CROPS.copy)
    text_tokens: tuple[int, int] = (8, 90)
    top_k: tuple[int, ...] = (4, 6, 8)
    num_blocks: tuple[int, ...] = (12, 14, 16)
    output_lengths: Mapping[int, float] = field(default_factory=_SHORT_ANSWERS.copy)

    @property
    def model_name(self) -> str:
        """Sizes in words, as the runs' `model`."""
        decoder = self.decoder
        return (
            f"OLMoE-shaped {self.name}: {decoder.blocks} blocks x {decoder.experts} experts, hidden {decoder.hidden}, "
            "random weights"
        )


_CPU_VISION = VisionSize(image_size=64, patch_size=8, pooling=2, width=128, layers=4, heads=4, mlp_width=512)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            VisionSize(image_size=16, patch_size=4, pooling=2, width=16, layers=1, heads=2, mlp_width=32),
            DecoderSize(vocabulary=64, hidden=32, heads=2, head_dim=16, blocks=2, experts=4, expert_width=16),
            crops={"low": (1, 1), "medium": (2, 2), "high": (3, 4)},
            text_tokens=(4, 12),
            top_k=(1, 2),
            num_blocks=(1, 2),
            output_lengths={1: 1, 2: 2, 4: 2, 8: 1},
        ),
        Preset(
            "cpu",
            _CPU_VISION,
            DecoderSize(vocabulary=4096, hidden=192, heads=3, head_dim=64, blocks=16, experts=32, expert_width=96),
        ),
        # As `cpu`, with a decoder a third wider: another model for the same machine.
        Preset(
            "cpu-wide",
            _CPU_VISION,
            DecoderSize(vocabulary=4096, hidden=256, heads=4, head_dim=64, blocks=16, experts=32, expert_width=128),
        ),
        # The shape of MolmoE-1B: 1B active, 7B in total, CLIP ViT-L/14 at 336 pixels.
        Preset(
            "molmoe-1b",
            VisionSize(image_size=336, patch_size=14, pooling=2, width=1024, layers=24, heads=16, mlp_width=4096),
            DecoderSize(
                vocabulary=50304, hidden=2048, heads=16, head_dim=128, blocks=16, experts=64, expert_width=1024
            ),
        ),
    )
}


def parse_output_lengths(given: str) -> dict[int, float]:
    """Weights by output tokens.

    Parameters
    ----------
    given : str
        ``2:30,8:10,32`` (tokens, and a weight that is 1 if left out), or the path of a table, whose ``output_length``
        is taken, all workloads together.

    Raises
    ------
    ArgumentError
        It is neither.
    TableError
        The file is no table.
    """
    if Path(given).is_file():
        from lutest.tablefile.sql import connect, database_errors

        with connect(given) as connection, database_errors(f"{given}: has no output lengths: "):
            query = "SELECT output_tokens, sum(n) FROM output_length GROUP BY output_tokens ORDER BY output_tokens"
            rows = connection.execute(query).fetchall()
        return {int(tokens): float(n) for tokens, n in rows}
    lengths: dict[int, float] = {}
    for part in given.split(","):
        tokens, _, weight = part.partition(":")
        try:
            length, share = int(tokens), float(weight or 1)
        except ValueError:
            length, share = 0, 0.0
        if length < 1 or not 0 < share < math.inf:
            raise ArgumentError(
                f"output lengths {given!r}: {part!r} is neither the path of a table nor tokens with a weight, such as "
                "2:30,8:10,32"
            )
        lengths[length] = lengths.get(length, 0.0) + share
    return lengths
