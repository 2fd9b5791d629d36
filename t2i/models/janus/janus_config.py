"""Configuration of a Janus-Pro, from either layout, in the terms of transformers' config.json."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from t2i.errors import UserError
from t2i.fields import check_types, leaves, read_object
from t2i.models.base import MOST_LAYERS, MOST_SIZE
from t2i.models.blocks import LlamaConfig
from t2i.models.janus import janus_weights as names
from t2i.models.tokenizers.vq import VQConfig
from t2i.weights import count_children

log = logging.getLogger(__name__)

_DEFAULTS: dict = {  # transformers' defaults, which a file may leave out
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "vision_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 384,
        "patch_size": 16,
        "mlp_ratio": 4.0,
        "projection_dim": 2048,
        "depth": 2,
        "num_image_tokens": 576,
    },
    "vq_config": {
        "base_channels": 128,
        "channel_multiplier": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "latent_channels": 256,
        "num_embeddings": 16384,
        "embed_dim": 8,
        "projection_dim": 2048,
        "image_token_embed_dim": 2048,
        "num_hidden_layers": 2,
    },
    "image_token_id": 100581,
    "tie_word_embeddings": True,
}
_FIXED: dict = {  # settings that every Janus-Pro has and our modules assume
    "text_config": {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0,
        "mlp_bias": False,
    },
    "vision_config": {"attention_bias": True, "use_qk_norm": False},
    "vq_config": {
        "hidden_act": "gelu",
        "double_latent": False,
        "in_channels": 3,
        "out_channels": 3,
    },
}

_PATCHES = "model.vision_model.embeddings.patch_embedding.weight"
_CODE_HEAD = "model.generation_head.proj_out.weight"
_ALIGNERS = ("mlp_gelu", "linear")
_STATED = (  # part of DeepSeek's configuration, the weight that it describes, outputs and inputs
    ("aligner_config", "model.aligner.fc1.weight", ("n_embed", "input_dim")),
    ("gen_aligner_config", "model.generation_aligner.fc1.weight", ("n_embed", "input_dim")),
    (
        "gen_vision_config",
        "model.generation_embeddings.weight",
        ("image_token_size", "n_embed"),
    ),
    ("gen_head_config", _CODE_HEAD, ("image_token_embed", "n_embed")),
    (
        "gen_head_config",
        "model.generation_head.vision_head.weight",
        ("image_token_size", "image_token_embed"),
    ),
)

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
"""Settings of Janus-Pro's language models (arXiv 2501.17811, table 1)."""

PUBLISHED = {
    f"{owner}/Janus-Pro-{size}": size
    for owner in ("deepseek-ai", "deepseek-community")
    for size in SIZES
}
"""Sizes of the published hub ids: their shapes are known without a download."""


@dataclass(frozen=True)
class JanusShape:
    """Shape of a Janus-Pro.

    Raises:
        UserError: a setting that no Janus-Pro has.
    """

    transformers: dict = field(repr=False)
    """The content of transformers' config.json; missing settings are filled in."""
    grid: tuple[int, int] | None = None
    """Height and width in codes; None: the understanding tower's number of patches."""

    def __post_init__(self):
        whole = _DEFAULTS | self.transformers
        for part in _FIXED:
            whole[part] = _DEFAULTS[part] | (self.transformers.get(part) or {})
        object.__setattr__(self, "transformers", whole)
        self._check_values()
        side = self.vision["image_size"] // self.vision["patch_size"]
        object.__setattr__(self, "grid", tuple(self.grid or (side, side)))
        self._check()

    def _check_values(self) -> None:
        """UserError for a setting of another type than usual, or beyond any use."""
        given = leaves(self.transformers)
        for name, usual in leaves(_DEFAULTS).items():
            value = given.get(name)
            most = MOST_LAYERS if name.endswith(("layers", "depth")) else MOST_SIZE
            fits = type(value) is type(usual) or (type(usual), type(value)) == (float, int)
            if fits and type(usual) in (int, float) and name != "image_token_id":
                fits = 0 < value < most  # type: ignore[operator]  # nor NaN
            if not fits:
                raise UserError(f"{name} is {value!r:.80}; it must be one such as {usual!r}")
        check_types(self.trunk)
        if not 0 < self.trunk.rope_base < math.inf:
            raise UserError(f"text_config.rope_theta={self.trunk.rope_base} must be above 0")

    def _check(self) -> None:
        other = [
            f"{part}.{key}={self.transformers[part][key]!r}, not {value!r}"
            for part, settings in _FIXED.items()
            for key, value in settings.items()
            if self.transformers[part].get(key, value) != value
        ]
        kind = self._rope.get("rope_type", self._rope.get("type", "default"))
        if kind != "default":
            other.append(f"text_config.rope_parameters of type {kind!r}, not 'default'")
        heads, width = self.text["num_attention_heads"], self.text["hidden_size"]
        if width % heads or (self.text.get("head_dim") or width // heads) != width // heads:
            other.append(f"text_config.head_dim is not hidden_size {width} / {heads} heads")
        if other:
            raise UserError("this is not a Janus-Pro configuration: " + "; ".join(other))

    @property
    def text(self) -> dict:
        """Settings of the language model."""
        return self.transformers["text_config"]

    @property
    def vision(self) -> dict:
        """Settings of the understanding tower."""
        return self.transformers["vision_config"]

    @property
    def codes(self) -> dict:
        """Settings of the image tokenizer and of the layers that embed and predict its codes."""
        return self.transformers["vq_config"]

    @property
    def _rope(self) -> dict:
        """Settings of RoPE: `rope_parameters`, or `rope_scaling` before transformers 5."""
        return (self.text.get("rope_scaling") or {}) | (self.text.get("rope_parameters") or {})

    @property
    def trunk(self) -> LlamaConfig:
        """Shape of the language model."""
        text = self.text
        return LlamaConfig(
            dim=text["hidden_size"],
            n_layer=text["num_hidden_layers"],
            n_head=text["num_attention_heads"],
            n_kv_head=text.get("num_key_value_heads") or text["num_attention_heads"],
            ffn_dim=text["intermediate_size"],
            norm_eps=text["rms_norm_eps"],
            rope_base=self._rope.get("rope_theta") or text.get("rope_theta") or 10000.0,
            token_dropout=0.0,
            resid_dropout=0.0,
            ffn_dropout=0.0,
        )


def published_shape(size: str) -> JanusShape:
    """Shape of a published size: 384 px, 24 x 24 codes of the VQ-16 tokenizer, SigLIP-L/16."""
    width = SIZES[size]["hidden_size"]
    config = {
        "text_config": {"vocab_size": 102400, "max_position_embeddings": 16384, **SIZES[size]},
        "vision_config": {"projection_dim": width},
        "vq_config": {"projection_dim": width, "image_token_embed_dim": width},
        "tie_word_embeddings": False,
    }
    return JanusShape(config)


def read_config(folder: Path, weights: dict[str, Tensor]) -> dict:
    """The content of a folder's config.json, of either layout, in transformers' terms; `weights`
    have transformers' names.

    Raises:
        UserError: config.json is missing, damaged, or another model's.
    """
    stored = read_object(folder / "config.json")
    kind = stored.get("model_type")
    if kind not in ("janus", "multi_modality"):
        raise UserError(
            f"{folder} is not a Janus-Pro: config.json has model_type {kind!r}, not 'janus' "
            "(transformers) or 'multi_modality' (DeepSeek)"
        )
    try:
        config = stored if kind == "janus" else _convert(stored, weights)
        JanusShape(config)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}/config.json lacks a Janus-Pro setting or has a wrong one: {error!r}"
        ) from error
    return config


def _convert(stored: dict, weights: dict[str, Tensor]) -> dict:
    """Convert DeepSeek's configuration, which says little: most sizes are read off the weights."""
    _check_whole(weights)
    _check_stated(stored, weights)
    language = {k: v for k, v in stored["language_config"].items() if k != "torch_dtype"}
    image_size = stored["vision_config"]["params"]["image_size"]
    patches = weights[_PATCHES]
    vision_width, _, patch, _ = patches.shape
    layers = count_children(weights, "model.vision_model.encoder.layers.")
    heads = 16
    if vision_width != 1024:
        heads = max(1, vision_width // 64)
        log.warning(
            "the understanding tower has width %d, so it is not SigLIP-L; no file states its number of "
            "heads: assuming %d",
            vision_width,
            heads,
        )
    vq = VQConfig.from_state_dict(names.vq_weights(weights))
    head = weights[_CODE_HEAD]
    return {
        "model_type": "janus",
        "tie_word_embeddings": language.get("tie_word_embeddings", False),  # Llama's default
        "text_config": {"model_type": "llama", **language},
        "vision_config": {
            "hidden_size": vision_width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch,
            "mlp_ratio": cut_off_ratio(
                weights["model.vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0], vision_width
            ),
            "projection_dim": weights["model.aligner.fc1.weight"].shape[0],
            "depth": _depth(stored["aligner_config"]),
            "num_image_tokens": (image_size // patch) ** 2,
        },
        "vq_config": {
            **vq_settings(vq),
            "projection_dim": head.shape[0],
            "image_token_embed_dim": head.shape[1],
            "num_hidden_layers": _depth(stored["gen_aligner_config"]),
        },
    }


def _check_whole(weights: dict[str, Tensor]) -> None:
    """UserError if weights that determine the shape are missing."""
    parts = {
        "the understanding tower (vision_model)": _PATCHES,
        "the understanding aligner (aligner)": "model.aligner.fc1.weight",
        "the head for codes (gen_head)": _CODE_HEAD,
    }
    if missing := [part for part, key in parts.items() if key not in weights]:
        raise UserError(
            f"the weights lack {' and '.join(missing)}, which are needed to read the shape of a model "
            "in DeepSeek's layout; use the whole folder"
        )


def _check_stated(stored: dict, weights: dict[str, Tensor]) -> None:
    """UserError if the configuration's sizes differ from those of the weights."""
    other = []
    for part, weight, sizes in _STATED:
        params, shape = stored[part]["params"], weights[weight].shape if weight in weights else ()
        other += [
            f"{part}.params.{name} is {params[name]}, but {weight} has {size}"
            for name, size in zip(sizes, shape, strict=False)
            if params.get(name, size) != size
        ]
    for part in ("aligner_config", "gen_aligner_config"):
        if (kind := stored[part]["params"].get("projector_type", "mlp_gelu")) not in _ALIGNERS:
            other.append(f"{part}.params.projector_type is {kind!r}, not {' or '.join(_ALIGNERS)}")
    if other:
        raise UserError(f"does not fit the weights: {'; '.join(other)}; download both again")


def _depth(aligner: dict) -> int:
    """Number of linear layers of an aligner, from DeepSeek's configuration."""
    params = aligner["params"]
    return 1 if params.get("projector_type") == "linear" else params.get("depth", 1)


def cut_off_ratio(hidden: int, width: int) -> float:
    """A ratio with int(width * ratio) == hidden, which is how transformers uses it."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def check_codes(shape: JanusShape, vq: VQConfig) -> None:
    """UserError if the configured image tokenizer differs from the one in the weights."""
    held = vq_settings(vq)
    other = [
        f"vq_config.{name} is {stated}, but the weights have {held[name]}"
        for name in held
        if (stated := shape.codes[name]) != held[name]
    ]
    if other:
        raise UserError(f"config.json does not fit the weights: {'; '.join(other)}")


def vq_settings(vq: VQConfig) -> dict:
    """The shape of an image tokenizer in transformers' terms."""
    return {
        "base_channels": vq.channels,
        "channel_multiplier": list(vq.multipliers),
        "num_res_blocks": vq.res_blocks,
        "latent_channels": vq.latent_channels,
        "num_embeddings": vq.codebook_size,
        "embed_dim": vq.codebook_dim,
    }
