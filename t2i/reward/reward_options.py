"""The settings of reward fine-tuning, on top of those of any training run. Without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from t2i.errors import UserError
from t2i.sampling import SamplingConfig
from t2i.training.config import TrainConfig

BUILT_IN = ("geneval", "geneval-soft", "dpg", "clip")

_MOST, _MOST_WORKERS = 1_000_000, 256
"""Of numbers that are more than anything has a use for, before they overflow or fill memory."""


@dataclass(frozen=True)
class RewardOptions:
    """What is rewarded, how it is drawn, and how strongly it is learned from."""

    functions: tuple[str, ...] = ("geneval-soft",)
    """geneval (the verdict, 0 or 1), geneval-soft (credit for objects and colours, too), dpg
    (share of questions answered yes), clip (similarity of image and prompt), or your own
    function, package.module:function, of (images, metadata) -> a number an image. None: nothing
    is rewarded; only start_cfg_scale and start_temperature are learned.
    """
    weights: tuple[float, ...] = ()
    """Of each function in the sum; none: 1 for all."""
    prompts: str = "shapes"
    """shapes or official (GenEval's grammar with the offline world's words or the official ones),
    or your own file: .txt, or .jsonl with "prompt" and whatever your functions read. Prompts of a
    benchmark are left out.
    """
    tasks: tuple[str, ...] = ("two_object", "counting", "colors", "position", "color_attr")
    """GenEval tasks that prompts are made of, in turn."""
    group: int = 8
    """Images of a prompt, which are compared with each other; batch_size / group prompts a step."""
    cfg_scale: float = 1.0
    """Guidance of what is drawn, scored and trained; 1 is off and halves the work."""
    temperature: float = 1.0
    """Of what is drawn, scored and trained."""
    updates: int = 1
    """Optimizer steps on a batch of images; with 1 the ratio is 1 and nothing is ever clipped."""
    clip: float = 0.2
    """The ratio of an image code's probabilities counts from 1 - clip to 1 + clip only."""
    kl: float = 0.02
    """Weight of the distance to the start, in nats per code."""
    start_cfg_scale: float | None = None
    """Guidance of the start, in that distance; None: cfg_scale. With it, the model learns to draw
    unguided what the start draws guided, at half the work.
    """
    start_temperature: float | None = None
    """Temperature of the start, in that distance; None: temperature."""
    by_spread: bool = True
    """Divide advantages by the spread of their group (GRPO), not by the mean spread of all."""
    detector: Literal["auto", "mask2former", "mask2former-hf", "shapes"] = "auto"
    """Who finds objects for geneval; auto: by the prompts."""
    detector_weights: Path | None = None
    """Weights of the detector (CLIP's beside it), if they are not to be downloaded."""
    answerer: Literal["auto", "mplug", "blip-vqa", "vlm", "shapes"] = "auto"
    """Who answers questions for dpg; auto: by the prompts."""
    answerer_weights: str | None = None
    """Folder or hub id of these weights."""
    workers: int = 0
    """Processes that judge, on the CPU, for each process that draws; 0: it judges by itself, with
    the judges' weights on its own device.
    """
    seconds: float = 600.0
    """A function that takes longer for a batch stops the run."""
    constant: int = 5
    """A function that gives one number to all images of so many batches stops the run."""
    draw_batch: int = 64
    """Images that a process draws at once; another number changes rounding, and nothing else."""
    watch: tuple[str, ...] = ("geneval", "dpg")
    """Built-in functions whose own benchmark is drawn and judged at validations, rewarded or not.
    """
    watch_prompts: int = 8
    """Prompts of each task of these benchmarks (0: all)."""
    watch_images: int = 2
    """Images of each of these prompts; diversity needs two."""

    def __post_init__(self):
        if not self.functions and (self.teacher is None or not self.kl):
            raise UserError(
                "reward.functions is empty, so nothing would be learned: name one of "
                f"{', '.join(BUILT_IN)}, or learn a guided start (reward.start_cfg_scale, reward.kl)"
            )
        for name in self.functions:
            if name not in BUILT_IN and not _is_path(name):
                raise UserError(
                    f"reward.functions: {name!r} is none of {', '.join(BUILT_IN)}, and no "
                    "package.module:function"
                )
        if len(set(self.functions)) < len(self.functions):
            raise UserError(f"reward.functions={self.functions} names one of them twice")
        if self.weights and len(self.weights) != len(self.functions):
            raise UserError(
                f"reward.weights={self.weights} must be one for each of the functions "
                f"{', '.join(self.functions)}"
            )
        if unknown := [name for name in self.watch if name not in BUILT_IN]:
            raise UserError(f"reward.watch: {unknown[0]!r} is none of {', '.join(BUILT_IN)}")
        least = {"group": 2, "kl": 0, "watch_prompts": 0, "workers": 0}
        least |= dict.fromkeys(("updates", "constant", "draw_batch", "watch_images"), 1)
        for name, bound in least.items():
            if not bound <= getattr(self, name) <= _MOST:
                raise UserError(
                    f"reward.{name}={getattr(self, name)} must be at least {bound} (and at most "
                    f"{_MOST:,})"
                )
        if self.workers > _MOST_WORKERS:
            raise UserError(
                f"reward.workers={self.workers} must be at most {_MOST_WORKERS}: each is a process"
            )
        if not all(abs(weight) <= _MOST for weight in self.weights):  # nor NaN
            raise UserError(
                f"reward.weights={self.weights} must be numbers from -{_MOST:,} to {_MOST:,}"
            )
        for name in ("clip", "temperature", "start_temperature", "seconds"):
            if (value := getattr(self, name)) is not None and not 1e-6 <= value <= _MOST:
                raise UserError(
                    f"reward.{name}={value} must be above 0 (from 0.000001 to {_MOST:,})"
                )
        if not self.tasks:
            raise UserError("reward.tasks is empty: name some of GenEval's tasks")
        self.sampling, self.teacher  # noqa: B018 (raise for guidance below 1)

    def weighted(self) -> dict[str, float]:
        """Each function's weight."""
        return dict(zip(self.functions, self.weights or (1.0,) * len(self.functions), strict=True))

    @property
    def sampling(self) -> SamplingConfig:
        """How images are drawn that are learned from: without filters, which would cut off what
        they remove from learning, too.
        """
        return SamplingConfig(cfg_scale=self.cfg_scale, temperature=self.temperature)

    @property
    def teacher(self) -> SamplingConfig | None:
        """How the start draws, if not as the run does."""
        if self.start_cfg_scale is None and self.start_temperature is None:
            return None
        scale = self.cfg_scale if self.start_cfg_scale is None else self.start_cfg_scale
        own = self.start_temperature
        return SamplingConfig(scale, temperature=self.temperature if own is None else own)

    @property
    def world(self) -> str:
        """Whose benchmarks and judges belong to the prompts."""
        return "shapes" if self.prompts == "shapes" else "official"


def _is_path(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(map(str.isidentifier, module.split(".")))


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """A run of reward fine-tuning: a training run whose batches are drawn, not read.

    `data` are captioned images whose loss is watched; nothing is trained on them.
    """

    learns_from_data: ClassVar[bool] = False
    reward: RewardOptions = field(default_factory=RewardOptions)

    def __post_init__(self):
        super().__post_init__()
        if self.steps is None:
            raise UserError("steps is not given: a run on drawn images has no passes over data")
        if self.batch_size % self.reward.group:
            raise UserError(
                f"batch_size={self.batch_size} must be a multiple of "
                f"reward.group={self.reward.group}: that many images of each prompt are compared"
            )
        if self.engine.zero_stage == 3:
            raise UserError(
                "reward fine-tuning draws in every process, which needs whole weights: use "
                "engine.zero_stage at most 2"
            )
        if self.engine.precision == "autocast":
            raise UserError(
                "engine.precision=autocast draws in another precision than it learns: use fp32, or "
                "bf16 with engine.zero_stage 1 or 2"
            )
        if self.method.k > 1 and self.method.noise == "gaussian":
            raise UserError("method.noise=gaussian is for training on data; drafts are drawn here")

    def drawn_with(self, own: SamplingConfig) -> SamplingConfig:
        """As it was learned, where guidance was: to guide again would apply it twice."""
        if self.reward.teacher is not None:
            own = self.reward.sampling
        return super().drawn_with(own)

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // self.reward.group
