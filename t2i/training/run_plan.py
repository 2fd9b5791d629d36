"""What a run does when, in numbers, and what of it will not make sense.

The numbers are settled from the settings, the number of samples and nothing else: a run that goes
on with another number of processes has the same plan.

A setting that is a number is taken as it is. One that is None follows the run's length:

- held out: 4 % of the samples, 8 to 256 of them, but never more than a fifth (more only where
  one picture has more samples than that: they are held out together);
- warm-up: 3 % of the steps, at most 2,000 (`OptimOptions.warmup`);
- validations and sample sheets: ten in a run, checkpoints: five; at least one in 1,000 steps
  (checkpoints: 2,000);
- lines of metrics: a hundred in a run, at least one in ten steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

from t2i.errors import UserError
from t2i.training.config import TrainConfig

PUBLISHED_K = 8
"""The largest window that the papers report; it was the best by less than its repeats' spread."""
_LONG = 400
"""Steps from which docs/recipe.md finds own drafts alone better than half of them."""
_FEW = 25
"""Adapters trained on 36 pictures were at their best after 27 steps (docs/tutorial.md)."""
_PASSES = 20
"""Those steps were six passes; adapters trained for 60 had learned the pictures by heart."""
_SHORT = 50
"""A run of fewer steps needs nothing before its end."""


@dataclass(frozen=True)
class Plan:
    """A run in numbers; stored in its config.json."""

    samples: int | None
    """Usable samples; None where nobody has counted them yet."""
    held_out: int
    """0 where nobody has counted them yet; before the data are split, the least number."""
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


@overload
def plan_run(config: TrainConfig, samples: int, held_out: int | None = None) -> Plan: ...
@overload
def plan_run(
    config: TrainConfig, samples: int | None, held_out: int | None = None
) -> Plan | None: ...
def plan_run(config: TrainConfig, samples: int | None, held_out: int | None = None) -> Plan | None:
    """The numbers of a run on so many usable samples; None if these and the steps are unknown.

    held_out: how many of them are, where the data are split already.
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
    """How many of so many usable samples are held out, unless one picture has several."""
    count = config.data.validation_samples
    if count is None:
        if samples < 2:
            raise UserError(
                f"the data has too few usable samples ({samples}): one at least is held out, and the "
                "others are trained on"
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
    """On steps, cadence and rates."""
    yield from _about_data(config, plan)
    yield from _about_rates(config, plan)
    log = config.log
    if plan.steps >= _SHORT:
        if not 0 < plan.save_every < plan.steps:
            yield (
                f"no checkpoint before the last of {plan.steps} steps: a kill loses everything; "
                f"give a smaller --log.save-every"
            )
        sheets, validations = plan.sample_every, plan.validate_every
        looks = (sheets if 0 < sheets < plan.steps else 0) or (0 < validations < plan.steps)
        if not looks and not log.at_start:
            yield (
                "no sample sheet and no validation before the end; give a smaller "
                "--log.sample-every and --log.validate-every"
            )
    method = config.method
    if 0 < method.own_drafts < 1 and not method.anneal and plan.steps > _LONG and method.k > 1:
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
            f"{plan.held_out} of {plan.samples}); 2 to 5 % will do"
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
    """What may disappoint with adapters and some dozens of pictures: worth a note, no fault."""
    if config.tuning != "lora" or not plan.training:
        return
    if config.steps is None and plan.steps < _FEW:
        yield (
            f"{plan.steps} steps hardly move adapters; a smaller --batch-size (and "
            "--engine.micro-batch) takes more steps over the same pictures"
        )
    passes = plan.steps * config.batch_size / plan.training
    if passes > _PASSES:
        yield (
            f"{passes:.0f} passes over {plan.training} training samples: so few are learned by "
            f"heart before that; fewer --epochs, or validate often and use {config.run_dir}/best"
        )


def _about_rates(config: TrainConfig, plan: Plan) -> Iterator[str]:
    optim, steps = config.optim, plan.steps
    peaks = peak_rates(config, plan)
    if plan.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps={plan.warmup_steps} is no less than the {steps} steps of the run: "
            "no rate gets to its peak"
        )
    for part, given in (("codec", optim.codec_lr), ("backbone", optim.backbone_lr)):
        if part in peaks and peaks[part][0] < 0.8 * given and plan.warmup_steps < steps:
            yield (
                f"the {part}'s rate gets to {peaks[part][0] / given:.0%} of "
                f"optim.{part}_lr={given:g}: "
                "shorten --optim.warmup-steps or --optim.backbone-delay-steps, or train longer"
            )
        if part in peaks and given == 0:
            yield f"optim.{part}_lr=0: the {part} does not learn"
    rate = optim.backbone_lr
    if config.tuning == "lora" and not 3e-5 <= rate <= 3e-3:
        yield (
            f"optim.backbone_lr={rate:g} is unusual for adapters; 1e-4 is, with 3e-5 to 3e-3 "
            "around it"
        )
    if config.tuning == "full" and rate > 1e-3:
        yield (
            f"optim.backbone_lr={rate:g} is far above what fine-tuning a whole model stands (1e-5 "
            "to 1e-4)"
        )
    if config.method.k > 1 and optim.codec_lr > 2e-2:
        yield f"optim.codec_lr={optim.codec_lr:g} is far above what was ever tried (1e-4 to 3e-3)"


def peak_rates(config: TrainConfig, plan: Plan) -> dict[str, tuple[float, int]]:
    """The highest rate of each trained part and the (first) step that has it."""
    optim, steps = config.optim, plan.steps
    rates = {}
    if config.method.k > 1:
        rates["codec"] = lambda step: optim.codec_rate(step, steps)
    if config.tuning != "codec" or config.train_image_layers:
        rates["backbone"] = lambda step: optim.backbone_rate(step, steps)
    # Both only fall, or stay, once the warm-up and the delay are over; before, what rises while it
    # falls as well is highest in the middle of the run.
    turns = (0, optim.backbone_delay_steps, plan.warmup_steps, (steps - 1) // 2, steps // 2)
    looked_at = sorted({min(step, steps - 1) for step in turns})
    best = {part: max(looked_at, key=rate) for part, rate in rates.items()}
    return {part: (rates[part](step), step) for part, step in best.items()}


def about_window(config: TrainConfig, logits: str) -> Iterator[str]:
    """On the size of the window."""
    k = config.method.k
    if k > PUBLISHED_K:
        yield (
            f"method.k={k} is beyond everything that was tried (2 to {PUBLISHED_K}): head, loss "
            f"and codec work on {k} times as many codes, {logits} of logits in each pass, and most "
            "drafts are far from what they predict"
        )
