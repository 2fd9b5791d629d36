"""What will not work, or not make sense, in settings that are possible: sentences for the
pre-flight, and nothing else.
"""

from collections import Counter
from collections.abc import Iterator

from t2i.data.data_report import DataReport
from t2i.training.config import TrainConfig
from t2i.training.plan import Plan

PUBLISHED_K = 8
"""The largest window that the papers report (k = 2, 4 and 8: the largest was the best by less than
the spread of its repeats).
"""
_LONG = 400
"""Steps from which docs/recipe.md finds own drafts alone better than half of them."""
_SHORT = 50
"""A run of fewer steps needs nothing before its end."""


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
                "no sample sheet and no validation before the end; give a smaller --log.sample-every "
                "and --log.validate-every"
            )
    method = config.method
    if 0 < method.own_drafts < 1 and not method.anneal and plan.steps > _LONG and method.k > 1:
        yield (
            f"{plan.steps} steps with method.own_drafts={method.own_drafts:g}: for more than {_LONG}, "
            "docs/recipe.md recommends own drafts alone (--method.own-drafts 1)"
        )


def _about_data(config: TrainConfig, plan: Plan) -> Iterator[str]:
    if plan.samples is None:
        return
    if plan.held_out > max(64, 0.1 * plan.samples):
        yield (
            f"{plan.held_out / plan.samples:.0%} of the data are held out (data.validation_samples="
            f"{plan.held_out} of {plan.samples}); 2 to 5 % will do"
        )
    if config.batch_size > plan.training:
        yield (
            f"batch_size={config.batch_size} is more than the {plan.training} training samples: every step "
            "sees some of them twice; give a smaller --batch-size"
        )
    elif plan.steps * config.batch_size < plan.training:
        yield (
            f"{plan.steps} steps of {config.batch_size} see only {plan.steps * config.batch_size} of the "
            f"{plan.training} training samples; give more --steps, or --epochs instead"
        )


def _about_rates(config: TrainConfig, plan: Plan) -> Iterator[str]:
    optim, steps = config.optim, plan.steps
    peaks = peak_rates(config, plan)
    if plan.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps={plan.warmup_steps} is no less than the {steps} steps of the run: no rate "
            "gets to its peak"
        )
    for part, given in (("codec", optim.codec_lr), ("backbone", optim.backbone_lr)):
        if part in peaks and peaks[part][0] < 0.8 * given and plan.warmup_steps < steps:
            yield (
                f"the {part}'s rate gets to {peaks[part][0] / given:.0%} of optim.{part}_lr={given:g}: "
                "shorten --optim.warmup-steps or --optim.backbone-delay-steps, or train longer"
            )
    rate = optim.backbone_lr
    if config.tuning == "lora" and not 3e-5 <= rate <= 3e-3:
        yield f"optim.backbone_lr={rate:g} is unusual for adapters; 1e-4 is, with 3e-5 to 3e-3 around it"
    if config.tuning == "full" and rate > 1e-3:
        yield f"optim.backbone_lr={rate:g} is far above what fine-tuning a whole model stands (1e-5 to 1e-4)"
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
    # Both only fall, or stay, once the warm-up and the delay are over.
    last = min(steps - 1, max(plan.warmup_steps, optim.backbone_delay_steps))
    best = {part: max(range(last + 1), key=rate) for part, rate in rates.items()}
    return {part: (rates[part](step), step) for part, step in best.items()}


def about_captions(survey: DataReport, size: int) -> Iterator[str]:
    """On the samples that were looked at, and on files that belong to no sample."""
    around = Counter(line["reason"] for line in survey.skipped if line["index"] is None)
    for reason, keys in survey.keys.items():
        advice = ""
        if reason == "too small":
            advice = f": the model's images are {size} px; --data.small-images upscale takes smaller ones"
        if count := len(keys) - around[reason]:
            yield f"{count} of {survey.seen} samples looked at are skipped, {reason} ({keys[0]}){advice}"
        if count := around[reason]:
            yield f"{count} left out, {reason} ({keys[-1]})"


def about_windows(config: TrainConfig, logits: str) -> Iterator[str]:
    """On the size of the window."""
    k = config.method.k
    if k > PUBLISHED_K:
        yield (
            f"method.k={k} is beyond everything that was tried (2 to {PUBLISHED_K}): head, loss and codec work on "
            f"{k} times as many codes, {logits} of logits in each pass, and most drafts are far from what they predict"
        )
