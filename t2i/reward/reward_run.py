"""A run of reward fine-tuning: a training run whose step draws, judges and learns.

The images of a step depend only on the seed, the step and the weights, so a resumed run draws the
same. Every process computes rewards, advantages and dropped groups of the whole batch, from the
same numbers.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from t2i.errors import NotFiniteError
from t2i.files import saving
from t2i.generation import Drawn, draw_images
from t2i.imaging import grid, save_png
from t2i.models.conditions import to_device
from t2i.reward.panel import Panel, RewardError
from t2i.reward.policy import (
    SUMS,
    Distributions,
    DrawnBatch,
    PolicyLoss,
    Start,
    advantages,
    code_distributions,
    score_codes,
)
from t2i.reward.reward_options import RewardConfig
from t2i.reward.reward_prompts import training_prompts
from t2i.reward.reward_watch import WatchedBenchmarks, text_kl, together
from t2i.reward.rewards import judging, load_rewards
from t2i.rng import make_keys
from t2i.sampling import DrawOptions
from t2i.training import run_state
from t2i.training.engine import grad_norm, healthy_norm, set_rates, start_processes
from t2i.training.start import build_model, check_start, start_facts
from t2i.training.training_run import Run

_DRAWN = 31
"""Number of the random stream that images are drawn with."""
_SHEET_GROUPS = 8
"""Number of groups whose best and worst images are shown."""


@dataclass
class Round:
    """A step's images in this process, and the rewards of the whole batch."""

    entries: list[dict]
    """The step's prompts, one per group."""
    mine: list[tuple[int, int]]
    """This process's images: number of the prompt, and of the image in its group."""
    drawn: list[Drawn]
    values: dict[str, list[float]]
    """Values of each reward for every image of the batch."""
    rewards_PG: Tensor
    """fp64, the weighted sums of the rewards."""
    advantages_PG: Tensor
    kept_P: Tensor
    """Groups whose rewards differ, the only ones to learn from."""


def _reward_metrics(found: Round) -> dict[str, float]:
    rewards = found.rewards_PG
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/group_std": float(rewards.std(1, correction=0).mean()),
        **{f"reward/by/{name}": sum(v) / len(v) for name, v in found.values.items()},
        "reward/dropped_groups": 1 - float(found.kept_P.double().mean()),
    }


class RewardRun(Run):
    """See `t2i.training.training_run.Run`."""

    config: RewardConfig

    def __init__(self, config: RewardConfig):
        processes, options = start_processes(), judging(config)
        self.pool = training_prompts(options, config.seed)
        self.shown = "reward/mean" if options.functions else "policy/kl"
        names = dict.fromkeys((*options.functions, *options.watch))
        device = torch.device("cpu") if options.workers else processes.device
        rewards = load_rewards(tuple(names), options, device)
        self.panel = Panel(
            rewards, options.weighted(), seconds=options.seconds, constant=options.constant
        )
        self.panel.check(self.pool.every())
        self.watcher = WatchedBenchmarks(config, self.panel, processes)
        if options.workers:
            self.panel.share(options.workers, options)
        super().__init__(config)
        # A resumed model no longer has the weights of the start.
        self.start = Start(self.model, of=build_model(config) if self.step > 0 else None)
        self.saved_step = self.step
        self.round: Round | None = None
        self.learning_mode()

    def facts(self, checkpoint: Path | None) -> dict:
        if checkpoint is not None:
            check_start(self.config, checkpoint)
        return {"start": start_facts(self.config)}

    def loss_module(self) -> nn.Module:
        options = self.config.reward
        return PolicyLoss(self.model, options.sampling, clip=options.clip, kl=options.kl)

    def learning_mode(self) -> None:
        """Turn dropout off, so that images are scored by the model that drew them."""
        self.model.eval()

    # -- a step ------------------------------------------------------------------------------------
    def _train_step(self) -> dict[str, float]:
        config, times = self.config, [time.perf_counter()]
        rates = set_rates(self.engine, config, self.step, self.plan.steps)
        drawn = self._draw()
        times.append(time.perf_counter())
        self.round = found = self._judge(*drawn)
        times.append(time.perf_counter())
        batches: Iterable[DrawnBatch] = self._batches(found)
        if config.reward.updates > 1:
            batches = list(batches)
        for _ in range(config.reward.updates):
            totals, norm = self._update(batches)
        total_norm = self._count_step(norm)
        if not healthy_norm(total_norm):
            self._refuse("gradient", self.step)
        times.append(time.perf_counter())
        seconds = [later - earlier for earlier, later in pairwise(times)]
        names = ("drawing", "judging", "learning")
        means = dict(zip(SUMS, (totals / totals[-1].clamp(min=1)).tolist(), strict=True))
        learned = totals[-1] > 0  # else all groups are dropped, and there are no means
        return {
            **(_reward_metrics(found) if config.reward.functions else {}),
            **{f"policy/{name}": means[name] for name in SUMS[1:-1] if learned},
            "train/loss": means["loss"],
            **{f"lr/{part}": rate for part, rate in rates.items()},
            **({} if total_norm is None else {"train/grad_norm": total_norm}),
            **{f"seconds/{name}": s for name, s in zip(names, seconds, strict=True)},
        }

    def _draw(self) -> tuple[list[dict], list[tuple[int, int]], list[Drawn]]:
        """Draw this process's share of the step's images: prompts, its images' numbers, images."""
        config, options, processes = self.config, self.config.reward, self.processes
        entries = self.pool.at(self.step, config.prompts_per_step)
        share = config.batch_size // processes.world_size
        places = range(processes.rank * share, (processes.rank + 1) * share)
        mine = [divmod(place, options.group) for place in places]
        seed = int(make_keys(config.seed, _DRAWN, self.step)) & (2**63 - 1)
        drawing = DrawOptions(seed, options.sampling, options.draw_batch)
        prompts = [entry["prompt"] for entry in entries]
        drawn = list(draw_images(self.model, prompts, drawing, jobs=mine, progress=False))
        return entries, mine, drawn

    def _judge(self, entries: list[dict], mine: list[tuple[int, int]], drawn: list[Drawn]) -> Round:
        """Compute every reward of every image, and the advantages.

        Raises:
            RewardError: a reward is broken, in any process.
        """
        images, asked = [one.image for one in drawn], [entries[p] for p, _ in mine]
        shares = together(self.processes, lambda: self.panel.judge_all(images, asked))
        values = {name: [v for share in shares for v in share[name]] for name in shares[0]}
        self.panel.check_variation(values, [entry["prompt"] for entry in entries])
        summed = self.panel.total(values) or [0.0] * self.config.batch_size  # nothing is rewarded
        total = torch.tensor(summed, dtype=torch.float64)
        rewards = total.view(len(entries), self.config.reward.group)
        found = advantages(rewards, by_spread=self.config.reward.by_spread)
        return Round(entries, mine, drawn, values, rewards, *found)

    @torch.no_grad()
    def _batches(self, found: Round) -> Iterator[DrawnBatch]:
        """The images to learn from, with the start's log-probabilities or distributions."""
        config, device = self.config, self.processes.device
        prompts, backbone = [entry["prompt"] for entry in found.entries], self.model.backbone
        prepared = backbone.prepare(prompts, backbone.prefix_length(prompts))
        image = torch.tensor(found.mine)
        windows = torch.stack([one.windows for one in found.drawn])
        gains = found.advantages_PG[image[:, 0], image[:, 1]].float()
        # DeepSpeed takes the mean over all passes of all processes, which have equally many, some
        # without images. These shares turn it into the mean over the kept images.
        count = config.batch_size // config.engine.micro_batch
        teacher = config.reward.teacher
        # A guided start is learned from on every image, whatever its reward.
        kept_P = found.kept_P if teacher is None else torch.ones_like(found.kept_P)
        kept = kept_P[image[:, 0]].float()
        share = kept * count / max(1, int(kept_P.sum()) * config.reward.group)
        for rows in kept.nonzero()[:, 0].tensor_split(count // self.processes.world_size):
            # Every process must take every pass; without an image of its own, one of weight 0.
            weighs = len(rows) > 0
            rows = rows if weighs else torch.tensor([0])
            of = to_device(image[rows, 0], device)
            own = {name: value[of] for name, value in prepared.items()}
            drawn = to_device(windows[rows], device)
            scored = (self.model, own, drawn, config.reward.sampling)
            start: Tensor | Distributions
            with self.start.applied():
                if teacher is None:
                    start = score_codes(*scored).log_p
                else:
                    start = code_distributions(*scored[:3], teacher)
            before = score_codes(*scored).log_p if config.reward.updates > 1 else None
            gain, part = (to_device(x[rows], device) for x in (gains, weighs * share))
            yield DrawnBatch(drawn, own, gain, part, start, before)

    def _update(self, batches: Iterable[DrawnBatch]) -> tuple[Tensor, Tensor | None]:
        """An optimizer step; returns `SUMS` of all processes, and the gradient's norm if known."""
        parts = []
        for batch in batches:
            loss, sums = self.engine(batch)
            self.engine.backward(loss)
            parts.append(sums)
            if self.engine.is_gradient_accumulation_boundary():
                norm = grad_norm(self.engine)
                totals, healthy = self._agree(torch.stack(parts).sum(0), norm)
                if not healthy:  # before any weight is touched
                    self._refuse("loss or gradient", self.step + 1)
            self.engine.step()
        return totals, norm

    def _refuse(self, what: str, step: int) -> None:
        assert self.round is not None, "of this step"
        prompts = [entry["prompt"] for entry in self.round.entries[:2]]
        raise NotFiniteError(
            f"the {what} is not finite at step {step}, with prompts such as {prompts}; "
            f"{run_state.advice(self.config.run_dir)}"
        )

    # -- around the steps --------------------------------------------------------------------------
    def train_step(self) -> dict[str, float]:
        """A step as in any run; saves the run first if a reward is broken."""
        try:
            return super().train_step()
        except RewardError as error:
            raise RewardError(f"{error}. {self._rescue()}") from error

    def _rescue(self) -> str:
        """Save the run, whose weights have not changed since the last step; returns a message."""
        if self.step == 0:
            return "Nothing was learned yet"
        already = self.step == self.saved_step
        folder = self.checkpoints.folder(self.step) if already else self.save()
        return f"Saved after step {self.step} ({folder}): --resume continues from there"

    def save(self) -> Path:
        self.saved_step = self.step
        folder = super().save()
        if self.stop_agreed and self.sheet_due():  # resuming draws the sheet, but without these
            self.processes.on_main(self._group_sheet)
        return folder

    def validate(self) -> dict[str, float]:
        """The held-out losses, and the metrics of `t2i.reward.reward_watch`."""
        found = super().validate()
        with self.average.applied():
            found |= self.watcher(self.model) | text_kl(self.model, self.start)
        return found

    def judged_by(self, metrics: dict[str, float]) -> float:
        """The negative weighted sum of the rewards on their watched benchmarks (of all watched ones
        if nothing is rewarded); the held-out loss if none is watched.
        """
        options = self.config.reward
        weights = options.weighted() or dict.fromkeys(options.watch, 1.0)
        scores = []
        for name, weight in weights.items():
            watched = (f"watch/{one}" for one in (name.removesuffix("-soft"), name))
            if (known := next((one for one in watched if one in metrics), None)) is not None:
                scores.append(weight * metrics[known])
        return -math.fsum(scores) if scores else super().judged_by(metrics)

    def draw_sheet(self) -> None:
        """Also show the best and worst images of the last step's groups."""
        super().draw_sheet()
        self._group_sheet()

    def _group_sheet(self) -> None:
        if (found := self.round) is None:
            return
        group, images, labels = self.config.reward.group, [], []
        whole = len(found.drawn) // group  # groups drawn entirely by this process
        spread = [p for p in range(whole) if found.kept_P[p]][:_SHEET_GROUPS]
        for prompt in spread:
            values = found.rewards_PG[prompt]
            for of, place in (("best", int(values.argmax())), ("worst", int(values.argmin()))):
                images.append(found.drawn[prompt * group + place].image)
                text = found.entries[prompt]["prompt"] if of == "best" else ""
                labels.append(f"{of} {float(values[place]):.2f} {text}".strip())
        if images:
            name = f"step_{self.step:06d}_groups.png"
            path = self.config.run_dir / "samples" / name
            with saving(path):
                save_png(grid(images, columns=4, labels=labels, cell=160), path)
