"""A tiny Janus with random weights in the published layout, from which the offline base is trained.

Its tokenizer is byte-level BPE with DeepSeek's special tokens, like the real one, so that all code
before the model runs as with the real one. It has a minimal understanding tower, so that the folder
is a complete Janus for transformers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from t2i.models.janus import janus_prompts as special
from t2i.models.janus.janus_config import JanusShape, vq_settings
from t2i.models.janus.janus_model import Janus
from t2i.models.janus.janus_prompts import JanusPrompts, chat
from t2i.models.tokenizers.vq import VQConfig, VQTokenizer


def build_tokenizer(prompts: Iterable[str], *, vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE with merges learned from the prompts; a function of its arguments only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = [special.BOS, special.EOS, special.PAD, special.BEGIN_OF_IMAGE, special.END_OF_IMAGE]
    marks += [special.IMAGE, special.USER, special.ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (chat(p).replace(special.USER, "").partition(special.ASSISTANT)[0] for p in prompts)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    return tokenizer


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a tiny language model."""

    dim: int = 192
    layers: int = 6
    heads: int = 6
    ffn_dim: int = 416
    vocab_size: int = 512


def build_tiny_janus(
    prompts: Iterable[str], tokenizer: VQTokenizer, *, side: int, seed: int = 0, **shape: int
) -> Janus:
    """A Janus with random weights that draws `side` x `side` codes of this image tokenizer.

    Args:
        prompts: texts that its word tokenizer is trained on.
        shape: fields of `LanguageShape` that differ from the defaults.
    """
    sizes = LanguageShape(**shape)
    assert isinstance(tokenizer.config, VQConfig)
    words = build_tokenizer(prompts, vocab_size=sizes.vocab_size)
    config = {
        "text_config": {
            "vocab_size": words.get_vocab_size(),
            "hidden_size": sizes.dim,
            "intermediate_size": sizes.ffn_dim,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.heads,
            "max_position_embeddings": 1024,
        },
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": side * tokenizer.downsample,
            "patch_size": tokenizer.downsample,
            "mlp_ratio": 2.0,
            "projection_dim": sizes.dim,
            "num_image_tokens": side * side,
        },
        "vq_config": {
            **vq_settings(tokenizer.config),
            "projection_dim": sizes.dim,
            "image_token_embed_dim": sizes.dim,
        },
        "image_token_id": words.token_to_id(special.IMAGE),
        "tie_word_embeddings": False,
    }
    backbone = Janus(JanusShape(config, (side, side)))
    backbone.to_empty(device="cpu")
    initialize(backbone, tokenizer, torch.Generator().manual_seed(seed))
    backbone.frozen.tokenizer = tokenizer
    backbone.frozen.text_encoder = JanusPrompts(words)
    return backbone.eval()


@torch.no_grad()
def initialize(backbone: Janus, tokenizer: VQTokenizer, generator: torch.Generator) -> None:
    """N(0, 0.02) for matrices, as in Llama; code embeddings start as the image tokenizer's."""
    for name, parameter in backbone.janus.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)
    model = backbone.janus.model
    model.generation_embeddings.weight.copy_(tokenizer.quantize.vectors())
    first = model.generation_aligner.fc1.weight
    nn.init.normal_(first, std=first.shape[1] ** -0.5, generator=generator)
