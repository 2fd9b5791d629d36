"""Other judges, through `transformers`: they answer "yes" or "no", whichever is likelier as the first token.

Their scores are not DPG-Bench's: a judge moves a score by points and can change a ranking. A number
from here is for comparing a model with itself, and always carries the judge's name.

Comparing two probabilities instead of reading generated text keeps "Yes." and "Yes, there is" from
counting as no. Shapes: Q questions, L text tokens, N image tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

_FORMS = ("{}", "{} ", " {}")  # how a tokenizer may hold a word: alone, or with its space


class _YesNoJudge:
    """What the two share: loading, the name, and the comparison of two words."""

    name: str

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, source: str):
        self.model, self.processor, self.source = model.eval(), processor, source
        self.yes, self.no = (_first_tokens(processor.tokenizer, word) for word in ("yes", "no"))
        if not self.yes or not self.no or self.yes & self.no:
            raise ValueError(
                f"judge {self.name}: the tokenizer of {source} has no tokens of their own for yes and no"
            )

    def identity(self) -> dict:
        return {
            "judge": self.name,
            "weights": self.source,
            "model": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def _says_yes(self, logits_V: Tensor) -> bool:
        log_probs = logits_V.float().log_softmax(dim=-1)
        yes, no = (log_probs[sorted(ids)].logsumexp(dim=0) for ids in (self.yes, self.no))
        return bool(yes > no)


def _first_tokens(tokenizer, word: str) -> set[int]:
    """Ids that are the whole word, in any case and with its space or without."""
    ids = set()
    for spelled in (word, word.capitalize(), word.upper()):
        for form in _FORMS:
            encoded = tokenizer.encode(form.format(spelled), add_special_tokens=False)
            if len(encoded) == 1 and encoded[0] != tokenizer.unk_token_id:
                ids.add(encoded[0])
    return ids


def _load(auto_class, folder: Path, name: str, device: torch.device | str):
    try:
        model, report = auto_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"judge {name}: {folder} cannot be loaded: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        keys = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"judge {name}: {folder} lacks {', '.join(keys[:10])}")
    return model.to(device), processor


class BlipJudge(_YesNoJudge):
    """BLIP for visual question answering (arXiv 2201.12086); an image is encoded once."""

    name = "blip-vqa"

    @classmethod
    def load(cls, folder: Path, source: str, device: torch.device | str) -> BlipJudge:
        return cls(*_load(BlipForQuestionAnswering, folder, cls.name, device), source)

    @torch.inference_mode()
    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        model, device = self.model, self.model.device
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        pixels = pixels["pixel_values"].to(device, model.dtype)
        image_1ND = model.vision_model(pixel_values=pixels)[0]
        asked = self.processor.tokenizer(
            [question.text for question in questions], padding=True, return_tensors="pt"
        ).to(device)
        text_QLD = model.text_encoder(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            encoder_hidden_states=image_1ND.expand(len(questions), -1, -1),
            encoder_attention_mask=None,
            return_dict=False,
        )[0]
        start = torch.full((len(questions), 1), model.decoder_start_token_id, device=device)
        logits_QV = model.text_decoder(
            input_ids=start,
            encoder_hidden_states=text_QLD,
            # `generate` of the library attends to padding here; a question must not depend on others.
            encoder_attention_mask=asked["attention_mask"],
        ).logits[:, -1]
        return ["yes" if self._says_yes(logits_V) else "no" for logits_V in logits_QV]


class ChatJudge(_YesNoJudge):
    """An image-text-to-text model with a chat template (Qwen-VL and its like), one question at a time."""

    name = "vlm"
    request = "{} Answer with yes or no."

    @classmethod
    def load(cls, folder: Path, source: str, device: torch.device | str) -> ChatJudge:
        return cls(*_load(AutoModelForImageTextToText, folder, cls.name, device), source)

    def identity(self) -> dict:
        return super().identity() | {"request": self.request}

    @torch.inference_mode()
    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        return [self._answer(image.convert("RGB"), question.text) for question in questions]

    def _answer(self, image: Image.Image, question: str) -> str:
        content = [
            {"type": "image", "image": image},
            {"type": "text", "text": self.request.format(question)},
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        logits_V = self.model(**inputs).logits[0, -1]
        return "yes" if self._says_yes(logits_V) else "no"
