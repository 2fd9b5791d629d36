"""LlamaGen's GPT, class-conditional and text-conditional (arXiv 2406.06525;
`autoregressive/models/gpt.py`).

The blocks are in `blocks.py`. Text acts through the attention's values alone, since the prefix has
neither queries nor keys there. A caption that was dropped for guidance becomes the stored
`uncond_embedding` but keeps its own padding mask.

Shapes: B batch, L inputs, P prefix, D width, T image tokens, C caption feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.base import (
    BackboneSpec,
    CaptionFeatures,
    Condition,
    published_size,
    published_stem,
    settle_config,
)
from t2i.models.blocks import (
    Block,
    ClassEmbedding,
    LlamaBackbone,
    LlamaConfig,
    RMSNorm,
    normal_weights,
)
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.sampling import SamplingConfig
from t2i.weights import build_empty, count_children, load_strict, read_state_dict, reading


@dataclass(frozen=True)
class LlamaGenConfig(LlamaConfig):
    """Shape of a LlamaGen GPT."""

    cond: Literal["class", "text"] = "class"
    vocab_size: int = 16384
    caption_tokens: int = 120
    caption_dim: int = 2048

    @property
    def prefix_tokens(self) -> int:
        return 1 if self.cond == "class" else self.caption_tokens


CONFIG = LlamaGenConfig

SIZES = {
    "B": {"n_layer": 12, "n_head": 12, "dim": 768},
    "L": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "XL": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "XXL": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "XXXL": {"n_layer": 48, "n_head": 40, "dim": 2560},
    "1B": {"n_layer": 22, "n_head": 32, "dim": 2048},
    "3B": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "7B": {"n_layer": 32, "n_head": 32, "dim": 4096},
}
"""Published sizes; 3B has the odd head width 100."""

CLASS_GUIDANCE = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}
"""How the published FID of each class-conditional size was sampled: this guidance, and all codes
(`GETTING_STARTED.md`).
"""


GRIDS = {
    **{f"c2i_{size}_{px}": (px // 16, px // 16) for size in SIZES for px in (256, 384)},
    "t2i_XL_stage1_256": (16, 16),
    "t2i_XL_stage2_512": (32, 32),
}
"""Grid of each published file: it has no parameters, so it cannot be read off the weights."""


def infer_config(
    state_dict: dict[str, Tensor], stem: str, grid: tuple[int, int] | None
) -> LlamaGenConfig:
    """Read the configuration off an official state dict; head count and grid come from the
    published tables.

    Raises:
        UserError: not a LlamaGen GPT, or an unpublished shape for which `config=` must be given.
    """
    with reading("a LlamaGen GPT"):
        dim = state_dict["tok_embeddings.weight"].shape[1]
        ffn_dim = state_dict["layers.0.feed_forward.w1.weight"].shape[0]
        vocab = state_dict["output.weight"].shape[0]
        caption = state_dict.get("cls_embedding.uncond_embedding")
        if caption is None:
            classes = state_dict["cls_embedding.embedding_table.weight"].shape[0] - 1
    layers = count_children(state_dict, "layers.")
    size = published_size(SIZES, dim=dim, n_layer=layers)
    grid = grid or GRIDS.get(stem)
    if size is None or grid is None:
        raise UserError(
            f"a GPT of width {dim} with {layers} layers named {stem!r} is not a published LlamaGen file: its "
            f"{'head count' if size is None else 'grid'} is not in the weights; pass config=LlamaGenConfig(...)"
            + ("" if size is None else " or grid=(h, w)")
        )
    config = LlamaGenConfig(**SIZES[size], grid=grid, vocab_size=vocab, ffn_dim=ffn_dim)
    if caption is None:
        return replace(config, num_classes=classes)
    tokens, width = caption.shape
    return replace(config, cond="text", caption_tokens=tokens, caption_dim=width)


class CaptionEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = nn.ModuleDict(
            {
                "fc1": nn.Linear(config.caption_dim, config.dim, bias=False),
                "fc2": nn.Linear(config.dim, config.dim, bias=False),
            }
        )
        shape = (config.caption_tokens, config.caption_dim)
        self.register_buffer("uncond_embedding", torch.randn(shape) / config.caption_dim**0.5)

    def forward(self, prepared: dict[str, Tensor], drop: Tensor | None) -> Tensor:
        features = prepared["features"].to(self.uncond_embedding.dtype)
        if drop is not None:
            features = torch.where(drop[:, None, None], self.uncond_embedding, features)
        hidden = F.gelu(self.cap_proj["fc1"](features), approximate="tanh")
        return self.cap_proj["fc2"](hidden)


class GPT(nn.Module):
    """The parameters, named as in the official checkpoints."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cls_embedding = (ClassEmbedding if config.cond == "class" else CaptionEmbedding)(
            config
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Weights for pre-training from scratch: N(0, 0.02), and a zero head."""
        normal_weights(self, generator)
        nn.init.zeros_(self.output.weight)


class LlamaGen(LlamaBackbone):
    lora_targets = r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))"

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.config = config
        self.gpt = GPT(config)
        self.spec = BackboneSpec(
            family="llamagen",
            dim=config.dim,
            num_heads=config.n_head,
            grid=config.grid,
            subvocabs=(config.vocab_size,),
            cond_kind=config.cond,
            prefix_tokens=config.prefix_tokens,
            num_classes=config.num_classes if config.cond == "class" else 0,
            sampling=SamplingConfig(
                cfg_scale=CLASS_GUIDANCE.get(published_size(SIZES, **vars(config)), 2.0)
            )
            if config.cond == "class"
            else SamplingConfig(cfg_scale=7.5, top_k=1000),
        )

    def prepare(self, conditions: Sequence, length: int | None = None) -> dict[str, Tensor]:
        if self.config.cond == "class":
            return super().prepare(conditions)
        if self.frozen.text_encoder is None:
            raise UserError(
                "this LlamaGen text-to-image backbone has no text encoder; pass text_encoder=PATH to load_backbone"
            )
        from t2i.models.llamagen.t5 import left_pad

        encoded = self.frozen.text_encoder.encode(list(conditions))
        features, mask = left_pad(encoded, self.config.caption_tokens)
        return {"features": features.to(self.device), "mask": mask.to(self.device)}

    def caption_features(self) -> CaptionFeatures | None:
        encoder = self.frozen.text_encoder
        if self.config.cond == "class" or encoder is None:
            return super().caption_features()
        return CaptionFeatures(encoder.encode, encoder.cache_key())

    def caption_notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        if self.frozen.text_encoder is not None:
            return self.frozen.text_encoder.notes(captions)
        from t2i.models.captions import caption_losses, clean_caption

        return [caption_losses(caption, clean_caption(caption)) for caption in captions]

    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        # A dropped caption keeps its own mask. Modules return tensors: DeepSpeed's hooks look into
        # nothing else.
        return Condition(self.gpt.cls_embedding(prepared, drop), mask=prepared.get("mask"))

    def embed_tokens(self, codes: Tensor) -> Tensor:
        return self.gpt.tok_embeddings(codes[..., 0])

    @property
    def blocks(self) -> nn.ModuleList:
        return self.gpt.layers

    def finish(self, x: Tensor) -> Tensor:
        return self.gpt.norm(x)

    def next_logits(self, h: Tensor, earlier: Tensor) -> Tensor:
        return self.gpt.output(h).float()

    def official_state_dict(self) -> dict[str, Tensor]:
        return self.gpt.state_dict()

    def image_layers(self) -> dict[str, nn.Module]:
        return {"tok_embeddings": self.gpt.tok_embeddings, "output": self.gpt.output}

    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)


def load(
    path: str | Path,
    *,
    config: LlamaGenConfig | None = None,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlamaGen:
    """Load an official GPT file (c2i_B_256.pt, t2i_XL_stage1_256.pt, ... DDP, FSDP or
    self-trained), strictly.

    Raises:
        UserError: unreadable file, another family, an unpublished shape without `config`, or keys
            that do not fit.
    """
    state_dict = {k: v for k, v in read_state_dict(path).items() if not _is_scratch(k)}
    config = settle_config(
        config, grid, path, lambda: infer_config(state_dict, Path(path).stem, grid)
    )
    backbone = build_empty(lambda: LlamaGen(config), dtype)
    load_strict(backbone.gpt, state_dict, path)
    return backbone


def _is_scratch(key: str) -> bool:
    """Position tables and sampling caches that some saved files carry along."""
    return key == "freqs_cis" or ".kv_cache." in key


def outline(
    source: str | Path,
    *,
    config: LlamaGenConfig | None = None,
    grid: tuple[int, int] | None = None,
) -> LlamaGen | None:
    """A published file's model on the meta device, without the file; None for what has no published
    shape.
    """
    stem = published_stem(source)
    if config is None and stem in GRIDS:
        kind, size, *_ = stem.split("_")
        config = LlamaGenConfig(**SIZES[size], cond="class" if kind == "c2i" else "text")
        config = replace(config, grid=grid or GRIDS[stem])
    if config is None:
        return None
    with torch.device("meta"):
        backbone, tokenizer = LlamaGen(config), VQTokenizer(VQConfig())
    backbone.frozen.tokenizer = tokenizer.eval().requires_grad_(False)
    return backbone.eval()


load_tokenizer = VQTokenizer.load
"""LlamaGen's image tokenizer (vq_ds16_c2i.pt, vq_ds16_t2i.pt, vq_ds8_c2i.pt)."""
