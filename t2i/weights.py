"""Reading published weight files safely and loading them strictly.

Every checkpoint of every family passes through `read_state_dict` (dialects of the file) and `load_strict` (which names each
key that does not fit). Pickles are only read with `weights_only=True`; the one class allowed inside besides tensors is
`argparse.Namespace`, which LlamaGen's own training scripts store next to the weights.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# The key under which a training script nests its weights, in the order in which LlamaGen's samplers look for them.
_NESTING_KEYS = ("model", "module", "state_dict")
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")
_MAX_KEYS_IN_MESSAGE = 40


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read one weight file (.safetensors, or a .pt/.pth/.bin pickle) into a flat state dict on the CPU.

    Understands `{"model" | "module" | "state_dict": {...}}`, consolidated FSDP files (the state dict at top level), files of
    LlamaGen's own training (with an argparse namespace inside) and prefixes left by `torch.compile` or DDP.

    Raises:
        ValueError: the file is missing, truncated, not a weight file, or holds objects that are unsafe to unpickle.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist; check the path")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle stream can make the unpickler raise anything
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"weight file {path} cannot be read: it is truncated, not a weight file, or holds unsafe objects ({reason}); "
            "download or copy it again"
        ) from error
    return _flatten(content, path)


def _flatten(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for key in _NESTING_KEYS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise ValueError(
            f"weight file {path} holds no state dict (looked at top level and under {', '.join(_NESTING_KEYS)})"
        )
    return {_strip_wrappers(key): value for key, value in content.items()}


def _strip_wrappers(key: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        key = key.removeprefix(prefix)
    return key


def count_children(state_dict: dict[str, Tensor], prefix: str) -> int:
    """How many different names follow `prefix` (which ends with a dot): the length of a stored list of modules."""
    return len({k.removeprefix(prefix).split(".")[0] for k in state_dict if k.startswith(prefix)})


def load_strict(module: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> None:
    """Copy `state_dict` into `module`, which must have exactly these keys and shapes.

    Raises:
        ValueError: names every key that is missing, unexpected or mis-shaped.
    """
    expected = module.state_dict()
    problems = {
        "missing": [k for k in expected if k not in state_dict],
        "unexpected": [k for k in state_dict if k not in expected],
        "mis-shaped": [
            f"{k} (file {tuple(state_dict[k].shape)}, model {tuple(v.shape)})"
            for k, v in expected.items()
            if k in state_dict and state_dict[k].shape != v.shape
        ],
    }
    if any(problems.values()):
        lines = [
            f"  {kind} ({len(keys)}): {shorten_keys(keys)}"
            for kind, keys in problems.items()
            if keys
        ]
        raise ValueError(
            f"{source} does not fit {type(module).__name__}:\n"
            + "\n".join(lines)
            + "\nIs it the right family, size and file?"
        )
    module.load_state_dict(state_dict, strict=True)


def shorten_keys(keys: list[str]) -> str:
    """The first of many keys, for a message."""
    shown = ", ".join(keys[:_MAX_KEYS_IN_MESSAGE])
    return (
        shown
        if len(keys) <= _MAX_KEYS_IN_MESSAGE
        else f"{shown}, ... and {len(keys) - _MAX_KEYS_IN_MESSAGE} more"
    )


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file through a temporary name, so that a reader never sees half of it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def write_json(path: str | Path, content: object) -> Path:
    """Write indented JSON, atomically."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
