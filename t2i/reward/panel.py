"""Asks the rewards, and stops a run whose reward says nothing.

A reward that is broken is the usual end of such a run, and a silent one: all zeros from a judge
that was installed wrongly look like a model that cannot learn. So every answer is looked at, and
whatever is wrong ends in one message with the reward's name and a prompt.
"""

import atexit
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from t2i.errors import UserError
from t2i.reward.reward_options import RewardOptions
from t2i.reward.rewards import Entries, Images, Reward, load_rewards


class RewardError(UserError):
    """A reward that cannot be learned from; the model is not to blame."""


class Panel:
    """Some rewards with their weights.

    Args:
        seconds: what a function may take for one call.
        constant: batches with one number for all images after which a reward counts as broken.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        *,
        seconds: float,
        constant: int,
    ):
        self.rewards, self.weights = rewards, weights
        self._seconds, self._most = seconds, constant
        self._same = dict.fromkeys(weights, 0)

    def share(self, workers: int, options: RewardOptions) -> None:
        """From now on ask copies of the rewards in so many processes of their own, on the CPU."""
        others = set(active_children())
        pool = get_context("spawn").Pool(workers, _load, (tuple(self.rewards), options))
        atexit.register(pool.terminate)  # also where one of them hangs
        judges = [child for child in active_children() if child not in others]
        self.rewards = {name: partial(_ask_all, pool, judges, name) for name in self.rewards}

    def check(self, entries: Entries, names: Sequence[str] | None = None) -> None:
        """UserError if a reward cannot judge such prompts; before anything is drawn."""
        for name in self.weights if names is None else names:
            if (check := getattr(self.rewards[name], "check", None)) is not None:
                check(entries)

    def judge(self, name: str, images: Images, entries: Entries) -> list[float]:
        """One reward's numbers.

        Raises:
            RewardError: it raised, took too long, gave another number of numbers or one that is
                not finite.
        """
        given = self._ask(name, images, entries)
        about = _example(entries)
        try:
            values = [float(value) for value in given]
        except (TypeError, ValueError) as error:
            told = " ".join(repr(given).split())  # an array's has several lines
            raise RewardError(
                f"reward {name} gave {told:.80} instead of a number an image ({error}){about}"
            ) from error
        if len(values) != len(images):
            raise RewardError(
                f"reward {name} gave {len(values)} numbers for {len(images)} images{about}"
            )
        for value, entry in zip(values, entries, strict=True):
            if not math.isfinite(value):
                raise RewardError(f"reward {name} gave {value}{_example([entry])}")
        return values

    def _ask(self, name: str, images: Images, entries: Entries) -> Any:
        # In a thread, since nothing else ends a wait for a server or a lock; a daemon, so that the
        # program can end although it hangs.
        outcome: list[Any] = [None, None]
        # A thread begins with the first GPU and with gradients.
        initialized = torch.cuda.is_initialized()
        gpu = torch.cuda.device(torch.cuda.current_device()) if initialized else nullcontext()

        def work() -> None:
            try:
                with torch.no_grad(), gpu:
                    outcome[0] = self.rewards[name](images, entries)
            except BaseException as error:
                outcome[1] = error

        thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive():
            raise RewardError(
                f"reward {name} did not answer within {self._seconds:g} seconds "
                f"(reward.seconds) about {len(images)} images{_example(entries)}"
            )
        if (error := outcome[1]) is not None:
            said = str(error) or "no message"
            raise RewardError(
                f"reward {name} raised {type(error).__name__}: {said:.300}{_example(entries)}"
            ) from error
        return outcome[0]

    def judge_all(self, images: Images, entries: Entries) -> dict[str, list[float]]:
        """The numbers of every reward with a weight."""
        return {name: self.judge(name, images, entries) for name in self.weights}

    def total(self, values: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum, an image each."""
        columns = zip(*(values[name] for name in self.weights), strict=True)
        weights = list(self.weights.values())
        return [math.fsum(w * v for w, v in zip(weights, row, strict=True)) for row in columns]

    def look(self, values: Mapping[str, Sequence[float]], prompts: Sequence[str]) -> None:
        """Look at a whole batch, of all processes.

        Raises:
            RewardError: a reward has given one number to all images of too many batches.
        """
        for name in self.weights:
            same = min(values[name]) == max(values[name])
            self._same[name] = self._same[name] + 1 if same else 0
            if self._same[name] >= self._most:
                raise RewardError(
                    f"reward {name} gave {values[name][0]:g} to every image of the last "
                    f"{self._most} batches (reward.constant), the last one of {len(prompts)} "
                    f"prompts such as {prompts[0]!r:.120}: there is nothing to learn from. Either "
                    "it is broken, or the model always, or never, does what it rewards"
                )


# -- in processes of their own ---------------------------------------------------------------------
_loaded: dict[str, Reward] = {}
"""Of a worker."""


def _load(names: Sequence[str], options: RewardOptions) -> None:
    torch.set_num_threads(1)
    _loaded.update(load_rewards(names, options, torch.device("cpu")))


def _ask_one(name: str, images: Images, entries: Entries) -> list:
    return list(_loaded[name](images, entries))


def _ask_all(
    pool: Pool, judges: Sequence[BaseProcess], name: str, images: Images, entries: Entries
) -> list:
    """A reward's answer, each judge asked for its share."""
    count = len(judges)
    shares = [range(len(images))[i::count] for i in range(min(count, len(images)))]
    asked = [(name, [images[i] for i in s], [entries[i] for i in s]) for s in shares]
    answers: list = [None] * len(images)
    answering = pool.starmap_async(_ask_one, asked)
    while not answering.ready():
        # A pool puts another process in the place of a dead one, and waits for its answer for ever.
        if dead := [judge.exitcode for judge in judges if judge.exitcode is not None]:
            raise RuntimeError(f"a process that judges ended by itself (exit code {dead[0]})")
        answering.wait(0.2)
    for share, given in zip(shares, answering.get(), strict=True):
        if len(given) != len(share):
            raise ValueError(f"{len(given)} numbers for {len(share)} images")
        for place, value in zip(share, given, strict=True):
            answers[place] = value
    return answers


def _example(entries: Entries) -> str:
    return f"; prompt {entries[0]['prompt']!r:.120}" if entries else ""
