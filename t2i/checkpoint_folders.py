"""Finds checkpoint folders and checks that they are complete (`t2i.checkpoint` has the layout)."""

import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from t2i.errors import UserError, nearest_path, no_folder
from t2i.fields import read_object
from t2i.files import reading
from t2i.manifest import MANIFEST, DamagedError, check_files
from t2i.sources import shipped_bases
from t2i.tuning import Tuning

log = logging.getLogger(__name__)

EXPORTED = "tensorar"
"""Name of the checkpoint folder within an export; it refers to its base by a relative path."""
BEST = "best"
"""Folder, within a run folder, of the model with the lowest held-out loss."""
CODEC = "codec.safetensors"
"""File with TensorAR's own weights."""
_SECTIONS = ("backbone", "method", "sampling", "training")
_FACTS = {"kit_version": str, "image_layers": bool}
_RUN_FACTS = {"step": int, "data_key": str, "config": dict, "state": dict}
"""Entries of "training" that resuming needs, with their types."""


def read_config(folder: str | Path, *, with_state: bool = False, contents: bool = False) -> dict:
    """The config.json of a complete checkpoint folder.

    Args:
        with_state: also require the files that resuming needs.
        contents: compare checksums, not only sizes; this reads every file.

    Raises:
        UserError: no such folder, not a checkpoint, incomplete, a file has changed, or it was
            trained in a way that is no longer supported.
    """
    folder = Path(folder)
    with reading(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        hint = nearest_path(folder)
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not folder.parent.exists()
        if on_hub and not hint:
            hint = (
                "; one on the hub is fetched first, and its folder given: hf download "
                f"{folder} prints it, and so does huggingface_hub.snapshot_download in Python"
            )
        if str(folder) in shipped_bases():
            hint = "; that is a shipped base, but a trained model is needed here"
        raise UserError(f"checkpoint folder {folder} {no_folder(folder)}{hint}")
    with reading(folder):
        check_files(folder, with_state=with_state, contents=contents)
    path = folder / "config.json"
    try:
        config = read_object(path)
    except UserError as error:
        raise DamagedError(f"{path} is not a checkpoint's config.json: {error}") from error
    wrong = [name for name in _SECTIONS if not isinstance(config.get(name), dict)]
    if config.get("tuning") not in get_args(Tuning):
        wrong.append("tuning")
    wrong += [n for n, of in _FACTS.items() if not isinstance(config.get(n, False), of)]
    if wrong:
        raise DamagedError(
            f"{path} is not a checkpoint's config.json: {wrong[0]} is {config.get(wrong[0])!r:.80}; "
            "copy the folder again"
        )
    # Older versions could train with a stride: one trunk input for several codes.
    of_run = config["training"].get("config")
    if isinstance(of_run, dict) and isinstance(of_run.get("method"), dict):
        of_run["method"].pop("stride", None)
    if (stride := config["method"].pop("stride", 1)) != 1:
        raise UserError(
            f"{folder} was trained with method.stride={stride} (one trunk input for {stride} codes), "
            "which is no longer supported: train again without a stride, and draw with --stride"
        )
    if with_state:
        _check_run(folder, config["training"])
    return config


def _check_run(folder: Path, facts: dict) -> None:
    """UserError unless the facts that resuming needs are there and the folder's name fits them."""
    for name, kind in _RUN_FACTS.items():
        right = isinstance(facts.get(name), kind) and (name != "step" or facts[name] > 0)
        if not right and (name in facts or name != "state"):
            raise DamagedError(
                f"{folder / 'config.json'} is not that of a run's checkpoint: training.{name} is "
                f"{facts.get(name)!r:.80}; copy the folder again"
            )
    named = re.fullmatch(r"step_(\d+)", folder.name)
    # The names decide which checkpoint is the newest, and which old ones are deleted.
    if named and int(named[1]) != facts["step"]:
        raise UserError(
            f"{folder} was saved after step {facts['step']}: rename it to "
            f"step_{facts['step']:06d}, or move it elsewhere"
        )


def run_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    return [folder for folder in step_folders(run_dir) if (folder / MANIFEST).is_file()]


def step_folders(run_dir: str | Path) -> list[Path]:
    """Folders named like a run's checkpoints, complete or not, oldest first."""
    place = Path(run_dir) / "checkpoints"
    with reading(place):
        names = os.listdir(place) if place.is_dir() else []
    found = filter(None, (re.fullmatch(r"step_(\d+)", name) for name in names))
    steps = {int(match[1]): place / match[0] for match in found}
    return [steps[step] for step in sorted(steps)]


def newest_healthy(run_dir: str | Path, *, with_state: bool = False) -> Path | None:
    """The newest healthy checkpoint of a run; None if the run has no checkpoints.

    Skips damaged ones, with a warning that names the damaged file.

    Raises:
        DamagedError: all checkpoints are damaged.
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
    """The folder itself, or a run's newest healthy checkpoint, or the one within an export.

    Raises:
        DamagedError: it is a run folder whose checkpoints are all damaged.
        UserError: it is a run folder without checkpoints.
    """
    if found := newest_healthy(folder):
        return found
    exported, best = Path(folder) / EXPORTED, Path(folder) / BEST
    with reading(exported):
        if (exported / MANIFEST).is_file():
            return exported
    if is_run(folder):
        advice = "give a folder with one" if not best.is_dir() else f"give its best model, {best}"
        raise UserError(f"{folder} is the folder of a run and holds no checkpoint (yet): {advice}")
    return Path(folder)


def is_run(folder: str | Path) -> bool:
    """Whether the folder's config.json is a training run's."""
    with suppress(UserError):
        return "plan" in read_object(Path(folder) / "config.json")
    return False


def from_shipped_base(source: str | Path) -> bool:
    """Whether this is a shipped base, or a checkpoint of a model that was trained from one."""
    base = {"weights": str(source)}
    if is_checkpoint(source):
        base = read_config(find_checkpoint(source))["backbone"]
    return names_shipped_base(base)


def names_shipped_base(base: Mapping[str, Any]) -> bool:
    """Whether the facts about a model's base, as checkpoints hold them, name a shipped one."""
    return any(base.get(name) in shipped_bases() for name in ("weights", "shipped_base"))


def choose_checkpoint(folder: str | Path) -> Path:
    """Like `find_checkpoint`; for a run, also logs the one chosen and where the best model is."""
    found, best = find_checkpoint(folder), Path(folder) / BEST
    if found.parent != Path(folder) / "checkpoints":
        return found
    note = ""
    try:
        facts = read_config(best)["training"]
        if found.name != f"step_{facts['step']:06d}":
            note = f"; the best in validation was step {facts['step']}: {best}"
            note += f" (loss {facts['best_loss']:.3f})"
    except (ValueError, KeyError, TypeError):  # missing or damaged: it is only mentioned here
        pass
    log.info("%s: using its newest checkpoint, %s%s", folder, found.name, note)
    return found


def is_checkpoint(source: str | Path) -> bool:
    """Whether this is a checkpoint, run or export folder (perhaps a damaged one), not a base.

    The bare name of a shipped base always means that base, even if a folder has the same name.
    """
    folder = Path(source)
    with reading(source):
        if str(source) in shipped_bases() or not folder.is_dir():
            return False
        if find_checkpoint(folder) != folder or (folder / MANIFEST).is_file():
            return True
        return (folder / "checkpoints").is_dir() or (folder / CODEC).is_file()
