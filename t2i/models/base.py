"""What TensorAR needs of an autoregressive image generator: `head(trunk(embed(token) + position,
condition))`.

A backbone predicts codes in raster order with a causal transformer. The method (`t2i.tensorar`)
talks to this interface only, so a new family is one file here. Positions and cache indices are
separate things: position P + p belongs to image token p (with stride s, window i sits at position P
+ i*s), the cache index counts the inputs seen so far.

Shapes: B batch, L inputs, P prefix length, D model width, T image tokens, S sub-tokens of a code, V
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.labels import class_ids
from t2i.sampling import SamplingConfig
from t2i.weights import naming


@dataclass(frozen=True)
class BackboneSpec:
    """The facts about a backbone that the rest of the kit may ask for."""

    family: str
    dim: int
    """Width D of the trunk."""
    num_heads: int
    """Attention heads of the trunk; the codec uses the same number."""
    grid: tuple[int, int]
    """Height and width of the image in codes."""
    subvocabs: tuple[int, ...]
    """Vocabulary of each sub-token of a code."""
    cond_kind: Literal["class", "text"]
    prefix_tokens: int
    """Length P of the condition prefix (the longest one where it varies)."""
    num_classes: int = 0
    """Classes of a class-conditional backbone."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the base model was sampled by its authors."""
    sign_codebook: bool = False
    """Codes are sign patterns, a sub-token's bits one latent channel each: noise between neighbours
    draws bits anew.
    """

    @property
    def num_tokens(self) -> int:
        """Codes per image, T."""
        return self.grid[0] * self.grid[1]


@dataclass
class Condition:
    """An encoded condition: what precedes the image in the trunk's input."""

    prefix: Tensor
    """Embeddings [B, P, D]; the output at the last one predicts the first image token."""
    mask: Tensor | None = None
    """Which prefix entries may be attended to, bool [B, P]; None means all."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Whatever else a family's trunk needs, batch first."""

    def rows(self, index: Tensor) -> "Condition":
        """The conditions of some samples."""
        return Condition(
            self.prefix[index],
            None if self.mask is None else self.mask[index],
            {k: v[index] for k, v in self.extras.items()},
        )

    @staticmethod
    def cat(parts: Sequence["Condition"]) -> "Condition":
        """Stack along the batch."""
        first = parts[0]
        return Condition(
            torch.cat([p.prefix for p in parts]),
            None if first.mask is None else torch.cat([p.mask for p in parts]),
            {k: torch.cat([p.extras[k] for p in parts]) for k in first.extras},
        )


class KVCache:
    """Preallocated keys and values of every layer, [B, H, length, K] each.

    `at` says which entries the next trunk call writes, and how many leading ones attention reads:
    a bucket, so that few shapes occur; a mask made from `index` hides what is not filled yet.
    Buffers are a layer's own: a compiler copies one buffer whole to write into a view of it.
    """

    BUCKET = 64
    """Entries read are a multiple of this."""

    def __init__(
        self, layers: int, batch: int, heads: int, length: int, head_dim: int, *, dtype, device
    ):
        shape = (batch, heads, length, head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            for _ in range(2)
        )
        self.length = length
        self.index = torch.empty(0, dtype=torch.long, device=device)
        self.extent = 0

    def at(self, index_L: Tensor, extent: int) -> "KVCache":
        """Write entries `index_L`, all below `extent`, and read the first `extent`."""
        self.index, self.extent = index_L, extent
        return self

    def bucket(self, filled: int) -> int:
        """How many leading entries are read when so many are filled."""
        assert 0 < filled <= self.length, (filled, self.length)
        return min(-(-filled // self.BUCKET) * self.BUCKET, self.length)

    def update(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries and return those that are read."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.index, k_BHLK.to(keys.dtype))
        values.index_copy_(2, self.index, v_BHLK.to(values.dtype))
        return keys[:, :, : self.extent], values[:, :, : self.extent]


class Tokenizer(Protocol):
    """Images <-> codes; see `t2i.tokenizers`."""

    downsample: int
    codebook_size: int

    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CaptionFeatures:
    """What a data set's cache keeps of its captions besides their text, for a backbone with an
    expensive caption encoder.
    """

    encode: Callable[[list[str]], list[Tensor]]
    """Captions to features [n_i, C] each."""
    key: dict
    """JSON-able: what the features depend on."""


@dataclass
class Frozen:
    """Frozen helpers of a backbone. A plain object and not a submodule, so that they are never
    trained, cast or sharded.
    """

    tokenizer: Tokenizer | None = None
    text_encoder: object | None = None
    warned: set[str] = field(default_factory=set)
    """Prompts that were warned of."""


C = TypeVar("C")


def settle_config(
    config: C | None, grid: tuple[int, int] | None, path: str | Path, infer: Callable[[], C]
) -> C:
    """The configuration given (with the grid, if that is given, too), or else what `infer` reads
    off the file's weights.

    Raises:
        UserError: `infer`'s, with the path.
    """
    if config is None:
        with naming(path):
            return infer()
    return config if grid is None else replace(config, grid=grid)


def published_size(sizes: dict[str, dict], **known) -> str | None:
    """Name of the first size that agrees with what is known of a shape, or None."""
    return next(
        (name for name, s in sizes.items() if all(known.get(k, v) == v for k, v in s.items())),
        None,
    )


def published_stem(source: str | Path) -> str:
    """Name, without its suffix, of a published file: of "owner/repo:file.pt" or of a path."""
    return Path(str(source).rpartition(":")[2]).stem


def power_cosine(scale: float, power: float, step: int, steps: int) -> float:
    """RAR's guidance (1d-tokenizer `modeling/rar.py`): 1 + (scale - 1) (1 - cos(pi
    (step/steps)^power)) / 2, in fp32 as there.
    """
    if power == 0:
        return scale
    done = torch.tensor(step / steps, dtype=torch.float32) ** power
    return (1 + (scale - 1) * (1 - torch.cos(torch.pi * done)) / 2).item()


def parameter_count(module: nn.Module) -> str:
    """Parameters of a module, for people."""
    count = sum(p.numel() for p in module.parameters())
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.3g} M"


class Backbone(nn.Module, ABC):
    """A pre-trained generator; its parameters are what fine-tuning may change."""

    spec: BackboneSpec
    lora_targets: str
    """Regular expression of the linear layers that LoRA may adapt."""
    left_out: int = 0
    """Parameters of the published model that were not loaded, because drawing images does not need
    them.
    """

    def __init__(self):
        super().__init__()
        self.frozen = Frozen()
        self.source = None
        """Where the weights came from (`t2i.loading.BackboneSource`)."""
        self.lora = None
        """PEFT's configuration, once adapters are injected (`t2i.lora`)."""
        self.gradient_checkpointing = False
        """Recompute the trunk's blocks and the logits in the backward pass."""
        self.token_dropout = nn.Dropout(0.0)
        """Element dropout on the trunk's inputs, in training."""

    def __repr__(self) -> str:
        """One line, not the modules."""
        s, first = self.spec, next(self.parameters())
        dtype = str(first.dtype).removeprefix("torch.")
        codes = f"{s.grid[0]} x {s.grid[1]} codes"
        return f"{type(self).__name__}({s.cond_kind}, {parameter_count(self)}, {codes}, {dtype} on {first.device})"

    # -- the condition -----------------------------------------------------------------------------
    def prepare(self, conditions: Sequence, length: int | None = None) -> dict[str, Tensor]:
        """Turn class ids or prompts into batched tensors by frozen means only; here class ids.

        Where the prefix varies with the prompts, `length` pads it to so many tokens
        (`prefix_length` of a larger set of prompts).
        """
        return {"labels": class_ids(conditions, self.spec.num_classes).to(self.device)}

    def prefix_length(self, conditions: Sequence) -> int:
        """Prefix tokens of the longest of these conditions: images drawn with one `length` do not
        depend on how they are batched.
        """
        return self.spec.prefix_tokens

    def caption_features(self) -> CaptionFeatures | None:
        """How a data set's captions are encoded once and cached; None if `prepare` is cheap enough
        to read them as text each time.

        Cached features come back padded on the left to `spec.prefix_tokens`, as {"features",
        "mask"}: what `prepare` gives.

        Raises:
            UserError: this backbone cannot be trained on captions.
        """
        raise UserError(
            "training on captions needs a text-to-image backbone with its text encoder "
            "(backbone.text_encoder)"
        )

    def caption_notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        """What is lost of each caption when it is encoded, in fixed phrases; None if nothing of it
        is left.
        """
        return [[] for _ in captions]

    @abstractmethod
    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        """Embed prepared conditions. `drop` [B] bool puts the unconditional form in their place,
        exactly as the base was trained.
        """

    # -- the model ---------------------------------------------------------------------------------
    @abstractmethod
    def embed_tokens(self, codes: Tensor) -> Tensor:
        """Content embeddings [..., D] of codes int64 [..., S]: no position, no dropout."""

    @abstractmethod
    def trunk(
        self, x_BLD: Tensor, positions_L: Tensor, condition: Condition, cache: KVCache | None = None
    ) -> Tensor:
        """Causal transformer on embeddings: positions 0..P-1 are the prefix, P + p image token p.
        Returns what the head reads.
        """

    @abstractmethod
    def next_logits(self, h: Tensor, earlier: Tensor) -> Tensor:
        """fp32 logits [..., V_s] of sub-token s = earlier.shape[-1], given hidden [..., D] and
        sub-tokens 0..s-1 [..., s].
        """

    def all_logits(self, h: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        """Teacher-forced logits of every sub-token, given the true codes [..., S]; one pass where
        the family can.
        """
        return tuple(self.next_logits(h, codes[..., :s]) for s in range(len(self.spec.subvocabs)))

    @abstractmethod
    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights that fine-tuning may change, under their official names."""

    def save_official(self, folder: Path, dtype: torch.dtype) -> Path:
        """Write all weights, in this type, in the layout of the family's authors; returns what
        `load` then takes.
        """
        weights = {k: v.to(dtype) for k, v in self.official_state_dict().items()}
        torch.save({"model": weights}, folder / "model.pt")
        return folder / "model.pt"

    def trained_modules(self) -> Sequence[nn.Module]:
        """What full fine-tuning trains."""
        return (self,)

    @abstractmethod
    def image_layers(self) -> dict[str, nn.Module]:
        """The layers that embed and predict image codes, by official name: LoRA leaves them alone,
        but they may be trained whole.
        """

    @property
    def lora_root(self) -> nn.Module:
        """The module whose names an adapter file uses: the published model's, where another library
        may load the adapter.
        """
        return self

    def parts(self) -> dict[str, Sequence[nn.Module]]:
        """Named parts for parameter counts; together all of it."""
        return {"backbone": (self,)}

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` inputs, with the dtype and device of the parameters."""

    def guidance(self, config: SamplingConfig, step: int, steps: int) -> float:
        """CFG scale at a step of the sampling loop, by the settings of one sub-token
        (`SamplingConfig.by_sub_token`).
        """
        return power_cosine(config.cfg_scale, config.cfg_power, step, steps)

    # -- pixels ------------------------------------------------------------------------------------
    @property
    def tokenizer(self) -> Tokenizer:
        if self.frozen.tokenizer is None:
            raise UserError(
                f"this {self.spec.family} backbone has no image tokenizer; pass tokenizer=PATH to load_backbone"
            )
        return self.frozen.tokenizer

    def code_vectors(self) -> tuple[Tensor, ...]:
        """Codebook geometry [V_s, C] of each sub-token, for noise between neighbouring codes; here
        of a stored codebook.
        """
        return (self.tokenizer.quantize.vectors(),)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Codes int64 [B, T, S] of pixels [B, 3, H, W] in [-1, 1]; here of a tokenizer with one
        sub-token.
        """
        return self.tokenizer.encode(pixels).flatten(1)[..., None]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that are drawn."""
        return tuple(side * self.tokenizer.downsample for side in self.spec.grid)

    def decode_images(self, codes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images uint8 [B, H, W, 3] of codes [B, T, S], rounded as the family's authors do.

        With a `size` (H, W) that is not the model's own, the decoder's raw output is resized before
        it is clamped, by bicubic interpolation without antialiasing: so LlamaGen's 384 px images
        become the 256 px ones of its FID (`sample_c2i_ddp.py`).
        """
        pixels = self.decode_pixels(codes)
        if size is not None and size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=size, mode="bicubic")
        return self.quantize_pixels(pixels).permute(0, 2, 3, 1)

    def decode_pixels(self, codes: Tensor) -> Tensor:
        """Pixels fp32 [B, 3, H, W] of codes [B, T, S], nominally in [-1, 1]; here of a tokenizer
        with one sub-token.
        """
        return self.tokenizer.decode(codes[..., 0].unflatten(1, self.spec.grid)).float()

    @abstractmethod
    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 of pixels nominally in [-1, 1], in the same shape, rounded as the family's authors
        do.
        """

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
