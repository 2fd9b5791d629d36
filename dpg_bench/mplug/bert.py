"""mPLUG's BERT layers: the text encoder, and the fusion encoder that combines text and image.

Reference: `models/multi_modal/mplug/modeling_mplug.py` of modelscope at 2905da1. Module names are
those of the published checkpoint. In the fusion encoder, layer k > 0 with k % stride == 0 is a
*connected* layer: it attends within [image; text] and adds its image part to the image stream. The
other layers let the text attend to the image, and leave the image unchanged.

All questions about one image share its features until the first connected layer. The image's batch
size is therefore 1 or Q, and as long as it is 1, its keys and values are computed only once.

Shapes: Q questions, L text tokens, N image tokens, T own and S attended tokens, D width, H heads,
d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError

KeysValues = tuple[Tensor, Tensor]  # each [batch, H, S, d]


@dataclass(frozen=True)
class BertConfig:
    """The parts of config_bert.json that matter; defaults are those of mPLUG-large."""

    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    num_hidden_layers: int = 12
    text_encoder_layers: int = 6
    fusion_layers: int = 6
    text_decode_layers: int = 12
    stride_layer: int = 100  # the reference's default if the file has none: no connected layer

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def fusion_depth(self) -> int:
        """Number of fusion layers used: the last ones of the file."""
        return min(self.fusion_layers, self.num_hidden_layers)

    def is_connected(self, fusion_layer: int) -> bool:
        """Whether this fusion layer, counted from the first one used, is connected."""
        return fusion_layer > 0 and fusion_layer % self.stride_layer == 0


class Embeddings(nn.Module):
    """Word, position and type (always 0) embeddings, summed and normalized."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, first_position: int = 0) -> Tensor:
        """ids [batch, T], at positions from first_position on, to [batch, T, D]."""
        here = slice(first_position, first_position + ids.shape[1])
        fixed = self.position_embeddings.weight[here] + self.token_type_embeddings.weight[0]
        return self.LayerNorm(self.word_embeddings(ids) + fixed)


class Output(nn.Module):
    """A projection back to the residual stream, normalized after the sum."""

    def __init__(self, inputs: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    """Attention to the keys and values of any sequence, made by `keys_values`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.self = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        )
        self.output = Output(width, config)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys and values of x [batch, S, D]."""
        return self._split(self.self["key"](x)), self._split(self.self["value"](x))

    def forward(self, x: Tensor, attended: KeysValues, mask: Tensor | None = None) -> Tensor:
        """x [batch, T, D] to the same shape.

        attended: keys and values with the same batch size, or one that divides it: consecutive
            rows of x then share a row, as the beams of a question and questions of an image do.
        mask: bool [attended batch, 1, 1, S], False on padding.
        """
        keys, values = attended
        query = self._split(self.self["query"](x.reshape(len(keys), -1, x.shape[-1])))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).reshape(x.shape), x)


class Layer(nn.Module):
    """A post-norm BERT layer, with or without attention to a second sequence."""

    def __init__(self, config: BertConfig, *, cross: bool):
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config) if cross else None
        self.intermediate = nn.ModuleDict(
            {"dense": nn.Linear(config.hidden_size, config.intermediate_size)}
        )
        self.output = Output(config.intermediate_size, config)

    def forward(
        self,
        x: Tensor,
        own: KeysValues,
        own_mask: Tensor | None = None,
        other: KeysValues | None = None,
        other_mask: Tensor | None = None,
    ) -> Tensor:
        """own: keys and values of the sequence itself; other: those of the second sequence."""
        x = self.attention(x, own, own_mask)
        if self.crossattention is not None:
            assert other is not None
            x = self.crossattention(x, other, other_mask)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)

    def encode(self, x: Tensor, mask: Tensor | None, other: KeysValues | None = None) -> Tensor:
        """Apply the layer to a whole sequence, with bidirectional self-attention."""
        return self(x, self.attention.keys_values(x), mask, other)


class Layers(nn.Module):
    """Layers under their published name."""

    def __init__(self, layers: Iterable[Layer]):
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[Layer]:
        return cast(Iterator[Layer], iter(self.layer))  # PyTorch types items as Module


class Bert(nn.Module):
    """Embeddings and `count` layers."""

    def __init__(self, config: BertConfig, count: int, *, cross: bool):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(Layer(config, cross=cross) for _ in range(count))


class QuestionEncoder(Bert):
    """Question ids [Q, L] and their mask (bool [Q, L]) to features [Q, L, D]."""

    def __init__(self, config: BertConfig):
        super().__init__(config, config.text_encoder_layers, cross=False)

    def forward(self, ids_QL: Tensor, mask_QL: Tensor) -> Tensor:
        text_QLD = self.embeddings(ids_QL)
        for layer in self.encoder:
            text_QLD = layer.encode(text_QLD, mask_QL[:, None, None])
        return text_QLD


class FusionEncoder(nn.Module):
    """Lets questions attend to the image and, in connected layers, the image to the questions."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.encoder = Layers(
            Layer(config, cross=not config.is_connected(k)) for k in range(config.fusion_depth)
        )

    def forward(self, text_QLD: Tensor, mask_QL: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """image: [1 or Q, N, D]. Returns image (batch size Q after a connected layer) and text."""
        image_tokens = image.shape[1]
        text_mask = mask_QL[:, None, None]
        joint_mask = F.pad(text_mask, (image_tokens, 0), value=True)
        for layer in self.encoder:
            if layer.crossattention is not None:
                seen = layer.crossattention.keys_values(image)
                text_QLD = layer.encode(text_QLD, text_mask, seen)
            else:
                image = image.expand(len(text_QLD), -1, -1)
                joint = layer.encode(torch.cat([image, text_QLD], dim=1), joint_mask)
                image = image + joint[:, :image_tokens]
                text_QLD = joint[:, image_tokens:]
        return image, text_QLD
