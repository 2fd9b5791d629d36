"""Loads backbones from sources (`t2i.sources`), and puts TensorAR around them."""

import logging
import math
import os
import re
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from t2i.errors import UserError
from t2i.fields import from_json
from t2i.models.base import MOST_LAYERS, MOST_SIZE, Backbone, LoadOptions
from t2i.models.blocks import LlamaConfig
from t2i.models.families import find_family
from t2i.sampling import SamplingConfig, check_seed
from t2i.sources import (
    BackboneSource,
    base_files,
    check_named,
    check_place,
    check_places,
    expand_folder,
    prove,
    resolve,
)
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.weights import state_dict_sha256, stored_sha256

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST_SIDE = 1024
"""Upper limit of a grid's sides, in codes: a grid is read from the command line."""
_MOST_BITS = 20
"""Upper limit of a code's bits: a model has an output for each of their values."""
_CARDS = Path("/proc/driver/nvidia/gpus")
"""Lists the NVIDIA cards of a Linux machine, whether PyTorch can use them or not."""


def pick_device(
    device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": a GPU in bfloat16 if there is one, else the CPU in float32.

    Raises:
        UserError: there is no such device or type, or no GPU on this machine.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if find_gpu() else "cpu"
    if not re.fullmatch(r"cpu|meta|cuda(:\d+)?", name):
        raise UserError(f"device {name!r} must be auto, cpu or cuda (cuda:1 is the second GPU)")
    if name.startswith("cuda"):
        _check_gpu(name)
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise UserError(f"dtype {dtype} holds no weights: give one of floating-point numbers")
        return torch.device(name), dtype
    if not isinstance(dtype, str) or (dtype != "auto" and dtype not in DTYPES):
        raise UserError(f"dtype {dtype!r} must be auto, {' or '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "bfloat16" if name.startswith("cuda") else "float32"
    if dtype == "bfloat16":
        warn_of_emulation(torch.device(name))
    return torch.device(name), DTYPES[dtype]


@cache
def warn_of_emulation(device: torch.device) -> None:
    """Warn once if this is a GPU without units for bfloat16 (older than Ampere)."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning(
            "%s computes bfloat16 by emulation, which is slow: float32 takes twice the memory, but "
            "may be faster (--dtype float32; in training --engine.precision fp32)",
            torch.cuda.get_device_name(device),
        )


def find_gpu() -> bool:
    """Whether PyTorch can use a GPU; warns once if it cannot, and this machine has a card."""
    found = torch.cuda.is_available()
    if not found and "CUDA_VISIBLE_DEVICES" not in os.environ:
        _warn_of_idle_cards()
    return found


@cache
def _warn_of_idle_cards() -> None:
    cards = len(list(_CARDS.iterdir())) if _CARDS.is_dir() else 0
    if cards:
        message = (
            "this machine has %d NVIDIA card(s), but the CPU is used, as PyTorch found no GPU: %s"
        )
        log.warning(message, cards, _why_no_gpu())


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built for CPUs only: install the build for your CUDA (pytorch.org)"
    return (
        f"this PyTorch needs a driver for CUDA {torch.version.cuda.partition('.')[0]} or newer "
        "(nvidia-smi shows yours; docs/troubleshooting.md), and CUDA_VISIBLE_DEVICES can hide cards"
    )


def _check_gpu(name: str) -> None:
    """UserError if PyTorch does not see this GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            f"device {name!r} was requested, but PyTorch found no GPU on this machine: "
            f"{_why_no_gpu()}; cpu or auto works without one"
        )
    number = torch.device(name).index or 0
    if number >= (count := torch.cuda.device_count()):
        raise UserError(
            f"device {name!r} was requested, but PyTorch found {count} GPU(s), numbered from cuda:0"
        )


def load_backbone(
    family: str,
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    config: Any | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
) -> Backbone:
    """Load a pre-trained backbone, strictly, in eval mode.

    Args:
        family: one of `t2i.models.families.FAMILIES`.
        source: official weight file or folder, folder with config.json, a shipped base,
            "owner/repo:file" or "owner/repo".
        tokenizer: image tokenizer weights, needed for pixels and for codebook noise; Open-MAGVIT2's
            checkpoints hold their own.
        text_encoder: folder or hub id of the caption encoder (LlamaGen text-to-image:
            google/flan-t5-xl).
        config: the family's config dataclass, for shapes that were never published; or only the
            grid, (height, width) in codes, for a renamed weight file: the grid is known from the
            published file name, not from the weights.
        device: "auto" is a GPU if there is one, else the CPU; "meta" builds only the shapes:
            nothing is fetched for a published name, and only names and shapes are read from a local
            file.
        dtype: "auto" is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        UserError: what is wrong with the name, file or keys, and what is allowed.
    """
    check_place(source, "source")
    device, dtype = pick_device(device, dtype)
    wanted = find_family(family).backbone_class.config_type
    grid = config if isinstance(config, tuple) else None
    if not (config is None or isinstance(config, wanted) or _is_grid(config)):
        raise UserError(
            f"config must be a {wanted.__name__} or a grid (height, width), but is {config!r:.80}"
        )
    shape = asdict(config) if isinstance(config, wanted) else None
    helpers = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    check_places(**helpers)
    files = base_files(family, source, **helpers, config=shape, grid=grid)
    return load_source(files, dtype=dtype, device=device)


def _is_grid(config: Any) -> bool:
    return isinstance(config, tuple) and [type(size) for size in config] == [int, int]


def load_source(
    source: BackboneSource,
    *,
    weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Load a backbone from a `BackboneSource`, as checkpoints store it and programs build it.

    On the "meta" device a published size needs no file; its tokenizer and text encoder are left out
    unless they are local files.

    Args:
        source: also sets the precision of caption features (`text_encoder_dtype`: LlamaGen's own
            were computed in "bfloat16", whatever the backbone's type), and whether to leave out
            parts that drawing images does not need (`generation_only`: Janus-Pro's understanding
            tower and text head).
        weights: used instead of the source's weight file (fine-tuned weights of a checkpoint).
    """
    if source.text_encoder_dtype not in DTYPES:
        raise UserError(
            f"text_encoder_dtype {source.text_encoder_dtype!r} must be {' or '.join(DTYPES)}"
        )
    family, files = find_family(source.family), expand_folder(source)
    encoder_class = family.text_encoder_class if files.text_encoder is not None else None
    backbone, on_meta = None, torch.device(device).type == "meta"
    options = LoadOptions(
        _shape(files), source.grid, dtype, source.generation_only, shapes_only=on_meta
    )
    if on_meta and not Path(files.weights).exists():
        backbone = family.backbone_class.outline(files.weights, options)
    if backbone is not None:
        files = _local_helpers(files)
    else:
        if not (on_meta and family.published_as_folder):
            prove(files, weights=weights is None)
        path = weights or resolve(files.weights, folder=family.published_as_folder)
        backbone = family.backbone_class.load(path, options)
    backbone.source = replace(source, config=asdict(backbone.config))
    where = f"the sampling settings of {source.weights}"
    own = from_json(SamplingConfig, files.sampling, where, defaults=backbone.spec.sampling)
    backbone.spec = replace(backbone.spec, sampling=own)
    inside = family.tokenizer_inside and files.tokenizer == files.weights
    if files.tokenizer is not None and (weights is not None or not inside):
        backbone.frozen.tokenizer = backbone.tokenizer_type.load(resolve(files.tokenizer))
    if backbone.frozen.tokenizer is not None:
        _check_codes(backbone)
        backbone.frozen.tokenizer.to(device)
    if files.text_encoder is not None:
        backbone.frozen.text_encoder = _load_text_encoder(encoder_class, backbone, files, device)
    return backbone.to(device)


def _load_text_encoder(
    encoder_class: Any, backbone: Backbone, files: BackboneSource, device: torch.device | str
) -> Any:
    if backbone.spec.cond_kind == "class":
        raise UserError(
            f"{files.weights} draws classes and does not read captions: leave out the text encoder "
            f"{files.text_encoder}"
        )
    encoder = encoder_class.load(
        files.text_encoder,
        max_tokens=backbone.spec.prefix_tokens,
        dtype=DTYPES[files.text_encoder_dtype],
        device=device,
    )
    if encoder.dim != backbone.caption_width:
        raise UserError(
            f"the text encoder {files.text_encoder} produces features of width {encoder.dim}, but "
            f"{files.weights} needs {backbone.caption_width}: they do not belong together"
        )
    return encoder


def _shape(files: BackboneSource) -> Any | None:
    """The family's config dataclass from an expanded source's config, if it has one; checked, as
    is the grid.
    """
    if files.grid is not None and not 1 <= min(files.grid) <= max(files.grid) <= _MOST_SIDE:
        raise UserError(
            f"grid={files.grid} must be at least 1 code high and wide, and at most {_MOST_SIDE}"
        )
    if files.config is None:
        return None
    where = f"the {files.family} shape of {files.weights}"
    config = from_json(find_family(files.family).backbone_class.config_type, files.config, where)
    _check_shape(config, where)
    return config


def _check_shape(config: Any, where: str) -> None:
    """UserError for impossible sizes; sizes that only differ from a file's fail when it is read."""
    for field in fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                least = 1 if isinstance(number, int) else 0
                if not least <= number < math.inf:
                    raise UserError(f"{where}: {field.name}={value} must be at least {least}")
                most = MOST_LAYERS if field.name.endswith("layer") else MOST_SIZE
                most = {"grid": _MOST_SIDE, "bits": _MOST_BITS}.get(field.name, most)
                if field.type is not float and number > most:
                    raise UserError(f"{where}: {field.name}={value} must be at most {most}")
                if "dropout" in field.name and number > 1:
                    raise UserError(f"{where}: {field.name}={value} must be at most 1")
    heads = getattr(config, "n_head", 1)
    if getattr(config, "dim", heads) % heads:
        raise UserError(f"{where}: dim={config.dim} must be a multiple of n_head={heads}")
    if isinstance(config, LlamaConfig):
        if not config.rope_base > 0:
            raise UserError(f"{where}: rope_base={config.rope_base} must be above 0")
        if config.head_dim % 4:  # half of it for each axis of the image, in pairs
            raise UserError(
                f"{where}: dim / n_head = {config.head_dim} must be a multiple of 4, as rotary "
                "embeddings use pairs for rows and for columns"
            )
        if heads % config.kv_heads:
            raise UserError(
                f"{where}: n_head={heads} must be a multiple of n_kv_head={config.kv_heads}"
            )


def _local_helpers(files: BackboneSource) -> BackboneSource:
    """The files without helpers that are not local; UserError if one could not be fetched."""

    def local(path: str | None, *, folder: bool = False) -> str | None:
        if path is None or Path(path).exists():
            return path
        check_named(path, folder=folder)
        return None

    tokenizer, text_encoder = local(files.tokenizer), local(files.text_encoder, folder=True)
    return replace(files, tokenizer=tokenizer, text_encoder=text_encoder)


def _check_codes(backbone: Backbone) -> None:
    codes = math.prod(backbone.spec.subvocabs)
    if backbone.tokenizer.codebook_size != codes:
        raise UserError(
            f"the image tokenizer has {backbone.tokenizer.codebook_size} codes, but the "
            f"{backbone.spec.family} backbone has {codes}: they do not belong together"
        )


def attach(backbone: Backbone, config: TensorARConfig, *, seed: int = 0) -> TensorAR:
    """Put a new codec around a backbone; equal to the base, bit for bit, until it is trained.

    Args:
        config: one of `t2i.presets`; with k = 1 there is no codec.
        seed: of the codec's initial weights.

    Raises:
        UserError: an argument is of another type, k is larger than the image's number of codes, or
            codebook noise is asked for and the backbone has no image tokenizer.
    """
    if not isinstance(backbone, Backbone):
        raise UserError(
            f"attach needs a backbone, but got {backbone!r:.80}: "
            "load one with t2i.load_backbone(family, source)"
        )
    if not isinstance(config, TensorARConfig):
        raise UserError(
            f"config is {config!r:.80}: give one of t2i.presets, such as t2i.presets.iclr2026()"
        )
    check_seed(seed)
    return TensorAR(backbone, config, seed=int(seed)).eval()


def tokenizer_hash(backbone: Backbone) -> str:
    """SHA-256 of the image tokenizer's file, or of its weights if it has none, for cache keys."""
    assert backbone.source is not None, "set by load_backbone"
    files = expand_folder(backbone.source)
    if files.tokenizer is not None:
        return stored_sha256(resolve(files.tokenizer))
    return state_dict_sha256(backbone.tokenizer.state_dict())
