"""The settings of reward fine-tuning, in addition to those of any run. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from t2i.errors import UserError
from t2i.fields import check_types
from t2i.sampling import SamplingConfig
from t2i.training.config import TrainConfig, Unread

BUILT_IN = ("geneval", "geneval-soft", "dpg", "clip")

_MOST, _MOST_WORKERS = 1_000_000, 256
"""Upper limits of numbers: larger ones have no use, and would overflow or fill memory."""


@dataclass(frozen=True)
class RewardOptions:
    """What is rewarded, how images are drawn, and how strongly the model learns from them."""

    functions: tuple[str, ...] = ("geneval-soft",)
    """geneval (the verdict, 0 or 1), geneval-soft (with partial credit for objects and colors), dpg
    (share of questions answered yes), clip (similarity of image and prompt), or your own
    package.module:function of (images, metadata) that returns a number per image. Empty: nothing is
    rewarded; the model only learns to draw as the start does with start_cfg_scale and
    start_temperature.
    """
    weights: tuple[float, ...] = ()
    """Weight of each function in the sum; empty: 1 for all."""
    prompts: str = "shapes"
    """shapes or official (GenEval's grammar with the offline world's words or the official ones),
    or your own file: .txt, or .jsonl with "prompt" and whatever your functions read. Prompts of a
    benchmark are left out.
    """
    tasks: tuple[str, ...] = ("two_object", "counting", "colors", "position", "color_attr")
    """GenEval tasks that prompts are taken from, in turn."""
    group: int = 8
    """Images per prompt, compared with each other; a step has batch_size / group prompts."""
    cfg_scale: float = 1.0
    """Guidance in drawing, scoring and training; 1 turns it off and halves the work."""
    temperature: float = 1.0
    """Temperature in drawing, scoring and training."""
    updates: int = 1
    """Optimizer steps on each batch of images; with 1 the ratio is always 1 and never clipped."""
    clip: float = 0.2
    """The ratio of a code's new and old probability is clipped to 1 - clip .. 1 + clip."""
    kl: float = 0.02
    """Weight of the divergence from the start (in nats per code) in the loss."""
    start_cfg_scale: float | None = None
    """Guidance of the start in that divergence; None: cfg_scale. With it, the model learns to draw
    unguided what the start draws guided, at half the work.
    """
    start_temperature: float | None = None
    """Temperature of the start in that divergence; None: temperature."""
    by_spread: bool = True
    """Divide advantages by the spread of their group (GRPO); otherwise by that of all groups."""
    detector: Literal["auto", "mask2former", "mask2former-hf", "shapes"] = "auto"
    """The object detector for geneval; auto: the one that suits the prompts (a file: the base)."""
    detector_weights: Path | None = None
    """Local weights of the detector, with CLIP's next to them; None: download them if needed."""
    answerer: Literal["auto", "mplug", "blip-vqa", "vlm", "shapes"] = "auto"
    """The model that answers questions for dpg; auto: the one that suits the prompts."""
    answerer_weights: str | None = None
    """Folder or hub id of the answerer's weights."""
    workers: int = 0
    """Judging processes, on the CPU, for each drawing process; 0: each drawing process judges, with
    the judges' weights on its own device.
    """
    seconds: float = 600.0
    """Stop the run if a function takes longer than this for a batch."""
    constant: int = 5
    """Stop the run if a function gives all images one number in this many successive batches."""
    draw_batch: int = 64
    """Images that a process draws at once; changes results only by rounding."""
    watch: tuple[str, ...] = ("geneval", "dpg")
    """Built-in functions whose benchmark is drawn and judged at validations, rewarded or not."""
    watch_prompts: int = 8
    """Prompts per task of these benchmarks, at most as many as they have (0: all)."""
    watch_images: int = 2
    """Images per prompt of these benchmarks; diversity needs two."""

    def __post_init__(self):
        check_types(self, "reward.")
        for name in self.functions:
            if name not in BUILT_IN and not _is_path(name):
                raise UserError(
                    f"reward.functions: {name!r} is none of {', '.join(BUILT_IN)}, and not a "
                    "package.module:function (of a file FOLDER/rewards.py: rewards:function, with "
                    "PYTHONPATH=FOLDER)"
                )
        if len(set(self.functions)) < len(self.functions):
            raise UserError(f"reward.functions={self.functions} has the same function twice")
        if self.weights and len(self.weights) != len(self.functions):
            raise UserError(
                f"reward.weights={self.weights} must have one weight for each of the functions "
                f"{', '.join(self.functions)}"
            )
        if not any(self.weighted().values()) and (self.teacher is None or not self.kl):
            raise UserError(
                "reward.functions is empty, or all its weights are 0, so nothing would be learned: "
                f"name one of {', '.join(BUILT_IN)}, or learn a guided start "
                "(reward.start_cfg_scale, reward.kl)"
            )
        if self.teacher is not None and not self.kl:
            raise UserError(
                "reward.start_cfg_scale and reward.start_temperature have no effect with "
                "reward.kl=0: leave them out, or give a reward.kl"
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
            raise UserError("reward.tasks is empty: give some of GenEval's tasks")
        self.sampling, self.teacher  # noqa: B018 (raise for guidance below 1)

    def weighted(self) -> dict[str, float]:
        """Each function's weight."""
        return dict(zip(self.functions, self.weights or (1.0,) * len(self.functions), strict=True))

    @property
    def sampling(self) -> SamplingConfig:
        """How the images to learn from are drawn: without filters, since codes that these remove
        could never be learned.
        """
        return SamplingConfig(cfg_scale=self.cfg_scale, temperature=self.temperature)

    @property
    def teacher(self) -> SamplingConfig | None:
        """How the start draws, if differently from the run."""
        if self.start_cfg_scale is None and self.start_temperature is None:
            return None
        scale = self.cfg_scale if self.start_cfg_scale is None else self.start_cfg_scale
        own = self.start_temperature
        return SamplingConfig(scale, temperature=self.temperature if own is None else own)

    @property
    def world(self) -> str:
        """The world whose benchmarks and judges suit the prompts; of a file's, the detector's."""
        own = self.prompts != "official" and self.detector == "shapes"
        return "shapes" if own or self.prompts == "shapes" else "official"


def _is_path(name: str) -> bool:
    module, colon, function = name.partition(":")
    names = [function, *module.split(".")]
    return bool(colon) and all(map(str.isidentifier, names)) and not module.endswith(".py")


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """A run of reward fine-tuning: its batches are drawn by the model, not read from data.

    `data` are captioned images, used only for the held-out loss.
    """

    learns_from_data: ClassVar[bool] = False
    reward: RewardOptions = field(default_factory=RewardOptions)

    def __post_init__(self):
        super().__post_init__()
        if self.steps is None:
            raise UserError(
                "steps is not given: epochs do not apply, since a run on drawn images makes no "
                "passes over data; give --steps"
            )
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
                "engine.precision=autocast would draw and learn in different precisions: use fp32, "
                "or bf16 with engine.zero_stage 1 or 2"
            )
        if self.method.k > 1 and self.method.noise == "gaussian":
            raise UserError(
                "method.noise=gaussian is for training on data, but here drafts are drawn; use "
                "another method.noise"
            )

    def drawn_with(self, own: SamplingConfig) -> SamplingConfig:
        """The run's own settings if guidance was built in: guiding again would apply it twice."""
        if self.reward.teacher is not None:
            own = self.reward.sampling
        return super().drawn_with(own)

    def unread(self) -> Unread:
        dropout = {"condition_dropout", "token_dropout", "lora.dropout"}
        of_loss = {f"method.{name}" for name in ("own_drafts", "anneal", "slot_weights")}
        yield dropout | of_loss, "reward fine-tuning, which learns from drawn images"
        if self.reward.prompts not in ("shapes", "official"):
            yield {"reward.tasks"}, f"reward.prompts={self.reward.prompts}, a file"
        if self.reward.updates == 1:
            yield {"reward.clip"}, "reward.updates=1 (the ratio is always 1)"
        used = {*self.reward.functions, *self.reward.watch}
        if not used & {"geneval", "geneval-soft"}:
            weights = set() if "clip" in used else {"reward.detector_weights"}
            yield weights | {"reward.detector"}, "reward.functions and watch without geneval"
        if not self.reward.watch:
            yield {"reward.watch_prompts", "reward.watch_images"}, "an empty reward.watch"
        if not self.reward.functions:
            yield {"reward.by_spread", "reward.constant"}, "empty reward.functions"
        if not used:
            judges = {"reward.workers", "reward.seconds"}
            yield judges, "empty reward.functions and reward.watch: nothing is judged"
        if "dpg" not in used:
            answerer = {"reward.answerer", "reward.answerer_weights"}
            yield answerer, "reward.functions and watch without dpg"

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // self.reward.group
