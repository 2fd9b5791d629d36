"""The options of programs that draw and judge images. Does not import torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from t2i import cli
from t2i.errors import UserError, no_folder
from t2i.fields import check_types
from t2i.model_options import DrawingModelOptions
from t2i.sampling import check_counts

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ClassImages:
    """Which images to draw with a class-conditional model."""

    count: int = 50_000
    """Number of images; the protocol has 50,000."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: the same number of images for every class (as RAR and Open-MAGVIT2 do); random:
    classes drawn at random (as LlamaGen does).
    """
    image_size: int | None = None
    """Side of an image in pixels (256 for the published FID of 384 px models); the model's own size
    if not given.
    """

    def __post_init__(self):
        check_counts(count=self.count, image_size=self.image_size)


@dataclass(frozen=True)
class Scope:
    """How much of a benchmark to run."""

    samples: int = 4
    """Images per prompt."""
    limit: int | None = None
    """Use only this many prompts, spread evenly over all; the result is marked PARTIAL."""
    allow_incomplete: bool = False
    """If images are missing or unreadable, report on the others; the result is marked INCOMPLETE.
    """

    def __post_init__(self):
        check_types(self)
        check_counts(samples=self.samples, limit=self.limit)

    def select(self, count: int) -> list[int]:
        """Indices of the prompts to use."""
        wanted = min(self.limit or count, count)
        return [i * count // wanted for i in range(wanted)]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(DrawingModelOptions):
    """What to judge: a model (its images are drawn first), or existing images."""

    images: Path | None = None
    """Judge this folder of images in GenEval's layout (00000/samples/00000.png ...) instead of a
    model.
    """
    out: Path | None = None
    """Output folder; outputs/<benchmark>/<name of the model> if not given (RUN-step_N for a run).
    """
    scope: tyro.conf.OmitArgPrefixes[Scope] = field(default_factory=Scope)

    def __post_init__(self):
        super().__post_init__()
        if (self.source is None) == (self.images is None):
            raise UserError(
                "give either --ckpt or --base.weights (a model to draw and judge), "
                "or --images (a folder)"
            )
        if self.images is not None:
            self.refuse_drawing()

    def check(self) -> "tuple[torch.device, torch.dtype]":
        """Check the model's options, or that the images exist; returns device and dtype."""
        if self.images is None:
            return super().check()
        from t2i.loading import pick_device

        if not self.images.is_dir():
            raise UserError(
                f"{self.images} {no_folder(self.images)}; --images must be a folder of images"
            )
        return pick_device(self.device, self.dtype)


@dataclass(frozen=True)
class CompareOptions:
    """Two output folders of the same benchmark."""

    a: tyro.conf.Positional[Path]
    """The first, such as the base model's."""
    b: tyro.conf.Positional[Path]
    """The second; differences are b - a."""


_MAIN = ("ckpt", "base.weights", "images", "out", "scope.samples", "scope.limit", "seed")
Options = TypeVar("Options", bound=BenchmarkOptions)


def parse(
    options: type[Options], description: str, main: Sequence[str]
) -> Options | CompareOptions:
    """A benchmark program's command line: `compare A B`, or what to judge.

    Args:
        main: this benchmark's options that --help shows, besides those of all benchmarks.
    """
    if sys.argv[1:2] == ["compare"]:
        return cli.parse(CompareOptions, description, 1)
    return cli.parse(options, description, main=(*_MAIN, *main))
