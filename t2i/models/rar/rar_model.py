"""RAR, class-conditional (arXiv 2411.00776; 1d-tokenizer `modeling/rar.py`), in raster order.

RAR was pre-trained on random orders, annealed to raster order for the last quarter of training, so
fine-tuning in raster order continues where pre-training ended. The trunk is a ViT with biases,
per-head LayerNorm on queries and keys, exact GELU and no RoPE. What matters for parity:

- There are two prefix entries: a learned cls token, then the class, whose output predicts token 0.
- Every input carries the position that it predicts: besides its own position embedding, the
  target-aware row of the next position is added to it.
- adaLN acts on every position: its condition is the class row plus a "timestep" row of the
  position. It also modulates the last, affine-free norm. That norm's two chunks are (scale, shift);
  a block's are (shift, scale, gate) twice.
- One embedding table holds codes, an unused mask row, the classes and the null class, in this
  order.
- Guidance grows from 1 to its full scale along a power-cosine (`SamplingConfig.cfg_power`), with
  different settings for each size.

Shapes: B batch, L inputs, P = 2 prefix, D width, H heads, K head width, T image tokens.
"""

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.base import BackboneSpec
from t2i.models.blocks import TransformerBackbone, attend
from t2i.models.conditions import Condition
from t2i.models.kv_cache import KVCache
from t2i.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from t2i.models.weight_file import GIVE_GRID, WeightFileBackbone, published_size
from t2i.sampling import SamplingConfig
from t2i.weights import count_children, reading_shape

PREFIX = 2
_EPS = 1e-6
# How many more rows than image tokens the official tables have; those past T + 1 are unused.
_SPARE_POSITIONS, _SPARE_TIMESTEPS = 1024, 100


@dataclass(frozen=True)
class RARConfig:
    """Shape of a RAR generator."""

    dim: int
    n_layer: int
    n_head: int
    mlp_dim: int
    grid: tuple[int, int] = (16, 16)
    vocab_size: int = 1024
    num_classes: int = 1000
    dropout: float = 0.1
    """Dropout after the attention's projection and both MLP layers (training only)."""
    attn_dropout: float = 0.1

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def first_class_id(self) -> int:
        """Row of class 0 in the embedding table; the mask row before it is not used here."""
        return self.vocab_size + 1

    @property
    def null_id(self) -> int:
        return self.first_class_id + self.num_classes


SIZES: dict[str, dict] = {
    "B": {"n_layer": 24, "n_head": 16, "dim": 768, "mlp_dim": 3072},
    "L": {"n_layer": 24, "n_head": 16, "dim": 1024, "mlp_dim": 4096},
    "XL": {"n_layer": 32, "n_head": 16, "dim": 1280, "mlp_dim": 5120},
    "XXL": {"n_layer": 40, "n_head": 16, "dim": 1408, "mlp_dim": 6144},
}
"""Published sizes."""

SAMPLING = {
    "B": SamplingConfig(cfg_scale=16.0, cfg_power=2.75),
    "L": SamplingConfig(cfg_scale=15.5, cfg_power=2.5, temperature=1.02),
    "XL": SamplingConfig(cfg_scale=6.9, cfg_power=1.5, temperature=1.02),
    "XXL": SamplingConfig(cfg_scale=8.0, cfg_power=1.2, temperature=1.02),
}
"""Sampling settings behind the published FID of each size."""

DEMO_SAMPLING = SamplingConfig(cfg_scale=4.0)
"""The constant guidance of the authors' demo, used for shapes that were never published."""


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class RARAttention(nn.Module):
    def __init__(self, config: RARConfig, layer: int):
        super().__init__()
        self.layer, self.heads = layer, config.n_head
        self.attn_dropout = config.attn_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        head_dim = config.dim // config.n_head
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim, eps=_EPS) for _ in range(2))
        self.proj = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        qkv_3BHLK = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv_3BHLK
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_dropout if self.training else 0.0
        return self.dropout(self.proj(attend(q, k, v, mask, cache, self.layer, dropout=dropout)))


class RARMLP(nn.Module):
    def __init__(self, config: RARConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


def _modulation(dim: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, chunks * dim))


class RARBlock(nn.Module):
    def __init__(self, config: RARConfig, layer: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.dim, eps=_EPS) for _ in range(2))
        self.attn = RARAttention(config, layer)
        self.mlp = RARMLP(config)
        self.adaLN_modulation = _modulation(config.dim, 6)

    def forward(
        self, x: Tensor, c_BLD: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_BLD).chunk(
            6, dim=-1
        )
        x = x + gate_a * self.attn(_modulated(self.norm1(x), shift_a, scale_a), mask, cache)
        return x + gate_m * self.mlp(_modulated(self.norm2(x), shift_m, scale_m))


class FinalNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.adaLN_modulation = _modulation(dim, 2)

    def forward(self, x: Tensor, c_BLD: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(c_BLD).chunk(2, dim=-1)
        return _modulated(F.layer_norm(x, x.shape[-1:], eps=_EPS), shift, scale)


class RARGPT(nn.Module):
    """The parameters, named as in the official checkpoints."""

    def __init__(self, config: RARConfig):
        super().__init__()
        self.num_tokens = config.num_tokens
        positions = (1, config.num_tokens + _SPARE_POSITIONS, config.dim)
        timesteps = (1, config.num_tokens + _SPARE_TIMESTEPS, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(positions))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(positions))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(timesteps))
        self.blocks = nn.ModuleList(RARBlock(config, i) for i in range(config.n_layer))
        self.embeddings = nn.Embedding(config.null_id + 1, config.dim)
        self.adaln_before_head = FinalNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab_size)

    def forward(
        self, x_BLD: Tensor, class_BD: Tensor, positions_L: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first block's input and the adaLN condition of every position, [B, L, D] each.

        This is a `forward` because ZeRO-3 gathers a module's own parameters only there.
        """
        x = x_BLD + self.cls_token[0].masked_fill((positions_L != 0)[..., None], 0)
        x = x + self.pos_embed[0, positions_L]
        # Position p predicts position p + 1; the cls token and the last image token have no target.
        targeted = (positions_L > 0) & (positions_L <= self.num_tokens)
        target = self.target_aware_pos_embed[0, positions_L + 1]
        x = x + target.masked_fill(~targeted[..., None], 0)
        return x, class_BD[:, None] + self.timesteps_embeddings[0, positions_L]

    def initialize(self, generator: torch.Generator) -> None:
        """Initialize for pre-training: truncated N(0, 0.02); zero cls token, biases and adaLN."""
        for name, parameter in self.named_parameters():
            if name == "cls_token" or name.endswith("bias") or "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)


class RAR(WeightFileBackbone, TransformerBackbone):
    config_type, tokenizer_type = RARConfig, MaskGITVQGAN
    lora_targets = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"

    def __init__(self, config: RARConfig):
        super().__init__()
        self.config = config
        self.gpt = RARGPT(config)
        self.spec = BackboneSpec(
            family="rar",
            dim=config.dim,
            num_heads=config.n_head,
            grid=config.grid,
            subvocabs=(config.vocab_size,),
            cond_kind="class",
            prefix_tokens=PREFIX,
            num_classes=config.num_classes,
            sampling=SAMPLING.get(published_size(SIZES, **vars(config)), DEMO_SAMPLING),
        )

    # -- files -------------------------------------------------------------------------------------
    @classmethod
    def infer_config(
        cls, state_dict: dict[str, Tensor], stem: str, grid: tuple[int, int] | None
    ) -> RARConfig:
        with reading_shape("a RAR generator"):
            vocab, dim = state_dict["lm_head.weight"].shape
            n_head = dim // state_dict["blocks.0.attn.q_norm.weight"].shape[0]
            mlp_dim = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
            classes = state_dict["embeddings.weight"].shape[0] - vocab - 2
            tokens = state_dict["timesteps_embeddings"].shape[1] - _SPARE_TIMESTEPS
        layers = count_children(state_dict, "blocks.")
        side = isqrt(max(tokens, 0))
        grid = grid or (side, side)
        if grid[0] * grid[1] != tokens:
            raise UserError(
                f"the weights have positions for {tokens} image tokens, not for a grid of "
                f"{grid[0]} x {grid[1]}; pass {GIVE_GRID}"
            )
        return RARConfig(dim, layers, n_head, mlp_dim, grid, vocab, classes)

    @classmethod
    def published_config(cls, stem: str, grid: tuple[int, int] | None) -> RARConfig | None:
        size = SIZES.get(stem.removeprefix("rar_").upper())
        return None if size is None else RARConfig(**size, grid=grid or (16, 16))

    # -- the model ---------------------------------------------------------------------------------
    def condition_ids(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embedding rows int64 [B] of labels [B], or of the null class where `drop`."""
        ids = labels + self.config.first_class_id
        return ids if drop is None else torch.where(drop, self.config.null_id, ids)

    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        row_BD = self.gpt.embeddings(self.condition_ids(prepared["labels"], drop))
        # The trunk adds the cls token, like everything else that depends only on the position.
        prefix = torch.stack([torch.zeros_like(row_BD), row_BD], dim=1)
        return Condition(prefix, extras={"class": row_BD})

    def embed_tokens(self, codes: Tensor) -> Tensor:
        return self.gpt.embeddings(codes[..., 0])

    @property
    def blocks(self) -> nn.ModuleList:
        return self.gpt.blocks

    def enter(self, x_BLD: Tensor, positions_L: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        return self.gpt(x_BLD, condition.extras["class"], positions_L)

    def finish(self, x: Tensor, *shared: Tensor) -> Tensor:
        return self.gpt.adaln_before_head(x, *shared)

    def head(self, h: Tensor, earlier: Tensor) -> tuple[Tensor, nn.Module]:
        return h, self.gpt.lm_head

    def image_layers(self) -> dict[str, nn.Module]:
        return {"embeddings": self.gpt.embeddings, "lm_head": self.gpt.lm_head}

    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        unit = ((pixels + 1) / 2).clamp(0, 1)
        return (unit * 255).to(torch.uint8)
