"""Pre-train the tiny offline base model: VQ tokenizer, then T5-style text encoder + LlamaGen
text-to-image GPT.

This is how `t2i/assets/shapes/` was made. Files have official layouts, so that the shipped base is
loaded by the same code as the published checkpoints; what is finished is kept. Bases of other sizes
may share one tokenizer and its codes:

    python launch/lab/pretrain_shapes.py --out runs/shapes-base
    python launch/lab/pretrain_shapes.py --out runs/shapes-1m --dim 128 --layers 4 \\
        --tokenizer runs/shapes-base/vq.pt

A GPU with some CPU cores beside it makes a larger one in minutes; OUT/partial is what there is if
it is stopped:

    python launch/lab/pretrain_shapes.py --out runs/shapes-7m --tokenizer t2i/assets/shapes/vq.pt \\
        --dim 256 --layers 8 --workers 16 --scenes 2000000 --minutes 6 \\
        --gpt-steps 1000000 --gpt-batch 512 --gpt-lr 1.5e-3 --compile

OUT/constant_rate is the base before its rate fell (published bases are of that kind);
OUT/scores.json judges both as the quickstart does.
"""

import logging
import multiprocessing
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # run from a clone, without installation

from t2i import cli
from t2i.files import replacing, write_json
from t2i.loading import pick_device
from t2i.models.captions import clean_caption
from t2i.models.llamagen.llamagen_model import LlamaGen, LlamaGenConfig
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.shapes.scenes import render, sample_scene
from t2i.shapes.shapes_prompts import TAGS, all_prompts, benchmark_prompts
from t2i.shapes.tiny_t5 import build_tiny_t5
from t2i.tensorar.model import TensorAR
from t2i.tensorar.presets import base as base_method

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
    """Number of captioned scenes for the GPT: enough to see each about twice, or a few million
    parameters learn them by heart.
    """
    gpt_steps: int = 3000
    gpt_batch: int = 64
    gpt_lr: float = 2e-3
    dim: int = 192
    """Width of the GPT (its heads are 32 wide)."""
    layers: int = 6
    caption_tokens: int = 16
    text_dim: int = 128
    """Width of the text encoder."""
    minutes: float | None = None
    """End scenes (after a third of it) and training after so long, if `scenes` and `gpt_steps` have
    not ended them before.
    """
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: int = 0
    """Processes that draw scenes; 0 draws them in this one."""
    compile: bool = False
    """Compile the GPT's blocks: half a minute that pays on a GPU."""

    @property
    def torch_device(self) -> torch.device:
        return pick_device(self.device, "float32")[0]


CONSTANT_RATE = 0.6  # share of a run before its rate falls
LOG_SECONDS, SAVE_SECONDS = 10, 60


# -- scenes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """What the GPT is trained on."""

    codes: Tensor
    """int32 [scenes, T]"""
    prompts: Tensor
    """Number of each scene's prompt in `every_prompt`, int64 [scenes]."""


def every_prompt() -> list[str]:
    return [metadata["prompt"] for tag in TAGS for metadata in all_prompts(tag)]


def draw_scenes(seed: int, size: int, indices: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Images uint8 [B, H, W, 3] and prompts of these scenes; held-out prompts never come."""
    scenes = [sample_scene(seed, int(i)) for i in indices]
    return np.stack([np.asarray(render(s, size)) for s in scenes]), [s.prompt for s in scenes]


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Images as float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn_scenes(cfg: Pretrain, chunk: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """All scenes in order, `chunk` at a time, by `cfg.workers` processes that stay a little
    ahead.
    """
    draw = partial(draw_scenes, cfg.seed, cfg.image_size)
    chunks = (range(i, min(i + chunk, cfg.scenes)) for i in range(0, cfg.scenes, chunk))
    if not cfg.workers:
        yield from map(draw, chunks)
        return
    context = multiprocessing.get_context("forkserver")  # a fork of this process may hold a GPU
    with ProcessPoolExecutor(cfg.workers, mp_context=context) as pool:
        waiting: deque = deque()
        try:
            for indices in chunks:
                waiting.append(pool.submit(draw, indices))
                if len(waiting) > 4 * cfg.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def scene_codes(cfg: Pretrain, tokenizer: Path, end: float = float("inf")) -> Scenes:
    """Codes and prompts of the scenes, as many as there are at the time `end`; all of them are kept
    beside the tokenizer.
    """
    path = tokenizer.with_name(f"codes-{cfg.seed}-{cfg.scenes}.npz")
    if path.exists():
        stored = dict(np.load(path))
    else:
        stored = encode_scenes(cfg, tokenizer, end)
        if len(stored["codes"]) == cfg.scenes:
            with replacing(path) as partial_path, open(partial_path, "wb") as file:
                np.savez(file, **stored)
    codes, prompts = (torch.from_numpy(stored[n].astype(np.int32)) for n in ("codes", "prompts"))
    return Scenes(codes, prompts.long())


@torch.no_grad()
def encode_scenes(cfg: Pretrain, tokenizer: Path, end: float) -> dict[str, np.ndarray]:
    """`Scenes` as uint16 arrays."""
    device = cfg.torch_device
    torch.backends.cudnn.allow_tf32 = False  # it changes codes
    vq = VQTokenizer.load(tokenizer).to(device)
    numbers = {prompt: i for i, prompt in enumerate(every_prompt())}
    codes, prompts, start, logged = [], [], time.time(), 0.0
    for images, texts in drawn_scenes(cfg, 64 if device.type == "cpu" else 1024):
        codes.append(
            vq.encode(to_pixels(images, device)).flatten(1).cpu().numpy().astype(np.uint16)
        )
        prompts += [numbers[text] for text in texts]
        now = time.time()
        if now - logged > LOG_SECONDS or now > end or len(prompts) == cfg.scenes:
            rate, logged = len(prompts) / (now - start), now
            log.info("%d of %d scenes encoded, %.0f a second", len(prompts), cfg.scenes, rate)
        if now > end:
            break
    return {"codes": np.concatenate(codes), "prompts": np.array(prompts, np.uint16)}


# -- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(cfg: Pretrain) -> VQTokenizer:
    """L1 + MSE reconstruction, cosine codebook; codes that nothing uses move onto latents of a
    batch.
    """
    torch.manual_seed(cfg.seed)
    model = VQTokenizer(VQConfig(32, (1, 1, 2, 2), 1, 64, codebook_size=1024, codebook_dim=8))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.vq_lr, betas=(0.9, 0.95))
    used = torch.zeros(model.codebook_size)
    random = np.random.default_rng(cfg.seed)
    for step in range(cfg.vq_steps):
        set_rate(optimizer, cfg.vq_lr, step, step / cfg.vq_steps)
        indices = random.integers(0, 1 << 30, cfg.vq_batch)
        pixels = to_pixels(draw_scenes(cfg.seed, cfg.image_size, indices)[0])
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


def train_gpt(cfg: Pretrain, scenes: Scenes, end: float) -> None:
    """Train the GPT and its text encoder together, until `gpt_steps` or the time `end`, and save
    the base.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(cfg.seed + 1)
    device, texts = cfg.torch_device, cfg.out / "text_encoder"
    build_tiny_t5(texts, every_prompt(), d_model=cfg.text_dim, d_ff=2 * cfg.text_dim, seed=cfg.seed)
    tokenizer = AutoTokenizer.from_pretrained(texts)
    encoder = T5EncoderModel.from_pretrained(texts).train().to(device)
    gpt = LlamaGen(gpt_config(cfg, codes_side=int(scenes.codes.shape[1] ** 0.5))).train()
    gpt.gpt.initialize(torch.Generator().manual_seed(cfg.seed))
    base = Base(gpt.to(device), encoder)
    if cfg.compile:
        compile_blocks(gpt)
    loss_of = batch_loss(cfg, base, tokenizer, scenes)
    parameters = torch.nn.ModuleList([gpt, encoder])
    optimizer = torch.optim.AdamW(
        parameters.parameters(),
        lr=cfg.gpt_lr,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=device.type == "cuda",
    )
    step, done, start = 0, 0.0, time.time()
    logged = saved = start
    while done < 1:
        set_rate(optimizer, cfg.gpt_lr, step, done)
        loss = loss_of()
        optimize(optimizer, parameters, loss)
        step, now, before = step + 1, time.time(), done
        done = max(step / cfg.gpt_steps, (now - start) / max(end - start, 1))
        if now - logged > LOG_SECONDS or step == 1 or done >= 1:
            logged, rate = now, step * cfg.gpt_batch / (now - start)
            share = f"{min(done, 1):.0%} done, {rate:.0f} scenes/s"
            log.info("gpt step %d: loss %.4f (%s)", step, loss.item(), share)
        if before < CONSTANT_RATE <= done:
            snapshot(base, cfg.out / "constant_rate")
        if now - saved > SAVE_SECONDS:
            saved = now
            snapshot(base, cfg.out / "partial")
    save_base(base, cfg.out, tokenizer="vq.pt")
    shutil.rmtree(cfg.out / "partial", ignore_errors=True)


def batch_loss(cfg: Pretrain, base: "Base", tokenizer, scenes: Scenes) -> Callable[[], Tensor]:
    """A function that returns the loss of the next random batch; a tenth of the captions is
    dropped.
    """
    device = cfg.torch_device
    tokens = tokenizer(
        [clean_caption(prompt) for prompt in every_prompt()],
        padding="max_length",
        max_length=cfg.caption_tokens,
        truncation=True,
        return_tensors="pt",
    ).to(device)
    ids, masks = tokens["input_ids"], tokens["attention_mask"].bool()
    codes, prompts = scenes.codes.to(device), scenes.prompts.to(device)
    model = TensorAR(base.gpt, base_method()).train()
    random = torch.Generator(device).manual_seed(cfg.seed)

    def loss() -> Tensor:
        batch = torch.randint(len(codes), (cfg.gpt_batch,), generator=random, device=device)
        drop = torch.rand(cfg.gpt_batch, generator=random, device=device) < 0.1
        prompt = prompts[batch]
        with torch.autocast(device.type, torch.bfloat16):
            features = base.encoder(input_ids=ids[prompt], attention_mask=masks[prompt])[0]
            condition = base.gpt.encode_condition(left_padded(features, masks[prompt]), drop)
            target = codes[batch, :, None].long()
            return model(target, condition, model.windows.gather(target)).weighted([1.0])

    return loss


def compile_blocks(gpt: LlamaGen) -> None:
    """One block's kernels serve all."""
    for block in gpt.gpt.layers:
        block.compile(dynamic=False)


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


def left_padded(features: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Rotate right-padded features to the right end, differentiably (cf.
    conditioning.t5.left_pad).
    """
    shift = (~mask).sum(1, keepdim=True)
    source = (torch.arange(mask.shape[1], device=mask.device) - shift) % mask.shape[1]
    mask = mask.gather(1, source)
    rotated = features.gather(1, source[..., None].expand_as(features))
    return {"features": rotated * mask[..., None], "mask": mask}


# -- common --------------------------------------------------------------------------------------


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, done: float) -> None:
    """Warm-up over 50 steps, then constant, then linear to zero over the last 40 %; `done` is the
    share of the run.
    """
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / 50, (1 - done) / (1 - CONSTANT_RATE))


def optimize(optimizer: torch.optim.Optimizer, model: torch.nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def save_model(state_dict: dict[str, Tensor], path: Path) -> None:
    """Official layout, half precision to keep the repository small."""
    with replacing(path) as partial_path:
        weights = {k: v.half().cpu().contiguous() for k, v in state_dict.items()}
        torch.save({"model": weights}, partial_path)


@dataclass(frozen=True)
class Base:
    """What is trained."""

    gpt: LlamaGen
    encoder: torch.nn.Module


def save_base(base: Base, folder: Path, tokenizer: str) -> None:
    """Write the trained parts of a backbone folder, the GPT last; `tokenizer` is the image
    tokenizer's file as seen from there.
    """
    base.encoder.save_pretrained(folder / "text_encoder")
    settings = {
        "family": "llamagen",
        "weights": "gpt.pt",
        "tokenizer": tokenizer,
        "text_encoder": "text_encoder",
        "config": asdict(base.gpt.config),
        "sampling": {"cfg_scale": 2.5, "top_p": 0.95},
    }
    write_json(folder / "config.json", settings)
    save_model(base.gpt.official_state_dict(), folder / "gpt.pt")


def snapshot(base: Base, folder: Path) -> None:
    """Write or replace a backbone folder inside the run's, whole or not at all."""
    new = folder.with_suffix(".tmp")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(folder.parent / "text_encoder", new / "text_encoder")
    save_base(base, new, tokenizer="../vq.pt")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    log.info("saved %s", folder)


def score(cfg: Pretrain) -> None:
    """GenEval's scores of the base, and of the one before its rate fell, on the quickstart's
    prompts and seeds.
    """
    from launch.lab.fine_tuning import judge
    from t2i.loading import attach, load_backbone

    metadata, scores = benchmark_prompts(seed=0, per_tag=20), {}
    for folder in (cfg.out, cfg.out / "constant_rate"):
        backbone = load_backbone("llamagen", folder, device=cfg.torch_device)
        judged = judge(attach(backbone, base_method()), metadata, seed=0, samples=4)
        summary = judged.report.summary
        found = {tag: round(score.mean, 3) for tag, score in summary.tags.items()}
        name = "base" if folder == cfg.out else folder.name
        scores[name] = found | {"overall": round(summary.overall, 3)}
        log.info("%s: %s", name, scores[name])
    write_json(cfg.out / "scores.json", scores)


def pretrain(cfg: Pretrain) -> None:
    """Make what is not there yet: tokenizer, generator, scores."""
    start, seconds = time.time(), 60 * (cfg.minutes or float("inf"))
    cfg.out.mkdir(parents=True, exist_ok=True)
    if not (cfg.out / "vq.pt").exists():
        if cfg.tokenizer is None:
            save_model(train_tokenizer(cfg).state_dict(), cfg.out / "vq.pt")
        else:
            shutil.copyfile(cfg.tokenizer, cfg.out / "vq.pt")
    if not (cfg.out / "gpt.pt").exists():
        scenes = scene_codes(cfg, cfg.tokenizer or cfg.out / "vq.pt", start + seconds / 3)
        train_gpt(cfg, scenes, start + seconds)
    if not (cfg.out / "scores.json").exists():
        score(cfg)


def main() -> None:
    pretrain(cli.parse(Pretrain, __doc__))


if __name__ == "__main__":
    cli.run(main)
