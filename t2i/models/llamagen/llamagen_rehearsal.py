"""LlamaGen with random weights in its authors' layout, for a rehearsal: text-to-image, and
class-conditional ("c2i-B").

Weights and image tokenizer are one fp32 pickle each, under "model". The caption encoder is the
encoder half of google/flan-t5-xl, in bf16 shards, with a tokenizer of the published size. Sizes
without a published text-to-image model get a config.json with their shape.
"""

from dataclasses import asdict
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

from t2i.files import write_json
from t2i.models.llamagen import llamagen_model
from t2i.models.llamagen.llamagen_model import GRIDS, LlamaGen, LlamaGenConfig
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer
from t2i.rehearsal.layout import Written
from t2i.rehearsal.random_weights import RandomWeights, shapes_of

_TINY: dict = {"n_layer": 2, "n_head": 2, "dim": 64, "caption_dim": 32, "vocab_size": 64}
_OF_CLASSES = "c2i-"
SIZES: dict[str, dict] = {
    **llamagen_model.SIZES,
    **{_OF_CLASSES + size: llamagen_model.SIZES[size] for size in ("B", "L", "XL", "XXL", "3B")},
    "tiny": _TINY,
}
_FLAN_T5_XL: dict = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_heads": 32,
    "num_layers": 24,
    "vocab_size": 32128,
}
_TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 1}
_TINY_VQ = VQConfig(32, (1, 1, 1, 1, 1), 1, 32, codebook_size=64)
_SENTINELS, _SHARD = 100, 10**9


def write(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write all files of a size; return them with the recipe that trains them."""
    if size.startswith(_OF_CLASSES):
        return _write_classes(folder, size.removeprefix(_OF_CLASSES), weights)
    tiny, stem = size == "tiny", f"t2i_{size}_stage1_256"
    config = LlamaGenConfig(**SIZES[size], cond="text", grid=(4, 4) if tiny else (16, 16))
    with torch.device("meta"):
        gpt, vq = LlamaGen(config), VQTokenizer(_TINY_VQ if tiny else VQConfig())
    files = {"weights": f"{stem}.pt", "tokenizer": "vq_ds16_t2i.pt", "text_encoder": "flan-t5-xl"}
    shapes = shapes_of(gpt.official_state_dict())
    weights.pickle(folder / files["weights"], shapes, nest="model")
    weights.pickle(folder / files["tokenizer"], shapes_of(vq.state_dict()), nest="model")
    _write_t5(folder / files["text_encoder"], weights, _TINY_T5 if tiny else {})
    base = {name: str(folder / file) for name, file in files.items()}
    if stem not in GRIDS:
        shape = {"family": "llamagen", **files, "config": asdict(config)}
        write_json(folder / "config.json", shape)
        base["weights"] = str(folder)
    side = config.grid[0] * 16
    return Written(side, base, "train-llamagen", "t2i-xl-256-lora")


def _write_classes(folder: Path, size: str, weights: RandomWeights) -> Written:
    """Write a class-conditional model, at the lowest resolution that has a recipe."""
    pixels = 384 if size in ("XL", "XXL", "3B") else 256
    config = LlamaGenConfig(**SIZES[size], grid=(pixels // 16, pixels // 16))
    with torch.device("meta"):
        gpt, vq = LlamaGen(config), VQTokenizer(VQConfig())
    files = {"weights": f"c2i_{size}_{pixels}.pt", "tokenizer": "vq_ds16_c2i.pt"}
    weights.pickle(folder / files["weights"], shapes_of(gpt.official_state_dict()), nest="model")
    weights.pickle(folder / files["tokenizer"], shapes_of(vq.state_dict()), nest="model")
    base = {name: str(folder / file) for name, file in files.items()}
    recipe = f"llamagen-{size.lower()}-{pixels}"
    return Written(pixels, base, "train-imagenet", recipe, config.num_classes)


def _write_t5(folder: Path, weights: RandomWeights, changes: dict) -> None:
    own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = T5Config(**{**_FLAN_T5_XL, **changes, **own})
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
    shapes = dict(shapes_of(encoder.state_dict()))
    shapes.pop("encoder.embed_tokens.weight", None)  # stored as shared.weight
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    weights.sharded(folder, shapes, torch.bfloat16, most=_SHARD)
    sentencepiece(config.vocab_size).save(str(folder / "tokenizer.json"))
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", **tokens})


def sentencepiece(vocab_size: int) -> Tokenizer:
    """A tokenizer like T5's (ids, special tokens, spaces, end token), with made-up pieces."""
    special = ("<pad>", "</s>", "<unk>")
    letters = (chr(code) for code in range(33, 127))
    words = ("".join(w) for n in count(1) for w in product(ascii_lowercase, repeat=n))
    made_up = ("\u2581" + word for word in words)
    pieces = [*special, "\u2581", *letters]
    pieces += islice(made_up, vocab_size - vocab_size % 100 - _SENTINELS - len(pieces))
    scores = [(piece, -float(place)) for place, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    sentinels = [f"<extra_id_{n}>" for n in reversed(range(_SENTINELS))]
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (*special, *sentinels)]
    tokenizer.add_special_tokens(marks)
    end = ("</s>", 1)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end]
    )
    return tokenizer
