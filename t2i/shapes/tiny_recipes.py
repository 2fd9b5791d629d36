"""Settings for making the tiny bases of the shapes world. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from t2i.errors import UserError
from t2i.sampling import check_counts

PIXELS_PER_CODE = 4
"""Side of the image area that a code covers, for every tiny image tokenizer."""


@dataclass(frozen=True)
class CaptionBase:
    """Recipe of a base that draws captions."""

    out: Path
    """Folder for the base."""
    family: Literal["llamagen", "janus"] = "llamagen"
    seed: int = 0
    """World that the training scenes come from; also seeds the weights."""
    image_size: int = 64
    """Side of the images in pixels."""
    vq_steps: int = 1500
    vq_batch: int = 32
    vq_lr: float = 1e-3
    tokenizer: Path | None = None
    """Finished image tokenizer to use instead of training one."""
    scenes: int = 96000
    """Captioned scenes for the GPT: each is seen about twice, as large models memorize repeats."""
    gpt_steps: int = 3000
    gpt_batch: int = 64
    gpt_lr: float = 2e-3
    dim: int = 192
    """Width of the GPT (its heads are 32 wide)."""
    layers: int = 6
    caption_tokens: int = 16
    """Longest caption in tokens, for LlamaGen; Janus has no limit."""
    text_dim: int = 128
    """Width of LlamaGen's text encoder."""
    minutes: float | None = None
    """Time limit for all of it, of which encoding scenes may take a third; none by default."""
    device: str = "auto"
    """auto, cpu or cuda."""
    workers: int = 0
    """Number of processes that draw scenes; 0 draws them in the main process."""
    compile: bool = False
    """Compile the GPT's blocks: takes half a minute, and pays on a GPU."""
    constant: bool = False
    """Keep the learning rate constant, as for published bases; nothing is scored then."""


@dataclass(frozen=True)
class ClassBase:
    """Recipe of a base that draws classes."""

    backbone: Literal["llamagen", "open_magvit2", "rar"]
    out: Path = Path("runs/class-shapes")
    """Folder for the images and the base of each family."""
    images_per_class: int = 200
    image_size: int = 24
    """Side of the images in pixels, a multiple of 4 (a code covers 4 x 4 pixels)."""
    tokenizer_steps: int = 800
    tokenizer_lr: float = 4e-3
    """Peak learning rate."""
    steps: int = 600
    """Optimizer steps of the generator."""
    lr: float = 2e-3
    batch_size: int = 64
    dim: int = 96
    layers: int = 4
    seed: int = 0

    def __post_init__(self):
        names = ("images_per_class", "image_size", "tokenizer_steps", "steps", "batch_size")
        for name in (*names, "dim", "layers"):
            check_counts(**{name: getattr(self, name)})
        if self.image_size % PIXELS_PER_CODE:
            raise UserError(f"image_size={self.image_size} must be a multiple of {PIXELS_PER_CODE}")
