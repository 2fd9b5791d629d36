"""Loading Mask2Former into transformers, strictly: from mmdet's checkpoint, or the hub's folder.

Both key styles of the one published training run are read (mmdet 2.x and 3.x), and given the names
of the hub's checkpoints, which transformers reads and writes whatever its modules are called
inside. One thing would load silently and be wrong, patch merging: mmdet joins four pixels in the
channel order of `nn.Unfold`, the original Swin and transformers pixel by pixel.
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

# In transformers' model or in a file, not always in both: a loss weight, a final norm without a
# part in the outputs, and a table of constants that older versions kept as a buffer.
WITHOUT_EFFECT = re.compile(
    r"criterion\.empty_weight"
    r"|model\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)"
    r"|.*\.relative_position_index"
)


def released_config() -> Mask2FormerConfig:
    """The released Swin-S model's; the decoder's layers count the one before the first, too."""
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
    """The model of an mmdet checkpoint (2.x or 3.x names), float32 on the CPU, in eval mode.

    Raises:
        UserError: the file cannot be read, or a key is missing, unexpected or mis-shaped.
    """
    weights = convert_keys(_read(path), path)
    return _loaded(path, None, config=config or released_config(), state_dict=weights)


def load_hub_folder(folder: Path) -> Mask2FormerForUniversalSegmentation:
    """The model of a folder that transformers wrote, float32 on the CPU, in eval mode.

    Raises:
        UserError: it cannot be read, or a weight is missing, unexpected or mis-shaped.
    """
    try:
        return _loaded(folder, folder, local_files_only=True)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{folder} is no readable folder of a transformers model: {reason}"
        ) from error


def _loaded(
    source: Path, folder: Path | None, **options: Any
) -> Mask2FormerForUniversalSegmentation:
    with _quiet():
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are listed below, and refused
            **options,
        )
    model, info = loaded
    said = f"{source} does not fit Mask2Former with this Swin backbone (names as in transformers)"
    check_loading(info, said, WITHOUT_EFFECT.fullmatch)
    return model.eval()


class _Ignored:
    """Stands for a class of the training framework that a checkpoint's metadata may name."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors; foreign objects in its metadata are dropped, none of their code runs."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip of torch's: the reader below says what is wrong
        foreign = []
    with torch.serialization.safe_globals([(_Ignored, name) for name in foreign]):
        return read_state_dict(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of the unused weights, which `_loaded` knows about."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# -- names and layouts -----------------------------------------------------------------------------
# mmdet's name = the hub's, from the left; what follows on the left is kept. "#" is a number, a
# name in braces takes an equal share of the tensor's rows. Where the styles differ, 2.x is first.
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
    """An mmdet state dict (2.x or 3.x names) under the hub's names.

    Raises:
        UserError: names the keys that no Mask2Former with a Swin backbone has, or that say the
            same thing twice.
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
    """mmdet's name, and the hub's."""
    for line in _NAMES.strip().splitlines():
        old, new = line.split(" = ")
        for module, name in _MODULES.items():
            new = new.replace(module, name)
        before, _, rest = new.partition("{")
        shares, _, after = rest.partition("}")
        yield old, [before + share + after for share in shares.split(",")]


_RULES = tuple(_rules())


def _hub_names(key: str) -> list[str]:
    """Where an mmdet key's tensor goes: one name, three for joined projections, none if unknown."""
    for old, names in _RULES:
        if found := [name for new in names if (name := _renamed(key, old, new))]:
            return found
    return []


def mmdet_name(key: str) -> str:
    """The 2.x name of the tensor in which the tensor of this hub key is."""
    return next(name for old, names in _RULES for new in names if (name := _renamed(key, new, old)))


def _renamed(key: str, old: str, new: str) -> str | None:
    match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), key)
    if match is None:
        return None
    for number in match.groups():
        new = new.replace("#", number, 1)
    return new + key[match.end() :]


def _merge_pixel_by_pixel(tensor: Tensor) -> Tensor:
    """Patch merging's last axis, 4C, from mmdet's order (channel, row, column) to Swin's.

    Swin joins the pixels (0, 0), (1, 0), (0, 1), (1, 1) (row, column), each with all C channels.
    """
    by_pixel = tensor.unflatten(-1, (-1, 2, 2))  # ..., channel, row, column
    return by_pixel.movedim((-1, -2), (-3, -2)).flatten(-3)
