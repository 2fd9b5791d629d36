"""Drawing with live previews: pictures of the codes so far, then the images and their stages."""

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
from t2i.processes import release_threads
from t2i.sampling import DrawOptions
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import drawn_windows
from t2i.tensorar.windows import Windows

T = TypeVar("T")

_PAUSE = 0.25
"""Minimum number of seconds between two previews."""
_SHARE = 0.2
"""Share of the time that previews may take."""


@dataclass(frozen=True)
class RequestState:
    """The progress of a request."""

    images: list[Image.Image]
    """Finished images are RGB; previews are RGBA, transparent where nothing is drawn yet."""
    share: float
    """Share of the codes that are drawn, 0..1."""
    stages: tuple[tuple[Image.Image, ...], ...] = ()
    """The refinement stages of each finished image; empty if the model does not refine."""
    notes: tuple[str, ...] = ()
    """Which parts of the prompt the model did not read, and what the prompt lacks."""


class Models:
    """The models to choose from; each is loaded on first use and then kept."""

    def __init__(
        self,
        options: Mapping[str, ModelOptions],
        where: tuple,
        most_images: int,
        lacking: Callable[[ModelOptions, str], str],
    ):
        """
        where: device and dtype, as returned by `ModelOptions.check`.
        lacking: describes what the model was trained with and the prompt lacks; "" if nothing.
        """
        self.options, self.where, self.most_images = options, where, most_images
        self.lacking = lacking
        self._loaded: dict[str, TensorAR] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.options)

    def load(self, name: str) -> TensorAR:
        """Return the model; UserError if there is no such model or it cannot be loaded."""
        if name not in self.options:
            raise UserError(f"there is no model {name!r:.80}: choose one of {self.names}")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self.options[name].load(*self.where)
                release_threads()  # models draw in threads of their own
            return self._loaded[name]

    def limits(self, name: str) -> dict[str, Limit]:
        codes = max(self.load(name).backbone.spec.subvocabs)
        return limits(most_images=self.most_images, codes=codes)


def draw_live(model: TensorAR, request: Request, lacking: str = "") -> Iterator[RequestState]:
    """Yield previews while drawing, then the finished images, the same as launch/generate.py's.

    Closing the iterator early stops the drawing. `lacking` is added to the notes.

    Raises:
        UserError: the model cannot draw this prompt, or memory is too small for that many images.
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
        for one in drawing:  # not list(drawing): `look` reads `done` meanwhile
            done.append(one)
        stages = tuple(one.stages for one in done if one.stages)
        notes = (*_notes(model, request.prompt), *filter(None, [lacking]))
        report(RequestState([one.image for one in done], 1.0, stages, notes))

    try:
        yield from reports(draw)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"there is not enough memory for {request.samples} images at once: ask for fewer"
        ) from error


def so_far(
    model: TensorAR, geometry: Windows, windows_BNkS: Tensor, settled: int
) -> list[Image.Image]:
    """RGBA pictures of a batch whose first `settled` windows are final, transparent elsewhere."""
    rows, columns = model.backbone.spec.grid
    done = min(settled * geometry.stride, geometry.tokens)
    place = torch.arange(geometry.tokens, device=windows_BNkS.device)
    # The decoder's output depends on neighboring codes: repeat the last row below what is drawn.
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
    """The consumer has closed the iterator."""


@dataclass(frozen=True)
class _Ended:
    """The last item in the queue: the work has ended, with this error or without one."""

    error: BaseException | None


def reports(work: Callable[[Callable[[T | None], None]], None]) -> Iterator[T]:
    """Run `work` in its own thread, yield what it reports, and raise what it raises.

    After the iterator is closed, the next report ends the work. Reporting None yields nothing: it
    only checks whether the iterator was closed.
    """
    queue: SimpleQueue[T | _Ended] = SimpleQueue()
    closed = threading.Event()

    def report(value: T | None) -> None:
        if closed.is_set():
            raise _Closed
        if value is not None:
            queue.put(value)

    def run() -> None:
        error: BaseException | None = None
        try:
            work(report)
        except BaseException as raised:
            error = raised
        queue.put(_Ended(error))

    release_threads()
    threading.Thread(target=run, name="drawing", daemon=True).start()
    try:
        while not isinstance(item := queue.get(), _Ended):
            yield item
    finally:
        closed.set()
    if item.error is not None:
        raise item.error
