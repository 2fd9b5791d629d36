"""Captions as flan-t5 features, which condition LlamaGen's text-to-image models.

The encoder is frozen. A caption is cleaned (`captions.py`), cut to P tokens including the
end-of-sequence token, encoded, and later LEFT padded to P entries, so that its last token directly
precedes the first image token (LlamaGen's `language/t5.py` and `sample_t2i.py`).

Shapes: B captions, P caption tokens of the image model, C feature width, n_i tokens of caption i.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from t2i.errors import UserError
from t2i.models.conditions import check_captions
from t2i.models.llamagen.captions import (
    CAPTION_CLEANING_VERSION,
    UNKNOWN,
    caption_losses,
    clean_caption,
)
from t2i.models.llamagen.t5_files import (
    copy_files,
    find_folder,
    load_encoder,
    load_tokenizer,
    weights_hash,
)

_PAD_MULTIPLE = 8
_ROWS_PER_PASS = 64


class T5Captions:
    """A frozen T5 encoder with its tokenizer. Not a module: it is never trained or sharded."""

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        max_tokens: int = 120,
    ):
        if max_tokens < 2:
            raise UserError(
                f"max_tokens={max_tokens} must be at least 2: a word and the end-of-sequence token"
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.folder = folder
        self.max_tokens = max_tokens

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | Path,
        *,
        max_tokens: int = 120,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "T5Captions":
        """Load google/flan-t5-xl (the official encoder) or a local folder of the same layout.

        LlamaGen was trained on features computed in bfloat16. See `t5_files` for the layout. On the
        "meta" device no weights are read.

        Raises:
            UserError: a file is missing, unreadable or not a T5's, or weights do not fit (all are
                named).
        """
        folder = find_folder(path_or_hub_id)
        shapes_only = torch.device(device).type == "meta"
        model: Any = load_encoder(folder, dtype, shapes_only=shapes_only)  # `to` is not typed
        tokenizer = load_tokenizer(folder, model.config.vocab_size)
        return cls(model.to(device), tokenizer, folder, max_tokens)

    @property
    def dim(self) -> int:
        """Feature width C."""
        return self.model.config.d_model

    def to(self, device: str | torch.device) -> "T5Captions":
        """Move the encoder to another device."""
        self.model.to(device)
        return self

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features [n_i, C] of each caption: those of its tokens, the last one being the end token.

        n_i is at most `max_tokens` (see `notes`). Dtype and device are the encoder's. An empty
        caption is the end token alone.

        A caption's features do not depend on the other captions: padding is masked exactly, and
        each caption is padded to the next multiple of 8 of its own length. Only rounding may
        differ, since the number of captions in a matrix product can change the order of its sums:
        no difference was seen on CPUs, the last bits differ on GPUs.

        Raises:
            UserError: `captions` is not a list of strings, or the features are not finite (float16
                is too narrow for flan-t5).
        """
        most = self.max_tokens
        token_ids = [
            ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
            for ids in self._tokenize(captions)[1]
        ]
        groups: dict[int, list[int]] = {}
        for index, ids in enumerate(token_ids):
            length = math.ceil(len(ids) / _PAD_MULTIPLE) * _PAD_MULTIPLE
            groups.setdefault(length, []).append(index)
        features: dict[int, Tensor] = {}
        for length, members in groups.items():
            for start in range(0, len(members), _ROWS_PER_PASS):
                rows = members[start : start + _ROWS_PER_PASS]
                encoded = self._encode_rows([token_ids[i] for i in rows], length)
                features.update(zip(rows, encoded, strict=True))
        return [features[index] for index in range(len(token_ids))]

    def notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        """Fixed phrases for what each caption loses in `encode`; None if nothing readable is left.

        Raises:
            UserError: as for `encode`.
        """
        texts, all_ids = self._tokenize(captions)
        unknown = self.tokenizer.unk_token_id
        blank = self.tokenizer.convert_tokens_to_ids("\u2581")  # sentencepiece's space
        no_words = {unknown, blank, self.tokenizer.eos_token_id}
        notes = []
        for caption, text, ids in zip(captions, texts, all_ids, strict=True):
            lost = caption_losses(caption, text, known=not set(ids) <= no_words)
            if lost is not None and len(ids) > self.max_tokens:
                lost.append(f"caption cut to {self.max_tokens} tokens")
            if lost is not None and unknown in ids:
                lost.append(UNKNOWN)
            notes.append(lost)
        return notes

    def _tokenize(self, captions: Sequence[str]) -> tuple[list[str], list[list[int]]]:
        """The cleaned captions, and their token ids."""
        check_captions(captions)
        if not captions:
            return [], []
        texts = [clean_caption(caption) for caption in captions]
        return texts, self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]

    # Not inference_mode: its tensors cannot be used in a later backward pass.
    @torch.no_grad()
    def _encode_rows(self, token_ids: list[list[int]], length: int) -> list[Tensor]:
        ids = torch.full((len(token_ids), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, values in enumerate(token_ids):
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        device = self.model.device
        mask = mask.to(device)
        hidden = self.model(input_ids=ids.to(device), attention_mask=mask)[0]
        valid = hidden[mask.bool()]
        if not torch.isfinite(valid).all():
            raise UserError(
                f"the text encoder returned values that are not finite in {self.model.dtype}; "
                "load it in bfloat16 or float32"
            )
        # Copies, because a view would keep (and save) the features of the whole batch.
        return [f.clone() for f in valid.split([len(values) for values in token_ids])]

    hash_of = staticmethod(weights_hash)
    """SHA-256 over an encoder's files, by folder or hub id, without loading it."""

    def weights_hash(self) -> str:
        return weights_hash(self.folder)

    def copy_files(self, target: Path) -> None:
        """Copy the encoder's files into a new folder that `load` accepts."""
        copy_files(self.folder, target)

    def cache_key(self) -> dict:
        """Everything the features depend on."""
        return {
            "text_encoder": self.weights_hash(),
            "text_encoder_dtype": str(self.model.dtype).removeprefix("torch."),
            "caption_cleaning": CAPTION_CLEANING_VERSION,
            "caption_tokens": self.max_tokens,
        }
