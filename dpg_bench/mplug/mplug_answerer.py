"""mPLUG as an answerer: images and questions to answers, with the reference's preprocessing.

Reference: `preprocessors/multi_modal.py` (MPlugPreprocessor) of modelscope at 2905da1. The image is
squashed to a square; the question is lower-cased and cut or padded to 25 tokens.
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
# The spaces that BERT's tokenizer in transformers 4 removes from the whole answer, in this order.
_TOGETHER = {
    **{f" {mark}": mark for mark in ".?!,"},
    " ' ": "'",
    **{f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")},
}


class MPlugAnswerer:
    """An `Answerer` that encodes each image once and answers its questions in batches.

    batch: questions per batch. It does not affect answers, and scores only by rounding.
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
        """Load a published folder (see `dpg_bench.mplug.mplug_model`).

        source: the weights' name in results (default: the folder's name).

        Raises:
            UserError: the folder is incomplete, or its files do not belong together.
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
        """Name, hashes of the files, and settings that affect answers."""
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
        """The answer to each question, in order, as the model writes it ("yes", "2")."""
        found = self.search(image, [question.text for question in questions])
        return [write_out(self.tokenizer, best[0].ids) for best in found]

    @torch.inference_mode()
    def search(self, image: Image.Image, texts: Sequence[str]) -> list[list[Hypothesis]]:
        """The hypotheses that beam search found for each question, best first."""
        image_1ND, found = self.encode(image), []
        for start in range(0, len(texts), self.batch):
            ids_QL, mask_QL = tokenize(self.tokenizer, texts[start : start + self.batch])
            found += self.model.answer(image_1ND, ids_QL.to(self.device), mask_QL.to(self.device))
        return found

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> Tensor:
        """The image's features [1, N, D], usable for any number of questions."""
        pixels = preprocess(image, self.model.config.image_res)
        return self.model.encode_images(pixels[None].to(self.device))


def preprocess(image: Image.Image, side: int) -> Tensor:
    """CLIP's normalized pixels, float32 [3, side, side], of an image of any shape and mode."""
    squash = open_clip.image_transform(side, is_train=False, resize_mode="squash")
    return squash(image.convert("RGB"))


def load_tokenizer(vocabulary: Path) -> BertWordPieceTokenizer:
    """BERT's uncased tokenizer, which pads and cuts to 25 tokens.

    Raises:
        UserError: the file does not exist, or lacks a special token.
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
    """An answer as text, with the spacing of the reference's tokenizer.

    (The tokenizers library removes spaces word by word, which misses those around an apostrophe.)
    """
    special = {tokenizer.token_to_id(word) for word in (*_NEEDED, "[MASK]")}
    # As in the reference, an id beyond the vocabulary is written as [UNK].
    words = [tokenizer.id_to_token(number) or "[UNK]" for number in ids if number not in special]
    text = " ".join(words).replace(" ##", "").strip()
    for apart, together in _TOGETHER.items():
        text = text.replace(apart, together)
    return text
