"""Open-MAGVIT2's class-conditional generator (arXiv 2409.04410; SEED-Voken
`modules/transformer/gpt.py`).

A code of 18 bits is two sub-tokens: `pre`, the first 6 bits, and `post`, the other 12. The trunk is
LlamaGen's (`blocks.py`): one position per code, whose input is the sum of both sub-tokens'
embeddings. What follows the trunk is different:

- The trunk's output is not normalized. A few more blocks of the same kind (the intra-token
  transformer) read the sequence [trunk output, embedding of `pre`] and predict `pre` at its first
  place and `post` at its second. The norm comes after them.
- These blocks use the rotary rows of the class and of the first code: zero at the first place (its
  queries and keys vanish), no rotation at the second.

TensorAR's codec sits between the trunk and the intra-token transformer, which handles every slot.

Shapes: B batch, L inputs, D width, S = 2 sub-tokens, T image tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
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
    run_blocks,
)
from t2i.models.conditions import Condition
from t2i.models.tokenizers.lfq import LFQTokenizer, signs, tokenizer_part
from t2i.models.weight_file import GIVE_SHAPE, WeightFileBackbone, published_size
from t2i.sampling import SamplingConfig
from t2i.weights import count_children, load_strict, reading_shape

_PREFIX = "transformer."


@dataclass(frozen=True, kw_only=True)
class OpenMAGVIT2Config(LlamaConfig):
    """Shape of an Open-MAGVIT2 generator; `n_layer` counts the blocks of its trunk."""

    n_intra_layer: int
    """Number of blocks of the intra-token transformer."""
    bits: tuple[int, int] = (6, 12)
    """Number of bits of each sub-token."""


SIZES: dict[str, dict] = {
    "B": {"n_layer": 24, "n_intra_layer": 2, "n_head": 16, "dim": 1024},
    "L": {"n_layer": 36, "n_intra_layer": 3, "n_head": 20, "dim": 1280},
    "XL": {"n_layer": 48, "n_intra_layer": 4, "n_head": 24, "dim": 1536},
}
"""Published sizes, all for 256 px (16 x 16 codes)."""

SAMPLING = {
    "B": SamplingConfig(cfg_scale=(1.9, 2.0)),
    "L": SamplingConfig(cfg_scale=(1.9, 1.9), temperature=(1.1, 1.0)),
    "XL": SamplingConfig(cfg_scale=(1.75, 1.85), temperature=(1.1, 1.0)),
}
"""Sampling settings behind the published FID, by sub-token (SEED-Voken
`scripts/evaluation/sample_gpu.sh`)."""


class OpenMAGVIT2GPT(nn.Module):
    """The parameters, named as in the official checkpoints."""

    def __init__(self, config: OpenMAGVIT2Config):
        super().__init__()
        self.class_emb = ClassEmbedding(config)
        self.pre_emb, self.post_emb = (nn.Embedding(2**b, config.dim) for b in config.bits)
        self.spatial_blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.factorized_blocks = nn.ModuleList(
            Block(config, i) for i in range(config.n_intra_layer)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.ModuleList(nn.Linear(config.dim, 2**b, bias=False) for b in config.bits)

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize for pre-training from scratch: N(0, 0.02), and zero heads."""
        normal_weights(self, generator)
        for weight in self.head.parameters():
            nn.init.zeros_(weight)


class OpenMAGVIT2(WeightFileBackbone, LlamaBackbone):
    config_type, tokenizer_type = OpenMAGVIT2Config, LFQTokenizer
    lora_targets = (
        r"(spatial|factorized)_blocks\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))"
    )

    def __init__(self, config: OpenMAGVIT2Config):
        super().__init__(config)
        self.config = config
        self.transformer = OpenMAGVIT2GPT(config)
        self.spec = BackboneSpec(
            family="open_magvit2",
            dim=config.dim,
            num_heads=config.n_head,
            grid=config.grid,
            subvocabs=tuple(2**b for b in config.bits),
            cond_kind="class",
            prefix_tokens=1,
            num_classes=config.num_classes,
            sign_codebook=True,
            sampling=SAMPLING[published_size(SIZES, dim=config.dim) or "B"],
        )

    # -- files -------------------------------------------------------------------------------------
    @classmethod
    def infer_config(
        cls, state_dict: dict[str, Tensor], stem: str, grid: tuple[int, int] | None
    ) -> OpenMAGVIT2Config:
        with reading_shape("an Open-MAGVIT2 generator"):
            pre, dim = state_dict[f"{_PREFIX}pre_emb.weight"].shape
            post = state_dict[f"{_PREFIX}post_emb.weight"].shape[0]
            ffn_dim = state_dict[f"{_PREFIX}spatial_blocks.0.feed_forward.w1.weight"].shape[0]
            classes = state_dict[f"{_PREFIX}class_emb.embedding_table.weight"].shape[0] - 1
        layers = count_children(state_dict, f"{_PREFIX}spatial_blocks.")
        size = published_size(SIZES, dim=dim, n_layer=layers)
        if not size:
            raise UserError(
                f"an Open-MAGVIT2 generator of width {dim} with {layers} layers is not a published "
                f"size, and its head count is not in the weights; give {GIVE_SHAPE}"
            )
        return OpenMAGVIT2Config(
            **SIZES[size],
            grid=grid or (16, 16),
            bits=((pre - 1).bit_length(), (post - 1).bit_length()),
            ffn_dim=ffn_dim,
            num_classes=classes,
        )

    @classmethod
    def published_config(cls, stem: str, grid: tuple[int, int] | None) -> OpenMAGVIT2Config | None:
        size = SIZES.get(stem.removeprefix("AR_256_"))
        return None if size is None else OpenMAGVIT2Config(**size, grid=grid or (16, 16))

    def fill(self, state_dict: dict[str, Tensor], path: str | Path) -> None:
        """Load the generator and, if the file holds it, its image tokenizer."""
        if inside := tokenizer_part(state_dict):
            self.frozen.tokenizer = LFQTokenizer.empty(inside, path)
        load_strict(ARCheckpoint(self), state_dict, path)

    def official_state_dict(self) -> dict[str, Tensor]:
        return {_PREFIX + k: v for k, v in self.transformer.state_dict().items()}

    # -- the model ---------------------------------------------------------------------------------
    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        return Condition(self.transformer.class_emb(prepared, drop))

    def embed_tokens(self, codes: Tensor) -> Tensor:
        return self.transformer.pre_emb(codes[..., 0]) + self.transformer.post_emb(codes[..., 1])

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.spatial_blocks

    def _intra_token(self, h: Tensor, earlier: Tensor) -> Tensor:
        """Run the intra-token transformer: h [..., D], `earlier` [..., s] -> [..., 1 + s, D]."""
        places = [h]
        if earlier.shape[-1]:
            places.append(self.transformer.pre_emb(earlier[..., 0]))
        x = torch.stack(places, dim=-2)
        out = run_blocks(
            self.transformer.factorized_blocks,
            x.reshape(-1, *x.shape[-2:]),
            self.rope_on(h.device)[: len(places)],
            None,
            None,
            recompute=self.gradient_checkpointing,
        )
        return self.transformer.norm(out).view(x.shape)

    def head(self, h: Tensor, earlier: Tensor) -> tuple[Tensor, nn.Module]:
        s = earlier.shape[-1]
        return self._intra_token(h, earlier)[..., s, :], self.transformer.head[s]

    def all_heads(self, h: Tensor, codes: Tensor) -> tuple[tuple[Tensor, nn.Module], ...]:
        states = self._intra_token(h, codes[..., :-1])
        heads = self.transformer.head
        return tuple((states[..., s, :], head) for s, head in enumerate(heads))

    def image_layers(self) -> dict[str, nn.Module]:
        names = ("pre_emb", "post_emb", "head")
        return {_PREFIX + name: getattr(self.transformer, name) for name in names}

    def code_vectors(self) -> tuple[Tensor, ...]:
        return tuple(signs(torch.arange(2**b), b) for b in self.config.bits)

    def encode_images(self, pixels: Tensor) -> Tensor:
        joint, low = self.tokenizer.encode(pixels).flatten(1), self.config.bits[0]
        return torch.stack([joint % 2**low, joint >> low], dim=-1)

    def decode_pixels(self, codes: Tensor) -> Tensor:
        joint = codes[..., 0] + (codes[..., 1] << self.config.bits[0])
        return self.tokenizer.decode(joint.unflatten(1, self.config.grid)).float()

    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        return (255 * (pixels + 1) / 2).clamp(0, 255).to(torch.uint8)


class ARCheckpoint(nn.Module):
    """The content of an official file: the generator and, if present, the tokenizer."""

    def __init__(self, backbone: OpenMAGVIT2):
        super().__init__()
        self.transformer = backbone.transformer
        if backbone.frozen.tokenizer is not None:
            self.first_stage_model = backbone.frozen.tokenizer
