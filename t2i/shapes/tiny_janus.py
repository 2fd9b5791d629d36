"""A tiny Janus with random weights in the published layout: the start of the offline shapes base,
and what tests load.

Its tokenizer is byte-level BPE with DeepSeek's special tokens, as the real one, so that everything
in front of the model is exercised for real. The understanding tower is there, as small as can be,
so that the folder is a complete Janus for transformers.
"""

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from t2i.models.janus import janus_prompts as special
from t2i.models.janus.janus_config import JanusShape, vq_settings
from t2i.models.janus.janus_model import Janus
from t2i.models.janus.janus_prompts import JanusPrompts, chat
from t2i.models.tokenizers.vq import VQTokenizer


def build_tokenizer(prompts: Iterable[str], *, vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE whose merges come from these prompts; any other text is spelt in bytes. A
    function of the arguments alone.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = (special.BOS, special.EOS, special.PAD, special.BEGIN_OF_IMAGE, special.END_OF_IMAGE)
    marks = (*marks, special.IMAGE, special.USER, special.ASSISTANT)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (chat(p).replace(special.USER, "").partition(special.ASSISTANT)[0] for p in prompts)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    return tokenizer


def build_tiny_janus(
    prompts: Iterable[str],
    tokenizer: VQTokenizer,
    *,
    side: int,
    dim: int = 192,
    layers: int = 6,
    heads: int = 6,
    ffn_dim: int = 416,
    vocab_size: int = 512,
    seed: int = 0,
) -> Janus:
    """A random Janus that draws `side` x `side` codes of this image tokenizer; its words are those
    of the prompts.
    """
    words = build_tokenizer(prompts, vocab_size=vocab_size)
    config = {
        "text_config": {
            "vocab_size": words.get_vocab_size(),
            "hidden_size": dim,
            "intermediate_size": ffn_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 1024,
        },
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": side * tokenizer.downsample,
            "patch_size": tokenizer.downsample,
            "mlp_ratio": 2.0,
            "projection_dim": dim,
            "num_image_tokens": side * side,
        },
        "vq_config": {
            **vq_settings(tokenizer.config),
            "projection_dim": dim,
            "image_token_embed_dim": dim,
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
    """N(0, 0.02) for matrices, as Llama's authors do; codes start as what the image tokenizer takes
    them for.
    """
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
