"""What several test files share: golden cases found by their config.json, and tiny models with random weights."""

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from t2i.backbones.llamagen import LlamaGen, LlamaGenConfig
from t2i.tensorar.model import TensorAR, TensorARConfig
from t2i.tokenizers.vq import VQConfig, VQTokenizer
from t2i.training.config import (
    BackboneOptions,
    DataOptions,
    EngineOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)
from t2i.weights import write_json

GOLDEN_ROOT = Path(os.environ.get("T2I_GOLDEN") or Path(__file__).parent / "golden")


@dataclass(frozen=True)
class GoldenCase:
    """A folder with config.json, checkpoint files and io.safetensors (`input.*`, `expected.*`)."""

    folder: Path
    config: dict

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    def input(self, name: str) -> Tensor:
        return self.tensors[f"input.{name}"]

    def expected(self, name: str) -> Tensor:
        """Skips the test where a case does not have this tensor."""
        if f"expected.{name}" not in self.tensors:
            pytest.skip(f"{self.folder.name} has no expected.{name}")
        return self.tensors[f"expected.{name}"]


def golden_cases(family: str) -> list:
    """Every case under the golden root whose family contains this text, as pytest parameters."""
    cases = []
    for path in sorted(GOLDEN_ROOT.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if family in config.get("family", ""):
            cases.append(pytest.param(GoldenCase(path.parent, config), id=path.parent.name))
    assert cases or "T2I_GOLDEN" in os.environ, f"no golden case of {family} under {GOLDEN_ROOT}"
    return cases


def golden_table(name: str) -> dict:
    """A JSON table of this name anywhere under the golden root; skips the test where there is none."""
    path = next(GOLDEN_ROOT.rglob(name), None)
    if path is None:
        pytest.skip(f"no {name} under {GOLDEN_ROOT}")
    return json.loads(path.read_text(encoding="utf-8"))


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Random weights at which every part matters: heads and null embeddings non-zero, norms away from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.dim() == 1:
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                gain = 3.0 if "output" in name else 1.0
                value.normal_(std=gain * value[0].numel() ** -0.5, generator=generator)


def tiny_config(cond: str) -> LlamaGenConfig:
    return LlamaGenConfig(
        dim=32,
        n_layer=2,
        n_head=2,
        grid=(4, 4),
        cond=cond,
        vocab_size=48,
        ffn_dim=64,
        num_classes=10,
        caption_tokens=6,
        caption_dim=12,
    )


def tiny_vq(seed: int = 0) -> VQTokenizer:
    """Two pixels per code, 48 codes."""
    tokenizer = VQTokenizer(VQConfig(32, (1, 2), 1, 16, codebook_size=48, codebook_dim=8))
    randomize(tokenizer, seed)
    return tokenizer.eval().requires_grad_(False)


def tiny_llamagen(cond: str, seed: int = 0) -> LlamaGen:
    """A LlamaGen of 4x4 codes ("class" or "text") with a tokenizer, in eval mode."""
    backbone = LlamaGen(tiny_config(cond))
    randomize(backbone, seed)
    backbone.frozen.tokenizer = tiny_vq()
    return backbone.eval()


def tiny_prepared(backbone: LlamaGen, batch: int) -> dict[str, Tensor]:
    """Different conditions: labels, or left-padded captions of different lengths."""
    if backbone.config.cond == "class":
        return {"labels": torch.arange(batch) % backbone.config.num_classes}
    length, width = backbone.config.caption_tokens, backbone.config.caption_dim
    valid = 1 + torch.arange(batch) * 2 % length
    mask = torch.arange(length) >= length - valid[:, None]
    features = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))
    return {"features": features * mask[..., None], "mask": mask}


def tiny_codes(batch: int, seed: int = 0) -> Tensor:
    """Random codes [B, 16, 1]."""
    return torch.randint(48, (batch, 16, 1), generator=torch.Generator().manual_seed(seed))


def open_gates(model: TensorAR) -> TensorAR:
    """Make the codec's zero-initialised gates non-zero, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, gate in model.named_parameters():
            if name.endswith(("z_in", "z_out")):
                gate.normal_(generator=generator)
    return model


def write_tiny_base(folder: Path) -> Path:
    """A backbone folder as `--backbone.weights` takes it: text-to-image, 4x4 codes of 8 pixels, without dropout of its own."""
    from t2i.conditioning.tiny_t5 import build_tiny_t5

    vq = VQTokenizer(VQConfig(32, (1, 1, 1, 1), 1, 32, codebook_size=64, codebook_dim=8))
    randomize(vq)
    config = LlamaGenConfig(
        dim=64,
        n_layer=2,
        n_head=2,
        grid=(4, 4),
        cond="text",
        vocab_size=64,
        ffn_dim=128,
        caption_tokens=12,
        caption_dim=32,
        resid_dropout=0.0,
        ffn_dropout=0.0,
    )
    gpt = LlamaGen(config)
    randomize(gpt)
    words = "a photo of two three red green blue circle square star left right above below"
    build_tiny_t5(folder / "text_encoder", [words], d_model=32, d_ff=32, num_layers=1)
    torch.save(vq.state_dict(), folder / "vq.pt")
    torch.save({"model": gpt.official_state_dict()}, folder / "gpt.pt")
    files = {"weights": "gpt.pt", "tokenizer": "vq.pt", "text_encoder": "text_encoder"}
    content = {"family": "llamagen", **files, "config": asdict(config)}
    write_json(folder / "config.json", {**content, "sampling": {"cfg_scale": 2.0}})
    return folder


def tiny_run(root: Path, name: str, **changes) -> TrainConfig:
    """A training run on the base and data under `root` (see the `tiny_world` fixture): 16 of the samples a step, k = 3.

    Options of the parts are given by their path, such as `engine__zero_stage=2`.
    """
    config = TrainConfig(
        run_dir=root / "runs" / name,
        backbone=BackboneOptions(weights=str(root / "base")),
        method=TensorARConfig(k=3),
        data=DataOptions(source=str(root / "data"), cache_dir=root / "cache", validation_samples=9),
        optim=OptimOptions(codec_lr=1e-2, backbone_lr=1e-3),
        engine=EngineOptions(micro_batch=4),
        log=LogOptions(log_every=1, validate_every=0, sample_every=0, save_every=0),
        batch_size=16,
        steps=3,
        token_dropout=0.0,
    )
    parts: dict[str, dict] = {}
    for path, value in changes.items():
        part, _, option = path.rpartition("__")
        parts.setdefault(part, {})[option] = value
    own = parts.pop("", {})
    nested = {part: replace(getattr(config, part), **options) for part, options in parts.items()}
    return replace(config, **nested, **own)
