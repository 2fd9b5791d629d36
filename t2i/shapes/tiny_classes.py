"""Tiny class-conditional bases of every family, from nothing: tokenizers and generators for the
offline world.

Shapes: N images, B batch, H x W pixels, h x w codes, E codebook dimension.
"""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.files import write_json
from t2i.models.base import Backbone
from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
from t2i.models.open_magvit2.open_magvit2_model import OpenMAGVIT2, OpenMAGVIT2Config
from t2i.models.rar.rar_model import RAR, RARConfig
from t2i.models.tokenizers.lfq import LFQConfig, LFQTokenizer
from t2i.models.tokenizers.maskgit_vqgan import MaskGITConfig, MaskGITVQGAN
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.progress import progress_bar

PIXELS_PER_CODE = 4
_CODES, _BITS = 512, (6, 6)
_HEAD = 32  # width of an attention head


def build_tokenizer(family: str, *, seed: int = 0) -> nn.Module:
    """A small tokenizer of the family's kind with fresh weights: 4 pixels a code, 512 codes or 12
    bits.
    """
    torch.manual_seed(seed)
    shape = {"channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1}
    if family == "llamagen":
        return VQTokenizer(VQConfig(**shape, latent_channels=32, codebook_size=_CODES))
    if family == "rar":
        tokenizer = MaskGITVQGAN(MaskGITConfig(**shape, codebook_size=_CODES, codebook_dim=16))
        nn.init.normal_(tokenizer.quantize.embedding.weight)
        return tokenizer
    return LFQTokenizer(LFQConfig(**shape, bits=sum(_BITS)))


def build_backbone(
    family: str, tokenizer: nn.Module, *, side: int, classes: int, dim: int, layers: int, seed: int
) -> Backbone:
    """A generator of side x side codes with fresh weights, and without dropout."""
    shape = {"dim": dim, "n_layer": layers, "n_head": max(1, dim // _HEAD), "grid": (side, side)}
    llama = {
        **shape,
        "num_classes": classes,
        "ffn_dim": 4 * dim,
        "token_dropout": 0.0,
        "resid_dropout": 0.0,
        "ffn_dropout": 0.0,
    }
    if family == "llamagen":
        backbone = LlamaGen(LlamaGenConfig(**llama, vocab_size=_CODES))
        weights = backbone.gpt
    elif family == "open_magvit2":
        backbone = OpenMAGVIT2(OpenMAGVIT2Config(**llama, n_intra_layer=1, bits=_BITS))
        weights = backbone.transformer
    else:
        plain = {"vocab_size": _CODES, "num_classes": classes, "dropout": 0.0, "attn_dropout": 0.0}
        backbone = RAR(RARConfig(**shape, mlp_dim=4 * dim, **plain))
        weights = backbone.gpt
    weights.initialize(torch.Generator().manual_seed(seed))
    backbone.frozen.tokenizer = tokenizer
    return backbone.eval()


def train_tokenizer(
    tokenizer: nn.Module, pixels: Tensor, *, steps: int, lr: float, seed: int, batch: int = 32
) -> None:
    """Reconstruction of pixels [N, 3, H, W] with straight-through codes; the tokenizer is frozen
    afterwards.

    The learning rate falls to zero.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, betas=(0.9, 0.95))
    tokenizer.train()
    for step in progress_bar(range(steps), desc="tokenizer", unit="step"):
        images = pixels[torch.randint(len(pixels), (batch,), generator=generator)]
        latents = tokenizer.latents(images)
        if step % 25 == 0 and step < 0.6 * steps and hasattr(tokenizer, "quantize"):
            _move_idle_codes(tokenizer, images, latents)
        rows, z = _quantized(tokenizer, images, latents)
        decoded = tokenizer.decode_vectors(z + (rows - z).detach())
        loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        loss = loss + _code_loss(tokenizer, rows, z)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
    tokenizer.eval().requires_grad_(False)


def _quantized(tokenizer: nn.Module, images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Code vectors [B, E, h, w] of the images, and the latents that they stand for (on the sphere
    for cosine codebooks).
    """
    if isinstance(tokenizer, LFQTokenizer):
        return torch.where(latents > 0, 1.0, -1.0), latents
    z = F.normalize(latents, dim=1) if isinstance(tokenizer, VQTokenizer) else latents
    return tokenizer.quantize.vectors()[tokenizer.encode(images)].permute(0, 3, 1, 2), z


def _code_loss(tokenizer: nn.Module, rows: Tensor, z: Tensor) -> Tensor:
    """Draws code vectors and latents together; without a codebook, asks that every bit says
    something (after arXiv 2310.05737).

    Commitment to the signs would freeze them: with it, 60 of 256 codes came to be used here.
    """
    if isinstance(tokenizer, LFQTokenizer):
        p = torch.sigmoid(4 * z).mean((0, 2, 3)).clamp(1e-4, 1 - 1e-4)
        return 0.1 * (p * p.log() + (1 - p) * (1 - p).log()).mean()
    return F.mse_loss(rows, z.detach()) + 0.25 * F.mse_loss(z, rows.detach())


@torch.no_grad()
def _move_idle_codes(tokenizer: nn.Module, images: Tensor, latents: Tensor) -> None:
    """Codes that no latent of the batch uses move onto latents of it."""
    table = tokenizer.quantize.embedding.weight
    used = torch.bincount(tokenizer.encode(images).flatten(), minlength=len(table)) > 0
    idle = torch.nonzero(~used).flatten()
    z_NE = latents.permute(0, 2, 3, 1).flatten(0, 2)
    picks = z_NE[torch.randperm(len(z_NE))[: len(idle)]]
    table[idle[: len(picks)]] = picks + 0.01 * torch.randn_like(picks)


def write_base(backbone: Backbone, folder: Path) -> Path:
    """A backbone folder as `--backbone.weights` takes it, in official layouts; config.json is
    written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(backbone.tokenizer.state_dict(), folder / "tokenizer.pt")
    backbone.save_official(folder, torch.float32)
    content = {
        "family": backbone.spec.family,
        "weights": "model.pt",
        "tokenizer": "tokenizer.pt",
        "config": asdict(backbone.config),
        "sampling": {"cfg_scale": 2.0},
    }
    write_json(folder / "config.json", content)
    return folder
