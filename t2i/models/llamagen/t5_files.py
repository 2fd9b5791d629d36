"""The files of a T5 encoder: finding them, hashing them for cache keys, loading them strictly.

A T5 folder holds config.json, weights (model*.safetensors or pytorch_model*.bin, whole or in
shards; a full T5 with its decoder will do) and tokenizer.json or spiece.model, as
google/flan-t5-xl does.
"""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from t2i.errors import UserError
from t2i.fields import read_object
from t2i.lfs import refuse_pointers
from t2i.published import fetch_model, files_sha256
from t2i.weights import check_loading, refuse_not_finite

_TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference
_OTHER_HALF = ("decoder.", "lm_head.")  # of a full T5; an encoder has no use for it


def find_folder(path_or_hub_id: str | Path) -> Path:
    """A local folder as it is; anything else is a hub id, fetched (or found in the hub's cache).

    Raises:
        UserError: it is neither, or there are no weights in it.
    """
    folder = Path(os.path.expanduser(path_or_hub_id))
    if folder.is_dir():
        return folder
    settings, advice = ["config.json", *_TOKENIZER_FILES], "Official: google/flan-t5-xl"
    return fetch_model(str(path_or_hub_id), settings, _WEIGHT_PATTERNS, advice=advice)


def _weight_files(folder: Path) -> list[Path]:
    for pattern in _WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def weights_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 over names and contents of config, weights and tokenizer files of a T5 folder.

    For cache keys; needs no model in memory. Token limit, dtype and CAPTION_CLEANING_VERSION are
    not covered. Large files are read once (see `t2i.published`).
    """
    folder = find_folder(path_or_hub_id)
    small = [folder / name for name in ("config.json", *_TOKENIZER_FILES)]
    return files_sha256([*(p for p in small if p.is_file()), *_weight_files(folder)])


def copy_files(folder: Path, target: Path) -> None:
    """Copy what makes up a T5 folder, and nothing else that may lie in it, into a new folder."""
    target.mkdir(parents=True)
    weights = _weight_files(folder)
    indices = [p for pattern in _WEIGHT_PATTERNS for p in folder.glob(f"{pattern}.index.json")]
    settings = [folder / name for name in ("config.json", *_TOKENIZER_FILES)]
    for path in [*(p for p in settings if p.is_file()), *indices, *weights]:
        shutil.copyfile(path, target / path.name)


def load_encoder(folder: Path, dtype: torch.dtype, *, shapes_only: bool = False) -> T5EncoderModel:
    """The encoder of a T5 folder, on the CPU; `shapes_only`: on the meta device, by config.json.

    Raises:
        UserError: a file is missing or unreadable, the model is not a T5, or weights are missing,
            unexpected or mis-shaped (each is named).
    """
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        held = ", ".join(sorted(os.listdir(folder))[:20]) or "nothing"
        raise UserError(
            f"{folder} is not a T5 folder: it needs config.json and "
            f"{' or '.join(_WEIGHT_PATTERNS)}, and holds {held}"
        )
    kind = read_object(folder / "config.json").get("model_type")
    if kind != "t5":
        raise UserError(f"{folder}/config.json describes a {kind!r} model, not 't5'")
    try:
        config = T5Config.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the hub's own classes, for a setting of another type
        raise UserError(f"{folder}/config.json describes no T5: {error}") from error
    if shapes_only:
        with torch.device("meta"):
            outline: Any = T5EncoderModel(config)
        return outline.to(dtype)  # `to` is not typed
    try:
        loaded: Any = T5EncoderModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are listed below, and refused
        )
        model, info = loaded
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        refuse_pointers(*folder.iterdir())
        raise UserError(f"the weights in {folder} cannot be read: {error}") from error
    said = f"the weights in {folder} do not fit its config.json"
    check_loading(info, said, lambda key: key.startswith(_OTHER_HALF))
    refuse_not_finite(model.state_dict(), folder)
    return model


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a T5 folder, for an encoder with `vocab_size` embeddings.

    Raises:
        UserError: it is missing or unreadable, too large for the encoder, or adds no end token.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(f"{folder} has no tokenizer: put tokenizer.json or spiece.model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        refuse_pointers(*folder.iterdir())
        raise UserError(
            f"the tokenizer in {folder} cannot be read; spiece.model also needs the packages "
            f"sentencepiece and protobuf ({error})"
        ) from error
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the encoder {vocab_size}; "
            "they belong to different models"
        )
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizer in {folder} does not end a caption with {tokenizer.eos_token!r} as "
            "T5's does; use the files of the encoder's own repository"
        )
    return tokenizer
