"""Names and shapes of published Janus-Pro checkpoints: DeepSeek's layout, transformers' layout, and the way between them.

DeepSeek's repositories (`model_type: multi_modality`) name modules after `janus/models/modeling_vlm.py`; transformers' conversions
(`model_type: janus`) after its own `JanusForConditionalGeneration`. Everything here works on transformers' names; the image tokenizer
inside is handed to our `VQTokenizer`, whose names are DeepSeek's.
"""

import json
import logging
from pathlib import Path

from torch import Tensor
from transformers import JanusConfig

from t2i.errors import UserError
from t2i.tokenizers.vq import VQConfig
from t2i.weights import count_children

log = logging.getLogger(__name__)

VQ = "model.vqmodel."
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"

_MODULES = (  # DeepSeek, transformers
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_aligner.layers.", "model.generation_aligner."),
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    ("gen_vision_model.", VQ),
    ("aligner.layers.", "model.aligner."),
    ("vision_model.vision_tower.blocks.", "model.vision_model.encoder.layers."),
    (
        "vision_model.vision_tower.patch_embed.proj.",
        "model.vision_model.embeddings.patch_embedding.",
    ),
    ("vision_model.vision_tower.norm.", "model.vision_model.post_layernorm."),
)
_VISION_LAYER = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection_layer."),
)
_VQ_NAMES = (
    ("encoder.conv_blocks.", "encoder.down."),
    ("decoder.conv_blocks.", "decoder.up."),
    (".res.", ".block."),
    (".mid.0.", ".mid.block_1."),
    (".mid.1.", ".mid.attn_1."),
    (".mid.2.", ".mid.block_2."),
)
_COMPUTED = ".rotary_emb.inv_freq"  # older transformers stored this table
# A pooling head that the model does not use, and a usage counter of the tokenizer's training.
_UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")

SIZES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
    },
}
"""Language models of Janus-Pro (arXiv 2501.17811, table 1)."""

PUBLISHED = {
    f"{owner}/Janus-Pro-{size}": size
    for owner in ("deepseek-ai", "deepseek-community")
    for size in SIZES
}
"""Hub ids whose shapes are known without a download."""


def published_config(size: str) -> JanusConfig:
    """Configuration of a published size: 384 px, 24 x 24 codes of the VQ-16 tokenizer, SigLIP-L/16."""
    width = SIZES[size]["hidden_size"]
    text = {"model_type": "llama", "vocab_size": 102400, "max_position_embeddings": 16384}
    return JanusConfig(
        text_config={**text, **SIZES[size]},
        vision_config={"projection_dim": width},
        vq_config={"projection_dim": width, "image_token_embed_dim": width},
        tie_word_embeddings=False,
    )


def read_config(folder: Path, weights: dict[str, Tensor]) -> JanusConfig:
    """Configuration of a folder in either layout; `weights` are its weights under transformers' names.

    Raises:
        UserError: config.json is missing, damaged, or another model's.
    """
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = stored.get("model_type")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {error}") from error
    if kind not in ("janus", "multi_modality"):
        raise UserError(
            f"{folder} is no Janus-Pro: config.json has model_type {kind!r}, not 'janus' (transformers) or "
            "'multi_modality' (DeepSeek)"
        )
    try:
        config = (
            JanusConfig.from_dict(stored) if kind == "janus" else _convert_config(stored, weights)
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json lacks a Janus-Pro setting: {error!r}") from error
    return config


def _convert_config(stored: dict, weights: dict[str, Tensor]) -> JanusConfig:
    """DeepSeek's configuration says little: widths and depths are read off the weights."""
    language = {k: v for k, v in stored["language_config"].items() if k != "torch_dtype"}
    image_size = stored["vision_config"]["params"]["image_size"]
    patches = weights["model.vision_model.embeddings.patch_embedding.weight"]
    vision_width, _, patch, _ = patches.shape
    layers = count_children(weights, "model.vision_model.encoder.layers.")
    heads = 16
    if vision_width != 1024:
        heads = max(1, vision_width // 64)
        log.warning(
            "an understanding tower of width %d is not SigLIP-L: its head count is in no file, %d is assumed",
            vision_width,
            heads,
        )
    vq = VQConfig.from_state_dict(vq_weights(weights))
    head = weights["model.generation_head.proj_out.weight"]
    return JanusConfig(
        text_config={"model_type": "llama", **language},
        vision_config={
            "hidden_size": vision_width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch,
            "mlp_ratio": weights["model.vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
            / vision_width,
            "projection_dim": weights["model.aligner.fc1.weight"].shape[0],
            "depth": stored["aligner_config"]["params"]["depth"],
            "num_image_tokens": (image_size // patch) ** 2,
        },
        vq_config={
            **vq_settings(vq),
            "projection_dim": head.shape[0],
            "image_token_embed_dim": head.shape[1],
            "num_hidden_layers": stored["gen_aligner_config"]["params"]["depth"],
        },
    )


def vq_settings(vq: VQConfig) -> dict:
    """The shape of an image tokenizer in transformers' words."""
    return {
        "base_channels": vq.channels,
        "channel_multiplier": vq.multipliers,
        "num_res_blocks": vq.res_blocks,
        "latent_channels": vq.latent_channels,
        "num_embeddings": vq.codebook_size,
        "embed_dim": vq.codebook_dim,
    }


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names, from either layout; keys that neither layout has stay as they are."""
    weights = {k: v for k, v in weights.items() if not k.endswith(_COMPUTED)}
    if any(key.startswith("model.") for key in weights):
        return weights
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith(_UNUSED):
            continue
        name = _rename(key)
        if ".attn.qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = chunk
        elif key == "vision_model.vision_tower.pos_embed":
            renamed["model.vision_model.embeddings.position_embedding.weight"] = value.squeeze(0)
        else:
            renamed[name] = value
    return renamed


def _rename(key: str) -> str:
    prefix, ours = next(((a, b) for a, b in _MODULES if key.startswith(a)), ("", ""))
    rest = key[len(prefix) :]
    if prefix in ("gen_aligner.layers.", "aligner.layers."):  # Linear, GELU, Linear, GELU, ...
        place, _, kind = rest.partition(".")
        return (
            f"{ours}fc1.{kind}"
            if place == "0"
            else f"{ours}hidden_layers.{int(place) // 2 - 1}.{kind}"
        )
    name = ours + rest
    if prefix == "gen_vision_model.":
        return VQ + _replace(rest, _VQ_NAMES)
    return _replace(name, _VISION_LAYER) if prefix.endswith(".blocks.") else name


def _replace(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def vq_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tokenizer's part of weights under transformers' names, under the names of `VQTokenizer`."""
    back = tuple((theirs, ours) for ours, theirs in _VQ_NAMES)
    return {_replace(k[len(VQ) :], back): v for k, v in weights.items() if k.startswith(VQ)}


def vq_to_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`VQTokenizer` weights under transformers' names."""
    return {VQ + _replace(k, _VQ_NAMES): v for k, v in state_dict.items()}
