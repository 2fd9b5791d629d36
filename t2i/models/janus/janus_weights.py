"""Published Janus-Pro folders: converting weight names from DeepSeek's layout to transformers', and
writing a folder for transformers.

DeepSeek's repositories (`model_type: multi_modality`) name modules after
`janus/models/modeling_vlm.py`; transformers' conversions (`model_type: janus`) after its own
`JanusForConditionalGeneration`. All code here uses transformers' names, except that the image
tokenizer is passed to our `VQTokenizer`, which uses DeepSeek's.
"""

import logging
import shutil
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from t2i.fields import read_object
from t2i.files import write_json
from t2i.models.janus.janus_prompts import JanusPrompts
from t2i.sampling import SamplingConfig

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
# transformers' image generation fails with a scale of 1; this one leaves logits unchanged.
_NO_GUIDANCE = 1 + 1e-9
# A pooling head that the model does not use, and a usage counter from the tokenizer's training.
_UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")
# Files that transformers' JanusProcessor reads besides the tokenizer; only folders in
# transformers' layout have them.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names, from either layout; unknown keys stay as they are."""
    if any(key.startswith("model.") for key in weights):
        return weights
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith(_UNUSED):
            continue
        name = _rename(key)
        if ".attn.qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                place = name.replace(".attn.qkv.", f".self_attn.{part}_proj.")
                # A copy: safetensors files cannot hold tensors that share memory.
                renamed[place] = chunk.clone()
        elif key == "vision_model.vision_tower.pos_embed":
            renamed["model.vision_model.embeddings.position_embedding.weight"] = value.squeeze(0)
        else:
            renamed[name] = value
    return renamed


def _rename(key: str) -> str:
    prefix, ours = next(((a, b) for a, b in _MODULES if key.startswith(a)), ("", ""))
    rest = key[len(prefix) :]
    if prefix in ("gen_aligner.layers.", "aligner.layers."):  # Linear, GELU, Linear, GELU, ...
        place, _, kind = rest.rpartition(".")  # without a place: a single Linear
        if place in ("", "0"):
            return f"{ours}fc1.{kind}"
        return f"{ours}hidden_layers.{int(place) // 2 - 1}.{kind}" if place.isdecimal() else key
    name = ours + rest
    if prefix == "gen_vision_model.":
        return VQ + _replace(rest, _VQ_NAMES)
    return _replace(name, _VISION_LAYER) if prefix.endswith(".blocks.") else name


def _replace(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def vq_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tokenizer's part of the weights, under the names of `VQTokenizer`."""
    back = tuple((theirs, ours) for ours, theirs in _VQ_NAMES)
    return {_replace(k[len(VQ) :], back): v for k, v in weights.items() if k.startswith(VQ)}


def vq_to_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`VQTokenizer` weights under transformers' names."""
    return {VQ + _replace(k, _VQ_NAMES): v for k, v in state_dict.items()}


# -- writing ---------------------------------------------------------------------------------------
def save_folder(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict,
    prompts: JanusPrompts,
    sampling: SamplingConfig,
) -> None:
    """Write a folder for transformers' `JanusForConditionalGeneration.from_pretrained`:
    configuration, weights (in shards if large), tokenizer and generation settings.

    Args:
        weights: all weights of the model under transformers' names, in the dtype to store.
        config: the content of config.json, except the dtype of the weights.
        sampling: the folder's default settings for drawing images.
    """
    if config["tie_word_embeddings"]:  # one tensor, stored once
        weights = {name: value for name, value in weights.items() if name != HEAD}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    kind = {"model_type": "janus", "architectures": ["JanusForConditionalGeneration"]}
    dtype = str(weights[EMBEDDING].dtype).removeprefix("torch.")
    write_json(folder / "config.json", config | kind | {"dtype": dtype})
    generation = {
        "bos_token_id": prompts.bos_id,
        "eos_token_id": prompts.tokenizer.token_to_id(prompts.eos),
        "pad_token_id": prompts.pad_id,
        "generation_kwargs": {"boi_token_id": prompts.boi_id},
        **_drawing_settings(sampling),
    }
    write_json(folder / "generation_config.json", generation)
    prompts.save(folder)
    if prompts.folder is not None and _is_transformers(prompts.folder):
        for name in _PROCESSOR_FILES:
            if (prompts.folder / name).is_file():
                shutil.copyfile(prompts.folder / name, folder / name)


def _drawing_settings(sampling: SamplingConfig) -> dict:
    """The sampling settings in generation_config.json."""
    own = sampling.by_sub_token(1)[0]
    if own.cfg_interval != -1 or own.cfg_power:
        log.warning(
            "transformers has no cfg_interval and cfg_power: the exported folder guides all tokens alike"
        )
    guidance = {"guidance_scale": max(own.cfg_scale, _NO_GUIDANCE)}
    if own.temperature == 0:
        return {"do_sample": False, **guidance}
    return {
        "do_sample": True,
        **guidance,
        "temperature": own.temperature,
        "top_k": own.top_k,  # if 0 is left out, transformers uses 50
        "top_p": own.top_p,
    }


def _is_transformers(folder: Path) -> bool:
    return read_object(folder / "config.json").get("model_type") == "janus"
