"""The families of image generators, and what is known about each without loading its model.

A family is a folder next to this file, registered by name in `FAMILIES`. Its `__init__.py` defines
`FAMILY`, an instance of `Family`; everything else is up to its `Backbone` (`t2i.models.base`).
Nothing here imports PyTorch, because programs list the families in their `--help`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
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
"""The folder names of all families, one per line."""

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[FAMILIES]  # so that the command line offers the names


@dataclass(frozen=True)
class Family:
    """What the kit needs to know about a family before, or without, loading its model."""

    name: str
    model: str
    """Its `Backbone` class, as "module:Class"."""
    text_encoder: str | None = None
    """The `TextEncoder` class of a separate caption encoder, as "module:Class"."""
    text_encoder_parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameter counts of published text encoders, which share the device with the model."""
    published_as_folder: bool = False
    """Weights, tokenizers and configuration are published as one folder, not as separate files."""
    prompt_file: str | None = None
    """File of the published folder that turns prompts into ids; its hash enters a checkpoint's."""
    tokenizer_inside: bool = False
    """The published weight file also holds the image tokenizer."""
    model_types: tuple[str, ...] = ()
    """The values that `model_type` may have in a published folder's config.json."""
    library: str | None = None
    """The hub's name for another library that can load what `Backbone.save_official` writes."""
    library_usage: tuple[str, ...] = ()
    """Lines of Python that load the repository OWNER/NAME with that library."""

    @cached_property
    def backbone_class(self) -> "type[Backbone]":
        """The class of its models."""
        return _import_class(self.model)

    @cached_property
    def text_encoder_class(self) -> Any:
        """The class of its text encoder; UserError if it takes none."""
        if self.text_encoder is None:
            why = (
                "takes no text encoder"
                if self.prompt_file is None
                else "brings its own prompt tokenizer"
            )
            raise UserError(f"{self.name} {why}: leave out text_encoder")
        return _import_class(self.text_encoder)


def _import_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def module_if_any(family: str, part: str) -> str | None:
    """A part of a family that not all have ("recipes", "rehearsal"): its module, or None."""
    name = f"t2i.models.{family}.{family}_{part}"
    return name if find_spec(name) else None


def find_family(name: str) -> Family:
    """The family with this name; UserError if there is none."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"unknown backbone family {name!r}; {choose_one(name, FAMILIES)}")
    family: Family = import_module(f"t2i.models.{name}").FAMILY
    assert family.name == name, f"the folder t2i/models/{name} calls its family {family.name}"
    return family
