"""What TensorAR needs of an image generator: `head(trunk(embed(token) + position, condition))`.

A backbone predicts codes in raster order with a causal transformer. The method (`t2i.tensorar`)
uses only this interface, so a new family is one new folder here (docs/add_a_backbone.md). Positions
and cache indices differ: position P + p belongs to image token p, while the cache index counts the
inputs seen so far.

Shapes: B batch, L inputs, P prefix length, D model width, T image tokens, S sub-tokens of a code, V
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.conditions import CaptionFeatures, Condition, class_ids, to_device
from t2i.models.kv_cache import KVCache
from t2i.models.tokenizers.conv_tokenizer import ConvTokenizer
from t2i.sampling import SamplingConfig

if TYPE_CHECKING:
    from peft import LoraConfig

    from t2i.sources import BackboneSource


MOST_LAYERS, MOST_SIZE = 1000, 1 << 20
"""Upper limits of a model's layers and other sizes. Larger numbers, as of a damaged or edited file,
would fill memory, or build layers without end.
"""
PIXELS_AT_ONCE = 4 * 384**2
"""How many pixels an image tokenizer encodes or decodes per call. For each of them, the four widest
feature maps of a published one, which exist at the same time, take 2 kB.
"""


@dataclass(frozen=True)
class BackboneSpec:
    """Facts about a backbone that the rest of the kit may use."""

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
    """Length P of the condition prefix (the maximum where it varies)."""
    num_classes: int = 0
    """Number of classes of a class-conditional backbone."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the authors sampled the base model."""
    sign_codebook: bool = False
    """Codes are sign patterns with one bit per latent channel: codebook noise resamples bits."""

    @property
    def num_tokens(self) -> int:
        """Codes per image, T."""
        return self.grid[0] * self.grid[1]

    def check_codes(self, codes: Tensor) -> None:
        """UserError if codes [B, T, S] do not fit this backbone; a GPU would only say "assert"."""
        positions, subtokens = codes.shape[1:]
        if (positions, subtokens) != (self.num_tokens, len(self.subvocabs)):
            raise UserError(
                f"the data has {positions} x {subtokens} codes per image (positions, sub-tokens), this "
                f"{self.family} backbone {self.num_tokens} x {len(self.subvocabs)}: they come from "
                "another tokenizer or resolution"
            )
        if (codes < 0).any() or (codes >= torch.tensor(self.subvocabs)).any():
            raise UserError(
                f"the data has codes from {int(codes.min())} to {int(codes.max())}, but this "
                f"{self.family} backbone's vocabulary is {self.subvocabs}: they come from another "
                "tokenizer"
            )


@dataclass
class Frozen:
    """Frozen helpers of a backbone. Not submodules, so never trained, cast or sharded."""

    tokenizer: ConvTokenizer | None = None
    text_encoder: Any = None
    """A `TextEncoder`, or None."""
    warned: set[str] = field(default_factory=set)
    """Prompts that a warning has already been logged for."""
    read_in_part: int = 0
    """How many of these prompts the text encoder reads only in part."""


@dataclass(frozen=True)
class LoadOptions:
    """How a published model is loaded."""

    config: Any | None = None
    """The model's shape, if it is not a published one."""
    grid: tuple[int, int] | None = None
    """Height and width in codes, overriding the config and the files."""
    dtype: torch.dtype = torch.float32
    generation_only: bool = False
    """Leave out the parts that drawing images does not need, if the family has any."""
    shapes_only: bool = False
    """Return a model on the meta device, with names and shapes checked."""


AS_PUBLISHED = LoadOptions()


def in_parts(work: Callable[[Tensor], Tensor], rows: Tensor, most: int) -> Tensor:
    """`work(rows)`, computed for at most `most` rows at a time.

    All parts have the same number of rows (the last one is padded), since rounding depends on it.
    """
    if len(rows) <= most:
        return work(rows)
    parts = -(-len(rows) // most)
    size = -(-len(rows) // parts)
    padding = rows[-1:].expand(parts * size - len(rows), *rows.shape[1:])
    return torch.cat([work(part) for part in torch.cat([rows, padding]).split(size)])[: len(rows)]


def parameter_count(module: nn.Module) -> str:
    """A module's number of parameters, such as "111 M"."""
    count = sum(p.numel() for p in module.parameters())
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.3g} M"


class Backbone(nn.Module, ABC):
    """A pre-trained generator; fine-tuning may change all its parameters."""

    spec: BackboneSpec
    config: Any
    """The model's shape, a `config_type`."""
    config_type: ClassVar[type[Any]]
    """The frozen dataclass that describes the shape of the family's models."""
    tokenizer_type: ClassVar[type[ConvTokenizer]]
    """The class of the image tokenizer that its codes come from."""
    lora_targets: str
    """Regular expression of the linear layers that LoRA may adapt."""
    caption_width: int = 0
    """Width of a caption token's cached features; 0 where captions are read as text."""
    left_out: int = 0
    """Number of published parameters that were not loaded because drawing does not need them."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = Frozen()
        self.source: BackboneSource | None = None
        """Where `load_backbone` loaded the weights from; None if it did not."""
        self.lora: LoraConfig | None = None
        """PEFT's configuration, once adapters are injected (`t2i.lora`)."""
        self.revision = 0
        """Incremented when the same parameters start computing something else (adapters on/off)."""
        self.gradient_checkpointing = False
        """Recompute the trunk's blocks, and the head up to its last layer, in the backward pass."""
        self.compile_blocks = False
        """Use `torch.compile` on the trunk's blocks in training."""
        self.sharded = False
        """Each process holds a part of every weight (ZeRO-3): layers must be called to be used."""
        self.token_dropout = nn.Dropout(0.0)
        """Element dropout on the trunk's inputs in training."""

    def __repr__(self) -> str:
        """A one-line summary instead of the modules."""
        s, first = self.spec, next(self.parameters())
        dtype = str(first.dtype).removeprefix("torch.")
        codes = f"{s.grid[0]} x {s.grid[1]} codes"
        return f"{type(self).__name__}({s.cond_kind}, {parameter_count(self)}, {codes}, {dtype} on {first.device})"

    # -- files -------------------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def load(cls, path: str | Path, options: LoadOptions = AS_PUBLISHED) -> Self:
        """Load what the family's authors publish, strictly, on the CPU in eval mode.

        Raises:
            UserError: the files are unreadable or another family's, do not determine the shape, or
                have keys that do not fit (all are named).
        """

    @classmethod
    @abstractmethod
    def outline(cls, source: str | Path, options: LoadOptions = AS_PUBLISHED) -> Self | None:
        """The model of a published name and its image tokenizer, on the meta device, with no file
        read; None if neither the name nor `options.config` gives the shape.
        """

    @abstractmethod
    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights that fine-tuning may change, under their official names."""

    def save_official(self, folder: Path, dtype: torch.dtype) -> Path:
        """Write all weights in this dtype under their official names; return the path for `load`.

        By default one file, {"model": weights} as LlamaGen nests them, without the image tokenizer.
        """
        # On the CPU: others could only read a GPU's tensors on a machine with a GPU.
        weights = {k: v.to("cpu", dtype) for k, v in self.official_state_dict().items()}
        torch.save({"model": weights}, folder / "model.pt")
        return folder / "model.pt"

    # -- the condition -----------------------------------------------------------------------------
    def prepare(self, conditions: Sequence, length: int | None = None) -> dict[str, Tensor]:
        """Turn class ids (the default) or prompts into batched tensors, using only frozen parts.

        length: number of tokens to pad the prefix to, where its length varies with the prompts
            (`prefix_length` of a larger set of prompts).
        """
        return {"labels": to_device(class_ids(conditions, self.spec.num_classes), self.device)}

    def prefix_length(self, conditions: Sequence) -> int:
        """Number of prefix tokens of the longest of these conditions, as `length` for `prepare`."""
        # With the same length for all, images do not depend on how they are batched.
        return self.spec.prefix_tokens

    def caption_features(self) -> CaptionFeatures | None:
        """How to encode a data set's captions once and cache them; None if `prepare` is cheap
        enough to do it at every step.

        Raises:
            UserError: this backbone cannot be trained on captions.
        """
        raise UserError(
            "training on captions needs a text-to-image backbone with its text encoder "
            "(backbone.text_encoder)"
        )

    def collate_features(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """A batch as from `prepare`, of features that `caption_features` encoded: [n_i, C] each."""
        raise NotImplementedError(f"{type(self).__name__} has no caption features")

    def made_up_conditions(self, batch: int, length: int) -> dict[str, Tensor]:
        """Meaningless conditions like those from `prepare`, for measuring speed; here class ids.

        length: number of prefix tokens, where it varies with the prompts.
        """
        return self.prepare([i % self.spec.num_classes for i in range(batch)])

    def as_read(self, caption: str) -> str:
        """The caption as the text encoder gets it: cleaned, if the family cleans captions."""
        return caption

    def caption_notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        """Fixed phrases for what each caption loses; None for one of which nothing is left."""
        return [[] for _ in captions]

    @abstractmethod
    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        """Embed prepared conditions, or the unconditional form where `drop` [B] bool is True."""

    # -- the model ---------------------------------------------------------------------------------
    @abstractmethod
    def embed_tokens(self, codes: Tensor) -> Tensor:
        """Content embeddings [..., D] of codes int64 [..., S]: no position, no dropout."""

    @abstractmethod
    def trunk(
        self, x_BLD: Tensor, positions_L: Tensor, condition: Condition, cache: KVCache | None = None
    ) -> Tensor:
        """Run the causal transformer on embeddings; returns the hidden states for the head.

        Positions 0..P-1 are the prefix, P + p is image token p; [B, L] gives each row its own.
        """

    @abstractmethod
    def head(self, h: Tensor, earlier: Tensor) -> tuple[Tensor, nn.Module]:
        """The head of sub-token s, given hidden states [..., D] and earlier sub-tokens [..., s].

        Returns the input of its last layer, and that layer, whose output are the logits [..., V_s].
        """

    def all_heads(self, h: Tensor, codes: Tensor) -> tuple[tuple[Tensor, nn.Module], ...]:
        """`head` for every sub-token, given the true codes [..., S]."""
        return tuple(self.head(h, codes[..., :s]) for s in range(len(self.spec.subvocabs)))

    def next_logits(self, h: Tensor, earlier: Tensor) -> Tensor:
        """fp32 logits [..., V_s] of sub-token s, given hidden states and earlier sub-tokens."""
        x, layer = self.head(h, earlier)
        return layer(x).float()

    def all_logits(self, h: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        """Teacher-forced logits of every sub-token, given the true codes [..., S]."""
        return tuple(layer(x).float() for x, layer in self.all_heads(h, codes))

    def fixed_text_logits(self) -> Tensor | None:
        """Logits [..., words] of the next word in fixed texts, which show how training on images
        changes the model's writing; None if the model does not write text.
        """
        return None

    def trained_modules(self) -> Sequence[nn.Module]:
        """The modules that full fine-tuning trains."""
        return (self,)

    @abstractmethod
    def image_layers(self) -> dict[str, nn.Module]:
        """Layers that embed and predict image codes, by official name; LoRA does not adapt them."""

    @property
    def lora_root(self) -> nn.Module:
        """The module whose parameter names an adapter file uses.

        The published model, if another library may load the adapter.
        """
        return self

    def parts(self) -> dict[str, Sequence[nn.Module]]:
        """Named parts for parameter counts, which together cover the whole model."""
        return {"backbone": (self,)}

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` inputs, with the parameters' dtype and device."""

    def guidance(self, config: SamplingConfig, step: int, steps: int) -> float:
        """CFG scale at a step, given one sub-token's settings (`SamplingConfig.by_sub_token`).

        With `cfg_power` it is RAR's (1d-tokenizer `modeling/rar.py`), in fp32 like the original:
        1 + (scale - 1) (1 - cos(pi (step/steps)^power)) / 2
        """
        scale = config.cfg_scale
        assert not isinstance(scale, tuple), "settings of one sub-token"
        if config.cfg_power == 0:
            return scale
        done = torch.tensor(step / steps, dtype=torch.float32) ** config.cfg_power
        return (1 + (scale - 1) * (1 - torch.cos(torch.pi * done)) / 2).item()

    # -- pixels ------------------------------------------------------------------------------------
    @property
    def tokenizer(self) -> ConvTokenizer:
        if self.frozen.tokenizer is None:
            raise UserError(
                f"this {self.spec.family} backbone has no image tokenizer; pass tokenizer=PATH to load_backbone"
            )
        return self.frozen.tokenizer

    def code_vectors(self) -> tuple[Tensor, ...]:
        """Codebook vectors [V_s, C] of each sub-token, for codebook noise."""
        return (self.tokenizer.quantize.vectors(),)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Codes int64 [B, T, S] of pixels [B, 3, H, W] in [-1, 1]; by default S = 1."""
        return self.tokenizer.encode(pixels).flatten(1)[..., None]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of drawn images."""
        (rows, columns), side = self.spec.grid, self.tokenizer.downsample
        return rows * side, columns * side

    @property
    def images_at_once(self) -> int:
        """How many images the tokenizer encodes or decodes per call."""
        height, width = self.image_size
        return max(1, PIXELS_AT_ONCE // (height * width))

    def decode_images(self, codes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images uint8 [B, H, W, 3] of codes [B, T, S], rounded as the family's authors do.

        If `size` (H, W) is not the model's own, the decoder's raw output is resized before
        clamping, by bicubic interpolation without antialiasing. This is how LlamaGen's 384 px
        images become the 256 px images of its FID (`sample_c2i_ddp.py`).
        """

        def work(codes: Tensor) -> Tensor:
            pixels = self.decode_pixels(codes)
            if size is not None and size != tuple(pixels.shape[-2:]):
                pixels = F.interpolate(pixels, size=size, mode="bicubic")
            return self.quantize_pixels(pixels).permute(0, 2, 3, 1)

        return in_parts(work, codes, self.images_at_once)

    def decode_pixels(self, codes: Tensor) -> Tensor:
        """Pixels fp32 [B, 3, H, W] of codes [B, T, S], nominally in [-1, 1]; by default S = 1."""
        return self.tokenizer.decode(codes[..., 0].unflatten(1, self.spec.grid)).float()

    @abstractmethod
    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels nominally in [-1, 1] as uint8, rounded as the family's authors do."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
