"""Writes the files of a rehearsal: each kind of model writes its own and describes their use."""

from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

from t2i.files import write_json


@dataclass(frozen=True)
class Written:
    """A model with random weights in its authors' layout, and how to train it."""

    side: int
    """Side of an image in pixels."""
    base: dict[str, str] = field(default_factory=dict)
    """Options of the base, without their prefix: "weights", "tokenizer", ..."""
    program: str = ""
    """Verb of the training program; "" for a judge."""
    recipe: str = ""
    """The recipe for this size, or for the nearest published one."""
    classes: int = 0
    """Number of classes; 0 if the model draws captions."""
    library: str = ""
    """Python code that loads an export from FOLDER with another library; "" if none can."""


JUDGES = {
    "mask2former": "geneval.detector_rehearsal",
    "mplug": "dpg_bench.mplug.mplug_rehearsal",
}
"""Modules that write the benchmarks' judges; a model family's module is in its own folder."""


def module_of(model: str) -> str:
    """The module that writes the files of this kind of model."""
    return JUDGES.get(model, f"t2i.models.{model}.{model}_rehearsal")


def write(model: str, size: str, out: str, holes: bool = False) -> None:
    """Write the files of a model to OUT/base, and four pictures to OUT/data."""
    from t2i.rehearsal.random_weights import RandomWeights

    base = Path(out) / "base"
    base.mkdir(parents=True)
    module = import_module(module_of(model))
    written = module.write(base, size, RandomWeights(holes=holes))
    _write_pictures(Path(out) / "data", written)
    write_json(base / "rehearsal.json", asdict(written))


def _write_pictures(folder: Path, written: Written) -> None:
    """Write four pictures of noise, with captions or in class folders."""
    import numpy as np
    from PIL import Image

    for place in range(written.classes):
        (folder / "train" / f"class_{place:04d}").mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (written.side, written.side, 3)
    for number in range(4):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8))
        if written.classes:
            image.save(folder / "train" / f"class_{number:04d}" / f"{number}.png")
        else:
            image.save(folder / f"{number}.png")
            caption = f"a picture of {number} red foxes in the snow"
            (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
