"""From names to models: where weights come from, and the two calls that build a TensorAR.

A source is a file, a folder with a config.json (the layout of `t2i/assets/shapes`), the name of a shipped offline base ("shapes",
...), or a file on the hub as "owner/repo:file". Families that publish a folder (Janus-Pro) take that folder, or "owner/repo".
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path

import torch

from t2i.backbones.base import Backbone, SamplingConfig
from t2i.errors import UserError
from t2i.files import file_sha256
from t2i.tensorar.model import TensorAR, TensorARConfig
from t2i.weights import folder_sha256, state_dict_sha256

FAMILIES = {
    "llamagen": "t2i.backbones.llamagen",
    "janus": "t2i.backbones.janus",
    "open_magvit2": "t2i.backbones.open_magvit2",
    "rar": "t2i.backbones.rar",
}
"""Module of each family: its `load`, `load_tokenizer` and `CONFIG`, the class of its shape, are what is called here.

`PUBLISHED_AS_FOLDER` says that weights, tokenizers and configuration are published as one folder (there is then an `outline` for what
needs no files), `TOKENIZER_INSIDE` that the published weight file holds the image tokenizer, too.
"""
ASSETS = Path(__file__).parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(
    device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": a GPU in bfloat16 where there is one, else the CPU in float32.

    Raises:
        UserError: there is no such device or type, or no GPU here.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|meta|cuda(:\d+)?", name):
        raise UserError(f"device {name!r} must be auto, cpu or cuda (cuda:1 is the second GPU)")
    if name.startswith("cuda"):
        _check_gpu(name)
    if isinstance(dtype, torch.dtype):
        return torch.device(name), dtype
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} must be auto, {' or '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "bfloat16" if name.startswith("cuda") else "float32"
    return torch.device(name), DTYPES[dtype]


def _check_gpu(name: str) -> None:
    """UserError if PyTorch does not see this GPU."""
    if not torch.cuda.is_available():
        why = (
            "this PyTorch is built for CPUs only: install the build for your CUDA (pytorch.org)"
            if torch.version.cuda is None
            else "look at nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
        )
        raise UserError(
            f"device {name!r} is asked for, but PyTorch found no GPU on this machine ({why}); "
            "cpu or auto works without one"
        )
    number = torch.device(name).index or 0
    if number >= (count := torch.cuda.device_count()):
        raise UserError(
            f"device {name!r} is asked for, but PyTorch found {count} GPU(s), from cuda:0"
        )


@dataclass(frozen=True)
class BackboneSource:
    """Everything needed to load the same backbone again; stored in every checkpoint folder."""

    family: str
    weights: str
    tokenizer: str | None = None
    text_encoder: str | None = None
    text_encoder_dtype: str = "float32"
    config: dict | None = None
    """Shape of the backbone, as its family's config dataclass has it."""
    sampling: dict = field(default_factory=dict)
    sha256: str | None = None
    """Hash of the weight file, or over the weight files of a folder."""
    generation_only: bool = False
    """Only what drawing images needs was loaded."""


def resolve(source: str | Path, *, folder: bool = False) -> Path:
    """The local path of a source; downloads "owner/repo:file", or with `folder` "owner/repo", into the hub's cache.

    Raises:
        UserError: there is no such file, folder, shipped base or hub file.
    """
    text = str(source)
    if Path(text).exists():
        return Path(text)
    repo, _, filename = text.partition(":")
    if repo.count("/") == 1 and bool(filename) != folder:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return _hub_folder(repo) if folder else Path(hf_hub_download(repo, filename))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            what = f"{filename} of {repo}" if filename else repo
            raise UserError(f"cannot download {what}: {error}") from error
    raise UserError(
        f"{text} is not a file, a folder, a shipped base ({', '.join(shipped_bases())}) "
        f"or a hub {'folder written owner/repo' if folder else 'file written owner/repo:file'}"
    )


def _hub_folder(repo: str) -> Path:
    """A published model folder: settings, tokenizer, and its weights in one format."""
    from huggingface_hub import snapshot_download

    settings = ["*.json", "*.jinja"]
    folder = Path(snapshot_download(repo, allow_patterns=[*settings, "*.safetensors"]))
    if not list(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(repo, allow_patterns=[*settings, "*.bin"]))
    return folder


def load_backbone(
    family: str,
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_dtype: str = "float32",
    config: object | None = None,
    grid: tuple[int, int] | None = None,
    generation_only: bool = False,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str = "auto",
) -> Backbone:
    """Load a pre-trained backbone, strictly, in eval mode.

    Args:
        family: one of `FAMILIES`.
        source: official weight file or folder, folder with config.json, a shipped base, "owner/repo:file" or "owner/repo".
        tokenizer: image tokenizer weights, needed for pixels and for codebook noise; Open-MAGVIT2's checkpoints hold their own.
        text_encoder: folder or hub id of the caption encoder (LlamaGen text-to-image: google/flan-t5-xl).
        text_encoder_dtype: "float32" or "bfloat16" (what LlamaGen's features were computed in), whatever the backbone's is.
        config: the family's config dataclass, for shapes that were never published.
        grid: height and width in codes, where the file's name does not tell.
        generation_only: leave out what drawing images does not need (Janus-Pro's understanding tower and text head).
        dtype: "auto" is bfloat16 on a GPU and float32 on the CPU.
        device: "auto" is a GPU where there is one, else the CPU; "meta" checks names and shapes without reading the weights, for the families that publish a folder.

    Raises:
        UserError: what is wrong with the name, file or keys, and what is allowed.
    """
    device, dtype = pick_device(device, dtype)
    spec = BackboneSource(
        family=family,
        weights=_lasting(source),
        tokenizer=None if tokenizer is None else _lasting(tokenizer),
        text_encoder=None if text_encoder is None else _lasting(text_encoder),
        text_encoder_dtype=text_encoder_dtype,
        config=None if config is None else asdict(config),
        generation_only=generation_only,
    )
    return load_source(spec, grid=grid, dtype=dtype, device=device)


def _lasting(source: str | Path) -> str:
    """A source as a checkpoint can store it: a local path holds from any working directory."""
    local = str(source) not in shipped_bases() and Path(source).exists()
    return str(Path(source).resolve() if local else source)


def load_source(
    source: BackboneSource,
    *,
    weights: Path | None = None,
    grid: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Load a `BackboneSource`; `weights` replaces the weight file (fine-tuned weights of a checkpoint folder).

    On the "meta" device a family that publishes a folder is loaded without its data, a published size without any file.
    """
    _check(source)
    module, files = import_module(FAMILIES[source.family]), expand_folder(source)
    options: dict = {"config": None, "grid": grid}
    if files.config is not None:  # JSON has no tuples
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in files.config.items()}
        options["config"] = module.CONFIG(**values)
    folder = published_as_folder(source.family)
    if folder:  # the other families are generators and nothing else
        options["generation_only"] = source.generation_only
    if folder and torch.device(device).type == "meta":
        backbone = module.outline(files.weights, **options) or module.load(
            resolve(files.weights, folder=True), shapes_only=True, **options
        )
    else:
        path = weights or resolve(files.weights, folder=folder)
        if weights is None and source.sha256 is not None and weights_sha256(path) != source.sha256:
            raise UserError(
                f"{path} is not the weight file that the checkpoint was trained on (its SHA-256 differs)"
            )
        backbone = module.load(path, dtype=dtype, **options)
    backbone.source = replace(source, config=asdict(backbone.config))
    if files.sampling:
        backbone.spec = replace(backbone.spec, sampling=SamplingConfig(**files.sampling))
    if files.tokenizer is not None and (weights is not None or files.tokenizer != files.weights):
        backbone.frozen.tokenizer = module.load_tokenizer(resolve(files.tokenizer))
    if backbone.frozen.tokenizer is not None:
        _check_codes(backbone)
        backbone.frozen.tokenizer.to(device)
    if files.text_encoder is not None:
        from t2i.conditioning.t5 import T5Captions

        backbone.frozen.text_encoder = T5Captions.load(
            files.text_encoder,
            max_tokens=backbone.spec.prefix_tokens,
            dtype=DTYPES[files.text_encoder_dtype],
            device=device,
        )
    return backbone.to(device)


def _check(source: BackboneSource) -> None:
    """UserError where a source says what no family, or not this one, can do."""
    if source.text_encoder_dtype not in DTYPES:
        raise UserError(
            f"text_encoder_dtype {source.text_encoder_dtype!r} must be {' or '.join(DTYPES)}"
        )
    if source.family not in FAMILIES:
        raise UserError(
            f"unknown backbone family {source.family!r}; choose one of {', '.join(FAMILIES)}"
        )
    if source.text_encoder is not None and published_as_folder(source.family):
        raise UserError(f"{source.family} brings its own prompt tokenizer: leave out text_encoder")


def _check_codes(backbone: Backbone) -> None:
    codes = math.prod(backbone.spec.subvocabs)
    if backbone.tokenizer.codebook_size != codes:
        raise UserError(
            f"the image tokenizer has {backbone.tokenizer.codebook_size} codes and the {backbone.spec.family} backbone "
            f"{codes}: they do not belong together"
        )


def with_hash(source: BackboneSource) -> BackboneSource:
    """The source with the SHA-256 of its weights, so that a checkpoint can refuse another base."""
    if source.sha256 is not None:
        return source
    folder = published_as_folder(source.family)
    return replace(
        source, sha256=weights_sha256(resolve(expand_folder(source).weights, folder=folder))
    )


def weights_sha256(path: Path) -> str:
    """SHA-256 of a weight file, or over those of a folder."""
    return folder_sha256(path) if path.is_dir() else file_sha256(path)


def published_as_folder(family: str) -> bool:
    """Whether the family's weights, tokenizers and configuration are published as one folder."""
    return _says(family, "PUBLISHED_AS_FOLDER")


def _says(family: str, fact: str) -> bool:
    return family in FAMILIES and getattr(import_module(FAMILIES[family]), fact, False)


def expand_folder(source: BackboneSource) -> BackboneSource:
    """Fill in what a backbone folder's config.json says; what the caller gave wins."""
    path = ASSETS / source.weights if source.weights in shipped_bases() else Path(source.weights)
    embeds = _says(source.family, "TOKENIZER_INSIDE")
    if not path.is_dir():
        return replace(source, tokenizer=source.tokenizer or (source.weights if embeds else None))
    try:
        stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "family" not in stored and published_as_folder(source.family):
            return replace(source, weights=str(path))  # the published folder itself
        files = {
            key: str(path / stored[key])
            for key in ("weights", "tokenizer", "text_encoder")
            if key in stored
        }
        family, weights = stored["family"], files["weights"]
        config = stored.get("config") if published_as_folder(family) else stored["config"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is not a backbone folder: config.json is missing or incomplete ({error})"
        ) from error
    if family != source.family:
        raise UserError(f"{path} holds a {family} backbone, not {source.family}")
    return replace(
        source,
        weights=weights,
        tokenizer=source.tokenizer or files.get("tokenizer") or (weights if embeds else None),
        text_encoder=source.text_encoder or files.get("text_encoder"),
        config=source.config or config,
        sampling=source.sampling or stored.get("sampling", {}),
    )


def family_of(source: str | Path) -> str:
    """The family that a shipped base, a backbone folder or a published folder says it is of.

    Raises:
        UserError: it does not say.
    """
    shipped = str(source) in shipped_bases()
    path = (ASSETS if shipped else Path()) / source / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if isinstance(stored, dict):
        if isinstance(stored.get("family"), str):
            return stored["family"]
        if stored.get("model_type") in ("janus", "multi_modality"):
            return "janus"
    if not Path(source).exists() and str(source).count("/") != 1:
        resolve(source)  # says what it could have been
    raise UserError(
        f"{source} does not say which family it is of: give one of {', '.join(FAMILIES)}"
    )


def shipped_bases() -> list[str]:
    """Names of the base models in the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def attach(backbone: Backbone, config: TensorARConfig, *, seed: int = 0) -> TensorAR:
    """Put a fresh codec around a backbone; equal to the base model, bit for bit, until it is trained."""
    return TensorAR(backbone, config, seed=seed).eval()


def tokenizer_hash(backbone: Backbone) -> str:
    """SHA-256 of the image tokenizer's weights (of the file, where it has one to itself), for cache keys."""
    files = expand_folder(backbone.source)
    if files.tokenizer is not None:
        return file_sha256(resolve(files.tokenizer))
    return state_dict_sha256(backbone.tokenizer.state_dict())
