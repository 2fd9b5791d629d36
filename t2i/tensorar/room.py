"""How many images are drawn at once: as many as the GPU has memory for, up to a usual number."""

import torch
from torch import nn

from t2i.models.base import Backbone
from t2i.models.tokenizers.conv_tokenizer import ConvTokenizer
from t2i.sampling import SamplingConfig
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import guidance_table

_PROMPT_TOKENS = 128
"""Assumed prefix length if it varies with the caption."""
_SHARE = 0.85
"""Share of a GPU's memory that is counted on; the rest is for libraries and temporary tensors."""
_WIDE_MAPS = (4, 6)
"""How many of the tokenizer's widest feature maps exist at once on a GPU and on a CPU (where
convolutions convert their input and output)."""
_CHANNELS = 128
"""Channels of these maps in published image tokenizers."""


def prompt_length(backbone: Backbone) -> int:
    """Number of prefix tokens, or an assumed number if it depends on the caption."""
    return min(backbone.spec.prefix_tokens, _PROMPT_TOKENS)


def cache_bytes(model: TensorAR, sampling: SamplingConfig, images: int) -> int:
    """Bytes of the cache of keys and values while this many images are drawn at once."""
    guided = guidance_table(model, sampling) is not None
    length = prompt_length(model.backbone) + model.windows.count - 1
    one = model.backbone.new_cache(1, 1)  # one entry more than its length
    entry = sum(t.nbytes for t in (*one.keys, *one.values)) // 2
    return images * (1 + guided) * (length + 1) * entry


def tokenizer_bytes(backbone: Backbone, images: int, *, gpu: bool) -> int:
    """Bytes of the feature maps while the image tokenizer encodes or decodes this many images, at
    most as many as one call takes.
    """
    own = backbone.frozen.tokenizer
    channels = own.config.channels if isinstance(own, ConvTokenizer) else _CHANNELS
    height, width = backbone.image_size
    one = 4 * channels * height * width
    return _WIDE_MAPS[not gpu] * one * min(images, backbone.images_at_once)


def gpu_bytes(device: torch.device) -> int | None:
    """The size of a GPU's memory, whatever is free at the moment; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def drawing_bytes(model: TensorAR, sampling: SamplingConfig, images: int) -> int:
    """Bytes on a GPU while this many images are drawn at once, without temporary tensors."""
    decoding = tokenizer_bytes(model.backbone, model.backbone.images_at_once, gpu=True)
    return _weight_bytes(model) + cache_bytes(model, sampling, images) + decoding


def images_that_fit(model: TensorAR, sampling: SamplingConfig, memory: int) -> int:
    """How many images (at least 1) can be drawn at once on a GPU with this many bytes."""
    room = _SHARE * memory - drawing_bytes(model, sampling, 0)
    return max(1, int(room / cache_bytes(model, sampling, 1)))


def _weight_bytes(model: TensorAR) -> int:
    """Bytes of a model with its image tokenizer and text encoder."""
    frozen = model.backbone.frozen
    parts = (model, frozen.tokenizer, getattr(frozen.text_encoder, "model", None))
    tensors = [
        t for p in parts if isinstance(p, nn.Module) for t in (*p.parameters(), *p.buffers())
    ]
    return sum(t.nbytes for t in tensors)
