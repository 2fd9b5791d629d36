"""The shapes world as a data source: `--data.source shapes` (or shapes:5000 for so many scenes),
drawn as they are read.

A folder named shapes is given as `./shapes`.
"""

from t2i.data.samples import Sample, Source
from t2i.errors import UserError
from t2i.files import namesake
from t2i.shapes.scenes import render, sample_scene

NAME = "shapes"
DEFAULT_SCENES = 3000
FINE_TUNING_SEED = 1
"""World of the fine-tuning scenes; the shipped base was pre-trained on world 0."""
_SIZE = 64


class ShapesSource(Source):
    """Scenes 0..n-1 of the fine-tuning world, 64 px."""

    def __init__(self, count: int = DEFAULT_SCENES):
        identity = {"shapes": FINE_TUNING_SEED, "scenes": count, "pixels": _SIZE}
        super().__init__(NAME, identity, count)

    def __getitem__(self, index: int) -> Sample:
        scene = sample_scene(FINE_TUNING_SEED, index)
        return Sample(index, f"scene {index}", render(scene, _SIZE), [scene.prompt])


def parse_shapes(text: str) -> ShapesSource | None:
    """The source that "shapes" or "shapes:N" names; None for anything else.

    Raises:
        UserError: N is no positive number.
    """
    name, colon, count = text.partition(":")
    if name != NAME:
        return None
    if colon and (not count.isdigit() or int(count) < 1):
        raise UserError(f"data source {text!r}: write shapes or shapes:N with N scenes, at least 1")
    source = ShapesSource(int(count) if colon else DEFAULT_SCENES)
    if said := namesake(text, "the scenes that the kit draws"):
        source.remarks.append(said)
    return source
