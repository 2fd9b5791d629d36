"""What TensorAR needs of an image generator: `head(trunk(embed(token) + position, condition))`.

A backbone predicts codes in raster order with a causal transformer. The method (`t2i.tensorar`)
talks to this interface only, so a new family is one folder here (docs/add_a_backbone.md). Positions
and cache indices are separate things: position P + p belongs to image token p, the cache index
counts the inputs seen so far.

Shapes: B batch, L inputs, P prefix length, D model width, T image tokens, S sub-tokens of a code, V
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.models.conditions import CaptionFeatures, Condition, class_ids
from t2i.models.kv_cache import KVCache
from t2i.models.tokenizers.conv_tokenizer import ConvTokenizer
from t2i.sampling import SamplingConfig

if TYPE_CHECKING:
    from peft import LoraConfig

    from t2i.sources import BackboneSource


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
    """Codes are sign patterns, each bit a latent channel: noise between neighbours redraws bits."""

    @property
    def num_tokens(self) -> int:
        """Codes per image, T."""
        return self.grid[0] * self.grid[1]

    def check_codes(self, codes: Tensor) -> None:
        """UserError if codes [B, T, S] are not of this backbone; a GPU would only say "assert"."""
        positions, subtokens = codes.shape[1:]
        if (positions, subtokens) != (self.num_tokens, len(self.subvocabs)):
            raise UserError(
                f"an image has {positions} x {subtokens} codes (positions, sub-tokens), this "
                f"{self.family} backbone {self.num_tokens} x {len(self.subvocabs)}: they are of "
                "another tokenizer or resolution"
            )
        if (codes < 0).any() or (codes >= torch.tensor(self.subvocabs)).any():
            found = f"the data has codes from {int(codes.min())} to {int(codes.max())}, this "
            own = f"{self.family} backbone {self.subvocabs}: they are of another tokenizer"
            raise UserError(found + own)


@dataclass
class Frozen:
    """Frozen helpers of a backbone: no submodule, so never trained, cast or sharded."""

    tokenizer: ConvTokenizer | None = None
    text_encoder: Any = None
    """A `TextEncoder`, or None."""
    warned: set[str] = field(default_factory=set)
    """Prompts that were warned of."""
    read_in_part: int = 0
    """How many of these are read in part."""


@dataclass(frozen=True)
class LoadOptions:
    """How a published model is loaded."""

    config: Any | None = None
    """Its shape, where that was never published."""
    grid: tuple[int, int] | None = None
    """Height and width in codes, in place of what config or files say."""
    dtype: torch.dtype = torch.float32
    generation_only: bool = False
    """Leave out what drawing images does not need, where there is any."""
    shapes_only: bool = False
    """A model on the meta device will do, with names and shapes checked."""


AS_PUBLISHED = LoadOptions()


def power_cosine(scale: float, power: float, step: int, steps: int) -> float:
    """RAR's guidance (1d-tokenizer `modeling/rar.py`), in fp32 as there:

    1 + (scale - 1) (1 - cos(pi (step/steps)^power)) / 2
    """
    if power == 0:
        return scale
    done = torch.tensor(step / steps, dtype=torch.float32) ** power
    return (1 + (scale - 1) * (1 - torch.cos(torch.pi * done)) / 2).item()


def parameter_count(module: nn.Module) -> str:
    """The number of a module's parameters, in words."""
    count = sum(p.numel() for p in module.parameters())
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.3g} M"


class Backbone(nn.Module, ABC):
    """A pre-trained generator; its parameters are what fine-tuning may change."""

    spec: BackboneSpec
    config: Any
    """Its shape, a `config_type`."""
    config_type: ClassVar[type[Any]]
    """The frozen dataclass that says the shape of such a model."""
    tokenizer_type: ClassVar[type[ConvTokenizer]]
    """The kind of image tokenizer that its codes come from."""
    lora_targets: str
    """Regular expression of the linear layers that LoRA may adapt."""
    caption_width: int = 0
    """Of a caption token's features in a data set's cache; 0 where captions are read as text."""
    left_out: int = 0
    """Parameters of the published model that were not loaded: drawing does not need them."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = Frozen()
        self.source: BackboneSource | None = None
        """Where the weights came from; None if `load_backbone` did not load them."""
        self.lora: LoraConfig | None = None
        """PEFT's configuration, once adapters are injected (`t2i.lora`)."""
        self.revision = 0
        """Raised when the same parameters begin to compute something else (adapters on and off)."""
        self.gradient_checkpointing = False
        """Recompute the trunk's blocks, and what the head does first, in the backward pass."""
        self.compile_blocks = False
        """Fuse the operations of the trunk's blocks by `torch.compile`, when it is trained."""
        self.sharded = False
        """Each process holds a part of every weight (ZeRO-3): layers have to be called."""
        self.token_dropout = nn.Dropout(0.0)
        """Element dropout on the trunk's inputs, in training."""

    def __repr__(self) -> str:
        """One line, not the modules."""
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
            UserError: unreadable files, another family, a shape that they do not tell, or keys that
                do not fit, each named.
        """

    @classmethod
    @abstractmethod
    def outline(cls, source: str | Path, options: LoadOptions = AS_PUBLISHED) -> Self | None:
        """A model of a published name on the meta device, with its image tokenizer and without any
        file; None where neither name nor `options.config` says the shape.
        """

    @abstractmethod
    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights that fine-tuning may change, under their official names."""

    def save_official(self, folder: Path, dtype: torch.dtype) -> Path:
        """Write all weights in this type under their official names; returns what `load` takes.

        Here one file, {"model": weights} as LlamaGen nests them, without the image tokenizer.
        """
        weights = {k: v.to(dtype) for k, v in self.official_state_dict().items()}
        torch.save({"model": weights}, folder / "model.pt")
        return folder / "model.pt"

    # -- the condition -----------------------------------------------------------------------------
    def prepare(self, conditions: Sequence, length: int | None = None) -> dict[str, Tensor]:
        """Turn class ids or prompts into batched tensors by frozen means only; here class ids.

        Where the prefix varies with the prompts, `length` pads it to so many tokens
        (`prefix_length` of a larger set of prompts).
        """
        return {"labels": class_ids(conditions, self.spec.num_classes).to(self.device)}

    def prefix_length(self, conditions: Sequence) -> int:
        """Prefix tokens of the longest of these conditions, a `length` for `prepare`."""
        # With one length for all, an image does not depend on how images are batched.
        return self.spec.prefix_tokens

    def caption_features(self) -> CaptionFeatures | None:
        """How a data set's captions are encoded once and cached; None if `prepare` is cheap enough
        to read them as text each time.

        Raises:
            UserError: this backbone cannot be trained on captions.
        """
        raise UserError(
            "training on captions needs a text-to-image backbone with its text encoder "
            "(backbone.text_encoder)"
        )

    def collate_features(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """A batch, as `prepare` gives it, of what `caption_features` encoded: [n_i, C] each."""
        raise NotImplementedError(f"{type(self).__name__} has no caption features")

    def made_up_conditions(self, batch: int, length: int) -> dict[str, Tensor]:
        """What `prepare` could give, for measuring speed: its content means nothing.

        Where the prefix varies with the prompts it has `length` tokens. Here class ids.
        """
        return self.prepare([i % self.spec.num_classes for i in range(batch)])

    def as_read(self, caption: str) -> str:
        """A caption as it goes to the text encoder: cleaned, where the family cleans captions."""
        return caption

    def caption_notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        """What is lost of each caption, in fixed phrases; None if nothing of it is left."""
        return [[] for _ in captions]

    @abstractmethod
    def encode_condition(
        self, prepared: dict[str, Tensor], drop: Tensor | None = None
    ) -> Condition:
        """Embed prepared conditions; `drop` [B] bool puts the unconditional form in their place."""

    # -- the model ---------------------------------------------------------------------------------
    @abstractmethod
    def embed_tokens(self, codes: Tensor) -> Tensor:
        """Content embeddings [..., D] of codes int64 [..., S]: no position, no dropout."""

    @abstractmethod
    def trunk(
        self, x_BLD: Tensor, positions_L: Tensor, condition: Condition, cache: KVCache | None = None
    ) -> Tensor:
        """Causal transformer on embeddings; returns what the head reads.

        Positions 0..P-1 are the prefix, P + p image token p; [B, L] gives each row its own.
        """

    @abstractmethod
    def head(self, h: Tensor, earlier: Tensor) -> tuple[Tensor, nn.Module]:
        """What predicts sub-token s, of hidden [..., D] and earlier ones [..., s]: the head's last
        layer, whose output are the logits [..., V_s], after what it reads.
        """

    def all_heads(self, h: Tensor, codes: Tensor) -> tuple[tuple[Tensor, nn.Module], ...]:
        """The same of every sub-token, given the true codes [..., S]."""
        return tuple(self.head(h, codes[..., :s]) for s in range(len(self.spec.subvocabs)))

    def next_logits(self, h: Tensor, earlier: Tensor) -> Tensor:
        """fp32 logits [..., V_s] of sub-token s, of hidden [..., D] and earlier ones [..., s]."""
        x, layer = self.head(h, earlier)
        return layer(x).float()

    def all_logits(self, h: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        """Teacher-forced logits of every sub-token, given the true codes [..., S]."""
        return tuple(layer(x).float() for x, layer in self.all_heads(h, codes))

    def fixed_text_logits(self) -> Tensor | None:
        """Logits [..., words] of the next word in texts that are always the same, to see what
        training on images does to writing; None of a model that does not write.
        """
        return None

    def trained_modules(self) -> Sequence[nn.Module]:
        """What full fine-tuning trains."""
        return (self,)

    @abstractmethod
    def image_layers(self) -> dict[str, nn.Module]:
        """Layers that embed and predict image codes, by official name; LoRA leaves them alone."""

    @property
    def lora_root(self) -> nn.Module:
        """The module whose names an adapter file uses.

        The published model's, where another library may load the adapter.
        """
        return self

    def parts(self) -> dict[str, Sequence[nn.Module]]:
        """Named parts for parameter counts; together all of it."""
        return {"backbone": (self,)}

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` inputs, with the dtype and device of the parameters."""

    def guidance(self, config: SamplingConfig, step: int, steps: int) -> float:
        """CFG scale at a step, by the settings of one sub-token (`SamplingConfig.by_sub_token`)."""
        assert not isinstance(config.cfg_scale, tuple), "settings of one sub-token"
        return power_cosine(config.cfg_scale, config.cfg_power, step, steps)

    # -- pixels ------------------------------------------------------------------------------------
    @property
    def tokenizer(self) -> ConvTokenizer:
        if self.frozen.tokenizer is None:
            raise UserError(
                f"this {self.spec.family} backbone has no image tokenizer; pass tokenizer=PATH to load_backbone"
            )
        return self.frozen.tokenizer

    def code_vectors(self) -> tuple[Tensor, ...]:
        """Codebook geometry [V_s, C] of each sub-token, for noise between neighbouring codes."""
        return (self.tokenizer.quantize.vectors(),)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Codes int64 [B, T, S] of pixels [B, 3, H, W] in [-1, 1]; here with one sub-token."""
        return self.tokenizer.encode(pixels).flatten(1)[..., None]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that are drawn."""
        (rows, columns), side = self.spec.grid, self.tokenizer.downsample
        return rows * side, columns * side

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
        """Pixels fp32 [B, 3, H, W] of codes [B, T, S], nominally in [-1, 1]; here S = 1."""
        return self.tokenizer.decode(codes[..., 0].unflatten(1, self.spec.grid)).float()

    @abstractmethod
    def quantize_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 of pixels nominally in [-1, 1], rounded as the family's authors do."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
