"""Pre-training of tiny models: the optimizer of all, image tokenizers of every kind, what is kept.

Shapes: B batch, H x W pixels, h x w codes, N latents of a batch, E codebook dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.files import replacing, write_json
from t2i.models.base import Backbone
from t2i.models.tokenizers.lfq import LFQTokenizer
from t2i.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.progress import progress_bar

ImageTokenizer = VQTokenizer | MaskGITVQGAN | LFQTokenizer
CONSTANT_RATE = 0.6
"""Share of a run before its rate falls."""
_IDLE_STEPS = 25


class Descent:
    """AdamW whose rate warms up, stays, and falls to zero over the last 40 % of the run, unless it
    is constant.
    """

    def __init__(
        self,
        trained: nn.Module,
        lr: float,
        *,
        weight_decay: float = 0.01,
        warm_up: int = 20,
        constant: bool = False,
    ):
        self._parameters, self._peak = list(trained.parameters()), lr
        self._steps, self._warm_up, self._constant = 0, warm_up, constant
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            betas=(0.9, 0.95),
            weight_decay=weight_decay,
            fused=self._parameters[0].is_cuda,
        )

    def step(self, loss: Tensor, done: float) -> None:
        """Follow the gradients of a loss, clipped; `done` is the share of the run before it."""
        self._steps += 1
        left = 1.0 if self._constant else (1 - done) / (1 - CONSTANT_RATE)
        share = min(1, self._steps / self._warm_up, left)
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * share
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()


def train_tokenizer(
    tokenizer: ImageTokenizer, batches: Iterator[Tensor], *, steps: int, lr: float
) -> None:
    """Reconstruction of pixels [B, 3, H, W] with straight-through codes; frozen afterwards."""
    descent = Descent(tokenizer, lr)
    codebook = None if isinstance(tokenizer, LFQTokenizer) else tokenizer.quantize
    device = next(tokenizer.parameters()).device
    used = torch.zeros(tokenizer.codebook_size, dtype=torch.bool, device=device)
    tokenizer.train().to(memory_format=torch.channels_last)
    bar = progress_bar(range(steps), desc="tokenizer", unit="step")
    for step in bar:
        pixels = next(batches)
        latents = tokenizer.latents(pixels.contiguous(memory_format=torch.channels_last))
        if codebook is None:
            z, rows = latents, torch.where(latents > 0, 1.0, -1.0)
        else:
            codes = tokenizer.encode(pixels)
            used[codes] = True
            if step % _IDLE_STEPS == 0 and step < CONSTANT_RATE * steps:
                _move_idle_codes(codebook.embedding.weight, latents, used)
            # A cosine codebook stands for directions.
            z = F.normalize(latents, dim=1) if isinstance(tokenizer, VQTokenizer) else latents
            rows = codebook.vectors()[codes].permute(0, 3, 1, 2)
        decoded = tokenizer.decode_vectors(z + (rows - z).detach())
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        descent.step(loss + _code_loss(codebook, rows, z), step / steps)
        bar.set_postfix(reconstruction=f"{loss.item():.4f}")
    tokenizer.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)


def _code_loss(codebook: nn.Module | None, rows: Tensor, z: Tensor) -> Tensor:
    """Draws code vectors and latents together; bits are asked to say something each (2310.05737).

    Commitment to the signs would freeze them: with it, 60 of 256 codes came to be used here.
    """
    if codebook is None:
        p = torch.sigmoid(4 * z).mean((0, 2, 3)).clamp(1e-4, 1 - 1e-4)
        return 0.1 * (p * p.log() + (1 - p) * (1 - p).log()).mean()
    return F.mse_loss(rows, z.detach()) + 0.25 * F.mse_loss(z, rows.detach())


@torch.no_grad()
def _move_idle_codes(table: Tensor, latents: Tensor, used: Tensor) -> None:
    """Codes that nothing has used since the last time move onto latents [B, E, h, w] of a batch."""
    idle = torch.nonzero(~used).flatten()
    z_NE = latents.permute(0, 2, 3, 1).flatten(0, 2)
    picks = z_NE[torch.randperm(len(z_NE))[: len(idle)]]
    table[idle[: len(picks)]] = picks + 0.01 * torch.randn_like(picks)
    used.zero_()


def save_tokenizer(tokenizer: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Write an image tokenizer in its authors' layout."""
    weights = {k: v.to("cpu", dtype).contiguous() for k, v in tokenizer.state_dict().items()}
    with replacing(path) as temporary:
        torch.save({"model": weights}, temporary)


def write_base(
    backbone: Backbone,
    folder: Path,
    sampling: dict[str, float],
    *,
    dtype: torch.dtype = torch.float32,
    text_encoder: Sequence[Any] = (),
) -> Path:
    """A folder as `--backbone.weights` takes it, in official layouts; config.json comes last.

    text_encoder: what saves itself to its folder, the encoder and its tokenizer.
    """
    (folder / "model").mkdir(parents=True, exist_ok=True)
    weights = backbone.save_official(folder / "model", dtype)
    content: dict[str, object] = {"family": backbone.spec.family}
    content["weights"] = str(weights.relative_to(folder))
    if weights.is_file():  # a published folder has its tokenizers and its configuration inside
        save_tokenizer(backbone.tokenizer, folder / "tokenizer.pt", dtype)
        content |= {"tokenizer": "tokenizer.pt", "config": asdict(backbone.config)}
    if text_encoder:
        for part in text_encoder:
            part.save_pretrained(folder / "text_encoder")
        content["text_encoder"] = "text_encoder"
    write_json(folder / "config.json", {**content, "sampling": sampling})
    return folder
