"""Worlds by name: each has its own data, prompts and exact judges. The kit ships one, "shapes".

A world is a module that is named only here. It offers

    open_source(text)    the data source that `--data.source` names ("shapes", "shapes:5000")
    every_prompt()       GenEval metadata of all its prompts
    benchmark_prompts()  the subset of these that is scored
    open_detector()      the detector for judging its images with GenEval
    questions()          its DPG-Bench question graph
    open_judge()         the judge that answers these questions
"""

from importlib import import_module
from types import ModuleType

WORLDS = {"shapes": "t2i.shapes.world"}


def open_world(name: str) -> ModuleType:
    """The module of the world with this name in `WORLDS`."""
    return import_module(WORLDS[name])
