"""Load a model as `launch/generate.py` does, draw the first codes of an image, and decode an image.

python -m t2i.rehearsal.first_codes --ckpt RUN --prompt "a red fox" --calls 16

A whole image of a large model takes minutes on a CPU; a few steps of the same loop show that it
runs, how long a step takes and, as the cache has its full length, how much memory it needs.
"""

import time
from contextlib import suppress
from dataclasses import dataclass

from t2i import cli
from t2i.model_options import DrawingModelOptions
from t2i.sampling import check_counts


@dataclass(frozen=True, kw_only=True)
class FirstCodes(DrawingModelOptions):
    """The model, what to draw with it, and how many steps."""

    prompt: str
    """Caption, or class id."""
    calls: int = 16
    """Number of calls of the model to time, after a first one that is not timed."""

    def __post_init__(self):
        super().__post_init__()
        check_counts(calls=self.calls)


class _Enough(Exception):
    """Raised to stop drawing once all calls are timed."""


def main() -> None:
    config = cli.parse(FirstCodes, __doc__)
    import torch

    from t2i.generation import parse_conditions, to_images
    from t2i.rng import make_keys
    from t2i.tensorar.sampler import sample_windows

    model = config.load(*config.check())
    backbone, times = model.backbone, []

    def tick(_) -> None:
        times.append(time.perf_counter())
        if len(times) > config.calls:
            raise _Enough

    prepared = backbone.prepare(parse_conditions(backbone, [config.prompt]))
    sampling = config.sampling.apply(model.sampling)
    with suppress(_Enough):
        sample_windows(
            model, prepared, make_keys(config.seed, torch.tensor([0]), 0), sampling, tick
        )
    step = (times[-1] - times[0]) / (len(times) - 1)
    sizes = torch.tensor(backbone.spec.subvocabs)
    codes = torch.arange(backbone.spec.num_tokens)[None, :, None] % sizes
    image = to_images(model, codes)[0]
    print(
        f"{len(times)} of {model.windows.count} steps drawn, {step:.3f} s per step; decoded an "
        f"image of {image.width} x {image.height}"
    )


if __name__ == "__main__":
    cli.run(main)
