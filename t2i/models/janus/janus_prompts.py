"""Janus-Pro's prompts: token ids of the chat string it was trained with, and the unconditional form
that guidance uses.

    <BOS><|User|>: a red fox\\n\\n<|Assistant|>:<begin_of_image>

(`janus/utils/conversation.py` and `generation_inference.py` of deepseek-ai/Janus). In the
unconditional form every token between the first and the last is padding that IS attended to. Three
common mistakes are avoided here: ids differ between 1B and 7B, so they are looked up by token;
transformers 5 may wrap tokenizer.json in a tokenizer class that drops spaces, so the `tokenizers`
library reads it directly; and BOS is added here exactly once, whether or not the file would add it.

Shapes: B prompts, P tokens of the longest.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from t2i.errors import UserError, naming
from t2i.fields import read_object
from t2i.files import text_sha256, write_json
from t2i.lfs import refuse_pointers
from t2i.models.conditions import check_captions, left_pad

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN_OF_IMAGE, END_OF_IMAGE = "<begin_of_image>", "<end_of_image>"
IMAGE = "<image_placeholder>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
MAX_TOKENS = 512
"""Longest prompt, in tokens."""
_SPACES = "two  spaces, and one"


class JanusPrompts:
    """Prompts to token ids. Not a module: it has no weights.

    Raises:
        UserError: the tokenizer lacks a special token of Janus, or drops spaces.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, bos: str = BOS, eos: str = EOS, max_tokens: int = MAX_TOKENS
    ):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.bos, self.eos = bos, eos
        self.folder: Path | None = None
        self.embeddings: int | None = None
        self.bos_id, self.pad_id, self.boi_id = map(self.token_id, (bos, PAD, BEGIN_OF_IMAGE))
        if tokenizer.decode(self._ids(_SPACES), skip_special_tokens=False) != _SPACES:
            raise UserError(
                "this tokenizer does not keep spaces (transformers 5 writes such files for Janus); "
                "use the file from the original repository"
            )

    @staticmethod
    def load(folder: str | Path) -> "JanusPrompts":
        """Read tokenizer.json and the BOS and EOS tokens from a published folder."""
        path = Path(folder) / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for a damaged file
            refuse_pointers(path)
            raise UserError(f"{path} cannot be read as a tokenizer: {error}") from error
        settings = path.with_name("tokenizer_config.json")
        stored = read_object(settings) if settings.is_file() else {}
        tokens = {k: stored.get(f"{k}_token") for k in ("bos", "eos")}
        named: dict = {
            k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items() if v
        }
        if not all(isinstance(token, str) for token in named.values()):
            raise UserError(f"{settings}: its BOS and EOS tokens are {tokens!r:.80}, not texts")
        with naming(path):
            prompts = JanusPrompts(tokenizer, **named)
        prompts.folder = Path(folder)
        return prompts

    def check_ids(self, embeddings: int) -> None:
        """UserError, here or for a later prompt, if a token's id is beyond this many embeddings.

        Only tokens in use are checked: a tokenizer may have others that no prompt produces.
        """
        self.embeddings = embeddings
        self._check_ids([self.bos_id, self.pad_id, self.boi_id])

    def _check_ids(self, ids: Sequence[int]) -> None:
        if self.embeddings is not None and max(ids) >= self.embeddings:
            raise UserError(
                f"tokenizer.json produces token {max(ids)}, but the model has {self.embeddings} "
                "embeddings: they belong to different models"
            )

    def save(self, folder: Path) -> None:
        """Write a tokenizer for transformers, which adds BOS (needed by transformers 5)."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        if tokenizer.encode("x").ids[:1] != [self.bos_id]:
            tokenizer.post_processor = TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, self.bos_id)]
            )
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": PAD,
            "image_token": IMAGE,
            "boi_token": BEGIN_OF_IMAGE,
            "eoi_token": END_OF_IMAGE,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", settings)

    def token_id(self, token: str) -> int:
        """Id of a special token; UserError if the tokenizer does not have it."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"the tokenizer has no token {token!r}; is it Janus-Pro's?")
        return token_id

    def to(self, device: torch.device | str) -> "JanusPrompts":
        """Does nothing: there are no weights."""
        return self

    def weights_hash(self) -> str:
        """SHA-256 of the tokenizer, the only thing here that an image depends on."""
        return text_sha256(self.tokenizer.to_str())

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, from BOS to begin-of-image.

        A prompt with more than `max_tokens` tokens loses the end of its text (see `notes`).
        """
        check_captions(prompts, "prompts")
        return [self._encode_one(prompt)[0] for prompt in prompts]

    def notes(self, prompts: Sequence[str]) -> list[list[str] | None]:
        """Fixed phrases for what each prompt loses in `encode`, or may hold by mistake."""
        check_captions(prompts, "prompts")
        cut, control = (
            [f"caption cut to {self.max_tokens} tokens"],
            ["caption holds control tokens"],
        )
        tokens = (USER, ASSISTANT, BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE, PAD, self.bos, self.eos)
        return [
            cut[: self._encode_one(prompt)[1]] + control[: any(t in prompt for t in tokens)]
            for prompt in prompts
        ]

    def _encode_one(self, prompt: str) -> tuple[list[int], bool]:
        """Token ids, and whether the prompt was cut."""
        ids = self._ids(chat(prompt))
        cut = len(ids) + 1 > self.max_tokens
        if cut:
            end = self._ids(chat("x").partition("x")[2])
            ids = ids[: self.max_tokens - 1 - len(end)] + end
        ids = [self.bos_id, *ids]
        assert ids[-1] == self.boi_id, "the tokenizer does not end in begin-of-image"
        self._check_ids(ids)
        return ids, cut

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def batch(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Prompts padded on the left: ids int64 [B, P] and mask bool [B, P], True for a prompt's
        own tokens.

        Args:
            length: number of tokens to pad to; None: that of the longest prompt.
        """
        encoded = [torch.tensor(ids) for ids in self.encode(prompts)]
        length = max(map(len, encoded)) if length is None else length
        return left_pad(encoded, length, self.pad_id)

    def unconditional(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids of the unconditional form: padding between first and last token; same mask."""
        inner = mask.clone()
        inner[:, -1] = False
        inner[:, 1:] &= mask[:, :-1]  # not the first token: what precedes it is padding
        inner[:, 0] = False
        return ids.masked_fill(inner, self.pad_id)


def chat(prompt: str) -> str:
    """The chat string of a prompt, without BOS; empty prompts as in the original code."""
    text = prompt.strip()
    message = f": {text}\n\n" if text else ":"
    return f"{USER}{message}{ASSISTANT}:{BEGIN_OF_IMAGE}"
