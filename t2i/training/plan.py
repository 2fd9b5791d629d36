"""What a run does when, in numbers: settled from the settings, the number of samples and nothing
else.

A setting that is a number is taken as it is. One that is None follows the run's length:

- held out: 4 % of the samples, 8 to 256 of them, but never more than a fifth;
- warm-up: 3 % of the steps, at most 2,000 (`OptimOptions.warmup`);
- validations and sample sheets: ten in a run, checkpoints: five; at least one in 1,000 steps
  (checkpoints: 2,000);
- lines of metrics: a hundred in a run, at least one in ten steps.
"""

from dataclasses import dataclass

from t2i.errors import UserError
from t2i.training.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """A run in numbers; stored in its config.json."""

    samples: int | None
    """Usable samples; None where nobody has counted them yet."""
    held_out: int | None
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


def plan_run(config: TrainConfig, samples: int | None, world_size: int = 1) -> Plan | None:
    """The numbers of a run on so many usable samples; None if neither they nor the steps are known.

    Raises:
        UserError: too few samples for what is held out.
    """
    held_out = None if samples is None else _held_out(config, samples, world_size)
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


def _held_out(config: TrainConfig, samples: int, world_size: int) -> int:
    count = config.data.validation_samples
    if count is None:
        share = min(max(round(0.04 * samples), 8), 256, samples // 5)
        count = max(share, world_size)
    if not world_size <= count < samples:
        raise UserError(
            f"data.validation_samples={count} must be at least one per process ({world_size}) and "
            f"fewer than the {samples} usable samples, or they leave none to train on"
        )
    return count
