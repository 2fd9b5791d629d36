"""Answerers from `transformers`: "yes" or "no", whichever is more likely as the first token.

Their scores are not official DPG-Bench scores: another answerer shifts scores by points and can
change a ranking. Use them to compare versions of one model, always with the answerer's name.

Generated text is not parsed, because "Yes." and "Yes, there is" would count as no. Shapes: Q
questions, L text tokens, N image tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForQuestionAnswering,
    PreTrainedModel,
    ProcessorMixin,
)

from dpg_bench.questions import Question
from t2i.errors import UserError
from t2i.published import hashes_by_name

_WEIGHT_FILES = ("*.safetensors", "*.bin")
_FORMS = ("{}", "{} ", " {}")  # a word as a token may hold it: alone, or with a space


class _YesNoAnswerer(ABC):
    """Shared base: loading, identity, and the comparison of "yes" with "no"."""

    name: str
    model_class: Any

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        source: str,
        folder: Path | None = None,
    ):
        """folder: its weight files are hashed; None if `source` names a commit."""
        self.model, self.processor = model.eval(), processor
        self.source, self.folder = source, folder
        self.yes, self.no = (_first_tokens(processor.tokenizer, word) for word in ("yes", "no"))
        if not self.yes or not self.no or self.yes & self.no:
            raise UserError(
                f"judge {self.name}: the tokenizer of {source} has no separate tokens for yes and no"
            )

    @classmethod
    def load(cls, folder: Path, source: str, device: torch.device | str) -> _YesNoAnswerer:
        """Load a folder in the layout of `transformers`, in the precision of its files.

        source: the weights' name in results; "owner/name@commit" if they are from the hub.

        Raises:
            UserError: the folder cannot be loaded, or weights are missing or have the wrong shape.
        """
        try:
            model, report = cls.model_class.from_pretrained(
                folder, dtype="auto", output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"judge {cls.name}: {folder} cannot be loaded: {error}") from error
        if lost := [*report["missing_keys"], *report["mismatched_keys"]]:
            names = ", ".join(sorted(map(str, lost))[:10])
            raise UserError(f"judge {cls.name}: {folder} lacks weights: {names}")
        return cls(model.to(device), processor, source, None if "@" in source else folder)

    def identity(self) -> dict:
        return {
            "judge": self.name,
            "weights": self.source,
            "sha256": self._hashes,
            "model": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @cached_property
    def _hashes(self) -> dict[str, str] | None:
        if self.folder is None:
            return None
        files = sorted(f for kind in _WEIGHT_FILES for f in self.folder.glob(kind))
        return hashes_by_name(files)

    @abstractmethod
    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        """As in `dpg_bench.answerers.Answerer`."""

    def _says_yes(self, logits_V: Tensor) -> bool:
        log_probs = logits_V.float().log_softmax(dim=-1)
        yes, no = (log_probs[sorted(ids)].logsumexp(dim=0) for ids in (self.yes, self.no))
        return bool(yes > no)


def _first_tokens(tokenizer, word: str) -> set[int]:
    """Ids of tokens that hold the whole word, in any case, with or without a space."""
    ids = set()
    for spelled in (word, word.capitalize(), word.upper()):
        for form in _FORMS:
            encoded = tokenizer.encode(form.format(spelled), add_special_tokens=False)
            if len(encoded) == 1 and encoded[0] != tokenizer.unk_token_id:
                ids.add(encoded[0])
    return ids


class BlipAnswerer(_YesNoAnswerer):
    """BLIP for visual question answering (arXiv 2201.12086). Encodes each image once."""

    name = "blip-vqa"
    model_class = BlipForQuestionAnswering

    @torch.inference_mode()
    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        pixels = pixels["pixel_values"].to(self.model.device, self.model.dtype)
        image_1ND = self.model.vision_model(pixel_values=pixels)[0]
        return [self._answer(image_1ND, question.text) for question in questions]

    def _answer(self, image_1ND: Tensor, question: str) -> str:
        # One at a time: the library's decoder attends to a batch's padding even with a mask, and
        # an answer must not depend on the other questions.
        ids_1L = self.processor.tokenizer(question, return_tensors="pt")["input_ids"]
        text_1LD = self.model.text_encoder(
            ids_1L.to(self.model.device), encoder_hidden_states=image_1ND, return_dict=False
        )[0]
        start = torch.full((1, 1), self.model.decoder_start_token_id, device=self.model.device)
        logits_V = self.model.text_decoder(start, encoder_hidden_states=text_1LD).logits[0, -1]
        return "yes" if self._says_yes(logits_V) else "no"


class ChatAnswerer(_YesNoAnswerer):
    """An image-text-to-text model with a chat template (Qwen-VL ...); one question at a time."""

    name = "vlm"
    model_class = AutoModelForImageTextToText
    request = "{} Answer with yes or no."

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.processor.chat_template is None:
            raise UserError(
                f"judge {self.name}: {self.source} has no chat template, so questions cannot be "
                "formatted for it: give an instruction-tuned model (-Instruct versions have one)"
            )

    def identity(self) -> dict:
        return super().identity() | {"request": self.request}

    @torch.inference_mode()
    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        return [self._answer(image.convert("RGB"), question.text) for question in questions]

    def _answer(self, image: Image.Image, question: str) -> str:
        content: Any = [
            {"type": "image", "image": image},
            {"type": "text", "text": self.request.format(question)},
        ]
        inputs: Any = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        logits_V = self.model(**inputs).logits[0, -1]
        return "yes" if self._says_yes(logits_V) else "no"
