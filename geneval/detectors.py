"""Detectors by name."""

from pathlib import Path
from typing import Literal

from geneval.detector import Detector

DetectorName = Literal["mask2former", "mask2former-hf", "shapes"]


def load_detector(
    name: DetectorName,
    *,
    weights: Path | None = None,
    sha256: str | None = None,
    device: str = "cpu",
) -> Detector:
    """The detector of this name; ValueError says what is wrong with the name or the weights."""
    if name == "shapes":
        from geneval.shapes_detector import ShapesDetector

        return ShapesDetector()
    raise ValueError(f"detector {name!r} is not available; choose shapes")
