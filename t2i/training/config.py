"""What a training run is: frozen dataclasses that `tyro` turns into command-line options.

Numbers that suit a run only if they grow with it (how many samples are held out, how long the rates
warm up, how often something is written) may be None: they are then settled from the data and the
steps, see `t2i.training.run_plan`. The named recipes are in `t2i/models/*/*_recipes.py`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from t2i.data.captioned import CaptionedImages
from t2i.errors import UserError
from t2i.fields import given_options
from t2i.model_options import BaseOptions
from t2i.sampling import SamplingConfig, SamplingOverrides, check_counts, check_seed
from t2i.tensorar.method import TensorARConfig
from t2i.tuning import LoRAConfig, Tuning


@dataclass(frozen=True)
class BackboneOptions(BaseOptions):
    """Which pre-trained model to start from."""

    family: str = "llamagen"
    """Of a published weight file."""
    weights: str = "shapes"
    """Official weight file, backbone folder, "shapes" (the shipped offline base), owner/repo:file
    on the hub, or an earlier run.
    """
    generation_only: bool = False
    """Leave unloaded what drawing does not need: Janus-Pro's understanding tower and text head."""


_MOST_SAMPLES, _MOST_EPOCHS = 1_048_576, 1e9
"""Of a step, whose samples are listed; and of a run."""
_CAPTION = "{caption}"
_AROUND = " \t\r\n,.;:"  # trigger words


@dataclass(frozen=True)
class _AnyData:
    """What captioned images and images of classes have in common."""

    validation_samples: int | None = None
    """Held out for the validation loss, never trained on; None: 4 % (`t2i.training.run_plan`)."""
    cache_dir: Path = Path("cache")
    """Where codes and text features are kept; reused by every run on the same data."""


@dataclass(frozen=True)
class DataOptions(_AnyData, CaptionedImages):
    """Captioned images."""

    max_samples: int | None = None
    """Use the first so many samples only."""
    trigger: str | None = None
    """Words before every caption ("drawn by xyz"), or around it ("{caption}, drawn by xyz")."""
    small_images: Literal["skip", "upscale"] = "skip"
    """What to do with images that are smaller than the model's."""
    views: Literal["centre", "flip"] = "centre"
    """The centre of each image, or (flip) each time either that or its mirror image; not for
    captions that say left or right, nor for images with writing.
    """

    def __post_init__(self):
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
        """A caption with the trigger words, as the model reads it; as it is if it has them."""
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
    """Folder with train/<class>/, or codes: LlamaGen's folders (one a crop range), RAR's .jsonl."""
    split: str = "train"
    """Sub-folder that is read."""
    views: Literal["ten-crop", "flip"] = "ten-crop"
    """Which crops are encoded: five per crop range, or the centre; each mirrored, too."""
    crop_ranges: tuple[float, ...] = (1.1, 1.05)
    """Ten-crop: sides of the squares that are cropped, relative to the image size."""

    def __post_init__(self):
        # As `t2i.data.images.Views`, which imports torch.
        if not self.crop_ranges or not 1 <= min(self.crop_ranges) <= max(self.crop_ranges) <= 10:
            raise UserError(f"data.crop_ranges={self.crop_ranges} must be factors from 1 to 10")


_MOST_RATE, _LEAST_CLIP = 1e12, 1e-12
"""Of a rate, decay or delay, and of a gradient's norm: what is far beyond overflows in PyTorch."""
_WARMUP_SHARE, _MOST_WARMUP = 0.03, 2000


@dataclass(frozen=True)
class OptimOptions:
    """AdamW. Codec: linear warm-up and decay to zero; backbone: constant after its delay, by
    default.
    """

    codec_lr: float = 1e-3
    """Peak learning rate of the input encoder and output decoder."""
    backbone_lr: float = 5e-5
    """Learning rate of the backbone (or of its adapters)."""
    warmup_steps: int | None = 0
    """Steps over which both rates rise from zero; None is 3 % of the run's."""
    backbone_delay_steps: int = 0
    """Steps for which the backbone is frozen while the codec starts to learn."""
    backbone_falls: bool = False
    """Let the backbone's rate fall to zero over the run, as the codec's does."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    """On matrices only."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if (
                name not in ("betas", "grad_clip") and not 0 <= (value or 0) <= _MOST_RATE
            ):  # nor NaN
                raise UserError(
                    f"optim.{name}={value} must be a number, and not negative (at most "
                    f"{_MOST_RATE:g})"
                )
        if not self.grad_clip >= _LEAST_CLIP:  # nor NaN
            raise UserError(f"optim.grad_clip={self.grad_clip} must be at least {_LEAST_CLIP:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas} must be two numbers in [0, 1)")

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of so many steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(_MOST_WARMUP, round(_WARMUP_SHARE * steps))

    def codec_rate(self, step: int, steps: int) -> float:
        """Codec learning rate at a step of a run."""
        return self.codec_lr * self._warm(step, steps) * (1 - step / steps)

    def backbone_rate(self, step: int, steps: int) -> float:
        """Backbone learning rate at a step of a run."""
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
    """What ZeRO shards over the processes: 1 optimizer, 2 and gradients, 3 and weights."""
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    """autocast multiplies in bf16 and keeps fp32 weights; bf16 has those in the optimizer only."""
    micro_batch: int = 32
    """Samples per process and forward pass; the rest of the batch is accumulated."""
    gradient_checkpointing: bool = False
    """Recompute the trunk's blocks in the backward pass to save memory."""
    codec_checkpointing: bool = False
    """Recompute input encoder and output decoder alone: less memory for little time."""
    compile: bool = False
    """Fuse the operations of the trunk's blocks by torch.compile, which takes a minute at first."""
    deepspeed_config: Path | None = None
    """JSON with further "zero_optimization" settings, such as launch/zero3_offload.json."""


@dataclass(frozen=True)
class LogOptions:
    """What is written while training; `metrics.jsonl` always is."""

    log_every: int | None = 10
    """Steps between lines of metrics (0: only with validations; None: by the run's length)."""
    validate_every: int | None = 100
    """Steps between validations (0: only at the end; None: ten times in a run)."""
    sample_every: int | None = 100
    """Steps between sheets (0: none; None: ten in a run); under ZeRO-3 at each checkpoint."""
    save_every: int | None = 1000
    """Steps between checkpoints (0: only at the end; None: five in a run)."""
    at_start: bool = False
    """Also validate and draw a sheet before the first step: what the base does by itself."""
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
    """Fixed prompts or class ids of the sheets; none: of the first four held-out images."""
    control: Path | None = None
    """Run folder of the control, whose curves this run's page shows beside its own."""
    tracker: Literal["auto", "none", "tensorboard", "wandb"] = "auto"
    """A further tracker; auto is TensorBoard if it is installed."""
    project: str = "tensorar"
    """Project name for wandb."""

    def __post_init__(self):
        for name in ("log_every", "validate_every", "sample_every", "save_every"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(
                    f"log.{name}={getattr(self, name)} must be a number of steps, or 0: see its "
                    "help"
                )


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    learns_from_data: ClassVar[bool] = True
    """Whether the steps read `data`, or it is only validated on."""
    run_dir: Path = Path("runs/train")
    """Everything the run writes goes here."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    method: TensorARConfig = field(default_factory=TensorARConfig)
    tuning: Tuning = "full"
    """Train the whole backbone, only the codec, or LoRA adapters (and the codec)."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train_image_layers: bool = False
    """With "lora" or "codec", train the layers that embed and predict image codes, too."""
    data: tyro.conf.AvoidSubcommands[DataOptions | LabelledOptions] = field(
        default_factory=DataOptions
    )
    optim: OptimOptions = field(default_factory=OptimOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    log: LogOptions = field(default_factory=LogOptions)
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    """Sampling of the sheets, and the checkpoint's default."""
    batch_size: int = 256
    """Samples per optimizer step, over all processes."""
    epochs: float = 20.0
    """Passes over the data; `steps` wins if it is given. A recipe's own steps give way to them."""
    steps: int | None = None
    """Optimizer steps."""
    condition_dropout: float = 0.1
    """Share of samples that are trained without their caption or class, for guidance."""
    token_dropout: float = 0.1
    """Element dropout on the trunk's input embeddings."""
    ema: float = 0.0
    """Decay of a moving average of the trained weights, which is what is saved then (0: none)."""
    seed: int = 0
    """Codec initialisation, data order, noise and dropout."""
    resume: bool = False
    """Go on from the newest complete checkpoint in run_dir."""
    check: bool = False
    """Look at data, model and settings, print what would happen, and train nothing."""

    def drawn_with(self, own: SamplingConfig) -> SamplingConfig:
        """How the checkpoint draws by default, of the model's own settings."""
        return self.sampling.apply(own)

    def __post_init__(self):
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
                "train_image_layers is for tuning lora or codec: full trains them anyway"
            )
        adapters = [f"lora.{k}={getattr(self.lora, k)}" for k in given_options(self.lora)]
        if adapters and self.tuning != "lora":
            raise UserError(
                f"{', '.join(adapters)} has no effect with tuning={self.tuning}: leave it out, or "
                "give --tuning lora"
            )
        if engine.precision == "bf16" and engine.zero_stage == 0:
            raise UserError(
                "bf16 needs engine.zero_stage >= 1 (DeepSpeed's stage 0 takes a stray optimizer "
                "step)"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"ema={self.ema} must be in [0, 1); 0.999 is usual, 0 is none")
        for name, wanted in (("engine.compile", engine.compile), ("ema", self.ema)):
            if wanted and engine.zero_stage == 3:
                raise UserError(
                    f"{name} needs whole weights in every process: it cannot be with "
                    "engine.zero_stage=3, which shards them; use at most 2"
                )
        if not 0 <= self.condition_dropout < 1 or not 0 <= self.token_dropout < 1:
            raise UserError(
                f"condition_dropout={self.condition_dropout} and "
                f"token_dropout={self.token_dropout} must be in [0, 1)"
            )
        if self.log.sample_every and not all(p.strip() for p in self.log.prompts):
            raise UserError(
                "log.prompts is empty or has an empty prompt; log.sample_every=0 draws no sample "
                "sheets"
            )
