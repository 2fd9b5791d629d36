"""The families of image generators, and what is known of one before its model is loaded.

A family is a folder beside this file, registered by its name in `FAMILIES`. The folder's
`__init__.py` says as `FAMILY` what stands here; everything else is asked of its `Backbone`
(`t2i.models.base`). Nothing here imports PyTorch: programs name families in their `--help`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from t2i.errors import UserError, choose_one

if TYPE_CHECKING:
    from t2i.models.base import Backbone

FAMILIES = (
    "llamagen",
    "janus",
    "open_magvit2",
    "rar",
)
"""One line a family: the name of its folder."""

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[FAMILIES]  # so that the options' parser offers the names


@dataclass(frozen=True)
class Family:
    """What the kit has to know of a family before, or without, loading its model."""

    name: str
    model: str
    """Its `Backbone`, as "module:Class"."""
    text_encoder: str | None = None
    """What encodes captions apart from the model, a `TextEncoder` as "module:Class"."""
    text_encoder_parameters: Mapping[str, int] = field(default_factory=dict)
    """Of published text encoders by name: they are kept on the device beside the model."""
    published_as_folder: bool = False
    """Weights, tokenizers and configuration are published as one folder, not as a file each."""
    prompt_file: str | None = None
    """File of the published folder that turns prompts into ids: its hash is part of a checkpoint's.
    """
    tokenizer_inside: bool = False
    """The published weight file holds the image tokenizer, too."""
    model_types: tuple[str, ...] = ()
    """What config.json of a published folder may say as `model_type`."""
    library: str | None = None
    """The hub's name of another library that loads what `Backbone.save_official` writes."""
    library_usage: tuple[str, ...] = ()
    """How it does so, in lines of Python, from the repository OWNER/NAME."""

    @cached_property
    def backbone_class(self) -> "type[Backbone]":
        """The class of its models."""
        return _named(self.model)

    @cached_property
    def text_encoder_class(self) -> Any:
        """The class of its text encoders; UserError if it takes none."""
        if self.text_encoder is None:
            why = "takes none" if self.prompt_file is None else "brings its own prompt tokenizer"
            raise UserError(f"{self.name} {why}: leave out text_encoder")
        return _named(self.text_encoder)


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def find_family(name: str) -> Family:
    """A family by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in FAMILIES:
        raise UserError(f"unknown backbone family {name!r}; {choose_one(name, FAMILIES)}")
    return import_module(f"t2i.models.{name}").FAMILY
