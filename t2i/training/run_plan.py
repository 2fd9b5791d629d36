"""A run's plan (steps, held-out samples, how often it writes), and warnings about its settings.

The plan depends only on the settings and the number of samples: a run resumed with another number
of processes has the same plan.

A setting that is a number is used as it is. If it is None, it follows the run's length:

- held out: 4 % of the samples, 8 to 256 of them, but at most a fifth (exceeded only if one
  picture has more samples than that, since these are held out together);
- warm-up: 3 % of the steps, at most 2,000 (`OptimOptions.warmup`);
- validations and sample sheets: ten in a run, checkpoints: five; at least one in 1,000 steps
  (checkpoints: 2,000);
- lines of metrics: a hundred in a run, at least one in ten steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

from t2i.errors import UserError
from t2i.models.conditions import given_as_files
from t2i.training.config import METRICS, TrainConfig

PUBLISHED_K = 8
"""The largest window in the papers; its lead was smaller than the spread of repeated runs."""
_LONG = 400
"""Steps above which docs/recipe.md found own drafts alone better than own drafts half of the time.
"""
_FEW = 25
"""Warn below this number of steps: on 36 pictures adapters were best after 27 steps (6 passes), on
44 after 77 (14 passes, docs/tutorial.md)."""
_PASSES = 20
"""Warn above this number of passes: after 60, adapters on those 36 pictures had overfit."""
_SHORT = 50
"""A run with fewer steps needs no checkpoint or sheet before its end."""


@dataclass(frozen=True)
class Plan:
    """A run in numbers; stored in its config.json."""

    samples: int | None
    """Usable samples; None if not counted yet."""
    held_out: int
    """0 if samples are not counted yet; the least number before the data are split."""
    steps: int
    warmup_steps: int
    log_every: int
    validate_every: int
    sample_every: int
    save_every: int

    @property
    def training(self) -> int | None:
        """Samples that are trained on."""
        return None if self.samples is None else self.samples - self.held_out

    def due(self, every: int, step: int) -> bool:
        """Whether what happens every so many steps (0: never) and at the end happens at `step`."""
        return step == self.steps or (every > 0 and step % every == 0)


@overload
def plan_run(config: TrainConfig, samples: int, held_out: int | None = None) -> Plan: ...
@overload
def plan_run(
    config: TrainConfig, samples: int | None, held_out: int | None = None
) -> Plan | None: ...
def plan_run(config: TrainConfig, samples: int | None, held_out: int | None = None) -> Plan | None:
    """The plan of a run on `samples` usable samples; None if neither these nor the steps are known.

    held_out: the number of held-out samples, if the data are already split.
    """
    if held_out is None:
        held_out = 0 if samples is None else least_held_out(config, samples)
    steps = config.steps
    if steps is None and samples is not None:
        steps = max(1, round(config.epochs * (samples - held_out) / config.batch_size))
    if steps is None:
        return None
    log = config.log
    return Plan(
        samples=samples,
        held_out=held_out,
        steps=steps,
        warmup_steps=config.optim.warmup(steps),
        log_every=_every(log.log_every, steps, times=100, most=10),
        validate_every=_every(log.validate_every, steps, times=10, most=1000),
        sample_every=_every(log.sample_every, steps, times=10, most=1000),
        save_every=_every(log.save_every, steps, times=5, most=2000),
    )


def _every(given: int | None, steps: int, *, times: int, most: int) -> int:
    return min(most, max(1, steps // times)) if given is None else given


def least_held_out(config: TrainConfig, samples: int) -> int:
    """How many of the usable samples are held out (more if one picture has several of them)."""
    count = config.data.validation_samples
    if count is None:
        if samples < 2:
            raise UserError(
                f"the data has too few usable samples ({samples}): at least one is held out, and at "
                "least one more is needed to train on"
            )
        return max(1, min(max(round(0.04 * samples), 8), 256, samples // 5))
    if not 1 <= count < samples:
        raise UserError(
            f"data.validation_samples={count} must be at least 1 and fewer than the {samples} usable "
            "samples, or they leave none to train on; --data.validation-samples None takes a share"
        )
    return count


# -- warnings --------------------------------------------------------------------------------------
def about_settings(config: TrainConfig, plan: Plan) -> Iterator[str]:
    """Warnings about steps, cadence and learning rates."""
    yield from _about_data(config, plan)
    yield from _about_rates(config, plan)
    log = config.log
    if plan.steps >= _SHORT:
        if not 0 < plan.save_every < plan.steps:
            yield (
                f"no checkpoint before the last of {plan.steps} steps: a kill loses everything; "
                "give a smaller --log.save-every"
            )
        looks = (plan.sample_every, plan.validate_every)
        if not any(0 < every < plan.steps for every in looks) and not log.at_start:
            yield (
                "no sample sheet and no validation before the end; give a smaller "
                "--log.sample-every and --log.validate-every"
            )
    if log.control is not None and not (log.control / METRICS).is_file():
        yield (
            f"log.control={log.control} holds no {METRICS} yet: the run's page shows that run's "
            "curves once it does"
        )
    for name in given_as_files(log.prompts):
        yield f"log.prompts draws the words {name!r}; this file is not read: give its prompts"
    method = config.method
    drafts = method.k > 1 and config.learns_from_data
    if drafts and 0 < method.own_drafts < 1 and not method.anneal and plan.steps > _LONG:
        yield (
            f"{plan.steps} steps with method.own_drafts={method.own_drafts:g}: for more than "
            f"{_LONG}, docs/recipe.md recommends own drafts alone (--method.own-drafts 1)"
        )


def _about_data(config: TrainConfig, plan: Plan) -> Iterator[str]:
    if plan.samples is None or plan.training is None or not config.learns_from_data:
        return
    if plan.held_out > max(64, 0.1 * plan.samples):
        yield (
            f"{plan.held_out / plan.samples:.0%} of the data are held out (data.validation_samples="
            f"{plan.held_out} of {plan.samples}); 2 to 5 % are enough"
        )
    if config.batch_size > plan.training:
        yield (
            f"batch_size={config.batch_size} is more than the {plan.training} training samples: "
            "every step sees some of them twice; give a smaller --batch-size"
        )
    elif plan.steps * config.batch_size < plan.training:
        yield (
            f"{plan.steps} steps of {config.batch_size} see only {plan.steps * config.batch_size} "
            f"of the {plan.training} training samples; give more --steps, or --epochs instead"
        )


def about_few_pictures(config: TrainConfig, plan: Plan) -> Iterator[str]:
    """Notes (not warnings) on what may disappoint with adapters and a few dozen pictures."""
    if config.tuning != "lora" or not plan.training:
        return
    if config.steps is None and plan.steps < _FEW:
        yield (
            f"{plan.steps} steps hardly change adapters; a smaller --batch-size (and "
            "--engine.micro-batch) gives more steps over the same pictures"
        )
    passes = plan.steps * config.batch_size / plan.training
    if passes > _PASSES:
        yield (
            f"{passes:.0f} passes over only {plan.training} training samples will overfit; give "
            f"fewer --epochs, or validate often and use {config.run_dir}/best"
        )


def _about_rates(config: TrainConfig, plan: Plan) -> Iterator[str]:
    optim, steps = config.optim, plan.steps
    peaks = peak_rates(config, plan)
    if plan.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps={plan.warmup_steps} is not below the {steps} steps of the run: "
            "no rate reaches its peak"
        )
    for part, given in (("codec", optim.codec_lr), ("backbone", optim.backbone_lr)):
        if part in peaks and peaks[part][0] < 0.8 * given and plan.warmup_steps < steps:
            yield (
                f"the {part}'s rate reaches only {peaks[part][0] / given:.0%} of "
                f"optim.{part}_lr={given:g}: "
                "shorten --optim.warmup-steps or --optim.backbone-delay-steps, or train longer"
            )
        if part in peaks and given == 0:
            yield f"optim.{part}_lr=0: the {part} does not learn"
    rate = optim.backbone_lr
    if config.tuning == "lora" and not 3e-5 <= rate <= 3e-3:
        yield (
            f"optim.backbone_lr={rate:g} is unusual for adapters; 1e-4 is usual, 3e-5 to 3e-3 are "
            "possible"
        )
    if config.tuning == "full" and rate > 1e-3:
        yield (
            f"optim.backbone_lr={rate:g} is far too high for fine-tuning a whole model (1e-5 to "
            "1e-4 is usual)"
        )
    if config.method.k > 1 and optim.codec_lr > 2e-2:
        yield f"optim.codec_lr={optim.codec_lr:g} is far above any rate tried so far (1e-4 to 3e-3)"


def peak_rates(config: TrainConfig, plan: Plan) -> dict[str, tuple[float, int]]:
    """The highest learning rate of each trained part, and the first step that has it."""
    optim, steps = config.optim, plan.steps
    rates = {}
    if config.method.k > 1:
        rates["codec"] = lambda step: optim.codec_rate(step, steps)
    if config.tuning != "codec" or config.train_image_layers:
        rates["backbone"] = lambda step: optim.backbone_rate(step, steps)
    # After warm-up and delay both rates only fall or stay. During the warm-up a rate that also
    # falls (a parabola over the whole run) is highest in the middle of the run.
    turns = (0, optim.backbone_delay_steps, plan.warmup_steps, (steps - 1) // 2, steps // 2)
    candidates = sorted({min(step, steps - 1) for step in turns})
    best = {part: max(candidates, key=rate) for part, rate in rates.items()}
    return {part: (rates[part](step), step) for part, step in best.items()}


def about_window(config: TrainConfig, logits: str) -> Iterator[str]:
    """A warning about a window larger than any in the papers; logits: their size in memory."""
    k = config.method.k
    if k > PUBLISHED_K:
        yield (
            f"method.k={k} is beyond every window tried so far (2 to {PUBLISHED_K}): head, loss and "
            f"codec work on {k} times as many codes, with {logits} of logits in each pass, and most "
            "drafts are far from what they predict"
        )
