"""All programs of the kit under one name.

t2i VERB [options]                    where the kit is installed
python -m launch VERB [options]       in a clone
torchrun --nproc_per_node 8 -m launch VERB [options]
deepspeed --module launch VERB [options]
"""

import sys
from importlib import import_module
from pathlib import Path
from textwrap import indent

if not __package__:  # run from a clone, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from t2i import cli
from t2i.errors import UserError, choose_one

VERBS = {
    "train-llamagen": ("launch.train_llamagen", "fine-tune LlamaGen text-to-image"),
    "train-janus": ("launch.train_janus", "fine-tune Janus-Pro"),
    "train-reward": ("launch.train_reward", "fine-tune by what judges say of drawn images"),
    "train-imagenet": ("launch.train_imagenet", "fine-tune a class-conditional model"),
    "generate": ("launch.generate", "draw images of prompts"),
    "review": ("launch.review", "compare models by looking, on one page"),
    "analyze": ("launch.analyze", "see what refinement changes, and what it costs"),
    "demo": ("launch.demo", "a page on which models draw while you watch"),
    "geneval": ("geneval.run", "score a model, or images, with GenEval"),
    "dpg-bench": ("dpg_bench.run", "score a model, or images, with DPG-Bench"),
    "sample-imagenet": ("launch.sample_imagenet", "draw the images of an ImageNet evaluation"),
    "fid": ("launch.fid", "score these images"),
    "export": ("launch.export", "turn a checkpoint into a folder that stands alone"),
    "plan": ("launch.plan", "plan a run on a cluster that is not there yet"),
    "rehearse": ("launch.rehearse", "walk the whole way at real size with random weights"),
    "ablate": ("launch.ablate", "the paper's ablation table, measured offline"),
    "quickstart": ("launch.quickstart", "all of it once, small and offline"),
    "benchmark": ("launch.benchmark", "how fast a model draws here"),
}
"""Module of each program, and what it does."""


def main() -> None:
    cli.run(_program)


def _program() -> None:
    """Run the one that is asked for."""
    # DeepSpeed's launcher puts --local_rank=N before the verb.
    given = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    verb = given[0] if given else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"{name:{width}}  {about}" for name, (_, about) in VERBS.items())
        print(indent(f"{__doc__}\n{verbs}\n", "  "))
        print("t2i VERB --help shows the options of one.")
        sys.exit()
    if verb not in VERBS:
        raise UserError(f"there is no t2i {verb}; {choose_one(verb, VERBS)}")
    # The programs name themselves in their help by the first word of the command line.
    sys.argv = [f"t2i {verb}", *given[1:]]
    try:
        program = import_module(VERBS[verb][0])
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("launch.lab"):
            raise
        raise UserError(f"t2i {verb} is run in a clone: the laboratory is not installed") from error
    program.main()


if __name__ == "__main__":
    main()
