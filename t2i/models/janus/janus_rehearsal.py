"""Janus-Pro with random weights, for a rehearsal: the hub's folder in transformers' layout, in
bf16, with a tokenizer of the published size.

The tokenizer is byte-level BPE with the published one's ids, as far as they are known: 100,000
tokens; then BOS, EOS, padding and begin-of-image; end-of-image and the placeholder at the end.
"""

from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from t2i.files import write_json
from t2i.models.janus import janus_config
from t2i.models.janus import janus_prompts as special
from t2i.models.janus import janus_weights as names
from t2i.models.janus.janus_config import JanusShape, published_shape
from t2i.models.janus.janus_model import Janus
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.rehearsal.layout import Written
from t2i.rehearsal.random_weights import RandomWeights, shapes_of

SIZES = janus_config.SIZES
_SPECIAL_IDS = {
    "1B": {special.PAD: 100002, special.BEGIN_OF_IMAGE: 100003, special.END_OF_IMAGE: 100580},
    "7B": {special.PAD: 100015, special.BEGIN_OF_IMAGE: 100016, special.END_OF_IMAGE: 100593},
}
_MERGED = 100_000
_LIBRARY = (
    "import torch; from transformers import JanusForConditionalGeneration as J; "
    "m = J.from_pretrained(FOLDER, dtype=torch.bfloat16); "
    "ids = torch.tensor([[100000, 5, 6]]); print(m(input_ids=ids).logits.isfinite().all())"
)


def write(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write the folder of a size; return it with the recipe that trains it."""
    shape = published_shape(size)
    with torch.device("meta"):
        model, vq = Janus(shape).janus, VQTokenizer(VQConfig())
    shapes = shapes_of(model.state_dict() | names.vq_to_transformers(vq.state_dict()))
    weights.sharded(folder, shapes, torch.bfloat16)
    tokenizer = byte_level(_SPECIAL_IDS[size])
    tokenizer.save(str(folder / "tokenizer.json"))
    image = tokenizer.token_to_id(special.IMAGE)
    config = replace(shape, transformers=shape.transformers | {"image_token_id": image})
    write_json(folder / "config.json", _published_config(config))
    tokens = {"bos_token": special.BOS, "eos_token": special.EOS, "pad_token": special.PAD}
    settings = {"tokenizer_class": "LlamaTokenizerFast", **tokens}
    write_json(folder / "tokenizer_config.json", settings)
    base = {"weights": str(folder)}
    recipe = f"janus-pro-{size.lower()}-lora"
    return Written(shape.vision["image_size"], base, "train-janus", recipe, library=_LIBRARY)


def _published_config(shape: JanusShape) -> dict:
    kind = {"model_type": "janus", "architectures": ["JanusForConditionalGeneration"]}
    return shape.transformers | kind | {"dtype": "bfloat16"}


def byte_level(special_ids: dict[str, int]) -> Tokenizer:
    """A tokenizer with 100,000 made-up byte merges, and special tokens at these ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(letters, letters))
    triples = ((a + b, c) for a, b in pairs for c in letters)
    more = islice(triples, _MERGED - len(letters) - len(pairs))
    merges: list[tuple[str, str]] = [*pairs, *more]
    vocabulary = {token: place for place, token in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    by_id = {place: token for token, place in special_ids.items()}
    by_id |= {_MERGED: special.BOS, _MERGED + 1: special.EOS}
    last = max(by_id)
    marks = [by_id.get(place, f"<|place_{place}|>") for place in range(_MERGED, last + 1)]
    marks += [special.IMAGE, special.USER, special.ASSISTANT]
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    return tokenizer
