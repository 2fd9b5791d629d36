"""LlamaGen's GPT, class-conditional and text-conditional (arXiv 2406.06525;
`autoregressive/models/gpt.py`).

The blocks are in `blocks.py`. Text acts only through the attention's values, since the prefix's
queries and keys vanish there. A caption dropped for guidance becomes the stored `uncond_embedding`
but keeps its own padding mask.

Shapes: B batch, L inputs, P prefix, D width, T image tokens, C caption feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.base import BackboneSpec
from t2i.models.blocks import (
    Block,
    ClassEmbedding,
    LlamaBackbone,
    LlamaConfig,
    RMSNorm,
    normal_weights,
)
from t2i.models.conditions import CaptionFeatures, Condition, left_pad, to_device
from t2i.models.llamagen.captions import caption_losses, clean_caption
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.models.weight_file import GIVE_GRID, GIVE_SHAPE, WeightFileBackbone, published_size
from t2i.sampling import SamplingConfig
from t2i.weights import count_children, reading_shape


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


SIZES: dict[str, dict] = {
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
"""Guidance scale of each class-conditional size's published FID (`GETTING_STARTED.md`)."""

GRIDS = {
    **{f"c2i_{size}_{px}": (px // 16, px // 16) for size in SIZES for px in (256, 384)},
    "t2i_XL_stage1_256": (16, 16),
    "t2i_XL_stage2_512": (32, 32),
}
"""Grid of each published file; it cannot be read off the weights."""


class CaptionEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = nn.ModuleDict(
            {
                "fc1": nn.Linear(config.caption_dim, config.dim, bias=False),
                "fc2": nn.Linear(config.dim, config.dim, bias=False),
            }
        )
        self.uncond_embedding: Tensor
        shape = (config.caption_tokens, config.caption_dim)
        self.register_buffer("uncond_embedding", torch.empty(shape))
        self.initialize_null()

    def initialize_null(self, generator: torch.Generator | None = None) -> None:
        """N(0, 1/width) for the features of no caption, which stay as they are."""
        width = self.uncond_embedding.shape[-1]
        nn.init.normal_(self.uncond_embedding, std=width**-0.5, generator=generator)

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
        embedding = ClassEmbedding if config.cond == "class" else CaptionEmbedding
        self.cls_embedding = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize for pre-training from scratch: N(0, 0.02), and a zero head."""
        normal_weights(self, generator)
        nn.init.zeros_(self.output.weight)
        if isinstance(self.cls_embedding, CaptionEmbedding):
            self.cls_embedding.initialize_null(generator)


class LlamaGen(WeightFileBackbone, LlamaBackbone):
    config_type, tokenizer_type = LlamaGenConfig, VQTokenizer
    lora_targets = r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))"

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.config = config
        self.gpt = GPT(config)
        classes = config.cond == "class"
        self.caption_width = 0 if classes else config.caption_dim
        guidance = CLASS_GUIDANCE.get(published_size(SIZES, **vars(config)), 2.0)
        self.spec = BackboneSpec(
            family="llamagen",
            dim=config.dim,
            num_heads=config.n_head,
            grid=config.grid,
            subvocabs=(config.vocab_size,),
            cond_kind=config.cond,
            prefix_tokens=config.prefix_tokens,
            num_classes=config.num_classes if classes else 0,
            sampling=SamplingConfig(guidance) if classes else SamplingConfig(7.5, top_k=1000),
        )

    # -- files -------------------------------------------------------------------------------------
    @classmethod
    def infer_config(
        cls, state_dict: dict[str, Tensor], stem: str, grid: tuple[int, int] | None
    ) -> LlamaGenConfig:
        with reading_shape("a LlamaGen GPT"):
            dim = state_dict["tok_embeddings.weight"].shape[1]
            ffn_dim = state_dict["layers.0.feed_forward.w1.weight"].shape[0]
            vocab = state_dict["output.weight"].shape[0]
            caption = state_dict.get("cls_embedding.uncond_embedding")
            if caption is None:
                classes = state_dict["cls_embedding.embedding_table.weight"].shape[0] - 1
        layers = count_children(state_dict, "layers.")
        size, grid = published_size(SIZES, dim=dim, n_layer=layers), grid or GRIDS.get(stem)
        if not size or grid is None:
            raise UserError(
                f"a GPT of width {dim} with {layers} layers named {stem!r} is not a published "
                f"LlamaGen file: its {'grid' if size else 'head count'} is not in the "
                f"weights; give {GIVE_GRID if size else GIVE_SHAPE}"
            )
        config = LlamaGenConfig(**SIZES[size], grid=grid, vocab_size=vocab, ffn_dim=ffn_dim)
        if caption is None:
            return replace(config, num_classes=classes)
        tokens, width = caption.shape
        return replace(config, cond="text", caption_tokens=tokens, caption_dim=width)

    @classmethod
    def published_config(cls, stem: str, grid: tuple[int, int] | None) -> LlamaGenConfig | None:
        if stem not in GRIDS:
            return None
        kind, size, *_ = stem.split("_")
        cond: Literal["class", "text"] = "class" if kind == "c2i" else "text"
        return LlamaGenConfig(**SIZES[size], cond=cond, grid=grid or GRIDS[stem])

    # -- the condition -----------------------------------------------------------------------------
    def prepare(self, conditions: Sequence, length: int | None = None) -> dict[str, Tensor]:
        if self.config.cond == "class":
            return super().prepare(conditions)
        if self.frozen.text_encoder is None:
            raise UserError(
                "this LlamaGen text-to-image backbone has no text encoder; pass text_encoder=PATH to load_backbone"
            )
        return self.collate_features(self.frozen.text_encoder.encode(list(conditions)))

    def caption_features(self) -> CaptionFeatures | None:
        encoder = self.frozen.text_encoder
        if self.config.cond == "class" or encoder is None:
            return super().caption_features()
        return CaptionFeatures(encoder.encode, encoder.cache_key())

    def collate_features(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        padded, mask = left_pad(features, self.config.caption_tokens)
        return {"features": to_device(padded, self.device), "mask": to_device(mask, self.device)}

    def made_up_conditions(self, batch: int, length: int) -> dict[str, Tensor]:
        if self.config.cond == "class":
            return super().made_up_conditions(batch, length)
        shape = (batch, self.config.caption_tokens, self.config.caption_dim)
        return self.collate_features(torch.randn(shape, device=self.device).unbind())

    def as_read(self, caption: str) -> str:
        return clean_caption(caption)

    def caption_notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        if self.frozen.text_encoder is not None:
            return self.frozen.text_encoder.notes(captions)
        return [caption_losses(caption, clean_caption(caption)) for caption in captions]

    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        # A dropped caption keeps its own mask. Modules return tensors only, because DeepSpeed's
        # hooks do not look inside other objects.
        return Condition(self.gpt.cls_embedding(prepared, drop), mask=prepared.get("mask"))

    # -- the model ---------------------------------------------------------------------------------
    def embed_tokens(self, codes: Tensor) -> Tensor:
        return self.gpt.tok_embeddings(codes[..., 0])

    @property
    def blocks(self) -> nn.ModuleList:
        return self.gpt.layers

    def finish(self, x: Tensor, *shared: Tensor) -> Tensor:
        return self.gpt.norm(x)

    def head(self, h: Tensor, earlier: Tensor) -> tuple[Tensor, nn.Module]:
        return h, self.gpt.output

    def image_layers(self) -> dict[str, nn.Module]:
        return {"tok_embeddings": self.gpt.tok_embeddings, "output": self.gpt.output}

    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
