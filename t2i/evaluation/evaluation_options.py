"""What is to be drawn and judged, as programs can be told it. Without torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from t2i import cli
from t2i.errors import UserError
from t2i.model_options import DrawingModelOptions
from t2i.sampling import check_counts

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ClassImages:
    """Which images to draw of a class-conditional model."""

    count: int = 50_000
    """Number of images; the protocol has 50,000."""
    labels: Literal["balanced", "random"] = "balanced"
    """As many images of every class (as for RAR, Open-MAGVIT2), or at random (as for LlamaGen)."""
    image_size: int | None = None
    """Side in pixels (256 for the published FID of 384 px models); the model's own if not given."""

    def __post_init__(self):
        check_counts(count=self.count)
        if self.image_size is not None:
            check_counts(image_size=self.image_size)


@dataclass(frozen=True)
class Scope:
    """How much of a benchmark is asked for."""

    samples: int = 4
    """Images per prompt."""
    limit: int | None = None
    """Only so many prompts, spread evenly over all; the result is marked PARTIAL."""
    allow_incomplete: bool = False
    """Report what is there if images are missing or unreadable; the result is marked INCOMPLETE."""

    def __post_init__(self):
        check_counts(samples=self.samples)
        if self.limit is not None:
            check_counts(limit=self.limit)

    def select(self, count: int) -> list[int]:
        """Indices of the prompts that are asked for."""
        wanted = min(self.limit or count, count)
        return [i * count // wanted for i in range(wanted)]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(DrawingModelOptions):
    """What to judge: a model (its images are drawn first), or images that are there."""

    images: Path | None = None
    """Instead of a model, a folder of images in GenEval's layout (00000/samples/00000.png ...)."""
    out: Path | None = None
    """Folder for all that comes of it; outputs/<benchmark>/<name of the model> if not given (of a
    run: RUN-step_N).
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
        """As for any model; and whether there are images, where they are to be judged."""
        if self.images is None:
            return super().check()
        from t2i.loading import pick_device

        if not self.images.exists():
            raise UserError(f"{self.images} does not exist; --images is a folder that holds images")
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
        main: options of this benchmark that --help shows, besides those of all.
    """
    if sys.argv[1:2] == ["compare"]:
        return cli.parse(CompareOptions, description, 1)
    return cli.parse(options, description, main=(*_MAIN, *main))
