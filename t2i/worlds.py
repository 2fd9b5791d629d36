"""Worlds that bring their own data, prompts and exact judges, by name; one is shipped, "shapes".

A world is a module, named here alone. It offers

    open_source(text)    the data source that `--data.source` names ("shapes", "shapes:5000")
    every_prompt()       GenEval metadata of all its prompts
    benchmark_prompts()  of those that a score is about
    open_detector()      the detector that GenEval judges its images with
    questions()          its DPG-Bench question graph
    open_judge()         who answers these questions
"""

from importlib import import_module
from types import ModuleType

WORLDS = {"shapes": "t2i.shapes.world"}


def open_world(name: str) -> ModuleType:
    """The world of a name in `WORLDS`."""
    return import_module(WORLDS[name])
