"""Drawing that can be watched: pictures of the codes so far, then the images and their stages."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from t2i.demo.request import Limit, Request, limits
from t2i.errors import UserError
from t2i.generation import Drawn, Job, draw_images, parse_conditions, to_images
from t2i.model_options import ModelOptions
from t2i.sampling import DrawOptions
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows
from t2i.tensorar.windows import Windows

T = TypeVar("T")

_PAUSE = 0.25
"""Seconds between two looks, at least."""
_SHARE = 0.2
"""Of the time that looks may take."""


@dataclass(frozen=True)
class RequestState:
    """How far a request is."""

    images: list[Image.Image]
    """RGB; see-through (RGBA) where nothing is drawn yet."""
    share: float
    """Of the codes that are drawn, 0..1."""
    stages: tuple[tuple[Image.Image, ...], ...] = ()
    """Of each image at the end, where the model refines."""
    notes: tuple[str, ...] = ()
    """What the model did not read of the prompt, and what the prompt lacks."""


class Models:
    """The models that may be chosen, each loaded when it is first asked for."""

    def __init__(
        self,
        options: Mapping[str, ModelOptions],
        where: tuple,
        most_images: int,
        lacking: Callable[[ModelOptions, str], str],
    ):
        """
        where: device and type, of `ModelOptions.check`.
        lacking: says what a prompt lacks that a model was trained with; "": nothing.
        """
        self.options, self.where, self.most_images = options, where, most_images
        self.lacking = lacking
        self._loaded: dict[str, TensorAR] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.options)

    def load(self, name: str) -> TensorAR:
        """UserError if there is no such model, or it cannot be loaded."""
        if name not in self.options:
            raise UserError(f"there is no model {name!r:.80}: choose one of {self.names}")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self.options[name].load(*self.where)
            return self._loaded[name]

    def limits(self, name: str) -> dict[str, Limit]:
        codes = max(self.load(name).backbone.spec.subvocabs)
        return limits(most_images=self.most_images, codes=codes)


def draw_live(model: TensorAR, request: Request, lacking: str = "") -> Iterator[RequestState]:
    """Pictures while they are drawn, and at last the images, as launch/generate.py draws them.
    `lacking` is a further note.

    Closed before its end, it stops drawing.

    Raises:
        UserError: the model cannot draw this prompt, or has no room for so many images.
    """
    prompts = parse_conditions(model.backbone, [request.prompt])
    options = DrawOptions(
        request.seed,
        request.sampling.apply(model.sampling),
        stages=model.windows.stages > 1,
        speculate=request.speculate,
    )

    def draw(report: Callable[[RequestState | None], None]) -> None:
        done: list[Drawn] = []
        geometry = drawn_windows(model, options.sampling or model.sampling)
        row = max(1, model.backbone.spec.grid[1] // geometry.stride)
        again = 0.0

        def look(jobs: Sequence[Job], windows: Tensor, settled: int) -> None:
            nonlocal again
            started = time.monotonic()
            if settled % row or started < again:
                return report(None)
            drawn = len(done) + len(jobs) * settled / geometry.count
            pictures = [one.image for one in done] + so_far(model, geometry, windows, settled)
            report(RequestState(pictures, drawn / request.samples))
            again = time.monotonic() + max(_PAUSE, (time.monotonic() - started) / _SHARE)

        samples = request.samples
        drawing = draw_images(
            model, prompts, options, samples_per_prompt=samples, progress=False, watch=look
        )
        for one in drawing:  # `look` counts them meanwhile
            done.append(one)
        stages = tuple(one.stages for one in done if one.stages)
        notes = (*_notes(model, request.prompt), *filter(None, [lacking]))
        report(RequestState([one.image for one in done], 1.0, stages, notes))

    try:
        yield from reports(draw)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"there is no memory for {request.samples} images at once: ask for fewer"
        ) from error


def so_far(
    model: TensorAR, geometry: Windows, windows_BNkS: Tensor, settled: int
) -> list[Image.Image]:
    """Pictures (RGBA) of a batch of which so many windows are settled, see-through elsewhere."""
    rows, columns = model.backbone.spec.grid
    done = min(settled * geometry.stride, geometry.tokens)
    place = torch.arange(geometry.tokens, device=windows_BNkS.device)
    # The decoder looks around: below the last codes it finds the same ones again.
    behind = done - columns + (place - done) % columns
    codes = geometry.final_codes(windows_BNkS)[:, torch.where(place < done, place, behind).clamp(0)]
    shown = (place < done).view(rows, columns).to(torch.uint8).mul(255).cpu().numpy()
    pictures = to_images(model, codes)
    mask = Image.fromarray(shown).resize(pictures[0].size, Image.Resampling.NEAREST)
    for picture in pictures:
        picture.putalpha(mask)
    return pictures


def _notes(model: TensorAR, prompt: str) -> tuple[str, ...]:
    if model.backbone.spec.cond_kind != "text":
        return ()
    (lost,) = model.backbone.caption_notes([prompt])
    return ("the prompt has no text the encoder can read",) if lost is None else tuple(lost)


class _Closed(Exception):
    """Nobody listens any more."""


@dataclass(frozen=True)
class _Ended:
    """The work has, perhaps by an error."""

    error: BaseException | None


def reports(work: Callable[[Callable[[T | None], None]], None]) -> Iterator[T]:
    """What `work` reports, while it runs in a thread of its own; and what it raises.

    Once this is closed, the next report ends the work; a report of None does nothing else.
    """
    box: SimpleQueue[T | _Ended] = SimpleQueue()
    closed = threading.Event()

    def report(value: T | None) -> None:
        if closed.is_set():
            raise _Closed
        if value is not None:
            box.put(value)

    def run() -> None:
        error: BaseException | None = None
        try:
            work(report)
        except BaseException as raised:
            error = raised
        box.put(_Ended(error))

    threading.Thread(target=run, name="drawing", daemon=True).start()
    try:
        while not isinstance(told := box.get(), _Ended):
            yield told
    finally:
        closed.set()
    if told.error is not None:
        raise told.error
