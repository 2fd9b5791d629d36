"""Load Mask2Former into transformers, strictly, from mmdet's checkpoint or the hub's folder.

The published weights exist with two styles of key names (mmdet 2.x and 3.x). Both are converted to
the names in the hub's checkpoints, which every version of transformers reads and writes. The
weights of patch merging must also be reordered, or they would load silently and be wrong: mmdet
joins four pixels in the channel order of `nn.Unfold`, the original Swin and transformers pixel by
pixel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.utils import logging

from t2i.errors import UserError
from t2i.weights import check_loading, read_state_dict, shorten_keys

# Keys that may be missing from the model or from the file: a loss weight, a final norm that the
# outputs do not use, and a table of constants that older versions kept as a buffer.
WITHOUT_EFFECT = re.compile(
    r"criterion\.empty_weight"
    r"|model\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)"
    r"|.*\.relative_position_index"
)


def released_config() -> Mask2FormerConfig:
    """The released Swin-S model's configuration.

    `decoder_layers` is one more than the number of layers: it also counts the prediction made
    before the first layer.
    """
    swin: dict[str, Any] = {
        "embed_dim": 96,
        "depths": [2, 2, 18, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    sizes: dict[str, Any] = {"num_labels": 80, "num_queries": 100, "decoder_layers": 10}
    return Mask2FormerConfig(backbone_config=SwinConfig(**swin), **sizes)


def load_mmdet(
    path: Path, config: Mask2FormerConfig | None = None
) -> Mask2FormerForUniversalSegmentation:
    """The model in an mmdet checkpoint (2.x or 3.x names), float32 on the CPU, in eval mode.

    Raises:
        UserError: the file cannot be read, or a weight is missing, unexpected or mis-shaped.
    """
    weights = convert_keys(_read(path), path)
    return _loaded(path, None, config=config or released_config(), state_dict=weights)


def load_hub_folder(folder: Path) -> Mask2FormerForUniversalSegmentation:
    """The model in a folder that transformers wrote, float32 on the CPU, in eval mode.

    Raises:
        UserError: the folder cannot be read, or a weight is missing, unexpected or mis-shaped.
    """
    try:
        return _loaded(folder, folder, local_files_only=True)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{folder} is not a readable folder of a transformers model: {reason}"
        ) from error


def _loaded(
    source: Path, folder: Path | None, **options: Any
) -> Mask2FormerForUniversalSegmentation:
    with _quiet():
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loading refuses them, all in one message
            **options,
        )
    model, info = loaded
    title = f"{source} does not fit Mask2Former with this Swin backbone (names as in transformers)"
    check_loading(info, title, WITHOUT_EFFECT.fullmatch)
    return model.eval()


class _Ignored:
    """Replaces any class of the training framework that a checkpoint's metadata refers to."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors. Other objects in it are dropped, without running any of their code."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a PyTorch zip file: `read_state_dict` reports what is wrong
        foreign = []
    with torch.serialization.safe_globals([(_Ignored, name) for name in foreign]):
        return read_state_dict(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of misfitting weights; `_loaded` checks them itself."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# -- names and layouts -----------------------------------------------------------------------------
# mmdet's prefix = the hub's prefix; the rest of a key is kept. "#" stands for a number. Names in
# braces each get an equal share of the tensor's rows. Where the styles differ, 2.x is first.
_NAMES = """
backbone.patch_embed.projection. = BACKBONE.embeddings.patch_embeddings.projection.
backbone.patch_embed.norm. = BACKBONE.embeddings.norm.
backbone.stages.#.blocks.#.norm1. = BACKBONE.encoder.layers.#.blocks.#.layernorm_before.
backbone.stages.#.blocks.#.norm2. = BACKBONE.encoder.layers.#.blocks.#.layernorm_after.
backbone.stages.#.blocks.#.attn.w_msa.relative_position_bias_table = BACKBONE.encoder.layers.#.blocks.#.attention.self.relative_position_bias_table
backbone.stages.#.blocks.#.attn.w_msa.qkv. = BACKBONE.encoder.layers.#.blocks.#.attention.self.{query,key,value}.
backbone.stages.#.blocks.#.attn.w_msa.proj. = BACKBONE.encoder.layers.#.blocks.#.attention.output.dense.
backbone.stages.#.blocks.#.ffn.layers.0.0. = BACKBONE.encoder.layers.#.blocks.#.intermediate.dense.
backbone.stages.#.blocks.#.ffn.layers.1. = BACKBONE.encoder.layers.#.blocks.#.output.dense.
backbone.stages.#.downsample. = BACKBONE.encoder.layers.#.downsample.
backbone.norm0. = BACKBONE.hidden_states_norms.stage1.
backbone.norm1. = BACKBONE.hidden_states_norms.stage2.
backbone.norm2. = BACKBONE.hidden_states_norms.stage3.
backbone.norm3. = BACKBONE.hidden_states_norms.stage4.
panoptic_head.pixel_decoder.input_convs.#.conv. = PIXELS.input_projections.#.0.
panoptic_head.pixel_decoder.input_convs.#.gn. = PIXELS.input_projections.#.1.
panoptic_head.pixel_decoder.level_encoding.weight = PIXELS.level_embed
panoptic_head.pixel_decoder.encoder.layers.#.attentions.0. = PIXELS.encoder.layers.#.self_attn.
panoptic_head.pixel_decoder.encoder.layers.#.self_attn. = PIXELS.encoder.layers.#.self_attn.
panoptic_head.pixel_decoder.encoder.layers.#.norms.0. = PIXELS.encoder.layers.#.self_attn_layer_norm.
panoptic_head.pixel_decoder.encoder.layers.#.norms.1. = PIXELS.encoder.layers.#.final_layer_norm.
panoptic_head.pixel_decoder.encoder.layers.#.ffns.0.layers.0.0. = PIXELS.encoder.layers.#.fc1.
panoptic_head.pixel_decoder.encoder.layers.#.ffn.layers.0.0. = PIXELS.encoder.layers.#.fc1.
panoptic_head.pixel_decoder.encoder.layers.#.ffns.0.layers.1. = PIXELS.encoder.layers.#.fc2.
panoptic_head.pixel_decoder.encoder.layers.#.ffn.layers.1. = PIXELS.encoder.layers.#.fc2.
panoptic_head.pixel_decoder.lateral_convs.0.conv. = PIXELS.adapter_1.0.
panoptic_head.pixel_decoder.lateral_convs.0.gn. = PIXELS.adapter_1.1.
panoptic_head.pixel_decoder.output_convs.0.conv. = PIXELS.layer_1.0.
panoptic_head.pixel_decoder.output_convs.0.gn. = PIXELS.layer_1.1.
panoptic_head.pixel_decoder.mask_feature. = PIXELS.mask_projection.
panoptic_head.query_embed. = QUERIES.queries_embedder.
panoptic_head.query_feat. = QUERIES.queries_features.
panoptic_head.level_embed. = QUERIES.level_embed.
panoptic_head.transformer_decoder.layers.#.attentions.0.attn. = QUERIES.decoder.layers.#.cross_attn.
panoptic_head.transformer_decoder.layers.#.cross_attn.attn. = QUERIES.decoder.layers.#.cross_attn.
panoptic_head.transformer_decoder.layers.#.attentions.1.attn.in_proj_ = QUERIES.decoder.layers.#.self_attn.{q_proj,k_proj,v_proj}.
panoptic_head.transformer_decoder.layers.#.self_attn.attn.in_proj_ = QUERIES.decoder.layers.#.self_attn.{q_proj,k_proj,v_proj}.
panoptic_head.transformer_decoder.layers.#.attentions.1.attn.out_proj. = QUERIES.decoder.layers.#.self_attn.out_proj.
panoptic_head.transformer_decoder.layers.#.self_attn.attn.out_proj. = QUERIES.decoder.layers.#.self_attn.out_proj.
panoptic_head.transformer_decoder.layers.#.norms.0. = QUERIES.decoder.layers.#.cross_attn_layer_norm.
panoptic_head.transformer_decoder.layers.#.norms.1. = QUERIES.decoder.layers.#.self_attn_layer_norm.
panoptic_head.transformer_decoder.layers.#.norms.2. = QUERIES.decoder.layers.#.final_layer_norm.
panoptic_head.transformer_decoder.layers.#.ffns.0.layers.0.0. = QUERIES.decoder.layers.#.fc1.
panoptic_head.transformer_decoder.layers.#.ffn.layers.0.0. = QUERIES.decoder.layers.#.fc1.
panoptic_head.transformer_decoder.layers.#.ffns.0.layers.1. = QUERIES.decoder.layers.#.fc2.
panoptic_head.transformer_decoder.layers.#.ffn.layers.1. = QUERIES.decoder.layers.#.fc2.
panoptic_head.transformer_decoder.post_norm. = QUERIES.decoder.layernorm.
panoptic_head.mask_embed.0. = QUERIES.decoder.mask_predictor.mask_embedder.0.0.
panoptic_head.mask_embed.2. = QUERIES.decoder.mask_predictor.mask_embedder.1.0.
panoptic_head.mask_embed.4. = QUERIES.decoder.mask_predictor.mask_embedder.2.0.
panoptic_head.cls_embed. = class_predictor.
"""
_MODULES = {
    "BACKBONE": "model.pixel_level_module.encoder",
    "PIXELS": "model.pixel_level_module.decoder",
    "QUERIES": "model.transformer_module",
}
RECOMPUTED = ".relative_position_index"  # a table of constants
_PATCH_MERGING = ".downsample."


def convert_keys(state_dict: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Convert an mmdet state dict (2.x or 3.x names) to the hub's names and layouts.

    Raises:
        UserError: some keys do not belong to a Mask2Former with a Swin backbone, or several hold
            the same weight; the message lists them.
    """
    converted: dict[str, Tensor] = {}
    problems = []
    for key, tensor in state_dict.items():
        if key.endswith(RECOMPUTED):
            continue
        names = _hub_names(key)
        if not names or any(name in converted for name in names) or len(tensor) % len(names):
            problems.append(key)
            continue
        if _PATCH_MERGING in names[0]:
            tensor = _merge_pixel_by_pixel(tensor)
        converted.update(zip(names, tensor.chunk(len(names)), strict=True))
    if problems:
        raise UserError(
            f"{source} does not hold mmdet's Mask2Former with a Swin backbone: unexpected "
            f"{shorten_keys(problems)}"
        )
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _rules() -> Iterator[tuple[str, list[str]]]:
    """The entries of `_NAMES`: mmdet's prefix, and the hub's prefixes."""
    for line in _NAMES.strip().splitlines():
        old, new = line.split(" = ")
        for module, name in _MODULES.items():
            new = new.replace(module, name)
        before, _, rest = new.partition("{")
        shares, _, after = rest.partition("}")
        yield old, [before + share + after for share in shares.split(",")]


_RULES = tuple(_rules())


def _hub_names(key: str) -> list[str]:
    """The hub's names for an mmdet key: one, three for joined projections, none if unknown."""
    for old, names in _RULES:
        if found := [name for new in names if (name := _renamed(key, old, new))]:
            return found
    return []


def mmdet_name(key: str) -> str:
    """The 2.x name of the mmdet tensor that contains this hub key's tensor."""
    return next(name for old, names in _RULES for new in names if (name := _renamed(key, new, old)))


def _renamed(key: str, old: str, new: str) -> str | None:
    """The key with prefix `old` replaced by `new`; None if it has another prefix."""
    match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), key)
    if match is None:
        return None
    for number in match.groups():
        new = new.replace("#", number, 1)
    return new + key[match.end() :]


def _merge_pixel_by_pixel(tensor: Tensor) -> Tensor:
    """Reorder patch merging's last axis, 4C, from mmdet's (channel, row, column) to Swin's.

    Swin joins the pixels (0, 0), (1, 0), (0, 1), (1, 1) (row, column), each with all C channels.
    """
    by_pixel = tensor.unflatten(-1, (-1, 2, 2))  # ..., channel, row, column
    return by_pixel.movedim((-1, -2), (-3, -2)).flatten(-3)
