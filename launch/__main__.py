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
from t2i.launcher import without_rank

VERBS = {
    "train-llamagen": ("launch.train_llamagen", "fine-tune LlamaGen text-to-image"),
    "train-janus": ("launch.train_janus", "fine-tune Janus-Pro"),
    "train-reward": ("launch.train_reward", "fine-tune on judges' scores of drawn images"),
    "train-imagenet": ("launch.train_imagenet", "fine-tune a class-conditional model"),
    "generate": ("launch.generate", "draw images from prompts"),
    "review": ("launch.review", "compare models' images side by side on one page"),
    "analyze": ("launch.analyze", "measure what refinement changes and what it costs"),
    "demo": ("launch.demo", "serve a page on which models draw while you watch"),
    "geneval": ("geneval.run", "score a model, or images, with GenEval"),
    "dpg-bench": ("dpg_bench.run", "score a model, or images, with DPG-Bench"),
    "sample-imagenet": ("launch.sample_imagenet", "draw the images for an ImageNet evaluation"),
    "fid": ("launch.fid", "compute FID and related scores of images"),
    "export": ("launch.export", "turn a checkpoint into a self-contained folder"),
    "plan": ("launch.plan", "plan a run on a cluster before you have it"),
    "rehearse": ("launch.rehearse", "run the whole pipeline at real size with random weights"),
    "ablate": ("launch.ablate", "reproduce the paper's ablation table offline"),
    "quickstart": ("launch.quickstart", "run the whole kit once, small and offline"),
    "benchmark": ("launch.benchmark", "measure speed and memory on this machine"),
}
"""Module and one-line description of each program."""


def main() -> None:
    cli.run(_program)


def _program() -> None:
    """Run the program that the first argument names."""
    given = without_rank(sys.argv[1:])  # it stands before the verb
    verb = given[0] if given else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"{name:{width}}  {about}" for name, (_, about) in VERBS.items())
        print(indent(f"{__doc__}\n{verbs}\n", "  "))
        print("t2i VERB --help shows the options of one program.")
        sys.exit()
    if verb not in VERBS:
        raise UserError(f"there is no t2i {verb}; {choose_one(verb, VERBS)}")
    # Programs take the name that they show in their help from argv[0].
    sys.argv = [f"t2i {verb}", *given[1:]]
    try:
        program = import_module(VERBS[verb][0])
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("launch.lab"):
            raise
        raise UserError(
            f"t2i {verb} only runs in a clone of the repository: launch/lab is not installed"
        ) from error
    program.main()


if __name__ == "__main__":
    main()
