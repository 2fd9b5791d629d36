"""LoRA on the trunk's linear layers, with PEFT and its adapter folders."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from t2i.errors import UserError
from t2i.fields import from_json, read_object
from t2i.models.base import Backbone
from t2i.tuning import LoRAConfig
from t2i.weights import copy_weights, read_state_dict, save_weights

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

_PEFT_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_OTHERWISE = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform")
"""PEFT settings that change what the same weights compute; off in the kit's adapters."""


def add_lora(backbone: Backbone, config: LoRAConfig, *, seed: int = 0) -> None:
    """Freeze the backbone and inject adapters, initialized by the seed; no effect until trained."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone.requires_grad_(False)
    # PEFT matches the pattern against whole module names.
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides it, so a float works
        lora_dropout=config.dropout,
        target_modules=rf".*{backbone.lora_targets}",
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator, on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, backbone.lora_root)
    backbone.lora = peft_config
    adapted = [name for name, _ in backbone.named_parameters() if "lora_A" in name]
    if not adapted:
        raise ValueError(
            f"LoRA found no layer that matches {backbone.lora_targets!r} in {type(backbone).__name__}"
        )
    backbone.to(backbone.device)


def adapter_state_dict(backbone: Backbone, *, image_layers: bool) -> dict[str, torch.Tensor]:
    """Adapter weights, and the image layers' if they are trained, under PEFT's file names."""
    layers = tuple(f"{name}." for name in _image_layer_names(backbone)) if image_layers else ()
    return {
        _PEFT_PREFIX + name.replace(".default.", "."): value
        for name, value in backbone.lora_root.state_dict().items()
        if "lora_" in name or name.startswith(layers)
    }


def _image_layer_names(backbone: Backbone) -> list[str]:
    """The layers that embed and predict image codes, by the names that an adapter file uses."""
    layers = [
        part  # PEFT replaces a list's items, not the list
        for layer in backbone.image_layers().values()
        for part in (layer if isinstance(layer, torch.nn.ModuleList) else (layer,))
    ]
    return [
        name
        for name, module in backbone.lora_root.named_modules()
        if any(module is layer for layer in layers)
    ]


def save_adapter(backbone: Backbone, folder: Path, *, image_layers: bool) -> None:
    """Write a PEFT adapter folder (adapter_config.json, adapter_model.safetensors).

    `image_layers`: the image layers were fully trained; they become PEFT's `modules_to_save`, so
    that PEFT loads them, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = _image_layer_names(backbone) if image_layers else None
    assert backbone.lora is not None, "there are adapters"
    config = copy.copy(backbone.lora)
    config.modules_to_save = whole
    config.save_pretrained(str(folder))
    save_weights(folder / _WEIGHTS, adapter_state_dict(backbone, image_layers=image_layers))


def load_adapter(backbone: Backbone, folder: Path) -> None:
    """Inject the adapters of a folder written by `save_adapter` into a fresh backbone, strictly."""
    settings = folder / "adapter_config.json"
    stored = read_object(settings)
    if lacking := [name for name in ("r", "lora_alpha") if name not in stored]:
        raise UserError(f"{settings} lacks {', '.join(lacking)}; copy it again")
    if other := [f"{name}={stored[name]}" for name in _OTHERWISE if stored.get(name)]:
        raise UserError(
            f"{settings}: {', '.join(other)} is not supported: the kit's adapters are plain A and "
            "B of one rank and scale; merge this adapter with PEFT"
        )
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    own = {ours: stored[theirs] for theirs, ours in names.items() if theirs in stored}
    add_lora(backbone, from_json(LoRAConfig, own, str(settings)))
    path = folder / _WEIGHTS
    weights = adapter_state_dict(backbone, image_layers=bool(stored.get("modules_to_save")))
    copy_weights(weights, read_state_dict(path), path)


def plain_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The backbone's weights without adapters, under official names."""
    weights = backbone.official_state_dict().items()
    return {k.replace(".base_layer.", "."): v for k, v in weights if "lora_" not in k}


@contextmanager
def without_lora(backbone: Backbone) -> Iterator[None]:
    """Switch the backbone's adapters off within the block."""
    _enable(backbone, False)
    try:
        yield
    finally:
        _enable(backbone, True)


def _enable(backbone: Backbone, adapters: bool) -> None:
    for _, layer in _adapted_layers(backbone):
        layer.enable_adapters(adapters)
    backbone.revision += 1


def merge_lora(backbone: Backbone) -> None:
    """Add the adapters to the weights they adapt and remove them: plain layers again."""
    for name, layer in _adapted_layers(backbone):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, layer.get_base_layer())
    backbone.lora = None
    vars(backbone.lora_root).pop("peft_config", None)  # PEFT's mark of adapters


def _adapted_layers(backbone: Backbone) -> "list[tuple[str, BaseTunerLayer]]":
    """PEFT's layers that wrap the backbone's, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(n, m) for n, m in backbone.named_modules() if isinstance(m, BaseTunerLayer)]
