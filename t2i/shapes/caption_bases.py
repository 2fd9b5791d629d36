"""Trains tiny caption-conditional bases from scratch: image tokenizer, encoded scenes, generator.

LlamaGen is trained together with its T5-style text encoder, Janus with its own word embeddings; the
image tokenizer may come from another base. Files have the official layouts, so that the code that
loads published checkpoints also loads these bases.
"""

import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, T5EncoderModel

from t2i.files import replacing, replacing_folder, write_json
from t2i.loading import attach, load_backbone, pick_device
from t2i.models.conditions import Condition
from t2i.models.janus.janus_model import Janus
from t2i.models.llamagen.captions import clean_caption
from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.shapes.fine_tuning import examine
from t2i.shapes.pretraining import (
    CONSTANT_RATE,
    Descent,
    save_tokenizer,
    train_tokenizer,
    write_base,
)
from t2i.shapes.scenes import render, sample_scene
from t2i.shapes.shapes_prompts import benchmark_prompts, every_prompt
from t2i.shapes.tiny_janus import build_tiny_janus
from t2i.shapes.tiny_recipes import CaptionBase
from t2i.shapes.tiny_t5 import build_tiny_t5
from t2i.tensorar.model import TensorAR
from t2i.tensorar.presets import base as base_method

log = logging.getLogger("pretrain")

LOG_SECONDS, SAVE_SECONDS = 10, 60
_DROPPED = 0.1  # share of captions dropped in training
_SAMPLING = {"cfg_scale": 2.5, "top_p": 0.95}


def make_caption_base(cfg: CaptionBase) -> Path:
    """Make the tokenizer, generator and scores unless they exist; returns the base's folder."""
    start, seconds = time.time(), 60 * (cfg.minutes or float("inf"))
    cfg.out.mkdir(parents=True, exist_ok=True)
    vq = cfg.tokenizer or cfg.out / "tokenizer.pt"
    if cfg.tokenizer is None and not vq.exists():
        save_tokenizer(trained_tokenizer(cfg), vq, torch.float16)
    if not (cfg.out / "config.json").exists():
        scenes = scene_codes(cfg, vq, start + seconds / 3)
        train(cfg, new_learner(cfg, VQTokenizer.load(vq)), scenes, start + seconds)
    if not cfg.constant and not (cfg.out / "scores.json").exists():
        score(cfg)
    return cfg.out


# -- scenes ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scenes:
    """The generator's training data."""

    codes: Tensor
    """int32 [scenes, T]"""
    prompts: Tensor
    """Index of each scene's prompt in `every_caption`, int64 [scenes]."""


def every_caption() -> list[str]:
    return [entry["prompt"] for entry in every_prompt()]


def draw_scenes(seed: int, size: int, indices: Iterable[int]) -> tuple[np.ndarray, list[str]]:
    """Images uint8 [B, H, W, 3] and prompts of these scenes; none has a held-out prompt."""
    scenes = [sample_scene(seed, int(i)) for i in indices]
    return np.stack([np.asarray(render(s, size)) for s in scenes]), [s.prompt for s in scenes]


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Images as float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn_scenes(cfg: CaptionBase, chunk: int) -> Iterable[tuple[np.ndarray, list[str]]]:
    """All scenes in order, `chunk` at a time; worker processes draw a few chunks ahead."""
    return DataLoader(
        _Chunks(cfg, chunk),
        batch_size=None,
        sampler=range(0, cfg.scenes, chunk),
        num_workers=cfg.workers,
        collate_fn=tuple,
        # Not "fork": this process may already use a GPU.
        multiprocessing_context="forkserver" if cfg.workers else None,
    )


@dataclass(frozen=True)
class _Chunks(Dataset):
    cfg: CaptionBase
    size: int

    def __getitem__(self, first: int) -> tuple[np.ndarray, list[str]]:
        end = min(first + self.size, self.cfg.scenes)
        return draw_scenes(self.cfg.seed, self.cfg.image_size, range(first, end))


def scene_codes(cfg: CaptionBase, tokenizer: Path, end: float = float("inf")) -> Scenes:
    """Codes and prompts of as many scenes as can be encoded before `end`; saved if complete."""
    path = cfg.out / f"codes-{cfg.seed}-{cfg.scenes}.npz"
    if path.exists():
        stored = dict(np.load(path))
    else:
        stored = _encoded(cfg, tokenizer, end)
        if len(stored["codes"]) == cfg.scenes:
            with replacing(path) as partial_path, open(partial_path, "wb") as file:
                np.savez(file, codes=stored["codes"], prompts=stored["prompts"])
    codes, prompts = (torch.from_numpy(stored[n].astype(np.int32)) for n in ("codes", "prompts"))
    return Scenes(codes, prompts.long())


@torch.no_grad()
def _encoded(cfg: CaptionBase, tokenizer: Path, end: float) -> dict[str, np.ndarray]:
    """Encode scenes; returns the fields of `Scenes` as uint16 arrays."""
    device, _ = pick_device(cfg.device)
    torch.backends.cudnn.allow_tf32 = False  # it changes codes
    vq = VQTokenizer.load(tokenizer).to(device)
    numbers = {prompt: i for i, prompt in enumerate(every_caption())}
    codes: list[np.ndarray] = []
    prompts: list[int] = []
    start, logged = time.time(), 0.0
    for images, texts in drawn_scenes(cfg, 64 if device.type == "cpu" else 1024):
        found = vq.encode(to_pixels(images, device)).flatten(1)
        codes.append(found.cpu().numpy().astype(np.uint16))
        prompts += [numbers[text] for text in texts]
        now = time.time()
        if now - logged > LOG_SECONDS or now > end or len(prompts) == cfg.scenes:
            rate, logged = len(prompts) / (now - start), now
            log.info("%d of %d scenes encoded, %.0f per second", len(prompts), cfg.scenes, rate)
        if now > end:
            break
    if len(prompts) < cfg.scenes / 2:
        message = "there was time for only %d of %d scenes, which a large model will memorize"
        log.warning(message, len(prompts), cfg.scenes)
    return {"codes": np.concatenate(codes), "prompts": np.array(prompts, np.uint16)}


# -- models ----------------------------------------------------------------------------------------
def trained_tokenizer(cfg: CaptionBase) -> VQTokenizer:
    """A tokenizer of 1024 codes, trained on random scenes."""
    torch.manual_seed(cfg.seed)
    tokenizer = VQTokenizer(VQConfig(32, (1, 1, 2, 2), 1, 64, codebook_size=1024, codebook_dim=8))
    random = np.random.default_rng(cfg.seed)
    batches = (
        to_pixels(
            draw_scenes(cfg.seed, cfg.image_size, random.integers(0, 1 << 30, cfg.vq_batch))[0]
        )
        for _ in range(cfg.vq_steps)
    )
    train_tokenizer(tokenizer, batches, steps=cfg.vq_steps, lr=cfg.vq_lr)
    return tokenizer


@dataclass(frozen=True)
class Learner:
    """A generator in training, with its text encoder and all captions in tokenized form."""

    backbone: LlamaGen | Janus
    captions: dict[str, Tensor]
    """Inputs for `condition`, with one row for each of `every_caption`."""
    text_encoder: tuple[Any, ...] = ()
    """LlamaGen's encoder, which is trained as well, and its tokenizer."""

    def trained(self) -> nn.ModuleList:
        return nn.ModuleList([*self.backbone.trained_modules(), *self.text_encoder[:1]])

    def condition(self, prompts: Tensor, drop: Tensor) -> Condition:
        """The conditions of captions, given their indices in `every_caption`."""
        rows = {name: value[prompts] for name, value in self.captions.items()}
        if self.text_encoder:
            features, mask = self.text_encoder[0](**rows)[0], rows["attention_mask"]
            rows = {"features": features * mask[..., None], "mask": mask}
        return self.backbone.encode_condition(rows, drop)

    def save(self, folder: Path) -> None:
        """Write or replace a base, in half precision to keep the repository small."""
        write_base(
            self.backbone, folder, _SAMPLING, dtype=torch.float16, text_encoder=self.text_encoder
        )


def new_learner(cfg: CaptionBase, tokenizer: VQTokenizer) -> Learner:
    """A generator with new weights, on the device that trains."""
    torch.manual_seed(cfg.seed + 1)
    device, _ = pick_device(cfg.device)
    build = _new_llamagen if cfg.family == "llamagen" else _new_janus
    learner = build(cfg, tokenizer, cfg.image_size // tokenizer.downsample)
    if cfg.compile:
        for block in learner.backbone.blocks:  # all blocks share one block's kernels
            block.compile(dynamic=False)
    learner.trained().train().to(device)
    return Learner(
        learner.backbone.to(device),
        {name: value.to(device) for name, value in learner.captions.items()},
        learner.text_encoder,
    )


def _new_llamagen(cfg: CaptionBase, tokenizer: VQTokenizer, side: int) -> Learner:
    folder = cfg.out / "text_encoder"
    build_tiny_t5(
        folder, every_caption(), d_model=cfg.text_dim, d_ff=2 * cfg.text_dim, seed=cfg.seed
    )
    words, encoder = AutoTokenizer.from_pretrained(folder), T5EncoderModel.from_pretrained(folder)
    # Padded on the left, as LlamaGen expects; T5 is unaffected, as it uses relative positions only.
    tokens = words(
        [clean_caption(caption) for caption in every_caption()],
        padding="max_length",
        padding_side="left",
        max_length=cfg.caption_tokens,
        truncation=True,
        return_tensors="pt",
    )
    backbone = LlamaGen(
        LlamaGenConfig(
            dim=cfg.dim,
            n_layer=cfg.layers,
            n_head=cfg.dim // 32,
            grid=(side, side),
            cond="text",
            vocab_size=tokenizer.codebook_size,
            caption_tokens=cfg.caption_tokens,
            caption_dim=cfg.text_dim,
            token_dropout=0.0,
            resid_dropout=0.0,
            ffn_dropout=0.0,
        )
    )
    backbone.gpt.initialize(torch.Generator().manual_seed(cfg.seed))
    backbone.frozen.tokenizer = tokenizer
    captions = {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"].bool(),
    }
    return Learner(backbone, captions, (encoder, words))


def _new_janus(cfg: CaptionBase, tokenizer: VQTokenizer, side: int) -> Learner:
    shape = {"dim": cfg.dim, "layers": cfg.layers, "heads": cfg.dim // 32}
    ffn_dim = 13 * cfg.dim // 6  # a gated layer as large as a plain one of 3.25 times the width
    backbone = build_tiny_janus(
        every_caption(), tokenizer, side=side, seed=cfg.seed, ffn_dim=ffn_dim, **shape
    )
    return Learner(backbone, backbone.prepare(every_caption()))


# -- training --------------------------------------------------------------------------------------
def train(cfg: CaptionBase, learner: Learner, scenes: Scenes, end: float) -> None:
    """Train for `gpt_steps` or until the time `end`, and save the base.

    OUT/constant_rate holds the base from before the learning rate falls, OUT/partial the latest
    snapshot, deleted at the end.
    """
    descent = Descent(
        learner.trained(), cfg.gpt_lr, weight_decay=0.05, warm_up=50, constant=cfg.constant
    )
    losses = _losses(cfg, learner, scenes)
    step, done, start = 0, 0.0, time.time()
    logged = saved = start
    while done < 1:
        loss = next(losses)
        descent.step(loss, done)
        step, now, before = step + 1, time.time(), done
        done = max(step / cfg.gpt_steps, (now - start) / max(end - start, 1))
        if now - logged > LOG_SECONDS or step == 1 or done >= 1:
            logged, rate = now, step * cfg.gpt_batch / (now - start)
            share = f"{min(done, 1):.0%} done, {rate:.0f} scenes/s"
            log.info("step %d: loss %.4f (%s)", step, loss.item(), share)
        if before < CONSTANT_RATE <= done and not cfg.constant:
            _snapshot(learner, cfg.out / "constant_rate")
        if now - saved > SAVE_SECONDS:
            saved = now
            _snapshot(learner, cfg.out / "partial")
    learner.save(cfg.out)
    shutil.rmtree(cfg.out / "partial", ignore_errors=True)


def _losses(cfg: CaptionBase, learner: Learner, scenes: Scenes) -> Iterator[Tensor]:
    """Next-code losses of random batches, with a tenth of the captions dropped."""
    device = learner.backbone.device
    codes, prompts = scenes.codes.to(device), scenes.prompts.to(device)
    model = TensorAR(learner.backbone, base_method()).train()
    random = torch.Generator(device).manual_seed(cfg.seed)
    while True:
        batch = torch.randint(len(codes), (cfg.gpt_batch,), generator=random, device=device)
        drop = torch.rand(cfg.gpt_batch, generator=random, device=device) < _DROPPED
        target = codes[batch, :, None].long()
        with torch.autocast(device.type, torch.bfloat16):
            condition = learner.condition(prompts[batch], drop)
            loss = model(target, condition, model.windows.gather(target)).loss
        yield loss


def _snapshot(learner: Learner, folder: Path) -> None:
    """Write or replace a base inside the run's folder, whole or not at all."""
    with replacing_folder(folder) as new:
        learner.save(new)
    log.info("saved %s", folder)


def score(cfg: CaptionBase, per_tag: int = 20, samples: int = 4) -> None:
    """Write OUT/scores.json: GenEval scores of the base and of its constant-rate snapshot.

    The defaults give the quickstart's prompts and seeds.
    """
    metadata, scores = benchmark_prompts(seed=0, per_tag=per_tag), {}
    for name, folder in (("base", cfg.out), ("constant_rate", cfg.out / "constant_rate")):
        backbone = load_backbone(cfg.family, folder, device=pick_device(cfg.device)[0])
        model = attach(backbone, base_method())
        summary = examine(model, metadata, seed=0, samples=samples).report.summary
        found = {tag: round(one.mean, 3) for tag, one in summary.tags.items()}
        scores[name] = found | {"overall": round(summary.overall, 3)}
        log.info("%s: %s", name, scores[name])
    write_json(cfg.out / "scores.json", scores)
