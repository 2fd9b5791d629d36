"""Contenders in turns: each does a few steps of an image, then the next does the same ones.

Whatever else the machine does hits all of them, and a ratio compares the same steps of the same
round. A contender draws in a thread of its own, which stands still between its turns: so whole
programs that know nothing of turns (transformers' `generate`, LlamaGen's) can be stopped between
two steps, at the middle of an image as well as at its start.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Semaphore, Thread
from typing import Protocol

import torch


def waiting(device: torch.device) -> Callable[[], None]:
    """What waits for all work that was started on a device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the work takes, with all that it starts on the device."""
    wait = waiting(device)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


Tick = Callable[[], None]
"""What a drawing loop calls once a step."""


class Contender(Protocol):
    """Something that does steps."""

    def warm_up(self, whole: int, steps: int) -> float | None:
        """Do the steps before those that are timed; seconds of a first image of `whole` steps, if
        it was drawn.
        """

    def turn(self, first: int, steps: int) -> float:
        """Seconds per step of steps `first` and following."""

    def close(self) -> None:
        """Let go of what is held."""


class _Stopped(BaseException):
    """Ends a loop from within."""


class Loop:
    """A contender that draws image after image by `draw(tick)`.

    With `records` it draws one whole image before all others, in which it compiles or records what
    later ones use.
    """

    def __init__(
        self, draw: Callable[[Tick], object], device: torch.device, *, records: bool = False
    ):
        self.draw, self.wait, self.records = draw, waiting(device), records
        self._go, self._stood = Semaphore(0), Semaphore(0)
        self._left, self._end, self._stop = 0, 0.0, False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._stand()
            while True:
                self.draw(self._tick)
        except _Stopped:
            pass
        except BaseException as error:  # handed to whoever gave the turn
            self._error = error
        finally:
            self._stood.release()

    def _stand(self) -> None:
        self._go.acquire()
        if self._stop:
            raise _Stopped

    def _tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.wait()
            self._end = time.perf_counter()
            self._stood.release()
            self._stand()

    def warm_up(self, whole: int, steps: int) -> float | None:
        first = self.turn(0, whole) * whole if self.records else None
        if steps:
            self.turn(0, steps)
        return first

    def turn(self, first: int, steps: int) -> float:
        self._left = steps
        self.wait()
        start = time.perf_counter()
        self._go.release()
        self._stood.acquire()
        if self._error is not None:
            raise self._error
        return (self._end - start) / steps

    def close(self) -> None:
        self._stop = True
        self._go.release()
        self._thread.join()


class Single:
    """A contender that can do any one step by itself: it does the middle one of each turn."""

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
    """Which steps are timed."""

    image: int
    """Steps of an image."""
    steps: int
    """Timed steps, around the middle; all of an image at most."""
    rounds: int

    @property
    def per_turn(self) -> int:
        return max(1, min(self.steps, self.image) // self.rounds)

    @property
    def first(self) -> int:
        """The first timed step. What comes before it in its image warms up."""
        return (self.image - self.per_turn * self.rounds) // 2

    @property
    def warm_up(self) -> int:
        """Steps before the first timed one, at least a turn."""
        return self.first if self.first >= self.per_turn else self.first + self.image

    @property
    def middle(self) -> float:
        """Codes before a timed step, on average."""
        return self.first + self.per_turn * self.rounds / 2


@dataclass
class Times:
    """What became of one contender."""

    per_step: list[float] = field(default_factory=list)
    """Seconds a step, of every round."""
    first: float | None = None
    """Seconds of a first whole image, where it was drawn."""
    error: str | None = None
    """Why it did not come to an end."""


def in_turns(contenders: Mapping[str, Contender], schedule: Schedule) -> dict[str, Times]:
    """Time them round after round; one whose memory does not suffice is left out from there on."""
    times = {name: Times() for name in contenders}
    running = dict(contenders)
    try:
        warm_all_up(running, schedule, times)
        for number in range(schedule.rounds):
            start = schedule.first + number * schedule.per_turn
            for name, one in list(running.items()):
                with _fitting(name, running, times):
                    times[name].per_step.append(one.turn(start, schedule.per_turn))
    finally:
        for one in running.values():
            one.close()
    return times


def warm_all_up(
    running: dict[str, Contender], schedule: Schedule, times: Mapping[str, Times]
) -> None:
    """What each does before its first turn."""
    for name, one in list(running.items()):
        with _fitting(name, running, times):
            times[name].first = one.warm_up(schedule.image, schedule.warm_up)


def alike_in_turns(
    works: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Times]:
    """Time works whose steps are all alike: one to warm up, then one in every round."""

    def single(work: Callable[[], object]) -> Single:
        return Single(lambda _: work(), device)

    singles = {name: single(work) for name, work in works.items()}
    return in_turns(singles, Schedule(rounds, rounds, rounds))


@contextmanager
def _fitting(
    name: str, running: dict[str, Contender], times: Mapping[str, Times]
) -> Iterator[None]:
    """One that needs more memory than there is goes no further."""
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
    """Of the rounds that both did: one that ran out of memory stopped early."""
    both = min(len(values), len(reference))
    return [a / b for a, b in zip(values[:both], reference[:both], strict=True)]
