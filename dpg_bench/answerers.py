"""The judges that answer DPG-Bench's questions: one interface, chosen by name (--judge), and always
named next to the score.

    mplug     the official judge (mPLUG-large), the only one comparable with published scores
    shapes    the exact detector, for the shapes world's own questions
    blip-vqa  BLIP's VQA model, the closest relative of mPLUG in `transformers`
    vlm       any image-text-to-text model in `transformers`, comparing P("yes") with P("no")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from dpg_bench.questions import Question
from t2i.errors import UserError, choose_one
from t2i.imaging import upright_rgb
from t2i.published import fetch_folder
from t2i.worlds import open_world

if TYPE_CHECKING:
    import torch

OFFICIAL_ANSWERER = "mplug"
# Hub ids. The first is a copy of ModelScope's damo/mplug_visual-question-answering_coco_large_en; a
# judge with an empty id needs no weights.
DEFAULT_WEIGHTS = {
    OFFICIAL_ANSWERER: "xingjianleng/mplug_visual-question-answering_coco_large_en",
    "shapes": "",
    "blip-vqa": "Salesforce/blip-vqa-capfilt-large",
    "vlm": "Qwen/Qwen2.5-VL-7B-Instruct",
}


class Answerer(Protocol):
    """Answers questions about images.

    An answerer limited to certain questions also has `check(questions)`, which refuses others.
    """

    def identity(self) -> dict:
        """For result files: "judge" (its name), its weights and their hash or revision."""
        ...

    def answer(self, image: Image.Image, questions: Sequence[Question]) -> list[str]:
        """The answer to each question, in order. Only exactly "yes" counts."""
        ...


def answer_prompt(
    answerer: Answerer, images: Sequence[Image.Image], questions: Sequence[Question]
) -> list[dict[str, str]]:
    """Ask all questions of a prompt about each of its images: one proposition id -> answer mapping
    per image, as `dpg_bench.score.score` takes for one item.
    """
    check_answerer(answerer)
    single = isinstance(images, Image.Image) or not isinstance(images, Iterable)
    given = [] if single else list(images)
    if not given or not all(isinstance(image, Image.Image) for image in given):
        raise UserError(f"answer_prompt needs a list of PIL images, but got {images!r:.80}")
    single = isinstance(questions, str) or not isinstance(questions, Iterable)
    if single or not all(isinstance(question, Question) for question in questions):
        raise UserError(
            f"questions is {questions!r:.80}: give those of an item, such as graph.items[item]"
        )
    ids = [str(question.proposition) for question in questions]
    seen = [upright_rgb(image) for image in given]
    return [dict(zip(ids, answerer.answer(image, questions), strict=True)) for image in seen]


def check_answerer(given: object) -> None:
    """UserError if this is not an answerer."""
    if isinstance(given, type) or not hasattr(given, "answer"):
        raise UserError(
            f"answerer is {given!r:.80}: give a loaded one, such as "
            'dpg_bench.answerers.load_answerer("mplug")'
        )


def load_answerer(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Answerer:
    """An answerer by name.

    weights: a local folder or a hub id; None for its default weights, fetched on first use.

    Raises:
        UserError: the name is unknown, or the weights cannot be found, fetched or loaded.
    """
    if not isinstance(name, str) or name not in DEFAULT_WEIGHTS:
        raise UserError(f"unknown judge {name!r}; {choose_one(name, DEFAULT_WEIGHTS)}")
    if name == "shapes":
        if weights is not None:
            raise UserError("the shapes judge is an exact detector and takes no weights")
        return open_world(name).open_judge()
    folder, source = find_folder(name, weights)
    if name == OFFICIAL_ANSWERER:
        from dpg_bench.mplug.mplug_answerer import MPlugAnswerer

        return MPlugAnswerer.load(folder, source, device)
    from dpg_bench.vqa_answerers import BlipAnswerer, ChatAnswerer

    return (BlipAnswerer if name == "blip-vqa" else ChatAnswerer).load(folder, source, device)


def find_folder(name: str, weights: str | Path | None) -> tuple[Path, str]:
    """The local folder of an answerer's weights, and their name in results.

    Raises:
        UserError: `weights` is not a local folder, and cannot be fetched from the hub.
    """
    wanted = str(weights or DEFAULT_WEIGHTS[name])
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        return folder, folder.name
    advice = f"Offline, copy the folder here and give its path as the weights of judge {name}"
    found = fetch_folder(wanted, advice=advice)
    return found, f"{wanted}@{found.name}"  # a snapshot's folder is named by its commit
