"""Pre-train the tiny offline Janus on the shapes world, with the image tokenizer of the shapes
base.

This is how `t2i/assets/shapes-janus/` was made: a folder in transformers' layout, loaded by the
same code as the published models.

    python launch/lab/pretrain_janus_shapes.py --out runs/shapes-janus-base
"""

import logging
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # run from a clone, without installation

from launch.lab.pretrain_shapes import (
    Pretrain,
    Scenes,
    every_prompt,
    optimize,
    scene_codes,
    set_rate,
)
from t2i import cli
from t2i.files import replacing_folder, write_json
from t2i.loading import ASSETS
from t2i.models.janus.janus_model import Janus
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.shapes.tiny_janus import build_tiny_janus
from t2i.tensorar.model import TensorAR
from t2i.tensorar.presets import base as base_method

log = logging.getLogger("pretrain")


@dataclass(frozen=True)
class PretrainJanus:
    """Recipe of the Janus shapes base."""

    out: Path
    """Folder for config.json and model/."""
    tokenizer: Path = ASSETS / "shapes" / "vq.pt"
    """Image tokenizer; it becomes part of the model."""
    seed: int = 0
    """World that the training scenes come from; also seeds the weights."""
    scenes: int = 96000
    """Number of captioned scenes."""
    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3
    dim: int = 192
    """Width of the language model (its heads are 32 wide)."""
    layers: int = 6
    ffn_dim: int = 416
    save_every: int = 250
    """Steps between half-finished models in model/; the last one counts."""


def build(cfg: PretrainJanus, tokenizer: VQTokenizer, side: int) -> Janus:
    shape = {"dim": cfg.dim, "layers": cfg.layers, "heads": cfg.dim // 32, "ffn_dim": cfg.ffn_dim}
    return build_tiny_janus(every_prompt(), tokenizer, side=side, seed=cfg.seed, **shape)


def train(cfg: PretrainJanus, backbone: Janus, scenes: Scenes) -> None:
    """The usual next-code loss, a tenth of the prompts dropped; the understanding side stays as it
    is.
    """
    prepared = backbone.prepare(every_prompt())
    model = TensorAR(backbone, base_method()).train()
    trained = nn.ModuleList(backbone.trained_modules())
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    random = torch.Generator().manual_seed(cfg.seed)
    start = time.time()
    for step in range(cfg.steps):
        set_rate(optimizer, cfg.lr, step, step / cfg.steps)
        batch = torch.randint(cfg.scenes, (cfg.batch,), generator=random)
        drop = torch.rand(cfg.batch, generator=random) < 0.1
        target = scenes.codes[batch, :, None].long()
        prompt = scenes.prompts[batch]
        with torch.autocast("cpu", torch.bfloat16):
            condition = backbone.encode_condition({k: v[prompt] for k, v in prepared.items()}, drop)
            loss = model(target, condition, model.windows.gather(target)).weighted([1.0])
        optimize(optimizer, trained, loss)
        if step % 50 == 0:
            rate = (time.time() - start) / (step + 1)
            log.info("janus step %d: loss %.4f (%.2f s/step)", step, loss.item(), rate)
        if step % cfg.save_every == 0 or step + 1 == cfg.steps:
            save(cfg, backbone)
    backbone.eval()


def save(cfg: PretrainJanus, backbone: Janus) -> None:
    """Write the backbone folder, in half precision to keep the repository small."""
    with replacing_folder(cfg.out / "model") as partial:
        backbone.save_official(partial, torch.float16)
    sampling = {"cfg_scale": 2.5, "top_p": 0.95}
    settings = {"family": "janus", "weights": "model", "sampling": sampling}
    write_json(cfg.out / "config.json", settings)


def main(cfg: PretrainJanus) -> None:
    cfg.out.mkdir(parents=True, exist_ok=True)
    vq = cfg.out / "vq.pt"
    shutil.copyfile(cfg.tokenizer, vq)  # the scenes' codes are kept beside it
    scenes = scene_codes(Pretrain(out=cfg.out, seed=cfg.seed, scenes=cfg.scenes), vq)
    side = int(scenes.codes.shape[1] ** 0.5)
    train(cfg, build(cfg, VQTokenizer.load(vq), side), scenes)


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(PretrainJanus, __doc__)))
