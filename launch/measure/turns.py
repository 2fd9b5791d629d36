"""Contenders take turns: each does a few steps of an image, then the next does the same steps.

So other load on the machine affects all of them, and a ratio compares the same steps in the same
round. Each contender draws in its own thread, which is paused between its turns. So even programs
that know nothing of turns (`generate` of transformers and of LlamaGen) can be paused between any
two steps of an image.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Semaphore, Thread
from typing import Protocol

import torch

from t2i.processes import release_threads


def waiting(device: torch.device) -> Callable[[], None]:
    """A function that waits for all work that was started on a device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the work takes, including everything that it starts on the device."""
    wait = waiting(device)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


Tick = Callable[[], None]
"""A function that a drawing loop calls once per step."""


class Contender(Protocol):
    """Something whose steps are timed."""

    def warm_up(self, whole: int, steps: int) -> float | None:
        """Do the `steps` before the timed ones. Returns the seconds of a first image of `whole`
        steps, if one was drawn.
        """

    def turn(self, first: int, steps: int) -> float:
        """Do the next `steps`, of which the first is step `first`: seconds per step."""

    def close(self) -> None:
        """Release all resources."""


class _Stopped(BaseException):
    """Raised within a drawing loop to end it."""


class Loop:
    """A contender that draws image after image by `draw(tick)`.

    With `records` it first draws a whole image, during which it compiles or records what later
    images use.
    """

    def __init__(
        self, draw: Callable[[Tick], object], device: torch.device, *, records: bool = False
    ):
        self.draw, self.wait, self.records = draw, waiting(device), records
        self._go, self._paused = Semaphore(0), Semaphore(0)
        self._left, self._end, self._stop = 0, 0.0, False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._wait_for_turn()
            while True:
                self.draw(self._tick)
        except _Stopped:
            pass
        except BaseException as error:  # `turn` raises it in the caller's thread
            self._error = error
        finally:
            self._paused.release()

    def _wait_for_turn(self) -> None:
        self._go.acquire()
        if self._stop:
            raise _Stopped

    def _tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.wait()
            self._end = time.perf_counter()
            release_threads()
            self._paused.release()
            self._wait_for_turn()

    def warm_up(self, whole: int, steps: int) -> float | None:
        first = self.turn(0, whole) * whole if self.records else None
        if steps:
            self.turn(0, steps)
        return first

    def turn(self, first: int, steps: int) -> float:
        self._left = steps
        self.wait()
        release_threads()
        start = time.perf_counter()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return (self._end - start) / steps

    def close(self) -> None:
        self._stop = True
        self._go.release()
        self._thread.join()


class Single:
    """A contender that can do any single step: in each turn it does the middle one."""

    def __init__(self, step: Callable[[int], object], device: torch.device):
        self.step, self.device = step, device

    def warm_up(self, whole: int, steps: int) -> None:
        self.step(0)

    def turn(self, first: int, steps: int) -> float:
        return seconds(lambda: self.step(first + steps // 2), self.device)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Schedule:
    """Which steps to time."""

    image: int
    """Steps per image."""
    steps: int
    """Steps to time, around the middle of the image; at most all of them."""
    rounds: int

    @property
    def per_turn(self) -> int:
        return max(1, min(self.steps, self.image) // self.rounds)

    @property
    def first(self) -> int:
        """The first timed step. The steps before it warm up."""
        return (self.image - self.per_turn * self.rounds) // 2

    @property
    def warm_up(self) -> int:
        """Steps before the first timed one, at least as many as a turn has."""
        return self.first if self.first >= self.per_turn else self.first + self.image

    @property
    def middle(self) -> float:
        """Steps before a timed step, on average."""
        return self.first + self.per_turn * self.rounds / 2


@dataclass
class Times:
    """The times of one contender."""

    per_step: list[float] = field(default_factory=list)
    """Seconds per step, for every round."""
    first: float | None = None
    """Seconds for a first whole image, if one was drawn."""
    error: str | None = None
    """Why it did not finish."""


def in_turns(contenders: Mapping[str, Contender], schedule: Schedule) -> dict[str, Times]:
    """Time the contenders round by round; one that runs out of memory leaves the later rounds."""
    times = {name: Times() for name in contenders}
    running = dict(contenders)
    try:
        for name, one in list(running.items()):
            with _dropped_if_out_of_memory(name, running, times):
                times[name].first = one.warm_up(schedule.image, schedule.warm_up)
        for number in range(schedule.rounds):
            start = schedule.first + number * schedule.per_turn
            for name, one in list(running.items()):
                with _dropped_if_out_of_memory(name, running, times):
                    times[name].per_step.append(one.turn(start, schedule.per_turn))
    finally:
        for one in running.values():
            one.close()
    return times


def alike_in_turns(
    works: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Times]:
    """Time work whose steps are all alike: one step to warm up, then one in every round."""

    def single(work: Callable[[], object]) -> Single:
        return Single(lambda _: work(), device)

    singles = {name: single(work) for name, work in works.items()}
    return in_turns(singles, Schedule(rounds, rounds, rounds))


@contextmanager
def _dropped_if_out_of_memory(
    name: str, running: dict[str, Contender], times: Mapping[str, Times]
) -> Iterator[None]:
    """Within it, running out of memory ends the contender and is noted in its times."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        times[name].error = f"out of memory: {str(error)[:100]}"
        running.pop(name).close()
        torch.cuda.empty_cache()


# -- numbers of a group ----------------------------------------------------------------------------


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: list[float], reference: list[float]) -> list[float]:
    """Ratios for the rounds that both did (one that runs out of memory stops early)."""
    both = min(len(values), len(reference))
    return [a / b for a, b in zip(values[:both], reference[:both], strict=True)]


def ratio_columns(values: list[float], reference: list[float]) -> dict:
    """Median and quartiles of the ratios, for a row; {} if no round was shared."""
    if not (shared := ratios(values, reference)):
        return {}
    low, middle, high = quartiles(shared)
    return {"ratio": middle, "ratio_quartiles": [low, high]}
