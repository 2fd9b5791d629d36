"""Score images of the shapes classes: how many show their class and nothing else.

python launch/lab/score_class_shapes.py outputs/rar-base.npz outputs/rar-control.npz \\
    outputs/rar-tuned.npz --sheet outputs/rar.png
# also score the tokenizer alone
python launch/lab/score_class_shapes.py outputs/rar-base.npz --base runs/class-shapes/rar

The .npz files come from `launch/sample_imagenet.py`. All must be drawn for the same classes in the
same order, so that image i of one file can be compared with image i of another.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from geneval.rules import RuleOptions
from t2i import cli
from t2i.errors import UserError
from t2i.evaluation.results import markdown_table
from t2i.shapes.scenes import CLASSES, class_image
from t2i.shapes.shapes_detector import ShapesDetector

_SAME = ("count", "labels", "seed")
_TOKENIZED = 20  # images of each class to encode and decode
_NEW = 1_000_000  # number of the first of them: no base was trained on images from here on
_SHEET_COLORS = 128  # saves two thirds of the bytes without a visible difference


@dataclass(frozen=True)
class ScoreConfig:
    """What to score."""

    samples: tyro.conf.Positional[tuple[Path, ...]]
    """.npz files from launch/sample_imagenet.py; all are compared with the first."""
    base: Path | None = None
    """Base whose tokenizer is also scored, on new images: an upper limit for the other scores."""
    sheet: Path | None = None
    """PNG to write, with an image of every class: one row per file."""
    out: Path = Path("outputs/class-shapes/results.json")
    """JSON file for the scores."""


def verdicts_on(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether images uint8 [N, H, W, 3] show their class: bool [N, 3] for shape and color together,
    shape, and color. All three are False for an image with no object or with several.
    """
    detector, verdicts = ShapesDetector(), np.zeros((len(images), 3), dtype=bool)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        found = []
        for shape, detections in detector.detect(image).items():
            clear = np.flatnonzero(detections.scores > RuleOptions().threshold).tolist()
            found += [
                (shape, c) for c in detector.classify_colors(image, shape, detections.take(clear))
            ]
        if len(found) == 1:
            shape, color = (a == b for a, b in zip(found[0], CLASSES[label], strict=True))
            verdicts[i] = shape and color, shape, color
    return verdicts


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """Images uint8 [N, H, W, 3], class ids int64 [N] and settings of a finished .npz file."""
    from t2i.evaluation.draw import sample_labels
    from t2i.evaluation.fid.image_sets import open_images
    from t2i.files import read_json

    record = path.with_name(path.name + ".json")
    if path.suffix != ".npz" or not record.exists():
        raise UserError(
            f"{path} is no .npz of launch/sample_imagenet.py, which writes the settings next to it "
            f"({record.name})"
        )
    opened, settings = open_images(path), read_json(record)
    if settings["classes"] != len(CLASSES):
        raise UserError(
            f"{path} has images of {settings['classes']} classes; "
            f"give files drawn for the {len(CLASSES)} classes of shapes"
        )
    images = np.stack(next(opened.batches(opened.count)))
    balanced = settings["labels"] == "balanced"
    labels = sample_labels(
        settings["count"], len(CLASSES), balanced=balanced, seed=settings["seed"]
    )
    return images, labels.numpy(), settings


def tokenized(base: Path) -> tuple[np.ndarray, np.ndarray]:
    """New images, encoded and decoded by the base's tokenizer, and their class ids."""
    import torch

    from t2i import load_backbone
    from t2i.data.images import to_pixels
    from t2i.sources import family_of

    if not (base / "config.json").exists():
        raise UserError(
            f"{base} is no base of launch/lab/pretrain_class_shapes.py: it has no config.json"
        )
    backbone = load_backbone(family_of(base), base, device="cpu")
    labels = np.arange(len(CLASSES)).repeat(_TOKENIZED)
    side = backbone.image_size[0]
    new = [class_image(label, _NEW + i, side, seed=0) for i, label in enumerate(labels.tolist())]
    with torch.no_grad():
        codes = backbone.encode_images(torch.stack([to_pixels(image) for image in new]))
        return backbone.decode_images(codes).numpy(), labels


def row(verdicts: np.ndarray, first: np.ndarray | None = None) -> dict:
    """Shares of correct images and, if `first` is given, the gain over that file, image by image;
    both with standard errors.
    """
    share, n = verdicts.mean(axis=0), len(verdicts)
    result = {
        "n": n,
        **dict(zip(("right", "shape", "color"), share.tolist(), strict=True)),
        "stderr": math.sqrt(share[0] * (1 - share[0]) / n),
    }
    if first is not None:
        difference = verdicts[:, 0].astype(float) - first[:, 0]
        result |= {
            "minus_first": difference.mean(),
            "minus_first_stderr": difference.std() / n**0.5,
        }
    return result


def table(rows: dict[str, dict]) -> str:
    """The rows as markdown."""
    cells = []
    for name, r in rows.items():
        minus = "-"
        if "minus_first" in r:
            minus = f"{r['minus_first']:+.3f} ± {r['minus_first_stderr']:.3f}"
        shares = [f"{r['right']:.3f} ± {r['stderr']:.3f}", f"{r['shape']:.3f}", f"{r['color']:.3f}"]
        cells.append([name, r["n"], *shares, minus])
    head = ("images", "n", "right", "shape", "color", "minus the first")
    return markdown_table(head, cells)


def one_of_each(images: np.ndarray, labels: np.ndarray) -> list[Image.Image]:
    """The first image of every class; UserError if a class has none."""
    missing = sorted(set(range(len(CLASSES))) - set(labels.tolist()))
    if missing:
        raise UserError(
            f"--sheet needs an image of every class, but class {missing[0]} has none: draw more images"
        )
    return [Image.fromarray(images[labels.tolist().index(c)]) for c in range(len(CLASSES))]


def main() -> None:
    config = cli.parse(ScoreConfig, __doc__)
    from t2i.files import writable_file, write_json
    from t2i.imaging import grid, save_png

    for place in filter(None, (config.out, config.sheet)):
        writable_file(place)
    read = {str(path): read_samples(path) for path in config.samples}
    same = [{name: settings[name] for name in _SAME} for *_, settings in read.values()]
    if any(other != same[0] for other in same):
        raise UserError(
            f"the files were drawn for other classes or with other seeds: {same}; "
            "draw all with the same count, labels and seed"
        )
    if config.sheet is not None:
        cells = [
            cell for images, labels, _ in read.values() for cell in one_of_each(images, labels)
        ]
        sheet = grid(cells, columns=len(CLASSES), cell=48)
        save_png(sheet.quantize(_SHEET_COLORS), config.sheet)
    rows, first = {}, None
    for name, (images, labels, _) in read.items():
        verdicts = verdicts_on(images, labels)
        rows[name] = row(verdicts, first)
        first = verdicts if first is None else first
    if config.base is not None:
        rows[f"new images through the tokenizer of {config.base}"] = row(
            verdicts_on(*tokenized(config.base))
        )
    settings = {name: settings for name, (*_, settings) in read.items()}
    about = {"detector": ShapesDetector().identity(), "settings": settings}
    write_json(config.out, {"scores": rows, **about})
    print(f"{table(rows)}\n\nwrote {config.out}")


if __name__ == "__main__":
    cli.run(main)
