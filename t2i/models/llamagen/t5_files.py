"""The files of a T5 encoder: finding them, hashing them for cache keys, loading them strictly.

A T5 folder, such as google/flan-t5-xl, holds config.json, weights (model*.safetensors or
pytorch_model*.bin, whole or in shards; a full T5 including its decoder is fine), and tokenizer.json
or spiece.model.
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
from t2i.models.base import MOST_LAYERS
from t2i.published import fetch_model, files_sha256
from t2i.weights import check_loading, refuse_not_finite

_SETTINGS_FILES = (
    "config.json",
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference
_DECODER = ("decoder.", "lm_head.")  # weights of a full T5 that are not loaded


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The path of a local folder, or of a hub id's files, fetched or found in the hub's cache.

    Raises:
        UserError: it is neither, or it has no weights.
    """
    folder = Path(os.path.expanduser(path_or_hub_id))
    if folder.is_dir():
        return folder
    advice = "Official: google/flan-t5-xl"
    return fetch_model(str(path_or_hub_id), [*_SETTINGS_FILES], _WEIGHT_PATTERNS, advice=advice)


def _settings_files(folder: Path) -> list[Path]:
    return [path for name in _SETTINGS_FILES if (path := folder / name).is_file()]


def _weight_files(folder: Path) -> list[Path]:
    for pattern in _WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def weights_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 over names and contents of a T5 folder's config, tokenizer and weight files.

    For cache keys, without loading the model. Does not cover token limit, dtype and
    CAPTION_CLEANING_VERSION. Large files are read only once (see `t2i.published`).
    """
    folder = find_folder(path_or_hub_id)
    return files_sha256([*_settings_files(folder), *_weight_files(folder)])


def copy_files(folder: Path, target: Path) -> None:
    """Copy the files that make up a T5 folder, and no others, into a new folder."""
    target.mkdir(parents=True)
    indices = [p for pattern in _WEIGHT_PATTERNS for p in folder.glob(f"{pattern}.index.json")]
    for path in [*_settings_files(folder), *indices, *_weight_files(folder)]:
        shutil.copyfile(path, target / path.name)


def load_encoder(folder: Path, dtype: torch.dtype, *, shapes_only: bool = False) -> T5EncoderModel:
    """The encoder of a T5 folder, on the CPU, or with `shapes_only` on the meta device.

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
    except Exception as error:  # huggingface_hub's own classes, for a setting of the wrong type
        raise UserError(f"{folder}/config.json does not describe a T5: {error}") from error
    if not 0 < config.num_layers <= MOST_LAYERS:
        raise UserError(
            f"{folder}/config.json: num_layers={config.num_layers} must be from 1 to {MOST_LAYERS}"
        )
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
            ignore_mismatched_sizes=True,  # so that `check_loading` below lists and refuses them all
        )
        model, info = loaded
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        refuse_pointers(*folder.iterdir())
        raise UserError(f"the weights in {folder} cannot be read: {error}") from error
    problem = f"the weights in {folder} do not fit its config.json"
    check_loading(info, problem, lambda key: key.startswith(_DECODER))
    refuse_not_finite(model.state_dict(), folder)
    return model


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a T5 folder, for an encoder with `vocab_size` embeddings.

    Raises:
        UserError: it is missing or unreadable, has too many tokens for the encoder, or adds no end
            token.
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
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the encoder has {vocab_size}; "
            "they belong to different models"
        )
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizer in {folder} does not end a caption with {tokenizer.eos_token!r}, as "
            "T5's does; use the files of the encoder's own repository"
        )
    return tokenizer
