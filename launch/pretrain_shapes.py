"""Pre-train the tiny offline base model: VQ tokenizer, then T5-style text encoder + LlamaGen text-to-image GPT.

This is how `t2i/assets/shapes/` was made. Files have official layouts, so that the shipped base is loaded by the same code as the
published checkpoints; what is finished is kept. Bases of other sizes may share one tokenizer and its codes:

    python launch/pretrain_shapes.py --out runs/shapes-base
    python launch/pretrain_shapes.py --out runs/shapes-1m --dim 128 --layers 4 --tokenizer runs/shapes-base/vq.pt
"""

import logging
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run from a clone, without installation

from t2i import cli
from t2i.backbones.llamagen import LlamaGen, LlamaGenConfig
from t2i.conditioning.captions import clean_caption
from t2i.conditioning.tiny_t5 import build_tiny_t5
from t2i.data.shapes import render, sample_scene
from t2i.data.shapes_prompts import TAGS, all_prompts
from t2i.files import write_json
from t2i.presets import base as base_method
from t2i.tensorar.model import TensorAR
from t2i.tokenizers.vq import VQConfig, VQTokenizer

log = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Pretrain:
    """Recipe of the shapes base."""

    out: Path
    """Folder for vq.pt, text_encoder/, gpt.pt and config.json."""
    seed: int = 0
    """World that the training scenes come from; also seeds the weights."""
    image_size: int = 64
    """Side of the images in pixels."""
    vq_steps: int = 1500
    vq_batch: int = 32
    vq_lr: float = 1e-3
    tokenizer: Path | None = None
    """Finished tokenizer to use instead of training one."""
    scenes: int = 96000
    """Number of captioned scenes for the GPT: enough to see each about twice, or a few million parameters learn them by heart."""
    gpt_steps: int = 3000
    gpt_batch: int = 64
    gpt_lr: float = 2e-3
    dim: int = 192
    """Width of the GPT (its heads are 32 wide)."""
    layers: int = 6
    caption_tokens: int = 16
    text_dim: int = 128
    """Width of the text encoder."""


# -- tokenizer -----------------------------------------------------------------------------------


def scene_pixels(cfg: Pretrain, indices: np.ndarray) -> Tensor:
    """Rendered scenes, float32 [B, 3, H, W] in [-1, 1]."""
    scenes = (render(sample_scene(cfg.seed, int(i)), cfg.image_size) for i in indices)
    images = torch.from_numpy(np.stack([np.asarray(image) for image in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_tokenizer(cfg: Pretrain) -> VQTokenizer:
    """L1 + MSE reconstruction, cosine codebook; codes that nothing uses move onto latents of a batch."""
    torch.manual_seed(cfg.seed)
    model = VQTokenizer(VQConfig(32, (1, 1, 2, 2), 1, 64, codebook_size=1024, codebook_dim=8))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.vq_lr, betas=(0.9, 0.95))
    used = torch.zeros(model.codebook_size)
    random = np.random.default_rng(cfg.seed)
    for step in range(cfg.vq_steps):
        set_rate(optimizer, cfg.vq_lr, step, cfg.vq_steps)
        pixels = scene_pixels(cfg, random.integers(0, 1 << 30, cfg.vq_batch))
        latents = model.latents(pixels.contiguous(memory_format=torch.channels_last))
        z = F.normalize(latents, dim=1)
        z_NE = z.permute(0, 2, 3, 1).flatten(0, 2)
        if step < 0.6 * cfg.vq_steps and step % 25 == 0:
            revive_codes(model, z_NE.detach(), used)
        codes = (z_NE @ model.quantize.vectors().T).argmax(-1)
        used.index_add_(0, codes, torch.ones(len(codes)))
        rows = model.quantize.vectors()[codes]
        rows = rows.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
        decoded = model.decode_vectors(z + (rows - z).detach())
        reconstruction = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        commitment = F.mse_loss(rows, z.detach()) + 0.25 * F.mse_loss(z, rows.detach())
        optimize(optimizer, model, reconstruction + commitment)
        if step % 50 == 0:
            log.info("tokenizer step %d: reconstruction %.4f", step, reconstruction.item())
    return model.eval().requires_grad_(False)


@torch.no_grad()
def revive_codes(model: VQTokenizer, z_NE: Tensor, used: Tensor) -> None:
    dead = torch.nonzero(used == 0).flatten()
    picks = z_NE[torch.randperm(len(z_NE))[: len(dead)]]
    noise = 0.01 * torch.randn_like(picks)
    model.quantize.embedding.weight[dead[: len(picks)]] = picks + noise
    used.zero_()


# -- text encoder and GPT ------------------------------------------------------------------------


def train_gpt(cfg: Pretrain, codes: Tensor, folder: Path) -> LlamaGen:
    """Train the GPT and its text encoder together; the encoder is frozen from then on."""
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(cfg.seed + 1)
    scenes = [sample_scene(cfg.seed, i) for i in range(cfg.scenes)]
    every_prompt = [metadata["prompt"] for tag in TAGS for metadata in all_prompts(tag)]
    build_tiny_t5(folder, every_prompt, d_model=cfg.text_dim, d_ff=2 * cfg.text_dim, seed=cfg.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = T5EncoderModel.from_pretrained(folder).train()
    tokens = tokenizer(
        [clean_caption(s.prompt) for s in scenes],
        padding="max_length",
        max_length=cfg.caption_tokens,
        truncation=True,
        return_tensors="pt",
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    gpt = LlamaGen(gpt_config(cfg, codes_side=int(codes.shape[1] ** 0.5))).train()
    gpt.gpt.initialize(torch.Generator().manual_seed(cfg.seed))
    model = TensorAR(gpt, base_method())
    parameters = torch.nn.ModuleList([model, encoder])
    optimizer = torch.optim.AdamW(
        parameters.parameters(), lr=cfg.gpt_lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    random = torch.Generator().manual_seed(cfg.seed)
    start = time.time()
    for step in range(cfg.gpt_steps):
        set_rate(optimizer, cfg.gpt_lr, step, cfg.gpt_steps)
        batch = torch.randint(cfg.scenes, (cfg.gpt_batch,), generator=random)
        drop = torch.rand(cfg.gpt_batch, generator=random) < 0.1
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(input_ids=ids[batch], attention_mask=mask[batch]).last_hidden_state
            prepared = left_padded(features, mask[batch])
            condition = gpt.encode_condition(prepared, drop)
            target = codes[batch, :, None]
            loss = model(target, condition, model.windows.gather(target)).weighted([1.0])
        optimize(optimizer, parameters, loss)
        if step % 50 == 0:
            rate = (time.time() - start) / (step + 1)
            log.info("gpt step %d: loss %.4f (%.2f s/step)", step, loss.item(), rate)
        if step % 500 == 0 or step + 1 == cfg.gpt_steps:
            save_model(gpt.official_state_dict(), folder.parent / "gpt.partial.pt")
            encoder.save_pretrained(folder)
    return gpt


def gpt_config(cfg: Pretrain, codes_side: int) -> LlamaGenConfig:
    return LlamaGenConfig(
        dim=cfg.dim,
        n_layer=cfg.layers,
        n_head=cfg.dim // 32,
        grid=(codes_side, codes_side),
        cond="text",
        vocab_size=1024,
        caption_tokens=cfg.caption_tokens,
        caption_dim=cfg.text_dim,
        token_dropout=0.0,
        resid_dropout=0.0,
        ffn_dropout=0.0,
    )


@torch.no_grad()
def scene_codes(cfg: Pretrain, tokenizer: Path) -> Tensor:
    """Codes int64 [scenes, T]; kept beside the tokenizer, since encoding takes a quarter of an hour."""
    path = tokenizer.with_name(f"codes-{cfg.seed}-{cfg.scenes}.npy")
    if not path.exists():
        log.info("encoding %d scenes", cfg.scenes)
        vq = VQTokenizer.load(tokenizer)
        chunks = [np.arange(i, min(i + 64, cfg.scenes)) for i in range(0, cfg.scenes, 64)]
        codes = torch.cat([vq.encode(scene_pixels(cfg, chunk)).flatten(1) for chunk in chunks])
        partial = path.with_suffix(".tmp.npy")
        np.save(partial, codes.numpy().astype(np.uint16))
        partial.rename(path)
    return torch.from_numpy(np.load(path).astype(np.int64))


def left_padded(features: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Rotate right-padded features to the right end, differentiably (cf. conditioning.t5.left_pad)."""
    shift = (~mask).sum(1, keepdim=True)
    source = (torch.arange(mask.shape[1]) - shift) % mask.shape[1]
    mask = mask.gather(1, source)
    rotated = features.gather(1, source[..., None].expand_as(features))
    return {"features": rotated * mask[..., None], "mask": mask}


# -- common --------------------------------------------------------------------------------------


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Warm-up over 50 steps, then constant, then linear to zero over the last 40 %."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))


def optimize(optimizer: torch.optim.Optimizer, model: torch.nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def save_model(state_dict: dict[str, Tensor], path: Path) -> None:
    """Official layout, half precision to keep the repository small."""
    partial = path.with_suffix(".tmp")
    torch.save({"model": {k: v.half().contiguous() for k, v in state_dict.items()}}, partial)
    partial.rename(path)


def pretrain(cfg: Pretrain) -> None:
    """Make what is not there yet: tokenizer, generator, config."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    if not (cfg.out / "vq.pt").exists():
        if cfg.tokenizer is None:
            save_model(train_tokenizer(cfg).state_dict(), cfg.out / "vq.pt")
        else:
            shutil.copyfile(cfg.tokenizer, cfg.out / "vq.pt")
    if not (cfg.out / "gpt.pt").exists():
        codes = scene_codes(cfg, cfg.tokenizer or cfg.out / "vq.pt")
        gpt = train_gpt(cfg, codes, cfg.out / "text_encoder")
        save_model(gpt.official_state_dict(), cfg.out / "gpt.pt")
        write_json(
            cfg.out / "config.json",
            {
                "family": "llamagen",
                "weights": "gpt.pt",
                "tokenizer": "vq.pt",
                "text_encoder": "text_encoder",
                "config": asdict(gpt.config),
                "sampling": {"cfg_scale": 2.5, "top_p": 0.95},
            },
        )


def main() -> None:
    pretrain(cli.parse(Pretrain, __doc__))


if __name__ == "__main__":
    cli.run(main)
