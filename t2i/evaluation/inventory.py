"""What a generation folder holds against what it should hold: nothing that an evaluator would read
goes unnoticed.

Three kinds of deviation, and no image ever counts as a wrong one because it is not there:

- missing: expected images without a file;
- problems: what would be judged as something that it is not (an extra sample, a folder for no
  prompt, another prompt's metadata), which is always refused;
- unread: files and folders whose names no evaluator of this layout reads; they are named, and left
  alone.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2i.errors import UserError
from t2i.evaluation.store import sample_file

_KNOWN = {"grid.png", "stages.png", "stages", "samples", "metadata.jsonl", "generation.json"}
_SHOWN = 6


@dataclass
class Inventory:
    """The images of a generation folder, and what is wrong with it."""

    folder: Path
    expected: int
    """Images that there should be."""
    found: dict[int, dict[int, Path]] = field(default_factory=dict)
    """Prompt index -> sample index -> file."""
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def check(self, *, allow_missing: bool) -> None:
        """UserError names what forbids judging."""
        if self.problems:
            raise UserError(f"{self.folder} cannot be judged: {shorten(self.problems, '; ')}")
        if not any(self.found.values()):
            raise UserError(
                f"{self.folder} holds none of the {self.expected} expected images ({self.missing[0]} ...)"
                + self._unread_note()
            )
        if self.missing and not allow_missing:
            raise UserError(
                f"{self.folder}: {len(self.missing)} of {self.expected} images are missing: {shorten(self.missing)}"
                f"{self._unread_note()}; add them, or judge the rest as INCOMPLETE with --allow-incomplete"
            )

    def numbered(
        self, folder: Path, pattern: str, is_kind: Callable[[Path], bool]
    ) -> dict[int, Path]:
        """Children by the number in their names; other names go to `unread`, repetitions to
        `problems`.
        """
        children: dict[int, Path] = {}
        for child in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = re.fullmatch(pattern, child.name)
            if match and is_kind(child):
                first = children.setdefault(int(match[1]), child)
                if first is not child:
                    self.problems.append(
                        f"{first.relative_to(self.folder)} and {child.name} are the same number"
                    )
            elif (
                child.name not in _KNOWN
                and not child.name.startswith(".")
                and child.suffix != ".tmp"
            ):
                self.unread.append(str(child.relative_to(self.folder)))
        return children

    def _unread_note(self) -> str:
        return f"; names that are not read: {shorten(self.unread)}" if self.unread else ""


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def take_inventory(
    folder: Path, entries: Sequence[dict], selected: Sequence[int], samples: int
) -> Inventory:
    """Look at names and metadata (images are opened when they are judged).

    Args:
        entries: all prompts of the benchmark; folders of prompts that are not `selected` are
            allowed.
        samples: images per prompt.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist (or is a file)")
    inventory = Inventory(folder, len(selected) * samples)
    folders = inventory.numbered(folder, r"(\d+)", Path.is_dir)
    for index in sorted(folders):
        if index >= len(entries):
            name = folders[index].name
            inventory.problems.append(f"folder {name} belongs to none of {len(entries)} prompts")
        elif problem := _metadata_problem(folders[index], entries[index]):
            inventory.problems.append(problem)
    for index in selected:
        images = {}
        if index in folders:
            inventory.numbered(folders[index], r"(?!)", Path.is_file)  # names what is not read
            images = inventory.numbered(folders[index] / "samples", r"(\d+)\.png", Path.is_file)
        for sample in sorted(set(images) - set(range(samples))):
            name = images.pop(sample).relative_to(folder)
            inventory.problems.append(f"{name} is more than the {samples} samples of a prompt")
        inventory.missing += [sample_file(index, s) for s in range(samples) if s not in images]
        inventory.found[index] = dict(sorted(images.items()))
    return inventory


def _metadata_problem(folder: Path, entry: dict) -> str | None:
    path = folder / "metadata.jsonl"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"{folder.name}/metadata.jsonl cannot be read ({error})"
    if known != entry:
        prompt = known.get("prompt") if isinstance(known, dict) else known
        return f"{folder.name} holds images of {prompt!r} instead of {entry['prompt']!r}"
    return None
