"""Janus-Pro as a text-to-image generator (arXiv 2501.17811; deepseek-ai/Janus, transformers' `models/janus`).

A Llama reads [prompt | image codes]: the prompt through its own token embedding, codes through a table of their own and a small MLP,
never through the token embedding; a separate head predicts codes. The modules are transformers'. Four things matter for parity:

- the unconditional prompt keeps BOS and begin-of-image, and its padding is attended to; only padding left of a prompt is masked;
- the image tokenizer is our `VQTokenizer`: transformers' copy does not normalise when it encodes, and draws other codes;
- RoPE frequencies stay fp32 when the model is cast to bf16 (see `_apply`);
- the padding token's embedding is trained: it is most of the unconditional prompt.

Shapes: B batch, L inputs, P prompt tokens, D width, T image tokens.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusForConditionalGeneration
from transformers.models.janus.modeling_janus import JanusVisionEmbeddings
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from t2i.backbones import janus_weights as names
from t2i.backbones.attention import KVCache, causal_mask, run_blocks
from t2i.backbones.base import Backbone, BackboneSpec, Condition, SamplingConfig, settle_config
from t2i.conditioning.janus_prompts import IMAGE, JanusPrompts
from t2i.errors import UserError
from t2i.tokenizers.vq import VQConfig, VQTokenizer
from t2i.weights import load_strict, naming, read_folder, reading

PUBLISHED_AS_FOLDER = True

log = logging.getLogger(__name__)

_MAX_PROMPT = 512
_UNDERSTANDING = ("model.vision_model.", "model.aligner.", "lm_head.")


@dataclass(frozen=True)
class JanusShape:
    """Shape of a Janus-Pro."""

    transformers: dict = field(repr=False)
    """`JanusConfig` as plain data."""
    grid: tuple[int, int]
    """Height and width of an image in codes."""

    @staticmethod
    def of(janus: JanusConfig, grid: tuple[int, int] | None = None) -> "JanusShape":
        """The shape of a configuration, with the grid that it says or another."""
        side = janus.vq_config.num_patches
        plain = json.loads(janus.to_json_string(use_diff=False))
        return JanusShape(plain, tuple(grid or (side, side)))

    @property
    def janus(self) -> JanusConfig:
        return JanusConfig.from_dict(self.transformers)


CONFIG = JanusShape


class PastKeyValues:
    """Our cache under the method that transformers' attention calls."""

    def __init__(self, cache: KVCache):
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        k, v = self.cache.update(layer, keys, values)
        return k.type_as(keys), v.type_as(values)


class Janus(Backbone):
    lora_targets = (
        r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    )

    def __init__(self, config: JanusShape, *, generation_only: bool = False):
        """`generation_only` leaves out the understanding tower, its aligner and the text head."""
        super().__init__()
        self.config = config
        shape = config.janus
        with torch.device("meta"):
            self.janus = JanusForConditionalGeneration(_untied(shape))
        model = self.janus.model
        del model.vqmodel  # ours is in `frozen`
        # Otherwise the padding token would get no gradient; it makes up the unconditional prompt.
        model.language_model.embed_tokens.padding_idx = None
        if generation_only:
            self.left_out = sum(p.numel() for m in self._understanding() for p in m.parameters())
            del model.vision_model, model.aligner, self.janus.lm_head
        text = shape.text_config
        self.spec = BackboneSpec(
            family="janus",
            dim=text.hidden_size,
            num_heads=text.num_attention_heads,
            grid=config.grid,
            subvocabs=(shape.vq_config.num_embeddings,),
            cond_kind="text",
            prefix_tokens=min(
                _MAX_PROMPT, text.max_position_embeddings - config.grid[0] * config.grid[1]
            ),
            sampling=SamplingConfig(cfg_scale=5.0),
        )

    # -- modules ----------------------------------------------------------------------------------------------------------
    @property
    def language_model(self) -> nn.Module:
        return self.janus.model.language_model

    @property
    def lora_root(self) -> nn.Module:
        return self.janus

    def _understanding(self) -> tuple[nn.Module, ...]:
        model = self.janus.model
        parts = (getattr(model, "vision_model", None), getattr(model, "aligner", None))
        return tuple(m for m in (*parts, getattr(self.janus, "lm_head", None)) if m is not None)

    def image_layers(self) -> dict[str, nn.Module]:
        kinds = ("generation_embeddings", "generation_aligner", "generation_head")
        return {f"model.{kind}": getattr(self.janus.model, kind) for kind in kinds}

    def trained_modules(self) -> Sequence[nn.Module]:
        return (self.language_model, *self.image_layers().values())

    def parts(self) -> dict[str, Sequence[nn.Module]]:
        understanding = self._understanding()
        return {
            "language model": (self.language_model,),
            "image layers": tuple(self.image_layers().values()),
            **({"understanding": understanding} if understanding else {}),
        }

    def official_state_dict(self) -> dict[str, Tensor]:
        weights = self.janus.state_dict()
        return {k: v for k, v in weights.items() if not k.startswith(_UNDERSTANDING)}

    def save_official(self, folder: Path, dtype: torch.dtype) -> Path:
        from t2i.backbones.janus_export import save_folder

        if self.left_out:
            raise UserError(
                "a Janus loaded with generation_only lacks a part of what a whole folder holds; load it without"
            )
        weights = self.janus.state_dict() | names.vq_to_transformers(self.tokenizer.state_dict())
        weights = {name: value.detach().to("cpu", dtype) for name, value in weights.items()}
        save_folder(folder, weights, self.config.janus, self.prompts, self.spec.sampling)
        return folder

    def _apply(self, fn, recurse=True):
        """What moves or casts the model must not round RoPE frequencies: in bf16 angles would be off by radians."""
        super()._apply(fn, recurse)
        self._compute_buffers()
        return self

    def _compute_buffers(self) -> None:
        """Tables that are in no checkpoint, in full precision on the device of the weights."""
        device = self.language_model.norm.weight.device
        for module in self.janus.modules():
            if isinstance(module, LlamaRotaryEmbedding):
                fresh = LlamaRotaryEmbedding(module.config)
                module.inv_freq = fresh.inv_freq.to(device)
                module.original_inv_freq = fresh.original_inv_freq.to(device)
            elif isinstance(module, JanusVisionEmbeddings):
                module.position_ids = torch.arange(module.num_positions, device=device)[None]

    # -- the condition ----------------------------------------------------------------------------------------------------
    @property
    def prompts(self) -> JanusPrompts:
        if self.frozen.text_encoder is None:
            raise UserError("this Janus has no prompt tokenizer; load it from its published folder")
        return self.frozen.text_encoder

    def prepare(self, conditions: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
        ids, mask = self.prompts.batch(conditions, length)
        null = self.prompts.unconditional(ids, mask)
        prepared = {"ids": ids, "null_ids": null, "mask": mask}
        return {name: value.to(self.device) for name, value in prepared.items()}

    def prefix_length(self, conditions: Sequence[str]) -> int:
        return max((len(ids) for ids in self.prompts.encode(conditions)), default=0)

    def caption_features(self) -> None:
        """Captions stay text: tokenizing them costs nothing."""

    def caption_notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        known = self.frozen.text_encoder is not None  # not where only shapes were read
        return self.prompts.notes(captions) if known else super().caption_notes(captions)

    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        ids = prepared["ids"]
        if drop is not None:
            ids = torch.where(drop[:, None], prepared["null_ids"], ids)
        return Condition(self.language_model.embed_tokens(ids), mask=prepared["mask"])

    # -- the model --------------------------------------------------------------------------------------------------------
    def embed_tokens(self, codes: Tensor) -> Tensor:
        model = self.janus.model
        return model.generation_aligner(model.generation_embeddings(codes[..., 0]))

    def trunk(
        self, x_BLD, positions_L, condition: Condition, cache: KVCache | None = None
    ) -> Tensor:
        shared = {
            "attention_mask": causal_mask(x_BLD, condition.mask, cache),
            "position_embeddings": self.language_model.rotary_emb(x_BLD, positions_L[None]),
            "past_key_values": None if cache is None else PastKeyValues(cache),
        }
        layers = (partial(layer, **shared) for layer in self.language_model.layers)
        x = run_blocks(layers, self.token_dropout(x_BLD), recompute=self.gradient_checkpointing)
        return self.language_model.norm(x)

    def next_logits(self, h: Tensor, earlier: Tensor) -> Tensor:
        return self.janus.model.generation_head(h).float()

    def new_cache(self, batch: int, length: int) -> KVCache:
        text, weight = self.language_model.config, self.language_model.norm.weight
        shape = (text.num_hidden_layers, batch, text.num_key_value_heads, length, text.head_dim)
        return KVCache(*shape, dtype=weight.dtype, device=weight.device)

    # -- pixels -----------------------------------------------------------------------------------------------------------
    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        """Janus cuts off where LlamaGen rounds."""
        return ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


def _untied(config: JanusConfig) -> JanusConfig:
    """A copy whose model has a text head of its own, also where the file ties it (see `load`)."""
    return JanusConfig.from_dict({**config.to_dict(), "tie_word_embeddings": False})


def load(
    path: str | Path,
    *,
    config: JanusShape | None = None,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    generation_only: bool = False,
    shapes_only: bool = False,
) -> Janus:
    """Load a published folder in DeepSeek's or transformers' layout, strictly, with its image tokenizer and its prompts.

    Args:
        config: overrides the folder's own configuration.
        grid: height and width in codes, if not those of the configuration.
        generation_only: leave out the understanding tower, its aligner and the text head.
        shapes_only: a model on the meta device, its names and shapes checked against the files without reading their data.

    Raises:
        UserError: unreadable files, another model, or keys that do not fit, each named.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: Janus-Pro is published as one (config.json, weights, tokenizer.json)"
        )
    weights = names.to_transformers(read_folder(folder, shapes_only=shapes_only))
    shape = config.janus if config is not None else names.read_config(folder, weights)
    tied = names.HEAD not in weights
    with naming(folder), reading("a Janus-Pro"):
        vq = VQConfig.from_state_dict(names.vq_weights(weights))
        if tied:
            weights[names.HEAD] = weights[names.EMBEDDING]
    shape.tie_word_embeddings = tied  # transformers' default is True, whatever the file holds
    prompts = JanusPrompts.load(folder, _MAX_PROMPT)
    shape.image_token_id = prompts.tokenizer.token_to_id(IMAGE) or shape.image_token_id
    grid = grid or (config.grid if config is not None else None)
    backbone = Janus(JanusShape.of(shape, grid), generation_only=generation_only)
    prompts.max_tokens = backbone.spec.prefix_tokens
    backbone.frozen.text_encoder = prompts
    _attach_tokenizer(backbone, vq, None if shapes_only else names.vq_weights(weights), folder)
    other = (names.VQ, *_UNDERSTANDING) if generation_only else (names.VQ,)
    kept = {k: v.to(dtype) for k, v in weights.items() if not k.startswith(other)}
    load_strict(backbone.janus, kept, folder, assign=True)
    if tied and not generation_only:
        backbone.janus.lm_head.weight = backbone.language_model.embed_tokens.weight
    backbone._compute_buffers()
    if backbone.left_out:
        size = backbone.left_out * dtype.itemsize / 1e9
        log.info(
            "not loaded: understanding tower, aligner and text head, %.2f GB that drawing images does not need",
            size,
        )
    return backbone.eval()


def _attach_tokenizer(
    backbone: Janus, config: VQConfig, weights: dict[str, Tensor] | None, source: str | Path
) -> None:
    """Give the backbone its image tokenizer, in fp32; without weights it stays on the meta device."""
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    if weights is not None:
        load_strict(tokenizer, {k: v.float() for k, v in weights.items()}, source, assign=True)
    backbone.frozen.tokenizer = tokenizer.eval().requires_grad_(False)


def outline(
    source: str | Path,
    *,
    config: JanusShape | None = None,
    grid: tuple[int, int] | None = None,
    generation_only: bool = False,
) -> Janus | None:
    """A published size on the meta device, without any file; None for what has no published shape."""
    size = names.PUBLISHED.get(str(source))
    if size is None:
        return None
    published = names.published_config(size)
    shape = settle_config(config, grid, source, lambda: JanusShape.of(published, grid))
    backbone = Janus(shape, generation_only=generation_only)
    _attach_tokenizer(backbone, VQConfig(), None, source)
    return backbone


load_tokenizer = VQTokenizer.load
"""An image tokenizer in place of the folder's own."""
