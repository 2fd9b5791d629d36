"""The MaskGIT VQGAN that RAR uses (1d-tokenizer `modeling/modules/maskgit_vqgan.py`, weights of
TiTok's PretrainedTokenizer).

A convolutional VQ-GAN without attention. Differences from LlamaGen's VQ that matter for parity:

- Its networks use pixels in [0, 1]. This class, like the rest of the kit, takes and returns pixels
  in [-1, 1].
- Where a residual block changes the width, the 1x1 shortcut is applied to the output of the block's
  convolutions, not to its input.
- The nearest code is the one at the smallest Euclidean distance: neither side is normalized.
- Average pooling halves the resolution; most convolutions have no bias; `decoder.up` is stored from
  fine to coarse.

All strides are 1 and all kernels odd, so TensorFlow's SAME padding is the same on every side.

Shapes: B images, H x W pixels, h x w codes, V codebook rows, E codebook dimension.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from t2i.models.tokenizers.conv_tokenizer import (
    Codebook,
    ConvConfig,
    ConvTokenizer,
    Level,
    UpConv,
    encoder_shape,
    group_norm,
    res_blocks,
    run_stack,
)
from t2i.weights import reading_shape


@dataclass(frozen=True)
class MaskGITConfig(ConvConfig):
    """Shape of the tokenizer; the defaults are the published shape (16 pixels per code)."""

    res_blocks: int = 2
    """Number of residual blocks at each resolution and in the middle, in encoder and decoder."""
    codebook_size: int = 1024
    codebook_dim: int = 256

    @staticmethod
    def from_state_dict(state_dict: dict[str, Tensor]) -> "MaskGITConfig":
        """Read the shape off an official state dict; UserError if it is not a MaskGIT VQGAN."""
        with reading_shape("a MaskGIT VQGAN"):
            shape = encoder_shape(state_dict, "down", "block")
            size, dim = state_dict["quantize.embedding.weight"].shape
            return MaskGITConfig(**shape, codebook_size=size, codebook_dim=dim)


# Unusual (`of_branch`), but the published weights were trained this way.
_res_blocks = partial(res_blocks, bias=False, of_branch=True)


def _conv(c_in: int, c_out: int, kernel: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias)


class MaskGITEncoder(nn.Module):
    def __init__(self, cfg: MaskGITConfig):
        super().__init__()
        widths = [cfg.channels, *(cfg.channels * m for m in cfg.multipliers)]
        last = len(cfg.multipliers) - 1
        self.conv_in = _conv(3, cfg.channels, bias=False)
        self.down = nn.ModuleList(
            Level(
                None if i == last else ("pool", nn.AvgPool2d(2)),
                block=_res_blocks(c_in, c_out, cfg.res_blocks),
            )
            for i, (c_in, c_out) in enumerate(pairwise(widths))
        )
        self.mid = _res_blocks(widths[-1], widths[-1], cfg.res_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = _conv(widths[-1], cfg.codebook_dim, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return run_stack(self, (*self.down, *self.mid), x)


class MaskGITDecoder(nn.Module):
    def __init__(self, cfg: MaskGITConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = _conv(cfg.codebook_dim, widths[-1])
        self.mid = _res_blocks(widths[-1], widths[-1], cfg.res_blocks)
        self.up = nn.ModuleList(
            Level(
                block=_res_blocks(c, width, cfg.res_blocks),
                resample=None if i == 0 else ("upsample_conv", UpConv(width)),
            )
            for i, (c, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = _conv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        return run_stack(self, (*self.mid, *reversed(self.up)), x)


class MaskGITVQGAN(ConvTokenizer):
    """The tokenizer in maskgit-vqgan-imagenet-f16-256.bin."""

    config_type = MaskGITConfig

    def __init__(self, config: MaskGITConfig):
        super().__init__(config)
        self.encoder, self.decoder = MaskGITEncoder(config), MaskGITDecoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim)

    def latents(self, pixels: Tensor) -> Tensor:
        return self.encoder((pixels + 1) / 2)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        z_BhwE = self.latents(pixels).permute(0, 2, 3, 1).float()
        rows_VE = self.quantize.vectors().float()
        # |z - e|^2 without |z|^2, which is equal for all codes.
        return (rows_VE.pow(2).sum(-1) - 2 * (z_BhwE @ rows_VE.T)).argmin(-1)

    def decode_vectors(self, z_BEhw: Tensor) -> Tensor:
        return 2 * self.decoder(z_BEhw) - 1
