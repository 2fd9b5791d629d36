"""The settings of a training run: frozen dataclasses that `tyro` turns into command-line options.

Numbers that should grow with the run (held-out samples, warm-up steps, steps between outputs) may
be None: `t2i.training.run_plan` then derives them from the data and the number of steps. The named
recipes are in `t2i/models/*/*_recipes.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from t2i.data.captioned import CaptionedImages
from t2i.errors import UserError
from t2i.fields import check_types, told_options
from t2i.model_options import BaseOptions
from t2i.sampling import SamplingConfig, SamplingOverrides, check_counts, check_seed
from t2i.tensorar.method import TensorARConfig
from t2i.tuning import LoRAConfig, Tuning


@dataclass(frozen=True)
class BackboneOptions(BaseOptions):
    """The pre-trained model to start from."""

    family: str = "llamagen"
    """Model family of a published weight file."""
    weights: str = "shapes"
    """Official weight file, backbone folder, "shapes" (the shipped offline base), owner/repo:file
    on the hub, or an earlier run.
    """
    generation_only: bool = False
    """Do not load what drawing does not need: Janus-Pro's understanding tower and text head."""

    def __post_init__(self):
        check_types(self, "backbone.")


METRICS = "metrics.jsonl"
"""Name of a run's file of metrics."""
_MOST_SAMPLES, _MOST_EPOCHS = 1_048_576, 1e9
"""Limits on the samples of a step (they are listed in memory) and on a run's epochs."""
_CAPTION = "{caption}"
_AROUND = " \t\r\n,.;:"  # stripped from trigger words


@dataclass(frozen=True)
class _AnyData:
    """Options shared by captioned images and images of classes."""

    validation_samples: int | None = None
    """Samples held out for the validation loss and never trained on; None: 4 %, from 8 to 256, but
    at most a fifth.
    """
    cache_dir: Path = Path("cache")
    """Folder of cached codes and text features, shared by all runs on the same data."""


@dataclass(frozen=True)
class DataOptions(_AnyData, CaptionedImages):
    """Captioned images."""

    max_samples: int | None = None
    """Use only this many samples, from the start; None: all."""
    trigger: str | None = None
    """Words put before every caption ("drawn by xyz") or around it ("{caption}, drawn by xyz")."""
    small_images: Literal["skip", "upscale"] = "skip"
    """What to do with images smaller than the model's."""
    views: Literal["centre", "flip"] = "centre"
    """centre: the center crop of each image; flip: at random that or its mirror image. Do not flip
    images with writing, or whose captions say left or right.
    """

    def __post_init__(self):
        check_types(self, "data.")
        check_counts(**{"data.max_samples": self.max_samples})
        if self.trigger is None:
            return
        words = self.trigger.replace(_CAPTION, "")
        if not words.strip(_AROUND) or set("{}") & set(words):
            what = "has no words" if not words.strip(_AROUND) else f"has braces besides {_CAPTION}"
            raise UserError(
                f"data.trigger={self.trigger!r} {what}; leave it out, or write 'drawn by xyz' or "
                f"'{_CAPTION}, drawn by xyz'"
            )

    def with_trigger(self, caption: str) -> str:
        """The caption with the trigger words added, unless it already has them."""
        if self.trigger is None:
            return caption
        words = re.escape(max(self.trigger.split(_CAPTION), key=len).strip(_AROUND))
        if re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE):
            return caption
        template = self.trigger if _CAPTION in self.trigger else f"{self.trigger}, {_CAPTION}"
        return template.replace(_CAPTION, caption)


@dataclass(frozen=True)
class LabelledOptions(_AnyData):
    """Images of classes, for class-conditional backbones."""

    source: tuple[str, ...] = ()
    """A folder with train/<class>/, or codes: LlamaGen's folders (one per crop range), or RAR's
    .jsonl.
    """
    split: str = "train"
    """Sub-folder of the source to read."""
    views: Literal["ten-crop", "flip"] = "ten-crop"
    """ten-crop encodes five crops per crop range, flip only the center crop; each also mirrored."""
    crop_ranges: tuple[float, ...] = (1.1, 1.05)
    """For ten-crop: side of the square that is cropped, relative to the model's image size."""

    def __post_init__(self):
        check_types(self, "data.")
        if Path(self.split).name != self.split:
            raise UserError(
                f"data.split={self.split!r} must be the name of a sub-folder; give another place as "
                "data.source"
            )
        # The same check as in `t2i.data.images.Views`, which imports torch.
        if not self.crop_ranges or not 1 <= min(self.crop_ranges) <= max(self.crop_ranges) <= 10:
            raise UserError(f"data.crop_ranges={self.crop_ranges} must be factors from 1 to 10")


_MOST_RATE, _LEAST_CLIP = 1e12, 1e-12
"""Limits on rates, decay and delay, and on `grad_clip`: PyTorch overflows far beyond them."""
_WARMUP_SHARE, _MOST_WARMUP = 0.03, 2000


@dataclass(frozen=True)
class OptimOptions:
    """AdamW. The codec's rate warms up and decays to zero, both linearly; by default the backbone's
    stays constant after its delay and warm-up.
    """

    codec_lr: float = 1e-3
    """Peak learning rate of the input encoder and output decoder."""
    backbone_lr: float = 5e-5
    """Learning rate of the backbone (or of its adapters)."""
    warmup_steps: int | None = 0
    """Steps over which both rates rise from zero; None: 3 % of the run, at most 2,000."""
    backbone_delay_steps: int = 0
    """Steps at the start during which the backbone is frozen and only the codec learns."""
    backbone_falls: bool = False
    """Let the backbone's rate fall to zero over the run, as the codec's does."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    weight_decay: float = 0.05
    """AdamW's weight decay, applied to matrices only."""
    grad_clip: float = 1.0
    """The gradient is scaled down to this norm if it is larger."""

    def __post_init__(self):
        check_types(self, "optim.")
        for name, value in vars(self).items():
            if name in ("betas", "grad_clip"):
                continue
            if not 0 <= (value or 0) <= _MOST_RATE:  # nor NaN
                raise UserError(f"optim.{name}={value} must be a number from 0 to {_MOST_RATE:g}")
        if not self.grad_clip >= _LEAST_CLIP:  # nor NaN
            raise UserError(f"optim.grad_clip={self.grad_clip} must be at least {_LEAST_CLIP:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas} must be two numbers in [0, 1)")

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of `steps` steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(_MOST_WARMUP, round(_WARMUP_SHARE * steps))

    def codec_rate(self, step: int, steps: int) -> float:
        """The codec's learning rate at a step of a run of `steps` steps."""
        return self.codec_lr * self._warm(step, steps) * (1 - step / steps)

    def backbone_rate(self, step: int, steps: int) -> float:
        """The backbone's learning rate at a step of a run of `steps` steps."""
        if step < self.backbone_delay_steps:
            return 0.0
        left = 1 - step / steps if self.backbone_falls else 1.0
        return self.backbone_lr * self._warm(step, steps) * left

    def _warm(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / (self.warmup(steps) + 1))


@dataclass(frozen=True)
class EngineOptions:
    """DeepSpeed and precision."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ZeRO shards over the processes: 1 the optimizer; 2 also gradients; 3 also weights."""
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    """autocast: fp32 weights, products in bf16; bf16: fp32 weights only in the optimizer."""
    micro_batch: int = 32
    """Samples per process and forward pass; gradients are accumulated over the whole batch."""
    gradient_checkpointing: bool = False
    """Recompute the trunk's blocks in the backward pass to save memory."""
    codec_checkpointing: bool = False
    """Recompute only the input encoder and output decoder: saves some memory at little cost."""
    compile: bool = False
    """Compile the trunk's blocks with torch.compile, which takes about a minute at the start."""
    deepspeed_config: Path | None = None
    """JSON with further "zero_optimization" settings, such as launch/zero3_offload.json."""

    def __post_init__(self):
        check_types(self, "engine.")


@dataclass(frozen=True)
class LogOptions:
    """What a run writes while training, besides `metrics.jsonl`, and how often."""

    log_every: int | None = 10
    """Steps between lines of metrics (0: only at validations; None: by the run's length)."""
    validate_every: int | None = 100
    """Steps between validations (0: only at the end; None: ten per run)."""
    sample_every: int | None = 100
    """Steps between sample sheets (0: none; None: ten per run); ZeRO-3: at each checkpoint."""
    save_every: int | None = 1000
    """Steps between checkpoints (0: only at the end; None: five per run)."""
    at_start: bool = False
    """Also validate and draw a sheet before the first step, to show the untrained base."""
    keep_last: int = 2
    """Newest checkpoints to keep; older ones are deleted."""
    keep_best: bool = True
    """Also keep, in run_dir/best, the model with the lowest held-out loss of its final codes."""
    prompts: tuple[str, ...] = (
        "a photo of a red circle",
        "a photo of two squares",
        "a photo of a green star left of a blue ring",
        "a photo of a yellow heart and a black cross",
    )
    """Fixed prompts or class ids of the sheets; empty: those of the first four held-out images."""
    control: Path | None = None
    """Run folder of the control; this run's page shows its curves next to its own."""
    tracker: Literal["auto", "none", "tensorboard", "wandb"] = "auto"
    """Where metrics are also sent; auto: TensorBoard if it is installed."""
    project: str = "tensorar"
    """Project name for wandb."""

    def __post_init__(self):
        check_types(self, "log.")
        for name in ("log_every", "validate_every", "sample_every", "save_every"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(
                    f"log.{name}={getattr(self, name)} must be a number of steps, or 0: see its "
                    "help"
                )


Unread = Iterator[tuple[set[str], str]]
"""Pairs of options that are not read, and the setting that is the reason."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    learns_from_data: ClassVar[bool] = True
    """Whether steps train on `data`; otherwise it is used only for validation."""
    run_dir: Path = Path("runs/train")
    """Folder for everything the run writes."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    method: TensorARConfig = field(default_factory=TensorARConfig)
    tuning: Tuning = "full"
    """Train the whole backbone, only the codec, or LoRA adapters (and the codec)."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train_image_layers: bool = False
    """With tuning lora or codec, also train the layers that embed and predict image codes."""
    data: tyro.conf.AvoidSubcommands[DataOptions | LabelledOptions] = field(
        default_factory=DataOptions
    )
    optim: OptimOptions = field(default_factory=OptimOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    log: LogOptions = field(default_factory=LogOptions)
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    """How the sheets are sampled, and how the checkpoint samples by default."""
    batch_size: int = 256
    """Samples per optimizer step, over all processes."""
    epochs: float = 20.0
    """Passes over the data; ignored if steps is given, but given alone it replaces the recipe's
    steps.
    """
    steps: int | None = None
    """Optimizer steps; None: computed from epochs."""
    condition_dropout: float = 0.1
    """Share of samples trained without their caption or class, as guidance needs."""
    token_dropout: float = 0.1
    """Element dropout on the trunk's input embeddings."""
    ema: float = 0.0
    """Decay of a moving average of the trained weights, saved in their place (0: no average)."""
    seed: int = 0
    """Seed of codec initialization, data order, noise and dropout."""
    resume: bool = False
    """Continue from the newest complete checkpoint in run_dir."""
    check: bool = False
    """Check data, model and settings, print what would happen, and exit without training."""

    def drawn_with(self, own: SamplingConfig) -> SamplingConfig:
        """The checkpoint's default sampling settings, given the model's own."""
        return self.sampling.apply(own)

    def unread(self) -> Unread:
        """Options that only this kind of run does not read; a user who gives one is warned."""
        yield from ()

    def __post_init__(self):
        check_types(self)
        engine = self.engine
        of_parts = {"engine.micro_batch": engine.micro_batch, "log.keep_last": self.log.keep_last}
        check_counts(_MOST_SAMPLES, batch_size=self.batch_size)
        check_counts(steps=self.steps, **of_parts)
        check_seed(self.seed)
        if not 0 < self.epochs <= _MOST_EPOCHS:  # nor NaN
            raise UserError(
                f"epochs={self.epochs} must be a number above 0 (at most {_MOST_EPOCHS:,.0f})"
            )
        if self.batch_size % engine.micro_batch:
            raise UserError(
                f"batch_size={self.batch_size} must be a multiple of "
                f"engine.micro_batch={engine.micro_batch}"
            )
        if self.train_image_layers and self.tuning == "full":
            raise UserError(
                "train_image_layers is for tuning lora or codec: tuning full trains them anyway"
            )
        adapters = told_options(self.lora, vars(self.lora), "lora.")
        if adapters and self.tuning != "lora":
            raise UserError(
                f"{adapters} has no effect with tuning={self.tuning}: leave it out, or "
                "give --tuning lora"
            )
        if engine.precision == "bf16" and engine.zero_stage == 0:
            raise UserError(
                "bf16 needs engine.zero_stage >= 1 (DeepSpeed's stage 0 takes an extra optimizer "
                "step)"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"ema={self.ema} must be in [0, 1); 0.999 is usual, 0 turns it off")
        for name, wanted in (("engine.compile", engine.compile), ("ema", self.ema)):
            if wanted and engine.zero_stage == 3:
                raise UserError(
                    f"{name} needs whole weights in every process: it cannot be combined with "
                    "engine.zero_stage=3, which shards them; use at most 2"
                )
        if not 0 <= self.condition_dropout < 1 or not 0 <= self.token_dropout < 1:
            raise UserError(
                f"condition_dropout={self.condition_dropout} and "
                f"token_dropout={self.token_dropout} must be in [0, 1)"
            )
        if self.log.sample_every and not all(p.strip() for p in self.log.prompts):
            raise UserError(
                "log.prompts has an empty prompt; remove it, or set log.sample_every=0 to draw no "
                "sample sheets"
            )
