"""Conditions: checks of the captions and class labels that users give, the interface of caption
encoders, padding, the way to the device, and encoded conditions as a trunk reads them.

Shapes: B batch, P prefix length, D model width, C width of a caption's features.
"""

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from t2i.errors import UserError, check_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check_captions(captions: Sequence[str], what: str = "captions") -> None:
    """UserError unless this is a list of strings that can be encoded as UTF-8."""
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
        raise UserError(f"{what} must be a list of strings, got {captions!r:.200}")
    for caption in captions:
        check_text(caption, what)


def given_as_files(prompts: Iterable[str]) -> list[str]:
    """Those prompts that are names of files that exist: a file of prompts may be meant."""
    kinds = (".txt", ".md", ".jsonl", ".json", ".csv")
    return [text for text in prompts if text.lower().endswith(kinds) and os.path.isfile(text)]


def class_ids(values: "Iterable[object] | Tensor", num_classes: int) -> "Tensor":
    """Check class labels and return them as an int64 tensor [n] on the CPU.

    Labels are integers (Python, numpy or torch) in 0 .. num_classes - 1. The null class used by
    guidance is not a valid label: the backbone itself drops conditions.

    Raises:
        UserError: names the first value that is not an integer in this range, and its position.
    """
    import torch  # here, so that programs that only check captions start fast

    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"class labels must be a list of integers, got {values!r}")
    return torch.tensor(
        [_class_id(value, place, num_classes) for place, value in enumerate(values)],
        dtype=torch.long,
    )


def _class_id(value: Any, place: int, num_classes: int) -> int:
    try:
        label = operator.index(value)
    except TypeError:
        label = None
    if label is None or isinstance(value, bool) or not 0 <= label < num_classes:
        raise UserError(
            f"class label {value!r} at position {place} is not an integer "
            f"between 0 and {num_classes - 1}"
        )
    return label


def to_device(x: "Tensor", device: "torch.device") -> "Tensor":
    """`x.to(device)`, but a GPU gets it without this process waiting for the GPU's earlier work."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def left_pad(rows: "Sequence[Tensor]", length: int, fill: float = 0) -> "tuple[Tensor, Tensor]":
    """Batch rows [n_i] or [n_i, C], padded on the left: [B, length] or [B, length, C], and a mask
    bool [B, length], True for a row's own entries.

    Raises:
        ValueError: there are no rows, one is longer than `length`, or their widths differ.
    """
    import torch

    widths = {tuple(row.shape[1:]) for row in rows}
    if len(widths) != 1 or rows[0].ndim > 2:
        shapes = [tuple(row.shape) for row in rows][:8]
        raise ValueError(f"expected rows [n_i, C] with one width C, got {shapes}")
    if (longest := max(map(len, rows))) > length:
        raise ValueError(f"a row has {longest} entries, more than the {length} of the batch")
    batch = rows[0].new_full((len(rows), length, *widths.pop()), fill)
    mask = torch.zeros(batch.shape[:2], dtype=torch.bool, device=batch.device)
    for index, row in enumerate(rows):
        batch[index, length - len(row) :] = row
        mask[index, length - len(row) :] = True
    return batch, mask


class TextEncoder(Protocol):
    """Encodes captions for `Backbone.prepare`."""

    folder: Path | None
    """The folder it was loaded from."""

    def to(self, device: "torch.device | str") -> Self: ...

    def notes(self, captions: Sequence[str]) -> list[list[str] | None]:
        """Fixed phrases for what each caption loses; None for one of which nothing is left."""

    def weights_hash(self) -> str:
        """SHA-256 of everything that an image can depend on."""


@dataclass(frozen=True)
class CaptionFeatures:
    """How to encode captions for a data set's cache, where doing so at every step is expensive."""

    encode: "Callable[[list[str]], list[Tensor]]"
    """Maps captions to features, [n_i, C] each."""
    key: dict
    """Everything the features depend on, as JSON-serializable values."""


@dataclass
class Condition:
    """An encoded condition: the part of the trunk's input that precedes the image."""

    prefix: "Tensor"
    """Embeddings [B, P, D]; the output at the last one predicts the first image token."""
    mask: "Tensor | None" = None
    """Which prefix entries may be attended to, bool [B, P]; None means all."""
    extras: "dict[str, Tensor]" = field(default_factory=dict)
    """Other tensors that a family's trunk needs, batch first."""

    def rows(self, index: "Tensor") -> "Condition":
        """The conditions of the samples `index`."""
        return Condition(
            self.prefix[index],
            None if self.mask is None else self.mask[index],
            {k: v[index] for k, v in self.extras.items()},
        )

    @staticmethod
    def cat(parts: Sequence["Condition"]) -> "Condition":
        """Concatenate along the batch."""
        import torch

        first, masks = parts[0], [p.mask for p in parts if p.mask is not None]
        return Condition(
            torch.cat([p.prefix for p in parts]),
            torch.cat(masks) if masks else None,
            {k: torch.cat([p.extras[k] for p in parts]) for k in first.extras},
        )
