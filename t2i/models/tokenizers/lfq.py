"""The look-up-free tokenizer of Open-MAGVIT2 (arXiv 2409.04410; SEED-Voken
`modules/diffusionmodules/improved_model.py`).

There is no learned codebook: a code is the sign pattern of E latent channels, and its index is the
pattern read as a binary number. Channel i is bit i, least significant first; positive latents give
1, others 0. The decoder's adaptive group norms use the mean and standard deviation of the code
vectors over the whole image, so every pixel depends on every code.

Shapes: B images, H x W pixels, h x w codes, C channels, E bits.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.tokenizers.conv_tokenizer import (
    ConvConfig,
    ConvTokenizer,
    Level,
    encoder_shape,
    group_norm,
    res_blocks,
    run_stack,
)
from t2i.weights import load_strict, read_state_dict, reading_shape

# Prefix of the tokenizer in a checkpoint of the autoregressive model.
_EMBEDDED = "first_stage_model."
_EMA = "model_ema."
_EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
# The discriminator and other parts of the loss, which files from your own training also hold.
_LOSS = ("loss.", "model_ema.loss")


def signs(indices: Tensor, bits: int) -> Tensor:
    """Code vectors fp32 [..., E] of -1 and +1 for indices int64 [...]."""
    set_bits = indices[..., None] >> torch.arange(bits, device=indices.device) & 1
    return (2 * set_bits - 1).float()


def indices(latents: Tensor) -> Tensor:
    """Indices int64 [...] of the sign patterns of latents [..., E]."""
    return ((latents > 0).long() << torch.arange(latents.shape[-1], device=latents.device)).sum(-1)


@dataclass(frozen=True)
class LFQConfig(ConvConfig):
    """Shape of an LFQ tokenizer; the defaults are the published ones."""

    res_blocks: int = 4
    """Number of residual blocks at each resolution and in the middle."""
    bits: int = 18
    """Number of latent channels, one per bit of a code."""

    @property
    def codebook_size(self) -> int:
        return 2**self.bits

    @staticmethod
    def from_state_dict(state_dict: dict[str, Tensor]) -> "LFQConfig":
        """Read the shape off an official state dict; UserError if it is not an LFQ tokenizer."""
        with reading_shape("an LFQ tokenizer of Open-MAGVIT2's layout"):
            shape = encoder_shape(state_dict, "down", "block")
            return LFQConfig(**shape, bits=state_dict["encoder.conv_out.weight"].shape[0])


class LFQUpsample(nn.Module):
    """A convolution to four times the channels, which become 2 x 2 pixels.

    Its channels are ordered (row, column, channel); `F.pixel_shuffle` expects (channel, row,
    column).
    """

    def __init__(self, c: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c, 4 * c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.conv1(x).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(blocks, 2)


class AdaptiveGroupNorm(nn.Module):
    """Group norm with scale and shift from the code vectors' deviation and mean over the image."""

    def __init__(self, bits: int, c: int):
        super().__init__()
        self.norm = group_norm(c, affine=False)
        self.gamma, self.beta = nn.Linear(bits, c), nn.Linear(bits, c)

    def forward(self, x_BChw: Tensor, z_BEhw: Tensor) -> Tensor:
        # The sample variance, which divides by hw - 1.
        variance, mean = torch.var_mean(z_BEhw.flatten(2), dim=-1)
        scale, shift = self.gamma((variance + self.norm.eps).sqrt()), self.beta(mean)
        return scale[..., None, None] * self.norm(x_BChw) + shift[..., None, None]


class LFQEncoder(nn.Module):
    def __init__(self, cfg: LFQConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, cfg.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Level(
                None if i == last else ("downsample", nn.Conv2d(width, width, 3, 2, padding=1)),
                block=res_blocks(c, width, cfg.res_blocks, bias=False),
            )
            for i, (c, width) in enumerate(pairwise([cfg.channels, *widths]))
        )
        self.mid_block = res_blocks(widths[-1], widths[-1], cfg.res_blocks, bias=False)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        return run_stack(self, (*self.down, *self.mid_block), x)


class LFQDecoder(nn.Module):
    """`up` and `adaptive` are stored from fine to coarse, and run from coarse to fine."""

    def __init__(self, cfg: LFQConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(cfg.bits, widths[-1], 3, padding=1)
        self.mid_block = res_blocks(widths[-1], widths[-1], cfg.res_blocks, bias=False)
        self.up = nn.ModuleList(
            Level(
                None if i == 0 else ("upsample", LFQUpsample(width)),
                block=res_blocks(c, width, cfg.res_blocks, bias=False),
            )
            for i, (c, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(cfg.bits, c) for c in inputs)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_BEhw: Tensor) -> Tensor:
        x = self.conv_in(z_BEhw)
        for block in self.mid_block:
            x = block(x)
        for norm, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            x = level(norm(x, z_BEhw))
        return self.conv_out(F.silu(self.norm_out(x)))


class LFQTokenizer(ConvTokenizer):
    """Images <-> codes 0 .. 2^E - 1."""

    config_type = LFQConfig

    def __init__(self, config: LFQConfig):
        super().__init__(config)
        self.encoder, self.decoder = LFQEncoder(config), LFQDecoder(config)

    def latents(self, pixels: Tensor) -> Tensor:
        """Latents, whose signs are the code vectors."""
        return self.encoder(pixels)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return indices(self.latents(pixels).movedim(1, -1))

    def vectors_of(self, codes: Tensor) -> Tensor:
        return signs(codes, self.config.bits)

    def decode_vectors(self, z_BEhw: Tensor) -> Tensor:
        return self.decoder(z_BEhw)

    @classmethod
    def load(cls, path: str | Path, *, ema: bool = False) -> "LFQTokenizer":
        """Load an official file, frozen, fp32: a tokenizer file (imagenet_256_L.ckpt) or an AR
        checkpoint, which contains a tokenizer.

        A tokenizer file has two sets of weights. `ema` selects the averaged ones, with which its
        reconstruction FID was measured; the published autoregressive models use the others.

        Raises:
            UserError: the file is unreadable or another family's, has no averaged weights for
                `ema`, or has keys that do not fit.
        """
        state_dict = read_state_dict(path)
        state_dict = tokenizer_part(state_dict) or state_dict
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(_LOSS)}
        raw = {k: v for k, v in state_dict.items() if not k.startswith(_EMA)}
        averaged = {k: v for k, v in state_dict.items() if k not in raw and k not in _EMA_COUNTERS}
        if ema and not averaged:
            raise UserError(f"{path} has no averaged weights ({_EMA}*); load it with ema=False")
        tokenizer = cls.empty(raw, path)
        # Averaged weights are stored under names without dots.
        names = {_EMA + name.replace(".", ""): name for name in tokenizer.state_dict()}
        averaged = {names.get(k, k): v for k, v in averaged.items()}
        parts = [(raw, path), (averaged, f"{path} (averaged weights, {_EMA}*)")]
        # Both must fit; the last one loaded stays.
        for weights, source in parts if ema else reversed(parts):
            if weights:
                load_strict(tokenizer, weights, source)
        return tokenizer


def tokenizer_part(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer's part of an AR checkpoint's state dict, under its own names; empty if none."""
    return {k.removeprefix(_EMBEDDED): v for k, v in state_dict.items() if k.startswith(_EMBEDDED)}
