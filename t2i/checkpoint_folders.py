"""Checkpoint folders: which one is meant, and whether it is whole (`t2i.checkpoint` says what is in
one).
"""

import logging
import os
import re
from pathlib import Path
from typing import get_args

from t2i.errors import UserError, nearest_path
from t2i.fields import read_object
from t2i.files import reading
from t2i.manifest import MANIFEST, DamagedError, check_files
from t2i.sources import shipped_bases
from t2i.tuning import Tuning

log = logging.getLogger(__name__)

EXPORTED = "tensorar"
"""Name of the checkpoint folder within an export, whose base is given relative to it."""
BEST = "best"
"""Folder of the model with the lowest held-out loss, within a run folder."""
CODEC = "codec.safetensors"
"""File of TensorAR's own weights."""
_SECTIONS = ("backbone", "method", "sampling", "training")
_FACTS = {"kit_version": str, "image_layers": bool}
_RUN_FACTS = {"step": int, "data_key": str, "config": dict, "state": dict}
"""What resuming reads of "training"."""


def read_config(folder: str | Path, *, with_state: bool = False, contents: bool = False) -> dict:
    """The config.json of a complete checkpoint folder.

    Args:
        with_state: also ask for the files that resume needs.
        contents: compare checksums, not only sizes: reads every file.

    Raises:
        UserError: no such folder, not a checkpoint, incomplete, a file is not what was written, or
            a way of training that is no more.
    """
    folder = Path(folder)
    with reading(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        hint = nearest_path(folder)
        if str(folder) in shipped_bases():
            hint = "; that is a shipped base, and a trained model is wanted here"
        raise UserError(f"checkpoint folder {folder} does not exist (or is a file){hint}")
    check_files(folder, with_state=with_state, contents=contents)
    path = folder / "config.json"
    try:
        config = read_object(path)
    except UserError as error:
        raise DamagedError(f"{path} is not what a checkpoint has: {error}") from error
    wrong = [name for name in _SECTIONS if not isinstance(config.get(name), dict)]
    if config.get("tuning") not in get_args(Tuning):
        wrong.append("tuning")
    wrong += [n for n, of in _FACTS.items() if not isinstance(config.get(n, False), of)]
    if wrong:
        raise DamagedError(
            f"{path} is not what a checkpoint has: {wrong[0]} is {config.get(wrong[0])!r:.80}; "
            "copy the folder again"
        )
    # Once a stride was trained: one input of the trunk for so many codes.
    of_run = config["training"].get("config")
    if isinstance(of_run, dict) and isinstance(of_run.get("method"), dict):
        of_run["method"].pop("stride", None)
    if (stride := config["method"].pop("stride", 1)) != 1:
        raise UserError(
            f"{folder} was trained with method.stride={stride}, one input of the trunk for {stride} "
            "codes, which is no more: train it again without, and draw with --stride"
        )
    if with_state:
        _check_run(folder, config["training"])
    return config


def _check_run(folder: Path, facts: dict) -> None:
    """What resuming reads is there, and the folder's name says when it was saved."""
    for name, kind in _RUN_FACTS.items():
        right = isinstance(facts.get(name), kind) and (name != "step" or facts[name] > 0)
        if not right and (name in facts or name != "state"):
            raise DamagedError(
                f"{folder / 'config.json'} is not what a run's checkpoint has: training.{name} is "
                f"{facts.get(name)!r:.80}; copy the folder again"
            )
    named = re.fullmatch(r"step_(\d+)", folder.name)
    # By their names the newest is found, and the oldest are deleted.
    if named and int(named[1]) != facts["step"]:
        raise UserError(
            f"{folder} was saved after step {facts['step']}: rename it to "
            f"step_{facts['step']:06d}, or move it elsewhere"
        )


def run_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    return [folder for folder in step_folders(run_dir) if (folder / MANIFEST).is_file()]


def step_folders(run_dir: str | Path) -> list[Path]:
    """Folders by the names of checkpoints, which may be incomplete, oldest first."""
    place = Path(run_dir) / "checkpoints"
    with reading(place):
        names = os.listdir(place) if place.is_dir() else []
    found = filter(None, (re.fullmatch(r"step_(\d+)", name) for name in names))
    steps = {int(match[1]): place / match[0] for match in found}
    return [steps[step] for step in sorted(steps)]


def newest_healthy(run_dir: str | Path, *, with_state: bool = False) -> Path | None:
    """The newest checkpoint of a run whose files are what was written; None if it has none.

    Goes back from a damaged one with a warning that names the file.

    Raises:
        DamagedError: all are damaged.
    """
    damage = None
    for folder in reversed(step_folders(run_dir)):
        try:
            read_config(folder, with_state=with_state, contents=True)
        except DamagedError as error:
            log.warning("%s is passed over: %s", folder, error)
            damage = damage or error
            continue
        if damage is not None:
            log.warning("going back to %s", folder)
        return folder
    if damage is not None:
        raise DamagedError(f"{run_dir} has no healthy checkpoint: {damage}") from damage
    return None


def find_checkpoint(folder: str | Path) -> Path:
    """The folder itself, the newest healthy checkpoint of a run, or the one within an export.

    Raises:
        DamagedError: it is a run folder, and all its checkpoints are damaged.
    """
    if found := newest_healthy(folder):
        return found
    exported = Path(folder) / EXPORTED
    with reading(exported):
        return exported if (exported / MANIFEST).is_file() else Path(folder)


def choose_checkpoint(folder: str | Path) -> Path:
    """As `find_checkpoint`; of a run, a log line says which it is, and where the best model is."""
    found, best = find_checkpoint(folder), Path(folder) / BEST
    if found.parent != Path(folder) / "checkpoints":
        return found
    beside = ""
    try:
        facts = read_config(best)["training"]
        if found.name != f"step_{facts['step']:06d}":
            beside = f"; the best at its validations was step {facts['step']}: {best}"
            beside += f" (loss {facts['best_loss']:.3f})"
    except (ValueError, KeyError, TypeError):  # none, or damaged, which is of no concern here
        pass
    log.info("%s: its newest checkpoint, %s%s", folder, found.name, beside)
    return found


def is_checkpoint(source: str | Path) -> bool:
    """Whether this is a checkpoint, run or export folder (perhaps a damaged one), and not a base.

    The bare name of a shipped base is that base, also where a folder here has this name.
    """
    folder = Path(source)
    with reading(source):
        if str(source) in shipped_bases() or not folder.is_dir():
            return False
        if find_checkpoint(folder) != folder or (folder / MANIFEST).is_file():
            return True
        return (folder / "checkpoints").is_dir() or (folder / CODEC).is_file()
