"""LlamaGen's GPT, class-conditional and text-conditional (arXiv 2406.06525; `autoregressive/models/gpt.py`).

A pre-norm Llama block with fused QKV and SwiGLU. Three things differ from the Llama that everyone knows and matter for parity:

- RoPE is two-dimensional on interleaved pairs: the first half of the pairs turns with the row, the second with the column.
- The prefix (class or caption) is not turned by the identity but by zero, so its queries and keys vanish: every attention logit
  to or from a prefix entry is 0 and text acts through the values alone.
- A caption that was dropped for guidance becomes the stored `uncond_embedding` but keeps its own padding mask.

Shapes: B batch, L inputs, P prefix, D width, H heads, K head width, T image tokens, C caption feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i.backbones.base import (
    Backbone,
    BackboneSpec,
    CaptionFeatures,
    Condition,
    KVCache,
    SamplingConfig,
    causal_mask,
)
from t2i.tokenizers.vq import VQTokenizer
from t2i.weights import load_strict, read_state_dict


@dataclass(frozen=True)
class LlamaGenConfig:
    """Shape of a LlamaGen GPT."""

    dim: int
    n_layer: int
    n_head: int
    grid: tuple[int, int] = (16, 16)
    cond: Literal["class", "text"] = "class"
    vocab_size: int = 16384
    n_kv_head: int | None = None
    ffn_dim: int | None = None
    """Hidden width of the SwiGLU; None means 8/3 of dim rounded up to a multiple of 256."""
    num_classes: int = 1000
    caption_tokens: int = 120
    caption_dim: int = 2048
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    token_dropout: float = 0.1
    """Element dropout on all input embeddings (training only)."""
    resid_dropout: float = 0.1
    ffn_dropout: float = 0.1

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or -(-int(2 * 4 * self.dim / 3) // 256) * 256

    @property
    def prefix_tokens(self) -> int:
        return 1 if self.cond == "class" else self.caption_tokens


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

GRIDS = {
    **{f"c2i_{size}_{px}": (px // 16, px // 16) for size in SIZES for px in (256, 384)},
    "t2i_XL_stage1_256": (16, 16),
    "t2i_XL_stage2_512": (32, 32),
}
"""Grid of each published file: it has no parameters, so it cannot be read off the weights."""


def infer_config(
    state_dict: dict[str, Tensor], stem: str, grid: tuple[int, int] | None
) -> LlamaGenConfig:
    """Read the configuration off an official state dict; head count and grid come from the published tables.

    Raises:
        ValueError: not a LlamaGen GPT, or an unpublished shape for which `config=` must be given.
    """
    try:
        dim = state_dict["tok_embeddings.weight"].shape[1]
        ffn_dim = state_dict["layers.0.feed_forward.w1.weight"].shape[0]
        vocab = state_dict["output.weight"].shape[0]
        caption = state_dict.get("cls_embedding.uncond_embedding")
        if caption is None:
            classes = state_dict["cls_embedding.embedding_table.weight"].shape[0] - 1
    except KeyError as error:
        raise ValueError(f"not a LlamaGen GPT: key {error} is missing") from error
    layers = 1 + max(int(k.split(".")[1]) for k in state_dict if k.startswith("layers."))
    size = next((s for s in SIZES.values() if s["dim"] == dim and s["n_layer"] == layers), None)
    grid = grid or GRIDS.get(stem)
    if size is None or grid is None:
        raise ValueError(
            f"a GPT of width {dim} with {layers} layers named {stem!r} is not a published LlamaGen file: its "
            f"{'head count' if size is None else 'grid'} is not in the weights; pass config=LlamaGenConfig(...)"
            + ("" if size is None else " or grid=(h, w)")
        )
    config = LlamaGenConfig(**size, grid=grid, vocab_size=vocab, ffn_dim=ffn_dim)
    if caption is None:
        return replace(config, num_classes=classes)
    tokens, width = caption.shape
    return replace(config, cond="text", caption_tokens=tokens, caption_dim=width)


class RMSNorm(nn.Module):
    """Normalise in fp32, cast back, then scale: the order matters in bf16."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        unit = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return unit.type_as(x) * self.weight


def rope_table(config: LlamaGenConfig) -> Tensor:
    """cos and sin for every position, [P + T, K/2, 2] fp32; zero for the prefix."""
    half = config.dim // config.n_head // 2
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    rows, columns = config.grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([torch.outer(axis.flatten(), frequencies) for axis in (row, column)], dim=-1)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([image.new_zeros(config.prefix_tokens, *image.shape[1:]), image])


def rotate(x_BLHK: Tensor, rope_LK2: Tensor) -> Tensor:
    """Turn interleaved pairs by the table's angles, in fp32."""
    pairs = x_BLHK.float().unflatten(-1, (-1, 2))
    cos, sin = rope_LK2[None, :, None].unbind(-1)
    even, odd = pairs.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).type_as(x_BLHK)


class Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.dim // config.n_head
        self.wqkv = nn.Linear(
            config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False
        )
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            k, v = k.type_as(q), v.type_as(q)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.heads
        )
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.null_id = config.num_classes
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, prepared: dict[str, Tensor], drop: Tensor | None) -> Tensor:
        labels = prepared["labels"]
        if drop is not None:
            labels = torch.where(drop, self.null_id, labels)
        return self.embedding_table(labels)[:, None]


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
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.output.weight)


class LlamaGen(Backbone):
    lora_targets = r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))"

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        self.token_dropout = nn.Dropout(config.token_dropout)
        # Not a buffer: it must stay fp32 when the model is cast to bf16.
        self._rope = rope_table(config) if self.gpt.norm.weight.device.type != "meta" else None
        self.spec = BackboneSpec(
            family="llamagen",
            dim=config.dim,
            num_heads=config.n_head,
            grid=config.grid,
            subvocabs=(config.vocab_size,),
            cond_kind=config.cond,
            prefix_tokens=config.prefix_tokens,
            sampling=SamplingConfig(cfg_scale=2.0)
            if config.cond == "class"
            else SamplingConfig(cfg_scale=7.5, top_k=1000),
        )

    def prepare(self, conditions: Sequence, length: int | None = None) -> dict[str, Tensor]:
        if self.config.cond == "class":
            from t2i.conditioning.labels import class_ids

            return {"labels": class_ids(conditions, self.config.num_classes).to(self.device)}
        if self.frozen.text_encoder is None:
            raise ValueError(
                "this LlamaGen text-to-image backbone has no text encoder; pass text_encoder=PATH to load_backbone"
            )
        from t2i.conditioning.t5 import left_pad

        encoded = self.frozen.text_encoder.encode(list(conditions))
        features, mask = left_pad(encoded, self.config.caption_tokens)
        return {"features": features.to(self.device), "mask": mask.to(self.device)}

    def caption_features(self) -> CaptionFeatures | None:
        encoder = self.frozen.text_encoder
        if self.config.cond == "class" or encoder is None:
            return super().caption_features()
        return CaptionFeatures(encoder.encode, encoder.cache_key(), encoder.report.lines)

    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        # A dropped caption keeps its own mask. Modules return tensors: DeepSpeed's hooks look into nothing else.
        return Condition(self.gpt.cls_embedding(prepared, drop), mask=prepared.get("mask"))

    def embed_tokens(self, codes: Tensor) -> Tensor:
        return self.gpt.tok_embeddings(codes[..., 0])

    def trunk(
        self, x_BLD, positions_L, condition: Condition, cache: KVCache | None = None
    ) -> Tensor:
        if self._rope is None or self._rope.device != x_BLD.device:
            self._rope = rope_table(self.config).to(x_BLD.device)
        rope = self._rope[positions_L]
        if cache is not None:
            mask = causal_mask(cache.index, cache.extent, condition.mask)
        elif condition.mask is not None:
            mask = causal_mask(
                torch.arange(x_BLD.shape[1], device=x_BLD.device), x_BLD.shape[1], condition.mask
            )
        else:
            mask = None
        x = self.token_dropout(x_BLD)
        for block in self.gpt.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        return self.gpt.norm(x)

    def next_logits(self, h: Tensor, earlier: Tensor) -> Tensor:
        return self.gpt.output(h).float()

    def official_state_dict(self) -> dict[str, Tensor]:
        return self.gpt.state_dict()

    def image_layers(self) -> dict[str, nn.Module]:
        return {"tok_embeddings": self.gpt.tok_embeddings, "output": self.gpt.output}

    def new_cache(self, batch: int, length: int) -> KVCache:
        c, weight = self.config, self.gpt.tok_embeddings.weight
        shape = (c.n_layer, batch, c.n_kv_head or c.n_head, length, c.dim // c.n_head)
        return KVCache(*shape, dtype=weight.dtype, device=weight.device)

    def code_vectors(self) -> tuple[Tensor, ...]:
        return (self.tokenizer.quantize.vectors(),)

    def decode_images(self, codes: Tensor) -> Tensor:
        pixels = self.tokenizer.decode(codes[..., 0].unflatten(1, self.config.grid))
        return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load(
    path: str | Path,
    *,
    config: LlamaGenConfig | None = None,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlamaGen:
    """Load an official GPT file (c2i_B_256.pt, t2i_XL_stage1_256.pt, ... DDP, FSDP or self-trained), strictly.

    Raises:
        ValueError: unreadable file, another family, an unpublished shape without `config`, or keys that do not fit.
    """
    state_dict = {k: v.to(dtype) for k, v in read_state_dict(path).items() if not _is_scratch(k)}
    try:
        if config is None:
            config = infer_config(state_dict, Path(path).stem, grid)
        elif grid is not None:
            config = replace(config, grid=grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        backbone = LlamaGen(config)
    backbone.to_empty(device="cpu").to(dtype)
    load_strict(backbone.gpt, state_dict, path)
    return backbone.eval()


def _is_scratch(key: str) -> bool:
    """Position tables and sampling caches that some saved files carry along."""
    return key == "freqs_cis" or ".kv_cache." in key


def config_from_dict(values: dict) -> LlamaGenConfig:
    """The config stored in a JSON file."""
    return LlamaGenConfig(**{**values, "grid": tuple(values["grid"])})


def load_tokenizer(path: str | Path) -> VQTokenizer:
    """LlamaGen's image tokenizer (vq_ds16_c2i.pt, vq_ds16_t2i.pt, vq_ds8_c2i.pt)."""
    return VQTokenizer.load(path)
