"""Conditions as users give them, checked: captions, and ImageNet-style class labels."""

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from t2i.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def check_captions(captions: Sequence[str], what: str = "captions") -> None:
    """UserError unless this is a list of strings that text encoders can take."""
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
        raise UserError(f"{what} must be a list of strings, got {captions!r:.200}")
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{what}: {caption!r:.200} holds a lone surrogate ({caption[error.start]!r}), which "
                "is no character; take it out"
            ) from error


def class_ids(values: "Iterable[object] | Tensor", num_classes: int) -> "Tensor":
    """Check class labels and return them as an int64 tensor [n] on the CPU.

    Labels are integers (Python, numpy or torch) in 0 .. num_classes - 1. The null class that
    guidance uses is no label: dropping a condition is the backbone's business.

    Raises:
        UserError: names the first value that is not an integer or out of range, and its place.
    """
    import torch  # here, so that programs which only check captions answer at once

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
