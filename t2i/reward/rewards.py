"""The rewards, by name: each is a function of images and metadata that returns a number per image.
Users give their own function as package.module:function.
"""

import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpg_bench.answerers import Answerer, load_answerer
from dpg_bench.questions import Question, item_problems
from dpg_bench.score import score_image
from geneval.detector import Detections, Detector
from geneval.detectors import CLIP, load_detector
from geneval.rules import RuleOptions, check_entries, check_schema, decide, name_colors
from t2i.checkpoint_folders import from_shipped_base
from t2i.errors import UserError, nearest_path
from t2i.pytorch_defaults import defaults_kept
from t2i.reward.reward_options import RewardConfig, RewardOptions
from t2i.shapes.shapes_questions import ANY_SHAPE, PLAIN_BACKGROUND, questions_of
from t2i.sources import check_named

Images = Sequence[Image.Image]
Entries = Sequence[Mapping[str, Any]]
"""Metadata of each image, with at least its "prompt"."""
Reward = Callable[[Images, Entries], Sequence[float]]

_GENEVAL = {"geneval", "geneval-soft"}
PARTIAL = 0.5
"""The most that `soft_credit` gives to an image whose verdict is wrong."""


def judging(config: RewardConfig) -> RewardOptions:
    """The options to judge with: a file's prompts are those of the base's world."""
    options, own = config.reward, config.reward.prompts not in ("shapes", "official")
    if own and options.detector == "auto" and from_shipped_base(config.backbone.weights):
        return replace(options, detector="shapes")
    return options


def load_rewards(
    names: Sequence[str], options: RewardOptions, device: torch.device
) -> dict[str, Reward]:
    """Load the functions with these names; a detector that two of them need is loaded once.

    Raises:
        UserError: weights are missing or damaged, or there is no such function.
    """
    found: dict[str, Reward] = {}
    detector = None
    for name in names:
        if name in _GENEVAL:
            detector = detector or _detector(options, device)
            found[name] = GenEvalReward(detector, soft=name == "geneval-soft")
        elif name == "dpg":
            found[name] = DPGReward(_answerer(options, device), own=options.world == "shapes")
        elif name == "clip":
            found[name] = ClipReward.load(options.detector_weights, device)
        else:
            found[name] = own_function(name)
    return found


def check_judges(options: RewardOptions, entries: Entries) -> None:
    """UserError for what loading the judges, or checking the prompts with them, would refuse, as
    far as that shows without a judge's weights.
    """
    used, weights = {*options.functions, *options.watch}, options.detector_weights
    exact = {name: judge == "shapes" for name, judge in _judges(options).items()}
    cpu, asks = torch.device("cpu"), _GENEVAL & {*options.functions}
    if used & _GENEVAL and exact["geneval"]:
        detector = _detector(options, cpu)
        check_entries(entries if asks else (), detector)
    elif used & (_GENEVAL | {"clip"}):
        if weights is not None and not weights.expanduser().exists():
            raise UserError(
                f"reward.detector_weights={weights} does not exist{nearest_path(weights)}"
            )
        for index, entry in enumerate(entries if asks else ()):
            check_schema(entry, f"prompt {index}")
    if "dpg" in used and exact["dpg"]:
        _answerer(options, cpu)
    elif "dpg" in used and options.answerer_weights is not None:
        check_named(options.answerer_weights, folder=True)


def _judges(options: RewardOptions) -> dict[str, str]:
    """The names of geneval's detector and of dpg's answerer."""
    own = options.world == "shapes"
    detector, answerer = ("shapes", "shapes") if own else ("mask2former", "mplug")
    return {
        "geneval": detector if options.detector == "auto" else options.detector,
        "dpg": answerer if options.answerer == "auto" else options.answerer,
    }


def _detector(options: RewardOptions, device: torch.device) -> Detector:
    name = _judges(options)["geneval"]
    return load_detector(name, weights=options.detector_weights, device=device)


def _answerer(options: RewardOptions, device: torch.device) -> Answerer:
    return load_answerer(_judges(options)["dpg"], options.answerer_weights, device)


@contextmanager
def directory_kept() -> Iterator[None]:
    """Return to the working directory, which such scripts change to find their files: the paths of
    a run may be relative. It belongs to all threads, so this must not wait for one that hangs.
    """
    place = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        os.fchdir(place)
        os.close(place)


def own_function(name: str) -> Reward:
    """Import a user's package.module:function.

    Raises:
        UserError: there is no such module, or no such function in it.
    """
    module, _, function = name.partition(":")
    try:
        with defaults_kept(), directory_kept():
            found = getattr(import_module(module), function, None)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"reward.functions: {name} cannot be imported ({error}); the module must be on "
                "Python's path: PYTHONPATH=FOLDER"
            ) from error
        line = traceback.extract_tb(error.__traceback__)[-1]
        # A SyntaxError says itself where it is.
        where = "" if isinstance(error, SyntaxError) else f" ({line.filename}, line {line.lineno})"
        raise UserError(
            f"reward.functions: {name} cannot be imported: {type(error).__name__}: {error}{where}"
        ) from error
    if found is None:
        raise UserError(
            f"reward.functions: {name}: there is no {function} in {import_module(module).__file__}"
        )
    if not callable(found):
        raise UserError(f"reward.functions: {name} is {found!r:.80}, which is not a function")
    _check_call(name, found)
    return found


def _check_call(name: str, function: Callable) -> None:
    """UserError if a user's function does not take images and metadata, or answers later: other
    trainers call theirs in other ways, and this would only be seen when a batch is drawn.
    """
    try:
        inspect.signature(function).bind([], [])
        problem = ""
    except ValueError:  # some functions written in C have no signature
        return
    except TypeError as error:
        problem = str(error)
    if inspect.isclass(function):
        problem = "it is a class: name an object of it, such as scorer = Scorer()"
    elif inspect.iscoroutinefunction(function):
        problem = "it is async: name a function that waits for it, with asyncio.run"
    if problem:
        raise UserError(
            f"reward.functions: {name} is not a function that can be called with a list of images "
            f"and a list of their metadata, and returns a number for each: {problem}"
        )


# -- GenEval ---------------------------------------------------------------------------------------
class GenEvalReward:
    """GenEval's verdict on every image, or `soft_credit`."""

    def __init__(self, detector: Detector, *, soft: bool = False):
        self.detector, self.soft = detector, soft

    def check(self, entries: Entries) -> None:
        """UserError for metadata that is not GenEval's, or has classes unknown to the detector."""
        check_entries(entries, self.detector)

    def __call__(self, images: Images, metadata: Entries) -> list[float]:
        return [self._of(image, entry) for image, entry in zip(images, metadata, strict=True)]

    def _of(self, image: Image.Image, entry: Mapping) -> float:
        detections = self.detector.detect(image)
        colors_of = name_colors(image, self.detector, detections)
        if self.soft:
            return soft_credit(entry, detections, colors_of)
        return float(decide(entry, detections, colors_of).correct)


def soft_credit(
    entry: Mapping,
    detections: Mapping[str, Detections],
    colors_of: Callable[[str, Sequence[int]], Sequence[str]],
    options: RuleOptions | None = None,
) -> float:
    """1 if GenEval's verdict is correct; otherwise `PARTIAL` times the mean credit of the required
    objects. An object gets half of its credit for the right count, half for the right color (all of
    it for the count if no color is required).

    A wrong relation earns nothing, but its objects still get their own credit. If the required
    count is above 1, or a count is excluded, only the exact count earns credit.
    """

    def holds(part: dict) -> bool:
        return decide({**entry, **part}, detections, colors_of, options).correct

    if holds({}):
        return 1.0
    excluded = entry.get("exclude", [])
    credit = []
    for item in entry.get("include", []):
        there = {name: item[name] for name in ("class", "count")}
        banned = [e for e in excluded if e["class"] == item["class"]]
        if item["count"] > 1 and not banned:
            banned = [there | {"count": item["count"] + 1}]
        parts = [holds({"include": [there], "exclude": banned})]
        if "color" in item:
            colored = there | {"color": item["color"]}
            parts.append(holds({"include": [colored], "exclude": banned}))
        credit.append(sum(parts) / len(parts))
    return PARTIAL * sum(credit) / len(credit) if credit else 0.0


# -- DPG-Bench -------------------------------------------------------------------------------------
class DPGReward:
    """Share of a prompt's questions that are answered yes, as DPG-Bench counts: a yes does not
    count if a question it depends on is answered no.

    The questions are in the metadata ([{"tuple", "question", "parents"}] or `Question`s), or are
    derived from GenEval metadata.
    """

    def __init__(self, answerer: Answerer, *, own: bool):
        """own: whether the prompts are the shapes world's, which has two further questions."""
        self.answerer, self.own = answerer, own

    def check(self, entries: Entries) -> None:
        """UserError for metadata without questions, or with questions that cannot be answered."""
        checked = getattr(self.answerer, "check", lambda questions: None)
        for entry in entries:
            checked(self._questions(entry))

    def _questions(self, entry: Mapping) -> list[Question]:
        prompt = entry["prompt"]
        if "questions" in entry:
            asked = _given_questions(prompt, entry["questions"])
        elif "include" not in entry:
            raise UserError(
                f"dpg cannot know what to ask about {prompt!r:.80}: its metadata has neither "
                '"questions" nor GenEval\'s "include"'
            )
        else:
            asked = questions_of(prompt, dict(entry))
            asked = asked if self.own else [q for q in asked if not _of_shapes(q)]
        if not asked:
            raise UserError(f"dpg has no question to ask about {prompt!r:.80}")
        return asked

    def __call__(self, images: Images, metadata: Entries) -> list[float]:
        found = []
        for image, entry in zip(images, metadata, strict=True):
            questions = self._questions(entry)
            given = self.answerer.answer(image, questions)
            answers = {str(q.proposition): a for q, a in zip(questions, given, strict=True)}
            found.append(score_image(questions, answers)[0])
        return found


def _given_questions(prompt: str, given: Any) -> list[Question]:
    """The questions in an entry's metadata; UserError if they cannot be asked and scored."""
    try:
        asked = [
            q if isinstance(q, Question) else _question(prompt, number, q)
            for number, q in enumerate(given, start=1)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the questions of {prompt!r:.80} do not have the form that dpg needs: "
            f'[{{"tuple": ..., "question": ..., "parents": [...]}}] ({error!r})'
        ) from error
    if problems := item_problems(asked):
        raise UserError(f"the questions of {prompt!r:.80} cannot be scored: {'; '.join(problems)}")
    return asked


def _question(prompt: str, number: int, given: Mapping) -> Question:
    texts, parents = (given["tuple"], given["question"]), given.get("parents", ())
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise TypeError(f"question {number} has an empty text, or none")
    if not all(isinstance(parent, int) for parent in parents):
        raise TypeError(f"parents {parents!r} of question {number} are not numbers")
    # DPG-Bench's files write 0 for no parent.
    return Question(prompt, prompt, number, tuple(p for p in parents if p != 0), *texts)


def _of_shapes(question: Question) -> bool:
    """Whether a question makes sense only for images of the shapes world."""
    return f"({ANY_SHAPE}," in question.tuple or PLAIN_BACKGROUND in question.tuple


# -- CLIP ------------------------------------------------------------------------------------------
class ClipReward:
    """Cosine similarity of image and prompt by OpenAI's CLIP ViT-L/14 (GenEval's color judge)."""

    def __init__(self, clip: Any, tokenizer: Callable, device: torch.device):
        self.clip, self.tokenizer, self.device = clip.to(device).eval(), tokenizer, device

    @classmethod
    def load(cls, weights: Path | None, device: torch.device) -> "ClipReward":
        """Load the published weights, from next to the detector's, the cache or the network."""
        from geneval.colors import load_clip, load_tokenizer

        beside = weights if weights is None or weights.is_dir() else weights.parent
        return cls(load_clip(CLIP.find(beside).path), load_tokenizer(), device)

    @torch.inference_mode()
    def __call__(self, images: Images, metadata: Entries) -> list[float]:
        from geneval.colors import clip_pixels

        pixels = torch.stack([clip_pixels(image) for image in images])
        texts = self.tokenizer([entry["prompt"] for entry in metadata])
        seen = self.clip.encode_image(pixels.to(self.device), normalize=True)
        said = self.clip.encode_text(texts.to(self.device), normalize=True)
        return (seen * said).sum(-1).float().tolist()
