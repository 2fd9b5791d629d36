"""The VQ tokenizer that LlamaGen and Janus share (LlamaGen `tokenizer/tokenizer_image/vq_model.py`,
Janus `vq_model.py`).

A convolutional encoder, a codebook compared by cosine (both sides are L2-normalized at every call,
as stored rows need not be unit vectors) and a convolutional decoder. VQ-16 has channel multipliers
(1, 1, 2, 2, 4), VQ-8 (1, 2, 2, 4).

Shapes: B images, H x W pixels, h x w codes, C channels, V codebook rows, E codebook dimension.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.tokenizers.conv_tokenizer import (
    Codebook,
    ConvConfig,
    ConvTokenizer,
    Level,
    ResBlock,
    UpConv,
    encoder_shape,
    group_norm,
    res_blocks,
    run_stack,
)
from t2i.weights import reading_shape


@dataclass(frozen=True)
class VQConfig(ConvConfig):
    """Shape of a VQ tokenizer; the defaults are VQ-16."""

    res_blocks: int = 2
    """Number of residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: int = 256
    """Channels between the convolutions and the projection to the codebook."""
    codebook_size: int = 16384
    codebook_dim: int = 8

    @staticmethod
    def from_state_dict(state_dict: dict[str, Tensor]) -> "VQConfig":
        """Read the shape off an official state dict; UserError if it is not a VQ tokenizer."""
        with reading_shape("a VQ tokenizer of LlamaGen's layout"):
            shape = encoder_shape(state_dict, "conv_blocks", "res")
            size, dim = state_dict["quantize.embedding.weight"].shape
            return VQConfig(
                **shape,
                latent_channels=state_dict["encoder.conv_out.weight"].shape[0],
                codebook_size=size,
                codebook_dim=dim,
            )


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of the feature map."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the reference pads right and bottom only


def _level(
    c_in: int, c_out: int, blocks: int, *, attend: bool, resample: tuple[str, nn.Module] | None
) -> Level:
    """One resolution: residual blocks, each followed by attention if `attend`."""
    lists = {"res": res_blocks(c_in, c_out, blocks)}
    if attend:
        lists["attn"] = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks))
    return Level(resample, **lists)


def _mid(c: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(c, c), AttnBlock(c), ResBlock(c, c)])


class VQEncoder(nn.Module):
    def __init__(self, cfg: VQConfig):
        super().__init__()
        widths = [cfg.channels * m for m in cfg.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, cfg.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            _level(
                c,
                width,
                cfg.res_blocks,
                attend=i == last,
                resample=None if i == last else ("downsample", Downsample(width)),
            )
            for i, (c, width) in enumerate(pairwise([cfg.channels, *widths]))
        )
        self.mid = _mid(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return run_stack(self, (*self.conv_blocks, *self.mid), x)


class VQDecoder(nn.Module):
    def __init__(self, cfg: VQConfig):
        super().__init__()
        widths = [cfg.channels * m for m in reversed(cfg.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid = _mid(widths[0])
        self.conv_blocks = nn.ModuleList(
            _level(
                c,
                width,
                cfg.res_blocks + 1,
                attend=i == 0,
                resample=None
                if i == last
                else ("upsample", nn.Sequential(OrderedDict(conv=UpConv(width)))),
            )
            for i, (c, width) in enumerate(pairwise([widths[0], *widths]))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return run_stack(self, (*self.mid, *self.conv_blocks), x)


class UnitCodebook(Codebook):
    def vectors(self) -> Tensor:
        """Unit-norm codebook rows [V, E], as passed to the decoder."""
        return F.normalize(self.embedding.weight, dim=-1)


class VQTokenizer(ConvTokenizer):
    """Reads vq_ds16_c2i.pt, vq_ds16_t2i.pt, vq_ds8_c2i.pt, and Janus' gen_vision_model weights."""

    config_type = VQConfig
    ignored_keys = ("quantize.codebook_used",)  # a usage counter of the reference's training loop

    def __init__(self, config: VQConfig):
        super().__init__(config)
        self.encoder, self.decoder = VQEncoder(config), VQDecoder(config)
        self.quantize = UnitCodebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def latents(self, pixels: Tensor) -> Tensor:
        """Latents that are not normalized yet: `encode` does it."""
        return self.quant_conv(self.encoder(pixels))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        z_BhwE = F.normalize(self.latents(pixels).permute(0, 2, 3, 1).float(), dim=-1)
        return (z_BhwE @ self.quantize.vectors().float().T).argmax(-1)

    def decode_vectors(self, z_BEhw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_BEhw))
