"""mPLUG as an answerer: images and questions in, answers out, with the reference's preprocessing.

Reference: `preprocessors/multi_modal.py` (MPlugPreprocessor) of modelscope at 2905da1: the image is
squashed to a square, the question is lower-cased and cut to 25 tokens, however long it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import open_clip
import torch
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from dpg_bench.mplug.decoder import Hypothesis
from dpg_bench.mplug.mplug_model import CONFIG, VOCABULARY, WEIGHTS, MPlug
from dpg_bench.questions import Question
from t2i.errors import UserError
from t2i.published import hashes_by_name

QUESTION_TOKENS = 25
_NEEDED = ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
# What BERT's tokenizer in transformers 4 puts together, over the whole answer and in this order.
_TOGETHER = {
    **{f" {mark}": mark for mark in ".?!,"},
    " ' ": "'",
    **{f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")},
}


class MPlugAnswerer:
    """See `dpg_bench.answerers.Answerer`. An image is encoded once; its questions are answered in
    batches.

    batch: questions answered at once. The answers do not depend on it (the scores do by rounding).
    """

    name = "mplug"

    def __init__(
        self,
        model: MPlug,
        tokenizer: BertWordPieceTokenizer,
        *,
        folder: Path | None = None,
        source: str = "random",
        batch: int = 16,
    ):
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.source, self.batch = source, batch

    @classmethod
    def load(
        cls, folder: str | Path, source: str = "", device: torch.device | str = "cpu"
    ) -> MPlugAnswerer:
        """The answerer of a published folder (see `dpg_bench.mplug.mplug_model`).

        source: what the weights are called in results (default: the folder's name).

        Raises:
            UserError: the folder is incomplete, or its files do not fit together.
        """
        folder = Path(folder)
        tokenizer = load_tokenizer(folder / VOCABULARY)
        model = MPlug.load(folder)
        if tokenizer.get_vocab_size() > model.config.bert.vocab_size:
            raise UserError(
                f"{folder / VOCABULARY} has {tokenizer.get_vocab_size()} words, the model only "
                f"{model.config.bert.vocab_size}: the files belong to different models"
            )
        return cls(model.to(device), tokenizer, folder=folder, source=source or folder.name)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def identity(self) -> dict:
        """Name, hash of the weights, and what of the settings an answer depends on."""
        return {
            "judge": self.name,
            "weights": self.source,
            "sha256": self._hashes,
            "image_res": self.model.config.image_res,
            "question_tokens": QUESTION_TOKENS,
        }

    @cached_property
    def _hashes(self) -> dict[str, str] | None:
        if self.folder is None:
            return None
        names = (WEIGHTS, CONFIG, self.model.config.bert_config, VOCABULARY)
        return hashes_by_name(self.folder / name for name in names)

    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        """The answer to each question, in their order, as the model writes it ("yes", "2")."""
        found = self.search(image, [question.text for question in questions])
        return [write_out(self.tokenizer, best[0].ids) for best in found]

    @torch.inference_mode()
    def search(self, image: Image.Image, texts: Sequence[str]) -> list[list[Hypothesis]]:
        """What the beam search ended with for each question, best first."""
        image_1ND, found = self.encode(image), []
        for start in range(0, len(texts), self.batch):
            ids_QL, mask_QL = tokenize(self.tokenizer, texts[start : start + self.batch])
            found += self.model.answer(image_1ND, ids_QL.to(self.device), mask_QL.to(self.device))
        return found

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> Tensor:
        """The image's features [1, N, D], good for any number of questions."""
        pixels = preprocess(image, self.model.config.image_res)
        return self.model.encode_images(pixels[None].to(self.device))


def preprocess(image: Image.Image, side: int) -> Tensor:
    """CLIP's normalised pixels, float32 [3, side, side], of an image of any shape and mode."""
    squash = open_clip.image_transform(side, is_train=False, resize_mode="squash")
    return squash(image.convert("RGB"))


def load_tokenizer(vocabulary: Path) -> BertWordPieceTokenizer:
    """BERT's uncased tokenizer, padding and cutting to 25 tokens.

    Raises:
        UserError: there is no such file, or it lacks a special token.
    """
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary} does not exist; it belongs to the judge's folder")
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    for token in _NEEDED:
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{vocabulary} has no {token}: it is not a BERT vocabulary")
    tokenizer.enable_truncation(QUESTION_TOKENS)
    tokenizer.enable_padding(length=QUESTION_TOKENS, pad_id=tokenizer.token_to_id("[PAD]"))
    return tokenizer


def tokenize(tokenizer: BertWordPieceTokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids (int64 [Q, 25]) and mask (bool [Q, 25], False on padding) of questions."""
    encoded = tokenizer.encode_batch([text.lower() for text in texts])
    ids_QL = torch.tensor([one.ids for one in encoded])
    return ids_QL, torch.tensor([one.attention_mask for one in encoded]).bool()


def write_out(tokenizer: BertWordPieceTokenizer, ids: Sequence[int]) -> str:
    """An answer as text, spaced as the reference's tokenizer does it.

    (The tokenizers library closes gaps word by word, and so leaves those around an apostrophe.)
    """
    unwritten = {tokenizer.token_to_id(word) for word in (*_NEEDED, "[MASK]")}
    written = [number for number in ids if number not in unwritten]
    # A number beyond the vocabulary is written, as there.
    words = [tokenizer.id_to_token(number) or "[UNK]" for number in written]
    text = " ".join(words).replace(" ##", "").strip()
    for apart, together in _TOGETHER.items():
        text = text.replace(apart, together)
    return text
