"""Draw images from prompts into GenEval's folder layout, with a contact sheet.

python launch/generate.py --ckpt runs/shapes-tuned --prompt "a photo of a red circle" --samples 4
# a base that the kit ships
python launch/generate.py --ckpt shapes --prompt-file prompts.txt
python launch/generate.py --base.family llamagen \\
    --base.weights peizesun/llamagen_t2i:t2i_XL_stage1_256.pt \\
    --base.tokenizer peizesun/llamagen_t2i:vq_ds16_t2i.pt \\
    --base.text-encoder google/flan-t5-xl --prompt "a bus"

Without --out, every request gets its own folder: repeating the same request resumes it where it
stopped, and a request with another model, seed or prompt never writes into it.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli, launcher
from t2i.model_options import DrawingModelOptions
from t2i.sampling import check_counts

_OUTPUTS = Path("outputs")
_MAIN = ("ckpt", "base.weights", "prompt", "prompt_file", "out", "samples", "seed", "stages")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DrawingModelOptions):
    """What to draw, and with which model."""

    prompt: tuple[str, ...] = ()
    """One or more prompts (class ids for a class-conditional model)."""
    prompt_file: Path | None = None
    """File with one prompt per line, or .jsonl with a "prompt" in every line (such as GenEval's
    metadata).
    """
    out: Path | None = None
    """Folder for 00000/samples/00000.png ... and grid.png; outputs/<model>-<hash of the request> if
    not given.
    """
    samples: int = 4
    """Images per prompt."""
    stages: bool = False
    """Also save every refinement stage, and a sheet that shows them side by side."""

    def __post_init__(self):
        super().__post_init__()
        check_counts(samples=self.samples)


def main() -> None:
    config = cli.parse(GenerateConfig, __doc__, main=_MAIN)
    launcher.refuse_several()
    from t2i.evaluation.generation_folder import write_sheets
    from t2i.evaluation.prompt_files import read_prompts
    from t2i.files import writable_folder
    from t2i.ownership import owning, remove_leftovers

    entries = read_prompts(config.prompt, config.prompt_file)
    device, dtype = config.check()
    from t2i.evaluation import draw
    from t2i.generation import all_jobs, unpadded
    from t2i.training.trigger_words import remind_of_trigger

    with ExitStack() as held:
        if config.out is None:
            writable_folder(_OUTPUTS, make=False)
        else:
            held.enter_context(owning(config.out, "image folder"))
            draw.check_prompts(config.out, entries, config.seed)
        remind_of_trigger(config.checkpoint, [entry["prompt"] for entry in entries])
        model = config.load(device, dtype)
        jobs = all_jobs(range(len(entries)), config.samples)
        options = replace(config.drawing(model), stages=config.stages)
        options = unpadded(model, options, len(jobs))
        request, out = draw.PromptRequest(model, entries, options), config.out
        if out is None:
            out = _OUTPUTS / f"{config.name()}-{request.short_hash}"
            held.enter_context(owning(out, "image folder"))
        remove_leftovers(out)
        draw.draw_prompts(request, jobs, out, show_steps=True)
        stages = draw.count_stages(model, options)
        sheets = write_sheets(out, entries, samples_per_prompt=config.samples, stages=stages)
    print("\n".join(f"wrote {path}" for path in sheets))


if __name__ == "__main__":
    cli.run(main)
