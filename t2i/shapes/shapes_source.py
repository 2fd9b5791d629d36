"""The shapes world as data: captioned scenes, as a source or as a folder.

`--data.source shapes` (or shapes:5000 for 5000 scenes) draws scenes as they are read. To use a
folder of that name, write `./shapes`.
"""

import json
import logging
import os
import re
from pathlib import Path

from t2i.data.samples import Sample, Source
from t2i.errors import UserError
from t2i.files import namesake, write_text
from t2i.imaging import save_png
from t2i.sampling import check_counts
from t2i.shapes.scenes import render, sample_scene

log = logging.getLogger(__name__)

NAME = "shapes"
DEFAULT_SCENES = 3000
FINE_TUNING_SEED = 1
"""World of the fine-tuning scenes; the shipped base was pre-trained on world 0."""
SIZE = 64


class ShapesSource(Source):
    """Scenes 0..n-1 of the fine-tuning world, 64 px."""

    def __init__(self, count: int = DEFAULT_SCENES):
        identity = {"shapes": FINE_TUNING_SEED, "scenes": count, "pixels": SIZE}
        super().__init__(NAME, identity, count)

    def __getitem__(self, index: int) -> Sample:
        scene = sample_scene(FINE_TUNING_SEED, index)
        return Sample(index, f"scene {index}", render(scene, SIZE), [scene.prompt])


def parse_shapes(text: str) -> ShapesSource | None:
    """The source that "shapes" or "shapes:N" names; None for anything else.

    Raises:
        UserError: N is not a positive number.
    """
    name, colon, count = text.partition(":")
    if name != NAME:
        return None
    if colon and (not re.fullmatch("[0-9]{1,15}", count) or int(count) < 1):
        raise UserError(f"data source {text!r}: write shapes or shapes:N for N scenes, at least 1")
    source = ShapesSource(int(count) if colon else DEFAULT_SCENES)
    if said := namesake(text, "the scenes that the kit draws"):
        source.remarks.append(said)
    return source


def write_dataset(folder: str | Path, n: int, seed: int = 0, size: int = 64) -> tuple[int, int]:
    """Write scenes 0..n-1 of world `seed` as an image folder; return (images written, kept).

    The layout is the datasets library's "imagefolder": `images/*.png` and `metadata.jsonl` with the
    columns file_name, text (the prompt) and metadata (the GenEval entry as a JSON string, for
    scoring). Existing images are kept and metadata.jsonl is written last, so that a repeated call
    continues one that was stopped; a larger `n` extends the folder, a smaller one removes nothing.

    Raises:
        UserError: the folder holds a different data set.
    """
    check_counts(n=n)
    folder = Path(folder)
    scenes = [sample_scene(seed, index) for index in range(n)]
    names = [f"images/seed{seed}_{size}px_{index:06d}.png" for index in range(n)]
    rows = [
        json.dumps({"file_name": name, "text": s.prompt, "metadata": json.dumps(s.metadata)}) + "\n"
        for name, s in zip(names, scenes, strict=True)
    ]
    table = folder / "metadata.jsonl"
    if table.exists():
        present = table.read_text(encoding="utf-8").splitlines(keepends=True)
        shared = min(len(present), n)
        if present[:shared] != rows[:shared]:
            raise UserError(
                f"{folder} holds a different data set, not seed {seed} at {size} px: "
                "give another folder or delete this one"
            )
        rows += present[shared:]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    present_names = set(os.listdir(folder / "images"))
    missing = [i for i, name in enumerate(names) if Path(name).name not in present_names]
    for index in missing:
        save_png(render(scenes[index], size), folder / names[index])
    write_text(table, "".join(rows))
    log.info("%s: %d images written, %d kept", folder, len(missing), n - len(missing))
    return len(missing), n - len(missing)
