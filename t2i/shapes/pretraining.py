"""Parts of pre-training that all tiny bases share: optimizer, image tokenizers, saving.

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
"""Share of a run before the learning rate starts to fall."""
_IDLE_STEPS = 25  # between replacements of unused codes


class Descent:
    """AdamW with a learning rate that warms up, stays constant and, unless `constant`, falls to
    zero over the last 40 % of the run.
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
        """Take a step along a loss's clipped gradients; `done` is the share of the run so far."""
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
    """Train to reconstruct pixels [B, 3, H, W] with straight-through codes; then freeze."""
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
            # VQTokenizer's codes are directions: it compares by cosine.
            z = F.normalize(latents, dim=1) if isinstance(tokenizer, VQTokenizer) else latents
            rows = codebook.vectors()[codes].permute(0, 3, 1, 2)
        decoded = tokenizer.decode_vectors(z + (rows - z).detach())
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        descent.step(loss + _code_loss(codebook, rows, z), step / steps)
        bar.set_postfix(reconstruction=f"{loss.item():.4f}")
    tokenizer.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)


def _code_loss(codebook: nn.Module | None, rows: Tensor, z: Tensor) -> Tensor:
    """Pull code vectors and latents together; for bits, reward each for being balanced
    (2310.05737).

    Bits have no commitment loss, which would freeze their signs: with it, only 60 of 256 codes were
    used here.
    """
    if codebook is None:
        p = torch.sigmoid(4 * z).mean((0, 2, 3)).clamp(1e-4, 1 - 1e-4)
        return 0.1 * (p * p.log() + (1 - p) * (1 - p).log()).mean()
    return F.mse_loss(rows, z.detach()) + 0.25 * F.mse_loss(z, rows.detach())


@torch.no_grad()
def _move_idle_codes(table: Tensor, latents: Tensor, used: Tensor) -> None:
    """Move codes unused since the last call onto random latents of a batch [B, E, h, w]."""
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
    """Write a folder for `--backbone.weights`, in official layouts; config.json comes last.

    text_encoder: the encoder and its tokenizer, objects with `save_pretrained`.
    """
    (folder / "model").mkdir(parents=True, exist_ok=True)
    weights = backbone.save_official(folder / "model", dtype)
    content: dict[str, object] = {"family": backbone.spec.family}
    content["weights"] = str(weights.relative_to(folder))
    if weights.is_file():  # a published folder already contains tokenizers and configuration
        save_tokenizer(backbone.tokenizer, folder / "tokenizer.pt", dtype)
        content |= {"tokenizer": "tokenizer.pt", "config": asdict(backbone.config)}
    if text_encoder:
        for part in text_encoder:
            part.save_pretrained(folder / "text_encoder")
        content["text_encoder"] = "text_encoder"
    write_json(folder / "config.json", {**content, "sampling": sampling})
    return folder
