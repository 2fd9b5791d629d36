"""Reads published weight files safely and loads them strictly.

Every checkpoint of every family passes through `read_state_dict` (which handles the variants of
file formats) and `load_strict` (which names each key that does not fit). Pickles are only read with
`weights_only=True`; the one class allowed besides tensors is `argparse.Namespace`, which LlamaGen's
own training scripts store next to the weights.
"""

import argparse
import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i.errors import UserError, shorten
from t2i.files import read_json, reading
from t2i.lfs import refuse_pointers
from t2i.published import files_sha256, remembered_sha256

# Keys under which training scripts nest the weights, in the order in which LlamaGen's samplers look
# for them; averages ("ema") are read only if there is nothing else.
_NESTING_KEYS = ("model", "module", "state_dict", "ema")
# Tensors in some files that are computed, not learned: tables, masks, and sampling caches.
_COMPUTED = (
    "freqs_cis",
    "causal_mask",
    "attn_mask",
    "k_cache",
    "v_cache",
    "inv_freq",
    "n_averaged",  # the number of updates, from PyTorch's AveragedModel
)
# Parts that torch.compile (of the model or its blocks), FSDP and its checkpointing add to names.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_DDP = re.compile(r"^(module\.)+")
_MOST_NESTED = 4  # levels of nesting; mPLUG's own loader accepts as many
_MOST_KEYS = 40  # listed in a message

_INDEX = ".index.json"  # end of the name of a shard index
_LARGE = 16 << 20
"""Bytes of a tensor from which on it is hashed by itself."""
_HASHING_THREADS = 8
_UNPICKLER = "WeightsUnpickler error:"

M = TypeVar("M", bound=nn.Module)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a weight file (.safetensors, a .pt/.pth/.bin pickle, or the .index.json next to its
    shards) as a flat state dict on the CPU.

    The file is memory-mapped: tensors are read when they are used, and weights copied into a model
    do not take up memory twice. (Pickles from before torch 1.6 cannot be mapped.)

    Understands `{"model" | "module" | "state_dict" | "ema": {...}}`, consolidated FSDP files (the
    state dict at top level), files from LlamaGen's own training (with an argparse namespace inside)
    and the parts that `torch.compile`, DDP and FSDP add to names. Leaves out tables, masks and
    caches.

    Raises:
        UserError: the file is missing, truncated, not a weight file, or holds objects that are
            unsafe to unpickle.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder or a special file" if path.exists() else "does not exist"
        raise UserError(f"weight file {path} {what}; check the path")
    if path.name.endswith(_INDEX):
        return _read_all(_shards(path))
    with reading(f"weight file {path}"), open(path, "rb"):
        pass  # the libraries below report a file without read permission as damaged
    try:
        if _is_safetensors(path):
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                mapped = zipfile.is_zipfile(path)
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle stream can make the unpickler raise anything
        raise _unreadable(path, error) from error
    return _flatten(content, path)


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, judged by its name or, as names vary, its content."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        start = file.read(9)  # the length of a JSON object, and its first character
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= path.stat().st_size - 8


def _unreadable(path: Path, error: Exception) -> UserError:
    refuse_pointers(path)
    # Quote only the fault: PyTorch goes on to suggest running the code inside the file.
    text = str(error).rpartition(_UNPICKLER)[2].partition("Please use")[0].strip()
    reason = text.split("\n")[0][:300] or type(error).__name__
    return UserError(
        f"weight file {path} cannot be read: it is truncated, not a weight file, or holds "
        f"unsafe objects ({reason}); download or copy it again"
    )


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a folder in transformers' layout: one file, or an index's shards."""
    folder = Path(folder)
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    raise UserError(
        f"{folder} holds no weights: it has no model.safetensors, no pytorch_model.bin and no "
        "index of their shards"
    )


def _shards(index: Path) -> list[Path]:
    """The weight files that an index names, which are next to it."""
    folder = index.parent
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}); download it again") from error
    if strange := sorted(str(n) for n in names if Path(str(n)).name != n):
        raise UserError(f"{index} names {', '.join(strange)}, which is not within the folder")
    if missing := sorted(n for n in names if not (folder / n).is_file()):
        raise UserError(f"{index} names {', '.join(missing)}, which is missing; download it again")
    return [folder / name for name in sorted(names)]


def read_folder(folder: str | Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """Read all weights of a folder (see `weight_files`).

    shapes_only: return them on the meta device, without reading their data.
    """
    return _read_all(weight_files(folder), shapes_only=shapes_only)


def _read_all(paths: Sequence[Path], *, shapes_only: bool = False) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in paths:
        part = _read_shapes(path) if shapes_only else read_state_dict(path)
        if twice := sorted(weights.keys() & part.keys()):
            raise UserError(f"{path} holds keys that another shard has, too: {shorten_keys(twice)}")
        weights |= part
    return weights


def _read_shapes(path: Path) -> dict[str, Tensor]:
    if not _is_safetensors(path):  # pickles are mapped, so this does not read their data either
        return {k: v.to("meta") for k, v in read_state_dict(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return _learned({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def _learned(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without its computed tensors."""
    return {k: v for k, v in state_dict.items() if k.rpartition(".")[2] not in _COMPUTED}


def _flatten(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_MOST_NESTED):
        if isinstance(content, dict):
            content = _within(content)
    if not _is_state_dict(content):
        held = content if isinstance(content, dict) else {}
        other = [repr(k) for k, v in held.items() if not _is_weight(v)]
        if 0 < len(other) < len(held):
            raise UserError(
                f"weight file {path} holds entries that are not weights: {shorten_keys(other)}; "
                f'save the weights alone, as {{"model": weights}}'
            )
        raise UserError(
            f"weight file {path} holds no state dict (looked at the top level, under "
            f"{', '.join(_NESTING_KEYS)}, and for a single one under any other name)"
        )
    named: dict[str, Tensor] = {}
    for key, value in content.items():
        if (name := _unwrapped(key)) in named:
            raise UserError(f"weight file {path} holds {name} twice, once as {key}")
        named[name] = value
    return _learned(named)


def _within(content: dict) -> dict:
    """The dict under a usual key, else the only state dict in it, else the dict itself."""
    for key in _NESTING_KEYS:
        if isinstance(content.get(key), dict):
            return content[key]
    found = [value for value in content.values() if _is_state_dict(value)]
    return found[0] if len(found) == 1 else content


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and _is_weight(v) for k, v in content.items())
    )


def _is_weight(value: object) -> bool:
    """Whether this is a tensor with all its numbers: not sparse, and not only a shape."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _unwrapped(name: str) -> str:
    """A weight's name without the parts that parallel training and compiling add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return _DDP.sub("", name)  # averages of a DDP model have the prefix twice


def count_children(state_dict: dict[str, Tensor], prefix: str) -> int:
    """Length of a stored module list, given its prefix (which ends with a dot); 0 if none."""
    places = {k.removeprefix(prefix).split(".")[0] for k in state_dict if k.startswith(prefix)}
    return 1 + max((int(place) for place in places if place.isdecimal()), default=-1)


@contextmanager
def reading_shape(what: str) -> Iterator[None]:
    """Turn a missing key, while inferring a shape, into the UserError that this is not `what`."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"not {what}: key {error} is missing") from error
    except IndexError as error:
        raise UserError(f"not {what}: a weight has too few dimensions") from error


def build_empty(
    build: Callable[[], M],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> M:
    """Build a module in eval mode for `load_strict`, without initializing its weights."""
    with torch.device("meta"):
        module = build().to(dtype)
    return module.to_empty(device=device).eval()


def load_strict(
    module: nn.Module, state_dict: dict[str, Tensor], source: str | Path, *, assign: bool = False
) -> None:
    """Copy `state_dict` into `module`, which must have exactly the same keys and shapes.

    assign: use the given tensors themselves instead of copying them.

    Raises:
        UserError: names every key that is missing, unexpected, mis-shaped or not finite.
    """
    _compare(module.state_dict(), state_dict, type(module).__name__, source)
    module.load_state_dict(state_dict, strict=True, assign=assign)
    refuse_not_finite(module.state_dict(), source)


@torch.no_grad()
def copy_weights(
    target: dict[str, Tensor], state_dict: dict[str, Tensor], source: str | Path
) -> None:
    """Like `load_strict`, into some of a backbone's tensors (by name) instead of a module."""
    _compare(target, state_dict, "this backbone", source)
    for name, tensor in target.items():
        tensor.copy_(state_dict[name])
    refuse_not_finite(target, source)


@torch.no_grad()
def refuse_not_finite(
    weights: dict[str, Tensor],
    source: str | Path,
    advice: str = "it is damaged, or the training went wrong; use another file",
) -> None:
    """UserError naming the weights that are infinite or NaN: they would silently draw noise."""
    # Checking only the extremes is many times faster than checking every number.
    read = {k: v for k, v in weights.items() if v.is_floating_point() and v.numel()}
    bad = [
        name
        for name, tensor in read.items()
        if not tensor.is_meta and not torch.stack(torch.aminmax(tensor)).isfinite().all()
    ]
    if bad:
        raise UserError(
            f"{source} holds numbers that are not finite ({shorten_keys(bad)}): {advice}"
        )


def _compare(
    expected: dict[str, Tensor], state_dict: dict[str, Tensor], what: str, source: str | Path
) -> None:
    """UserError naming every key that differs."""
    problems = {
        "missing": [k for k in expected if k not in state_dict],
        "unexpected": [k for k in state_dict if k not in expected],
        "mis-shaped": [
            f"{k} (file {tuple(state_dict[k].shape)}, model {tuple(v.shape)})"
            for k, v in expected.items()
            if k in state_dict and state_dict[k].shape != v.shape
        ],
        # Quantized weights, for example, mean nothing without their scales.
        "not floating-point": [
            f"{k} ({state_dict[k].dtype})"
            for k, v in expected.items()
            if k in state_dict and v.is_floating_point() > state_dict[k].is_floating_point()
        ],
    }
    refuse_misfits(problems, f"{source} does not fit {what}")


def refuse_misfits(problems: Mapping[str, Sequence[str]], title: str) -> None:
    """UserError with the title and, by kind of problem, the keys that do not fit, if any."""
    if any(problems.values()):
        lines = [
            f"  {kind} ({len(keys)}): {shorten_keys(keys)}"
            for kind, keys in problems.items()
            if keys
        ]
        raise UserError("\n".join([f"{title}:", *lines, "Is it the right family, size and file?"]))


def shorten_keys(keys: Sequence[str]) -> str:
    """The first keys of a list, for a message."""
    return shorten(keys, most=_MOST_KEYS)


def check_loading(info: dict, title: str, without_effect: Callable[[str], object]) -> None:
    """`refuse_misfits` for transformers' loading report, ignoring keys `without_effect`."""
    problems = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "mis-shaped": [key for key, *_ in info["mismatched_keys"]],
    }
    counted = {k: sorted(key for key in v if not without_effect(key)) for k, v in problems.items()}
    refuse_misfits(counted, title)


def stored_sha256(path: Path) -> str:
    """SHA-256 of a weight file; for a folder or a shard index, over the names and hashes of its
    weight files, in the order of their names.
    """
    if path.is_dir():
        return files_sha256(weight_files(path))
    return files_sha256(_shards(path)) if path.name.endswith(_INDEX) else remembered_sha256(path)


def state_dict_sha256(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of weights in memory. Large ones take part
    by their own SHA-256, which threads compute: the 14 GB of a 7B model would take 13 s otherwise.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        large = {k: pool.submit(_sha256, v) for k, v in state_dict.items() if v.nbytes >= _LARGE}
        for name, value in sorted(state_dict.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(large[name].result() if name in large else _bytes_of(value))
    return digest.hexdigest()


def _sha256(value: Tensor) -> bytes:
    return hashlib.sha256(_bytes_of(value)).digest()


def _bytes_of(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_weights(path: str | Path, state_dict: dict[str, Tensor]) -> None:
    """Write a safetensors file, whatever the tensors' devices and memory layouts."""
    save_file({k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, path)
