"""What the benchmarks' programs can be told; cheap to import, so that --help and mistakes are
answered at once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tyro

from t2i import cli
from t2i.errors import UserError
from t2i.model_options import ModelOptions
from t2i.sampling import SamplingOverrides

if TYPE_CHECKING:
    import torch

_MAIN = ("ckpt", "base.weights", "images", "out", "samples", "limit", "seed")


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
        if self.samples < 1 or (self.limit is not None and self.limit < 1):
            raise UserError(f"samples={self.samples} and limit={self.limit} must be at least 1")

    def select(self, count: int) -> list[int]:
        """Indices of the prompts that are asked for."""
        wanted = min(self.limit or count, count)
        return [i * count // wanted for i in range(wanted)]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(ModelOptions):
    """What to judge, and where to: a model (its images are drawn first), or images that are
    there.
    """

    images: Path | None = None
    """Instead of a model, a folder of images in GenEval's layout (00000/metadata.jsonl,
    00000/samples/00000.png).
    """
    out: Path | None = None
    """Folder for images, verdicts, results and gallery; outputs/<benchmark>/<name of the model> if
    not given.
    """
    samples: int = 4
    """Images per prompt."""
    limit: int | None = None
    """Only so many prompts, spread evenly over all; the result is marked PARTIAL."""
    allow_incomplete: bool = False
    """Report what is there if images are missing or unreadable; the result is marked INCOMPLETE."""
    seed: int = 0
    """An image depends on (seed, prompt index, sample index) alone."""
    batch_size: int = 16
    """Images sampled at once."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOverrides] = field(
        default_factory=SamplingOverrides
    )

    def __post_init__(self):
        if (self.source is None) == (self.images is None):
            raise UserError(
                "give either --ckpt or --base.weights (a model to draw and judge), or --images (a folder)"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        self.scope()

    def check(self) -> "tuple[torch.device, torch.dtype]":
        """As of any model; and whether there are images, where they are to be judged."""
        from t2i.loading import pick_device

        self.sampling.check()
        if self.images is None:
            return super().check()
        if not self.images.exists():
            raise UserError(f"{self.images} does not exist; --images is a folder that holds images")
        return pick_device(self.device, self.dtype)

    def scope(self) -> Scope:
        """How much of the benchmark is asked for."""
        return Scope(self.samples, self.limit, self.allow_incomplete)


@dataclass(frozen=True)
class CompareOptions:
    """Two output folders of the same benchmark."""

    a: tyro.conf.Positional[Path]
    """The first, such as the base model's."""
    b: tyro.conf.Positional[Path]
    """The second; differences are b - a."""


Options = TypeVar("Options", bound=BenchmarkOptions)


def dispatch(
    options: type[Options],
    description: str,
    judge: Callable[[Options], None],
    compare: Callable[[CompareOptions], None],
    main: Sequence[str],
) -> None:
    """A benchmark's program: compare if the first word says so, else draw and judge.

    Args:
        main: options of this benchmark that --help shows, besides those of all.
    """
    if sys.argv[1:2] == ["compare"]:
        compare(cli.parse(CompareOptions, description, 1))
    else:
        judge(cli.parse(options, description, main=(*_MAIN, *main)))
