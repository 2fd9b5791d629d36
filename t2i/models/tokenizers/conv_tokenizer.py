"""The interface of convolutional tokenizers, the loading of official weights, and shared blocks.

Shapes: B images, H x W pixels, h x w codes, V codebook rows, E codebook dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import naming
from t2i.weights import build_empty, count_children, load_strict, read_state_dict


@dataclass(frozen=True)
class ConvConfig:
    """Widths of the encoder (and, in reverse, the decoder); the defaults are the published ones."""

    channels: int = 128
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each resolution; the resolution halves from one to the next."""


def encoder_shape(state_dict: dict[str, Tensor], levels: str, blocks: str) -> dict:
    """Channels, multipliers and number of residual blocks of an encoder, given the names of its
    list of levels and of each level's list of blocks.

    Raises:
        KeyError: a key is missing.
    """
    channels = state_dict["encoder.conv_in.weight"].shape[0]
    # At least one, so that another family's file fails below with the name of a missing key.
    count = max(1, count_children(state_dict, f"encoder.{levels}."))
    widths = [
        state_dict[f"encoder.{levels}.{i}.{blocks}.0.conv2.weight"].shape[0] for i in range(count)
    ]
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "res_blocks": count_children(state_dict, f"encoder.{levels}.0.{blocks}."),
    }


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6, affine=affine)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut, whose projection with `of_branch` reads their output."""

    def __init__(self, c_in: int, c_out: int, *, bias: bool = True, of_branch: bool = False):
        super().__init__()
        self.of_branch = of_branch
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_out if of_branch else c_in, c_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(h if self.of_branch else x)
        return x + h


def res_blocks(
    c_in: int, c_out: int, count: int, *, bias: bool = True, of_branch: bool = False
) -> nn.ModuleList:
    """A list of residual blocks; the first changes the width."""
    widths = [c_in, *[c_out] * count]
    return nn.ModuleList(
        ResBlock(a, b, bias=bias, of_branch=of_branch) for a, b in pairwise(widths)
    )


class Level(nn.Module):
    """One resolution: blocks taken from each list in turn, then possibly a resampling.

    Lists and resampling have the names used in the official files.
    """

    def __init__(self, resample: tuple[str, nn.Module] | None, **blocks: nn.ModuleList):
        super().__init__()
        for name, part in blocks.items():
            self.add_module(name, part)
        self._lists = tuple(blocks)
        self._resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for row in zip(*(getattr(self, name) for name in self._lists), strict=True):
            for block in row:
                x = block(x)
        return getattr(self, self._resample)(x) if self._resample else x


class UpConv(nn.Conv2d):
    """A 3 x 3 convolution of the map at twice its resolution."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))


def run_stack(stack: Any, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run an encoder or decoder: a convolution, these blocks, norm and SiLU, a convolution."""
    x = stack.conv_in(x)
    for block in blocks:
        x = block(x)
    return stack.conv_out(F.silu(stack.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    def vectors(self) -> Tensor:
        """Codebook rows [V, E] as passed to the decoder."""
        return self.embedding.weight


class ConvTokenizer(nn.Module, ABC):
    """Images <-> codes, with the parameter names of the official checkpoints."""

    config_type: ClassVar[type[Any]]
    """A `ConvConfig` with a `codebook_size` and a static `from_state_dict`."""
    ignored_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of official files that encoding and decoding do not use."""
    quantize: Codebook
    """The codebook, if there is one."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @abstractmethod
    def latents(self, pixels: Tensor) -> Tensor:
        """Latents to quantize, [B, E, h, w], of pixels [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of pixels [B, 3, H, W] in [-1, 1]. Use fp32: bf16 changes codes."""

    @abstractmethod
    def decode_vectors(self, z_BEhw: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], nominally in [-1, 1], of code vectors."""

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.config.multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The vectors [..., E] passed to the decoder for codes [...]."""
        return self.quantize.vectors()[codes]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], nominally in [-1, 1] but not clamped, of codes int64 [B, h, w]."""
        return self.decode_vectors(self.vectors_of(codes).movedim(-1, 1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load an official file strictly; frozen, fp32.

        Raises:
            UserError: the file is unreadable or another family's, or has keys that do not fit.
        """
        stored = read_state_dict(path)
        state_dict = {k: v for k, v in stored.items() if k not in cls.ignored_keys}
        tokenizer = cls.empty(state_dict, path)
        load_strict(tokenizer, state_dict, path)
        return tokenizer

    @classmethod
    def outline(cls) -> Self:
        """A frozen tokenizer of the published shape, without weights, on the meta device."""
        return build_empty(lambda: cls(cls.config_type()), device="meta").requires_grad_(False)

    @classmethod
    def empty(cls, state_dict: dict[str, Tensor], path: str | Path) -> Self:
        """A frozen tokenizer with the shape and device of a file's weights, ready to load them."""
        with naming(path):
            config = cls.config_type.from_state_dict(state_dict)
        device = next(iter(state_dict.values())).device
        return build_empty(lambda: cls(config), device=device).requires_grad_(False)
