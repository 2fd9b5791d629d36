"""Sample images from a checkpoint, into the GenEval folder layout with a contact sheet.

python launch/generate.py --ckpt runs/shapes --prompt "a photo of a red circle" --samples 4
python launch/generate.py --ckpt runs/shapes --prompt-file prompts.txt --stages
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run from a clone, without installation

from t2i import cli
from t2i.errors import UserError
from t2i.sampling_options import SamplingOverrides


@dataclass(frozen=True)
class GenerateConfig:
    """What to draw."""

    ckpt: Path
    """Checkpoint folder, or a run folder (its newest checkpoint)."""
    base: Path | None = None
    """Where the base weights are now, if they moved since the training."""
    out: Path = Path("outputs")
    """Folder for 00000/samples/00000.png ... and grid.png."""
    prompt: tuple[str, ...] = ()
    """One or more prompts (class ids for a class-conditional model)."""
    prompt_file: Path | None = None
    """One prompt per line, or .jsonl with a "prompt" in every line (such as GenEval's metadata)."""
    samples: int = 4
    """Images per prompt."""
    seed: int = 0
    """An image depends on (seed, prompt index, sample index) alone."""
    batch_size: int = 16
    """Images sampled at once."""
    stages: bool = False
    """Also save every refinement stage, and a sheet that shows them side by side."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, or auto (bfloat16 on a GPU)."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOverrides] = field(
        default_factory=SamplingOverrides
    )

    def __post_init__(self):
        if self.samples < 1 or self.batch_size < 1:
            raise UserError(
                f"samples={self.samples} and batch_size={self.batch_size} must be at least 1"
            )


def main() -> None:
    config = cli.parse(GenerateConfig, __doc__)
    from t2i.checkpoint import from_pretrained
    from t2i.evaluation.store import read_prompts, write_generated
    from t2i.generation import conditions, iterate_images, pick_device

    entries = read_prompts(config.prompt, config.prompt_file)
    device, dtype = pick_device(config.device, config.dtype)
    model = from_pretrained(
        config.ckpt, base=config.base, generation_only=True, device=device, dtype=dtype
    )
    sampling = config.sampling.apply(model.sampling)
    prompts = [entry["prompt"] for entry in entries]
    config.out.mkdir(parents=True, exist_ok=True)  # find out before sampling if that cannot be
    images = iterate_images(
        model,
        conditions(model.backbone, prompts),
        seed=config.seed,
        samples_per_prompt=config.samples,
        batch_size=config.batch_size,
        sampling=sampling,
        stages=config.stages,
    )
    sheets = write_generated(images, entries, config.out, samples_per_prompt=config.samples)
    print("\n".join(f"wrote {path}" for path in sheets))


if __name__ == "__main__":
    cli.run(main)
