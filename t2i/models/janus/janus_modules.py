"""The modules of a Janus-Pro, named as in transformers' checkpoints (and so in adapter files).

The language model is a Llama: pre-norm blocks, RoPE on the halves of a head, no biases. Image codes
have their own embedding, MLP into the language model, and head. The understanding tower, its
aligner and the text head are part of a complete checkpoint, but drawing does not use them; the
first two only hold weights here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.models.blocks import LlamaConfig, RMSNorm, attend, rotate
from t2i.models.janus.janus_config import JanusShape
from t2i.models.kv_cache import KVCache
from t2i.models.lean import swiglu


class JanusAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_dim = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in projections)
        heads = [q.shape[2], k.shape[2]]
        q, k = rotate(torch.cat([q, k], dim=2), rope, halves=True).split(heads, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.o_proj(attend(q, k, v, mask, cache, self.layer))


class JanusFeedForward(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class JanusBlock(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = JanusAttention(config, layer)
        self.mlp = JanusFeedForward(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """The modules of the Llama; `LlamaBackbone.trunk` runs them."""

    def __init__(self, config: LlamaConfig, vocab_size: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleList(JanusBlock(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Aligner(nn.Module):
    """An MLP of `depth` layers into the language model."""

    def __init__(self, dim_in: int, dim: int, depth: int):
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim)
        self.hidden_layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(1, depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        for layer in self.hidden_layers:
            x = layer(F.gelu(x))
        return x


class CodeHead(nn.Module):
    """Predicts image codes: `vision_head(read(x))`."""

    def __init__(self, dim_in: int, dim: int, codes: int):
        super().__init__()
        self.proj_out = nn.Linear(dim_in, dim)
        self.vision_head = nn.Linear(dim, codes)

    def read(self, x: Tensor) -> Tensor:
        """The input of `vision_head`."""
        return F.gelu(self.proj_out(x))


def tower(vision: dict) -> nn.ModuleDict:
    """The weights of the understanding tower (SigLIP), which is not run here."""
    dim, patch = vision["hidden_size"], vision["patch_size"]
    embeddings = {
        "patch_embedding": nn.Conv2d(vision["num_channels"], dim, patch, stride=patch),
        "position_embedding": nn.Embedding((vision["image_size"] // patch) ** 2, dim),
    }
    layers = (_tower_layer(dim, vision["mlp_ratio"]) for _ in range(vision["num_hidden_layers"]))
    return nn.ModuleDict(
        {
            "embeddings": nn.ModuleDict(embeddings),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "post_layernorm": nn.LayerNorm(dim),
        }
    )


def _tower_layer(dim: int, mlp_ratio: float) -> nn.ModuleDict:
    hidden = int(dim * mlp_ratio)
    projections = ("q_proj", "k_proj", "v_proj", "projection_layer")
    return nn.ModuleDict(
        {
            "layer_norm1": nn.LayerNorm(dim),
            "self_attn": nn.ModuleDict({name: nn.Linear(dim, dim) for name in projections}),
            "layer_norm2": nn.LayerNorm(dim),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)}),
        }
    )


class JanusParts(nn.Module):
    """The module that transformers calls `model`, without the image tokenizer."""

    def __init__(self, shape: JanusShape):
        super().__init__()
        vision, codes = shape.vision, shape.codes
        self.vision_model = tower(vision)
        self.aligner = Aligner(vision["hidden_size"], vision["projection_dim"], vision["depth"])
        size, width, dim = codes["num_embeddings"], codes["embed_dim"], codes["projection_dim"]
        self.generation_embeddings = nn.Embedding(size, width)
        self.generation_aligner = Aligner(width, dim, codes["num_hidden_layers"])
        self.generation_head = CodeHead(codes["image_token_embed_dim"], dim, size)
        self.language_model = LanguageModel(shape.trunk, shape.text["vocab_size"])


class JanusModel(nn.Module):
    """The complete model, with the text head."""

    def __init__(self, shape: JanusShape):
        super().__init__()
        self.model = JanusParts(shape)
        self.lm_head = nn.Linear(shape.trunk.dim, shape.text["vocab_size"], bias=False)


def rope_table(config: LlamaConfig, positions: int) -> Tensor:
    """cos and sin of every position, [positions, K/2, 2] fp32."""
    steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_base**steps
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
