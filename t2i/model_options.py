"""Options for the model that a program draws with or exports. Without torch, for a fast --help."""

import logging
import re
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from t2i import __version__
from t2i.errors import UserError, naming, nearest_path, no_folder
from t2i.fields import given_options
from t2i.files import namesake
from t2i.models.families import FamilyName, find_family
from t2i.sampling import (
    DrawOptions,
    SamplingConfig,
    SamplingOverrides,
    Speculate,
    Speed,
    check_counts,
)

if TYPE_CHECKING:
    import torch

    from t2i.tensorar.model import TensorAR

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseOptions:
    """A published base model or, with --ckpt, where the files of the checkpoint's base are now."""

    family: FamilyName | None = None
    """Model family of a published weight file; folders name their own."""
    weights: str | None = None
    """Official weight file or folder, backbone folder, or a name on the hub (owner/repo:file,
    owner/repo). With --ckpt also the folder to which all files of the base moved.
    """
    tokenizer: str | None = None
    """Image tokenizer weights (folders and Open-MAGVIT2's files include their own)."""
    text_encoder: str | None = None
    """Caption encoder of LlamaGen: folder or hub id (a backbone folder includes its own)."""
    text_encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the caption encoder's features."""
    grid: tuple[int, int] | None = None
    """Height and width of an image in codes; only needed for a weight file that was renamed."""

    def check_helpers(self) -> None:
        """UserError for an image tokenizer or a caption encoder that can be nowhere."""
        from t2i.sources import check_named

        if self.tokenizer is not None:
            check_named(self.tokenizer)
        if self.text_encoder is not None:
            check_named(self.text_encoder, folder=True)

    def check_beside(self, checkpoint: Path) -> None:
        """UserError for options that contradict what a checkpoint stores about its base."""
        from t2i.checkpoint_folders import read_config

        stored = read_config(checkpoint)["backbone"]
        for name in ("family", "text_encoder_dtype", "grid"):
            value, own = getattr(self, name), stored.get(name)
            own = tuple(own) if isinstance(own, list) else own
            if value not in (getattr(type(self), name), own):
                raise UserError(
                    f"--base.{name.replace('_', '-')} is for a published base: {checkpoint} uses "
                    f"{own or 'its own'}, not {value}; leave out the option"
                )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A trained model or a plain base, and the device it runs on."""

    ckpt: str | None = None
    """Checkpoint, run (its newest checkpoint) or export folder, or shapes, shapes-janus."""
    base: BaseOptions = field(default_factory=BaseOptions)
    device: str = "auto"
    """cpu, cuda, or auto (a GPU if there is one)."""
    dtype: str = "auto"
    """Type of the model that draws: float32, bfloat16, or auto (bfloat16 on a GPU)."""
    speed: Speed = "auto"
    """How drawing steps are run: eager, graphs (CUDA), compiled (takes a minute first), or auto
    (graphs if they pay for the number of steps, else eager). Images are the same up to rounding.
    """
    speculate: Speculate = "auto"
    """Codes (TensorAR: windows) of each image to draw per call of the model, all but one from
    guesses; wrong guesses are drawn again, so images are the same up to rounding. off: one; auto:
    12 (compiled: 8) if a model without TensorAR draws one image at a time on a CPU, else one.
    """

    @property
    def source(self) -> str | None:
        """The model to draw with, as typed."""
        return self.ckpt or self.base.weights

    @cached_property
    def checkpoint(self) -> Path | None:
        """The checkpoint folder that `ckpt` refers to; None for a plain base."""
        # Found only once: a run that is still training may write a newer one in the meantime.
        from t2i.checkpoint_folders import choose_checkpoint, is_checkpoint

        if self.ckpt is None or not is_checkpoint(self.ckpt):
            return None
        return choose_checkpoint(self.ckpt)

    def check(self) -> "tuple[torch.device, torch.dtype]":
        """The device and type to use, after all checks that do not need the model to be loaded.

        Raises:
            UserError: no model is given, it does not exist or is incomplete, or there is no such
                device or type.
        """
        from t2i.checkpoint_folders import find_checkpoint, is_checkpoint, read_config
        from t2i.loading import pick_device
        from t2i.sources import check_named, family_of, no_backbone, shipped_bases
        from t2i.tensorar.speed import check_speed

        if self.source is None:
            raise UserError(
                "no model: give --ckpt (a checkpoint, or shapes) or --base.weights (a published base)"
            )
        where = pick_device(self.device, self.dtype)
        check_speed(self.speed, where[0], self.speculate)
        folder = Path(self.source)
        if self.ckpt is not None and not folder.is_dir() and self.ckpt not in shipped_bases():
            raise UserError(
                f"checkpoint folder {self.ckpt} {no_folder(folder)}, and no shipped base has this name "
                f"(those are {', '.join(shipped_bases())}); give a published base as "
                f"--base.weights{nearest_path(folder)}"
            )
        if self.ckpt is None and is_checkpoint(self.source):
            raise UserError(f"{self.source} is a checkpoint, not a base: give it as --ckpt")
        if self.ckpt is not None and self.base.weights is not None and self.checkpoint is None:
            raise UserError(
                f"{self.ckpt} is not a checkpoint, so it has no other base: leave out "
                "--base.weights"
            )
        self.base.check_helpers()
        if self.checkpoint is not None:
            self.base.check_beside(self.checkpoint)
        elif self.source in shipped_bases():
            if said := namesake(self.source, "the base that the kit ships"):
                log.warning(said)
        elif folder.is_dir() and not (folder / "config.json").is_file():
            if self.ckpt is None:
                raise no_backbone(folder)
            read_config(find_checkpoint(folder))
        elif self.base.family is None:
            family_of(self.source)
        else:
            check_named(self.source, folder=find_family(self.base.family).published_as_folder)
        return where

    def load(self, device: "torch.device | str", dtype: "torch.dtype | str") -> "TensorAR":
        """Load the model in eval mode, without parts that drawing images does not need."""
        from t2i.checkpoint import from_pretrained, load_base
        from t2i.sources import base_files, family_of

        base = self.base
        assert self.source is not None, "check comes first"
        if self.checkpoint is None:
            family = base.family or family_of(self.source)
            of_captions = base.text_encoder_dtype != BaseOptions.text_encoder_dtype
            if of_captions and find_family(family).text_encoder is None:
                raise UserError(
                    f"--base.text-encoder-dtype has no effect with {family}, which has no caption "
                    "encoder; leave it out"
                )
            given = asdict(base) | {"family": family, "weights": self.source}
            model = load_base(base_files(**given, generation_only=True), device, dtype)
        else:
            model = from_pretrained(
                self.checkpoint,
                base=base.weights,
                tokenizer=base.tokenizer,
                text_encoder=base.text_encoder,
                generation_only=True,
                device=device,
                dtype=dtype,
            )
        model.speed, model.speculate = self.speed, self.speculate
        frozen, spec = model.backbone.frozen, model.backbone.spec
        if frozen.tokenizer is None:
            raise UserError(f"{self.source} includes no image tokenizer: give --base.tokenizer")
        if spec.cond_kind == "text" and frozen.text_encoder is None:
            raise UserError(f"{self.source} includes no caption encoder: give --base.text-encoder")
        return model

    def name(self) -> str:
        """A name of the model for folder names: run and step, the export, or the base's file."""
        from t2i.checkpoint_folders import BEST, EXPORTED
        from t2i.sources import absolute

        assert self.source is not None, "check comes first"
        if self.checkpoint is None:
            name = absolute(self.source.rpartition(":")[2]).name
            name = re.sub(r"\.(pt|pth|ckpt|bin|safetensors)$", "", name)
            # They do not show in the weights, by whose hash requests are told apart.
            unusual = ["x".join(map(str, self.base.grid or ())), self.base.text_encoder_dtype]
            return "-".join([name, *(part for part in unusual if part not in ("", "float32"))])
        folder = self.checkpoint.resolve()
        if folder.parent.name == "checkpoints":
            return f"{folder.parents[1].name}-{folder.name}"
        if folder.name == BEST:
            return f"{folder.parent.name}-{BEST}"
        return folder.parent.name if folder.name == EXPORTED else folder.name

    def about(self, model: "TensorAR") -> dict[str, Any]:
        """Facts about the model for results files."""
        from t2i.checkpoint_folders import read_config

        if self.checkpoint is None:
            assert model.backbone.source is not None, "set by load_backbone"
            return {"kit_version": __version__, "backbone": asdict(model.backbone.source)}
        config = read_config(self.checkpoint)
        facts = {key: config[key] for key in ("kit_version", "tuning", "method", "backbone")}
        step = config["training"].get("step")
        return {"checkpoint": str(self.checkpoint.resolve()), "step": step, **facts}


@dataclass(frozen=True, kw_only=True)
class DrawingModelOptions(ModelOptions):
    """A model, and how a program draws with it."""

    seed: int = 0
    """Random seed. An image depends only on the seed, its prompt index and its sample index."""
    batch_size: int | None = None
    """Images drawn at once, per process; None: 16, or fewer if the GPU has too little memory."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOverrides] = field(
        default_factory=SamplingOverrides
    )

    def __post_init__(self):
        DrawOptions(self.seed, batch_size=self.batch_size)

    def of_model(self) -> "DrawingModelOptions":
        """These options alone, without those that a program adds."""
        own = {f.name: getattr(self, f.name) for f in fields(DrawingModelOptions)}
        return DrawingModelOptions(**own)

    def check(self) -> "tuple[torch.device, torch.dtype]":
        """Like `ModelOptions.check`, and UserError for sampling settings that no model, or not this
        one, takes.
        """
        self.sampling.check()
        where = super().check()
        self._check_windows()
        return where

    def _check_windows(self) -> None:
        """UserError for a window or stride that this model does not have."""
        from t2i.checkpoint import stored_part
        from t2i.checkpoint_folders import read_config
        from t2i.tensorar.method import TensorARConfig
        from t2i.tensorar.windows import Windows

        k, folder = 1, self.checkpoint
        if folder is not None:
            k = stored_part(read_config(folder), "method", TensorARConfig, folder).k
        asked = self.sampling.apply(SamplingConfig())
        with naming(str(self.source)):
            Windows(k, k).shrunk(asked.window, asked.stride)

    def refuse_drawing(self, more: tuple[str, ...] = ()) -> None:
        """UserError if options about drawing are given although no model draws.

        Args:
            more: further options of this program that are about drawing.
        """
        given = [name for name in given_options(self) if name.partition(".")[0] in _DRAWING + more]
        if given:
            typed = [name.removeprefix("sampling.").replace("_", "-") for name in given]
            names = ", ".join(f"--{name}" for name in typed)
            raise UserError(
                f"{names}: only for a model that draws, but none is given; leave it out"
            )

    def drawing(self, model: "TensorAR", *, among_others: bool = False) -> DrawOptions:
        """The settings to draw with this model; UserError if it cannot be drawn with them.

        Args:
            among_others: other models share these options, so do not warn about those without
                effect on this one.
        """
        from t2i.tensorar.sampler import check_sampling, drawn_windows

        sampling = self.sampling.apply(model.sampling)
        check_sampling(model, sampling)  # before a folder is claimed with these settings
        drafts = among_others or drawn_windows(model, sampling).stages > 1
        self.sampling.look_for_unread(sampling, drafts)
        return DrawOptions(self.seed, sampling, self.batch_size, about=self.about(model))


_DRAWING = ("base", "dtype", "speed", "speculate", "seed", "batch_size", "sampling")


@dataclass(frozen=True)
class ExportOptions:
    """The checkpoint to export, and how."""

    ckpt: Path
    """Checkpoint, run (its newest checkpoint) or export folder."""
    out: Path
    """New folder for the export."""
    base: BaseOptions = field(default_factory=BaseOptions)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the stored weights; adapters are merged into the base in float32 first."""
    prompt: tuple[str, ...] = ()
    """Prompts to draw for the model card (class ids for a class-conditional model)."""
    samples: int = 2
    """Images per prompt."""
    device: str = "auto"
    """Device that draws the images: cpu, cuda, or auto."""
    results: tuple[Path, ...] = ()
    """Benchmark results (results.json files) for the model card."""

    def __post_init__(self):
        check_counts(samples=self.samples)
        moved = ("weights", "tokenizer", "text_encoder")
        if other := [name for name in given_options(self.base) if name not in moved]:
            names = ", ".join(f"--base.{name.replace('_', '-')}" for name in other)
            raise UserError(f"{names}: the checkpoint has its own; leave it out")
        if self.samples != ExportOptions.samples and not self.prompt:
            raise UserError("--samples needs a --prompt to draw: give one, or leave it out")
        if not all(prompt.strip() for prompt in self.prompt):
            raise UserError("a --prompt is empty; to draw no samples, leave out --prompt")
