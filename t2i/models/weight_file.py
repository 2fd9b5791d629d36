"""Backbones published as one weight file, and how to load them strictly."""

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from t2i.errors import naming
from t2i.models.base import AS_PUBLISHED, Backbone, LoadOptions
from t2i.weights import build_empty, load_strict, read_state_dict


class WeightFileBackbone(Backbone):
    """A backbone whose shape is read off its weights and, where these are not enough, its name.

    A family defines `infer_config` and `published_config`, and holds its weights in `gpt`.
    """

    gpt: Any
    """The parameters, named as in the official file."""

    @classmethod
    @abstractmethod
    def infer_config(
        cls, state_dict: dict[str, Tensor], stem: str, grid: tuple[int, int] | None
    ) -> Any:
        """The shape of an official state dict; `stem` is the file's name without suffix, and `grid`
        overrides it.

        Raises:
            UserError: it is another family's, or the weights do not determine the shape.
        """

    @classmethod
    @abstractmethod
    def published_config(cls, stem: str, grid: tuple[int, int] | None) -> Any | None:
        """The shape of the published file named `stem` (no suffix); None if there is none."""

    def fill(self, state_dict: dict[str, Tensor], path: str | Path) -> None:
        """Load the weights of an official file, strictly."""
        load_strict(self.gpt, state_dict, path)

    def official_state_dict(self) -> dict[str, Tensor]:
        return self.gpt.state_dict()

    @classmethod
    def load(cls, path: str | Path, options: LoadOptions = AS_PUBLISHED) -> Self:
        config, grid = options.config, options.grid
        state_dict = read_state_dict(path)
        if options.shapes_only:
            state_dict = {name: tensor.to("meta") for name, tensor in state_dict.items()}
        if config is None:
            with naming(path):
                config = cls.infer_config(state_dict, Path(path).stem, grid)
        elif grid is not None:
            config = replace(config, grid=grid)
        build: Any = cls  # each family's class takes its config
        backbone = build_empty(lambda: build(config), options.dtype, "meta")
        held = sum(tensor.numel() for tensor in state_dict.values())
        if sum(weight.numel() for weight in backbone.parameters()) > held:
            # Names what does not fit, before memory is taken for all of it.
            backbone.fill({name: tensor.to("meta") for name, tensor in state_dict.items()}, path)
        backbone = backbone.to_empty(device="meta" if options.shapes_only else "cpu")
        backbone.fill(state_dict, path)
        return backbone

    @classmethod
    def outline(cls, source: str | Path, options: LoadOptions = AS_PUBLISHED) -> Self | None:
        config = options.config
        if config is None:
            config = cls.published_config(Path(str(source).rpartition(":")[2]).stem, options.grid)
        if config is None:
            return None
        build: Any = cls
        with torch.device("meta"):
            backbone = build(config)
        backbone.frozen.tokenizer = cls.tokenizer_type.outline()
        return backbone.eval()


GIVE_GRID = (
    "config=(height, width); to a program --base.grid HEIGHT WIDTH, to training --backbone.grid"
)
"""Advice for error messages where only the grid is missing."""
GIVE_SHAPE = (
    "a folder of weights and a config.json that gives the shape (docs/add_a_backbone.md), in "
    "Python also the family's config="
)
"""Advice for error messages about weights of a size that nobody published."""


def published_size(sizes: dict[str, dict], **known) -> str:
    """Name of the first size that matches the known parts of a shape; "" if none does."""
    for name, size in sizes.items():
        if all(known.get(key, value) == value for key, value in size.items()):
            return name
    return ""
