"""What a training run is: frozen dataclasses that `tyro` turns into command-line options, and the named recipes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from t2i import presets
from t2i.checkpoint import Tuning
from t2i.errors import UserError
from t2i.lora import LoRAConfig
from t2i.sampling_options import SamplingOverrides
from t2i.tensorar.model import TensorARConfig


@dataclass(frozen=True)
class BackboneOptions:
    """Which pre-trained model to start from."""

    family: str = "llamagen"
    weights: str = "shapes"
    """Official weight file, backbone folder, "shapes" (the shipped offline base), owner/repo:file on the hub, or an earlier run."""
    tokenizer: str | None = None
    """Image tokenizer weights (a folder or "shapes" brings its own)."""
    text_encoder: str | None = None
    """Caption encoder: folder or hub id (a backbone folder or "shapes" brings its own)."""
    text_encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the caption features."""
    generation_only: bool = False
    """Leave unloaded what drawing images does not need: Janus-Pro's understanding tower and text head."""


@dataclass(frozen=True)
class DataOptions:
    """Captioned images."""

    source: str = ""
    """Folder with metadata.jsonl or sidecar .txt captions, parquet, webdataset tars, a hub id, or "shapes" (offline; a folder of that
    name is ./shapes)."""
    image_column: str | None = None
    """Column of the images; found by itself where it is clear."""
    caption_column: str | None = None
    """Column of the captions; found by itself where it is clear."""
    split: str = "train"
    """Split of a hub data set, or sub-folder."""
    config_name: str | None = None
    """Configuration of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    streaming: bool = False
    """Read hub and parquet data row by row without a copy on disk."""
    max_samples: int | None = None
    """Use the first so many samples only."""
    validation_samples: int = 256
    """Held out for the validation loss; never trained on."""
    small_images: Literal["skip", "upscale"] = "skip"
    """What to do with images that are smaller than the model's."""
    cache_dir: Path = Path("cache")
    """Where codes and text features are kept; reused by every run on the same data."""

    def __post_init__(self):
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"data.max_samples={self.max_samples} must be at least 1")


@dataclass(frozen=True)
class LabelledOptions:
    """Images of classes, for class-conditional backbones."""

    source: tuple[str, ...] = ()
    """Folder with train/<class>/, or codes that others computed: LlamaGen's folders (one for each crop range), RAR's .jsonl."""
    split: str = "train"
    """Sub-folder with the classes."""
    views: Literal["ten-crop", "flip"] = "ten-crop"
    """Which crops of an image are encoded: five and their mirror images per crop range, or the centre and its mirror image."""
    crop_ranges: tuple[float, ...] = (1.1, 1.05)
    """Ten-crop: sides of the squares that are cropped, relative to the image size."""
    validation_samples: int = 256
    """Held out for the validation loss; never trained on."""
    cache_dir: Path = Path("cache")
    """Where codes are kept; reused by every run on the same data."""


@dataclass(frozen=True)
class OptimOptions:
    """AdamW. Codec: linear warm-up, then linear decay to zero; backbone: constant after its delay."""

    codec_lr: float = 1e-3
    """Peak learning rate of the input encoder and output decoder."""
    backbone_lr: float = 5e-5
    """Learning rate of the backbone (or of its adapters)."""
    warmup_steps: int = 0
    """Steps over which both rates rise from zero."""
    backbone_delay_steps: int = 0
    """The backbone stands still for so many steps, while the codec finds its feet."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    """On matrices only."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self):
        for name in (
            "codec_lr",
            "backbone_lr",
            "warmup_steps",
            "backbone_delay_steps",
            "weight_decay",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name}={getattr(self, name)} must not be negative")
        if self.grad_clip <= 0:
            raise UserError(f"optim.grad_clip={self.grad_clip} must be above 0")

    def codec_rate(self, step: int, steps: int) -> float:
        """Codec learning rate at a step of a run."""
        return self.codec_lr * self._warm(step) * (1 - step / steps)

    def backbone_rate(self, step: int) -> float:
        """Backbone learning rate at a step."""
        return 0.0 if step < self.backbone_delay_steps else self.backbone_lr * self._warm(step)

    def _warm(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup_steps + 1))


@dataclass(frozen=True)
class EngineOptions:
    """DeepSpeed and precision."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ZeRO shards over the processes: 1 optimizer, 2 and gradients, 3 and weights."""
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    """autocast multiplies matrices in bf16 and keeps fp32 weights; bf16 keeps fp32 master weights in the optimizer only."""
    micro_batch: int = 32
    """Samples per process and forward pass; the rest of the batch is accumulated."""
    gradient_checkpointing: bool = False
    """Recompute the trunk's blocks in the backward pass to save memory."""
    deepspeed_config: Path | None = None
    """JSON with further "zero_optimization" settings, such as launch/zero3_offload.json."""


@dataclass(frozen=True)
class LogOptions:
    """What is written while training; `metrics.jsonl` always is."""

    log_every: int = 10
    """Steps between lines of metrics (0: only with validations)."""
    validate_every: int = 100
    """Steps between validations (0: only at the end)."""
    sample_every: int = 100
    """Steps between sample sheets (0: none). Under ZeRO-3 they are drawn from each checkpoint instead."""
    save_every: int = 1000
    """Steps between checkpoints (0: only at the end)."""
    keep_last: int = 2
    """Newest checkpoints to keep; older ones are deleted."""
    prompts: tuple[str, ...] = (
        "a photo of a red circle",
        "a photo of two squares",
        "a photo of a green star left of a blue ring",
        "a photo of a yellow heart and a black cross",
    )
    """Fixed prompts (or class ids) of the sample sheets."""
    tracker: Literal["auto", "none", "tensorboard", "wandb"] = "auto"
    """A further tracker; auto is TensorBoard if it is installed."""
    project: str = "tensorar"
    """Project name for wandb."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    run_dir: Path = Path("runs/train")
    """Everything the run writes goes here."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    method: TensorARConfig = field(default_factory=TensorARConfig)
    tuning: Tuning = "full"
    """Train the whole backbone, only the codec, or LoRA adapters (and the codec)."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train_image_layers: bool = False
    """With "lora" or "codec", also train the layers that embed and predict image codes, as a whole."""
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
    """Passes over the data; `steps` wins if given."""
    steps: int | None = None
    """Optimizer steps."""
    condition_dropout: float = 0.1
    """Share of samples that are trained without their caption or class, for guidance."""
    token_dropout: float = 0.1
    """Element dropout on the trunk's input embeddings."""
    seed: int = 0
    """Codec initialisation, data order, noise and dropout."""
    resume: bool = False
    """Go on from the newest complete checkpoint in run_dir."""
    check: bool = False
    """Look at data, model and settings, print what would happen, and train nothing."""

    def __post_init__(self):
        least_one = {
            "batch_size": self.batch_size,
            "engine.micro_batch": self.engine.micro_batch,
            "log.keep_last": self.log.keep_last,
            "steps": self.steps,
        }
        for name, value in least_one.items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.epochs <= 0:
            raise UserError(f"epochs={self.epochs} must be above 0")
        if self.batch_size % self.engine.micro_batch:
            raise UserError(
                f"batch_size={self.batch_size} must be a multiple of engine.micro_batch={self.engine.micro_batch}"
            )
        if self.train_image_layers and self.tuning == "full":
            raise UserError(
                "train_image_layers is for tuning lora or codec: full trains them anyway"
            )
        if self.engine.precision == "bf16" and self.engine.zero_stage == 0:
            raise UserError(
                "bf16 needs engine.zero_stage >= 1 (DeepSpeed's stage 0 takes a stray optimizer step)"
            )
        if not 0 <= self.condition_dropout < 1 or not 0 <= self.token_dropout < 1:
            raise UserError(
                f"condition_dropout={self.condition_dropout} and token_dropout={self.token_dropout} must be in [0, 1)"
            )
        if self.log.sample_every and not all(p.strip() for p in self.log.prompts or ("",)):
            raise UserError(
                "log.prompts is empty or has an empty prompt; log.sample_every=0 draws no sample sheets"
            )


def _shapes(method: TensorARConfig, codec_lr: float = 1e-3) -> TrainConfig:
    """The offline world: the shipped base, small batches, two cores. All share one backbone learning rate."""
    return TrainConfig(
        run_dir=Path("runs/shapes"),
        method=method,
        data=DataOptions(source="shapes"),
        optim=OptimOptions(codec_lr=codec_lr, backbone_lr=1e-4, warmup_steps=20),
        engine=EngineOptions(micro_batch=32),
        log=LogOptions(save_every=100),
        batch_size=32,
        steps=200,
        token_dropout=0.0,
    )


def _llamagen_t2i(method: TensorARConfig, **changes) -> TrainConfig:
    """LlamaGen GPT-XL, stage 1 (256 px), with the published recipe."""
    config = TrainConfig(
        run_dir=Path("runs/llamagen-t2i"),
        backbone=BackboneOptions(
            weights="peizesun/llamagen_t2i:t2i_XL_stage1_256.pt",
            tokenizer="peizesun/llamagen_t2i:vq_ds16_t2i.pt",
            text_encoder="google/flan-t5-xl",
            text_encoder_dtype="bfloat16",
        ),
        method=method,
        optim=OptimOptions(codec_lr=1e-4, backbone_lr=1e-5, warmup_steps=100),
        engine=EngineOptions(
            zero_stage=2, precision="bf16", micro_batch=8, gradient_checkpointing=True
        ),
        log=LogOptions(
            sample_every=500,
            validate_every=500,
            prompts=(
                "a photo of a red bus",
                "a photo of two cats",
                "a dog to the left of a bench, morning light",
                "a bowl of oranges next to a blue cup",
            ),
        ),
    )
    return replace(config, **changes)


RECIPES: dict[str, tuple[str, TrainConfig]] = {
    "shapes-iclr2026": ("offline shapes world, ICLR 2026 method", _shapes(presets.iclr2026())),
    "shapes-arxiv2505": ("offline shapes world, arXiv v1 method", _shapes(presets.arxiv2505())),
    "shapes-tuned": (
        "offline shapes world, ICLR 2026 method: light drafts, half of them its own, a faster codec",
        _shapes(presets.tuned(), codec_lr=3e-3),
    ),
    "shapes-control": (
        "offline shapes world, the base fine-tuned as usual",
        _shapes(presets.base()),
    ),
    "t2i-xl-256-iclr2026": (
        "LlamaGen text-to-image XL at 256 px, published recipe, ICLR 2026 method",
        _llamagen_t2i(presets.iclr2026()),
    ),
    "t2i-xl-256-arxiv2505": (
        "LlamaGen text-to-image XL at 256 px, published recipe, arXiv v1 method",
        _llamagen_t2i(presets.arxiv2505()),
    ),
    "t2i-xl-256-tuned": (
        "LlamaGen text-to-image XL at 256 px, light drafts, half of them its own",
        _llamagen_t2i(presets.tuned()),
    ),
    "t2i-xl-256-lora": (
        "LlamaGen text-to-image XL at 256 px, LoRA on the backbone",
        _llamagen_t2i(presets.iclr2026(), tuning="lora"),
    ),
}
"""Named starting points; every option can be changed on the command line."""
