"""A new run that begins with the weights of an earlier one: its checkpoint takes the place of a
published base.
"""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch

from t2i.checkpoint import (
    CODEC,
    find_checkpoint,
    is_checkpoint,
    load_stored_backbone,
    read_config,
    stored_part,
    stored_source,
)
from t2i.lora import merge_lora
from t2i.models.base import Backbone
from t2i.sampling import SamplingConfig
from t2i.sources import expand_folder, moved, prove, shipped_bases
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.weights import load_strict, read_state_dict

log = logging.getLogger(__name__)


def start_from(
    folder: str | Path,
    *,
    resumed: bool = False,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    generation_only: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """The backbone of a checkpoint as the base of a new run: changed weights, merged adapters,
    sampling settings.

    The new run's checkpoints hold all of these weights: they do not need the old folder, only the
    base's other files.

    Args:
        folder: checkpoint, run or export folder.
        resumed: it is the new run's own checkpoint: its adapters are left out, since training goes
            on with them.
        base: where the base's weights are now.
        tokenizer: where the base's image tokenizer is now.
        text_encoder: where its text encoder is now.

    Raises:
        UserError: no complete checkpoint, or a file of its base is gone or another.
    """
    folder = find_checkpoint(folder)
    config = read_config(folder)
    source = moved(
        stored_source(config, folder), base=base, tokenizer=tokenizer, text_encoder=text_encoder
    )
    source = replace(source, generation_only=generation_only)
    if base is not None:
        prove(expand_folder(source))
    merged = config.get("tuning") == "lora" and not resumed
    exact = torch.float32 if merged else dtype  # bf16 would round the adapters away
    backbone = load_stored_backbone(
        folder, config, source, adapter=merged, device=torch.device(device), dtype=exact
    )
    if merged:
        merge_lora(backbone)
        backbone.to(dtype)
    if resumed:
        return backbone
    sampling = replace(stored_part(config, "sampling", SamplingConfig, folder), window=0)
    backbone.spec = replace(backbone.spec, sampling=sampling)
    changed = config["tuning"] != "codec" or config.get("image_layers")
    backbone.source = replace(
        backbone.source,
        sampling=asdict(sampling),
        started_from=str(folder.resolve()) if changed else source.started_from,
    )
    return backbone


def is_local_base(weights: str) -> bool:
    """Whether it is a file or folder of base weights here: no shipped base, name on the hub, or
    earlier run.
    """
    return weights not in shipped_bases() and Path(weights).exists() and not is_checkpoint(weights)


def take_codec(model: TensorAR, folder: str | Path) -> None:
    """Copy a checkpoint's codec into a model whose codec has the same shape; a log line says if it
    has not.
    """
    folder = find_checkpoint(folder)
    method = stored_part(read_config(folder), "method", TensorARConfig, folder)
    if model.codec is None or method.k == 1:
        return
    shape = ("k", "stride", "depth", "mlp", "residual")
    if changes := [
        f"{name} {getattr(method, name)} -> {getattr(model.config, name)}"
        for name in shape
        if getattr(method, name) != getattr(model.config, name)
    ]:
        log.info("the codec begins anew: that of %s is another (%s)", folder, ", ".join(changes))
    elif next(model.parameters()).device.type != "meta":
        load_strict(model.codec, read_state_dict(folder / CODEC), folder / CODEC)
