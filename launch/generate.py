"""Draw images of prompts, into the GenEval folder layout with a contact sheet.

python launch/generate.py --ckpt runs/shapes --prompt "a photo of a red circle" --samples 4
# a base that the kit ships
python launch/generate.py --ckpt shapes --prompt-file prompts.txt
python launch/generate.py --base.family llamagen \\
    --base.weights peizesun/llamagen_t2i:t2i_XL_stage1_256.pt \\
    --base.tokenizer peizesun/llamagen_t2i:vq_ds16_t2i.pt \\
    --base.text-encoder google/flan-t5-xl --prompt "a bus"

Every request has a folder of its own unless --out names one: the same request goes on where it
stopped, and another model, seed or prompt never gets into it.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import tyro

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError
from t2i.model_options import ModelOptions
from t2i.sampling import SamplingOverrides

_OUTPUTS = Path("outputs")
_MAIN = ("ckpt", "base.weights", "prompt", "prompt_file", "out", "samples", "seed", "stages")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelOptions):
    """What to draw, and with which model."""

    prompt: tuple[str, ...] = ()
    """One or more prompts (class ids for a class-conditional model)."""
    prompt_file: Path | None = None
    """One prompt per line, or .jsonl with a "prompt" in every line (such as GenEval's metadata)."""
    out: Path | None = None
    """Folder for 00000/samples/00000.png ... and grid.png; outputs/<model>-<hash of the request> if
    not given.
    """
    samples: int = 4
    """Images per prompt."""
    seed: int = 0
    """An image depends on (seed, prompt index, sample index) alone."""
    batch_size: int = 16
    """Images sampled at once."""
    stages: bool = False
    """Also save every refinement stage, and a sheet that shows them side by side."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOverrides] = field(
        default_factory=SamplingOverrides
    )

    def __post_init__(self):
        if self.samples < 1 or self.batch_size < 1:
            raise UserError(
                f"samples={self.samples} and batch_size={self.batch_size} must be at least 1"
            )


def main() -> None:
    config = cli.parse(GenerateConfig, __doc__, main=_MAIN)
    from t2i.evaluation.store import read_prompts, write_sheets
    from t2i.files import owning, remove_leftovers, writable_folder

    entries = read_prompts(config.prompt, config.prompt_file)
    device, dtype = config.check()
    config.sampling.check()
    with ExitStack() as held:
        from t2i.evaluation import sampling

        if config.out is None:
            writable_folder(_OUTPUTS)
        else:
            held.enter_context(owning(config.out, "image folder"))
            sampling.check_folder(config.out, entries, config.seed)
        model = config.load(device, dtype)
        options = sampling.DrawOptions(
            seed=config.seed,
            sampling=config.sampling.apply(model.sampling),
            batch_size=min(config.batch_size, len(entries) * config.samples),
            stages=config.stages,
            show_steps=True,
        )
        out = config.out
        if out is None:
            out = _OUTPUTS / f"{config.name()}-{sampling.request_hash(model, entries, options)}"
            held.enter_context(owning(out, "image folder"))
        remove_leftovers(out)
        sampling.draw_images(
            model,
            entries,
            range(len(entries)),
            out,
            samples=config.samples,
            options=options,
            about=config.about(model),
        )
        sheets = write_sheets(
            out,
            entries,
            samples_per_prompt=config.samples,
            stages=sampling.count_stages(model, options),
        )
    print("\n".join(f"wrote {path}" for path in sheets))


if __name__ == "__main__":
    cli.run(main)
