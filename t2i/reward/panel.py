"""Calls the rewards, and stops the run if one of them fails or never varies.

A broken reward easily goes unnoticed: all zeros from a wrongly installed judge look like a model
that cannot learn. So every answer is checked, and any fault ends the run with one message that
names the reward and a prompt.
"""

import atexit
import math
import threading
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from t2i.errors import UserError
from t2i.processes import release_threads
from t2i.pytorch_defaults import defaults_kept
from t2i.reward.reward_options import RewardOptions
from t2i.reward.rewards import Entries, Images, Reward, directory_kept, load_rewards

_LARGEST = 1e30
"""Larger rewards overflow when they are squared for the spread of a group: nothing is learned."""


class RewardError(UserError):
    """A reward is broken or cannot be learned from; the model is not at fault."""


class Panel:
    """Rewards with their weights.

    Args:
        seconds: time limit for one call of a function.
        constant: a reward counts as broken if it gives every image the same number in this many
            successive batches.
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
        self._seconds, self._limit = seconds, constant
        self._unvaried = dict.fromkeys(weights, 0)  # successive batches

    def share(self, workers: int, options: RewardOptions) -> None:
        """From now on, call copies of the rewards in `workers` separate processes, on the CPU."""
        others = set(active_children())
        pool = get_context("spawn").Pool(workers, _load, (tuple(self.rewards), options))
        atexit.register(pool.terminate)  # even if one of them hangs
        judges = [child for child in active_children() if child not in others]
        self.rewards = {name: partial(_ask_all, pool, judges, name) for name in self.rewards}

    def check(self, entries: Entries, names: Sequence[str] | None = None) -> None:
        """UserError if a reward cannot judge these prompts; called before anything is drawn."""
        for name in self.weights if names is None else names:
            if (check := getattr(self.rewards[name], "check", None)) is not None:
                check(entries)

    def judge(self, name: str, images: Images, entries: Entries) -> list[float]:
        """One reward's values, one per image.

        Raises:
            RewardError: the reward raised, took too long, or did not give one number per image,
                none beyond 1e30.
        """
        if not images:
            return []
        given = self._ask(name, images, entries)
        about = _example(entries)
        try:
            values = _numbers(given)
        except (TypeError, ValueError, RuntimeError) as error:
            told = " ".join(repr(given).split())  # an array's has several lines
            raise RewardError(
                f"reward {name} gave {told:.80} instead of a number per image ({error}){about}"
            ) from error
        if len(values) != len(images):
            raise RewardError(
                f"reward {name} gave {len(values)} numbers for {len(images)} images{about}"
            )
        for value, entry in zip(values, entries, strict=True):
            if not abs(value) <= _LARGEST:
                limit = f", but may give up to {_LARGEST:g}" if math.isfinite(value) else ""
                raise RewardError(f"reward {name} gave {value:g}{limit}{_example([entry])}")
        return values

    def _ask(self, name: str, images: Images, entries: Entries) -> Any:
        # In a thread, since a call that waits for a server or a lock cannot be interrupted; a
        # daemon thread, so that the program can end while it hangs.
        outcome: list[Any] = [None, None]
        # A new thread starts with the first GPU and with gradients enabled.
        initialized = torch.cuda.is_initialized()
        gpu = torch.cuda.device(torch.cuda.current_device()) if initialized else nullcontext()

        def work() -> None:
            try:
                with defaults_kept(), torch.no_grad(), gpu:
                    # Copies, since a function may well change what it is given: image.thumbnail
                    # does. The next reward and the sheets show the images as they were drawn.
                    own = [image.copy() for image in images], deepcopy(list(entries))
                    outcome[0] = self.rewards[name](*own)
            except BaseException as error:
                outcome[1] = error

        release_threads()
        thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
        with directory_kept():
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
        """The values of every reward that has a weight."""
        return {name: self.judge(name, images, entries) for name in self.weights}

    def total(self, values: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum of the rewards for each image."""
        columns = zip(*(values[name] for name in self.weights), strict=True)
        weights = list(self.weights.values())
        return [math.fsum(w * v for w, v in zip(weights, row, strict=True)) for row in columns]

    def check_variation(
        self, values: Mapping[str, Sequence[float]], prompts: Sequence[str]
    ) -> None:
        """Check the values of a whole batch, from all processes.

        Raises:
            RewardError: a reward has given all images the same number in too many batches.
        """
        for name in self.weights:
            same = min(values[name]) == max(values[name])
            self._unvaried[name] = self._unvaried[name] + 1 if same else 0
            if self._unvaried[name] >= self._limit:
                raise RewardError(
                    f"reward {name} gave {values[name][0]:g} to every image of the last "
                    f"{self._limit} batches (reward.constant), the last one of {len(prompts)} "
                    f"prompts such as {prompts[0]!r:.120}: there is nothing to learn from. Either "
                    "the reward is broken, or the model always (or never) does what it rewards"
                )


def _numbers(given: Any) -> list[float]:
    """What a reward gave, as numbers; TypeError, ValueError or RuntimeError if it is no list of
    them.
    """
    if isinstance(given, Mapping | Set | str):  # its keys or letters may be numbers
        raise TypeError("neither a dict nor a set has the images' order, nor has text")
    # An array of one element is a number; libraries disagree about float() of it.
    return [float(v.item() if hasattr(v, "item") else v) for v in given]


# -- in separate processes -------------------------------------------------------------------------
_loaded: dict[str, Reward] = {}
"""The rewards of a worker process."""


def _load(names: Sequence[str], options: RewardOptions) -> None:
    torch.set_num_threads(1)
    _loaded.update(load_rewards(names, options, torch.device("cpu")))


@torch.no_grad()
def _ask_one(name: str, images: Images, entries: Entries) -> list[float]:
    return _numbers(_loaded[name](images, entries))


def _ask_all(
    pool: Pool, judges: Sequence[BaseProcess], name: str, images: Images, entries: Entries
) -> list:
    """A reward's values, computed by all judges, each for its share of the images."""
    count = min(len(judges), len(images))
    asked = [(name, images[i::count], entries[i::count]) for i in range(count)]
    answering = pool.starmap_async(_ask_one, asked)
    while not answering.ready():
        # A pool replaces a dead process, but waits forever for the dead one's answer.
        if dead := [judge.exitcode for judge in judges if judge.exitcode is not None]:
            raise RuntimeError(f"a judging process ended unexpectedly (exit code {dead[0]})")
        answering.wait(0.2)
    answers: list = [None] * len(images)
    for i, given in enumerate(answering.get()):
        if len(given) != (share := len(asked[i][1])):
            raise ValueError(f"{len(given)} numbers for {share} images")
        answers[i::count] = given
    return answers


def _example(entries: Entries) -> str:
    return f"; prompt {entries[0]['prompt']!r:.120}" if entries else ""
