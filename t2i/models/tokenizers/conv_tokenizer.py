"""What the convolutional tokenizers share: how a shape is read off official weights, and how these
are loaded.

Shapes: B images, H x W pixels, h x w codes, V codebook rows, E codebook dimension.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from t2i.weights import build_empty, count_children, load_strict, naming, read_state_dict

T = TypeVar("T", bound="ConvTokenizer")


@dataclass(frozen=True)
class ConvConfig:
    """Resolutions of the encoder, which the decoder goes through the other way; the defaults are
    the published ones.
    """

    channels: int = 128
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each resolution; the image is halved between them."""


def encoder_shape(state_dict: dict[str, Tensor], levels: str, blocks: str) -> dict:
    """Channels, multipliers and residual blocks of an encoder, from the names of its list of levels
    and of a level's blocks.

    Raises:
        KeyError: a key that such an encoder has is missing.
    """
    channels = state_dict["encoder.conv_in.weight"].shape[0]
    # At least one, so that another family's file fails below by the name of a key.
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


class Codebook(nn.Module):
    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)

    def vectors(self) -> Tensor:
        """Codebook rows [V, E] as the decoder receives them."""
        return self.embedding.weight


class ConvTokenizer(nn.Module):
    """Images <-> codes; parameter names are those of the official checkpoints. A family adds
    `encode` and `decode_vectors`.
    """

    config_type: type[ConvConfig]
    ignored_keys: tuple[str, ...] = ()
    """Keys of official files that have no part in encoding or decoding."""

    def __init__(self, config: ConvConfig):
        super().__init__()
        self.config = config

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.config.multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def vectors_of(self, codes: Tensor) -> Tensor:
        """What the decoder receives for codes [...]: vectors [..., E]."""
        return self.quantize.vectors()[codes]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], nominally in [-1, 1] but not clamped, of codes int64 [B, h, w]."""
        return self.decode_vectors(self.vectors_of(codes).movedim(-1, 1))

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Load an official file strictly; frozen, fp32.

        Raises:
            UserError: unreadable file, another family, or keys that do not fit.
        """
        stored = read_state_dict(path)
        state_dict = {k: v for k, v in stored.items() if k not in cls.ignored_keys}
        tokenizer = cls.empty(state_dict, path)
        load_strict(tokenizer, state_dict, path)
        return tokenizer

    @classmethod
    def empty(cls: type[T], state_dict: dict[str, Tensor], path: str | Path) -> T:
        """A frozen tokenizer in eval mode of the shape that a file's weights have, to be filled
        with them.
        """
        with naming(path):
            config = cls.config_type.from_state_dict(state_dict)
        return build_empty(lambda: cls(config)).requires_grad_(False)
