"""Places for drawn images: what they hold already, and what their images depend on.

    OUT/00000/samples/00000.png   a generation folder (t2i.evaluation.generation_folder)
    OUT/000000.png                a folder of numbered PNGs
    OUT.npz                       one array `arr_0` uint8 [N, H, W, 3], as ADM's evaluator reads it

What images depend on is written beside them before the first one (generation.json, settings.json,
OUT.npz.json), and compared before another is added: all are of one model, one seed and one way to
draw, or the place is refused by name. An image is there whole or not at all (for an .npz: a batch,
in OUT.npz.parts), so a run that was killed goes on with what is missing, and any number of
processes give the same files.
"""

import logging
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from t2i.data.sources.folders import is_image
from t2i.errors import UserError
from t2i.evaluation.generation_folder import (
    GENERATION_FILE,
    SHEETS,
    codes_file,
    load_image,
    refuse_other_images,
    sample_file,
    stage_file,
    write_codes,
    write_prompt,
)
from t2i.files import (
    read_json,
    replacing,
    wait_for,
    wait_until_none,
    writable_file,
    writable_folder,
    write_json,
)
from t2i.generation import Drawn, Job
from t2i.imaging import save_png
from t2i.manifest import refuse_in_checkpoint
from t2i.processes import ALONE, Processes

log = logging.getLogger(__name__)

_HASH = re.compile(r"[0-9a-f]{64}")


def _is_other(path: Path) -> bool:
    """Whether a file of a generation folder is an image that is not one of its sheets."""
    return is_image(path) and path.name not in SHEETS


class Place(ABC):
    """Where images are drawn to."""

    def __init__(self, out: Path, record: Path, processes: Processes):
        """record: the file that says what the images depend on."""
        self.out, self.record, self.processes = out, record, processes

    def check(self, known: dict) -> None:
        """UserError for what `claim` would refuse, as far as it is known before a model is loaded.

        Args:
            known: the settings that are known by then.
        """
        refuse_in_checkpoint(self.out, "--out")
        writable_folder(self.record.parent, make=False)
        if self.record.is_file() and self.is_occupied():
            refuse_others(read_json(self.record), known, images=self.images, compared=set(known))

    def claim(self, settings: dict, about: dict, *, compared: set[str] | None = None) -> dict:
        """Record the settings of new images, or compare them with those of the images that are
        there; every process calls it. Returns what is recorded.

        A record without any image is of a run that was stopped before its first: it is replaced.

        Args:
            about: facts that are recorded, but not compared.
            compared: the keys of the settings that images depend on; all of them if None.

        Raises:
            UserError: the place holds images of other settings, or of unknown ones, or it cannot
                be written.
            TimeoutError: the main process stopped.
        """
        settings, compared = settings | {"about": about}, compared or set(settings)
        if self.processes.is_main:
            self.check({})
            if not (self.record.is_file() and self.is_occupied()):
                self._begin(settings)

        def unsettled() -> list[Path]:
            there = self.record.is_file()
            same = there and not _changes(read_json(self.record), settings, compared)
            return [] if same or (there and self.is_occupied()) else [self.record]

        wait_until_none(unsettled, self.processes.patience)
        recorded = read_json(self.record)
        refuse_others(recorded, settings, images=self.images, compared=compared)
        return recorded

    def _begin(self, settings: dict) -> None:
        if self.is_occupied():
            raise UserError(
                f"{self.images} holds files without {self.record.name}, so nobody can say how they "
                "were drawn; give another --out"
            )
        writable_folder(self.record.parent)
        write_json(self.record, settings)

    @property
    def images(self) -> Path:
        """The file or folder that holds what is there."""
        return self.out

    @abstractmethod
    def is_occupied(self) -> bool:
        """Whether images, or anything else but the record, are in the place."""

    @abstractmethod
    def missing(self, batch: Sequence[Job]) -> set[Job]:
        """Which images of a batch are not there; after `claim`."""

    @abstractmethod
    def write(self, images: Sequence[Drawn]) -> None:
        """Add the images of a batch that were missing."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all processes have added theirs; every process calls it."""


class GenerationFolder(Place):
    """GenEval's layout: prompt by prompt, with the prompts' metadata and refinement stages."""

    def __init__(
        self, out: Path, entries: Sequence[dict], processes: Processes = ALONE, *, stages: int = 0
    ):
        """entries: all prompts. stages: refinement stages to keep of an image."""
        super().__init__(out, out / GENERATION_FILE, processes)
        self.entries, self.stages = entries, stages

    def check(self, known: dict) -> None:
        if self.is_occupied() or not self.record.is_file():
            refuse_other_images(self.out, self.entries)
        super().check(known)

    def is_occupied(self) -> bool:
        return any(self.out.glob("[0-9]*/samples/*")) or any(self.out.glob("[0-9]*/stages/*"))

    def _begin(self, settings: dict) -> None:
        stopped, children = self.record.is_file(), sorted(self.out.glob("*"))
        if not stopped and (others := [path.name for path in children if _is_other(path)]):
            told = "%s holds other images (%s, ...), among which sheets and folders are written"
            log.warning(told, self.out, others[0])
        super()._begin(settings)
        for metadata in self.out.glob("[0-9]*/metadata.jsonl") if stopped else ():
            metadata.unlink()  # of the run that drew nothing
            with suppress(OSError):
                metadata.parent.rmdir()

    def missing(self, batch: Sequence[Job]) -> set[Job]:
        return {job for job in batch if not self._has(job)}

    def _has(self, job: Job) -> bool:
        """Whether there is a readable file of an image, and as many stages as are asked for."""
        path = self.out / sample_file(*job)
        staged = [stage_file(*job, self.stages), codes_file(*job)] if self.stages else []
        if not all(file.is_file() for file in (path, *(self.out / name for name in staged))):
            return False
        try:
            load_image(path)
        except UserError as error:
            log.error("%s; drawing it again", error)
            return False
        return True

    def write_prompts(self, indices: Sequence[int]) -> None:
        """Write the metadata of these prompts; the main process does."""
        if self.processes.is_main:
            for index in indices:
                write_prompt(self.out, index, self.entries[index])

    def write(self, images: Sequence[Drawn]) -> None:
        for drawn in images:
            for r, stage in enumerate(drawn.stages):
                save_png(stage, self.out / stage_file(*drawn.job, r + 1))
            if drawn.stage_codes is not None:
                write_codes(self.out / codes_file(*drawn.job), drawn.stage_codes.tolist())
            save_png(drawn.image, self.out / sample_file(*drawn.job))

    def finish(self) -> None:
        # Not by waiting for files: one that is damaged is there before it is drawn again.
        self.processes.barrier()


class NumberedImages(Place):
    """So many images by number: PNGs in a folder."""

    def __init__(self, out: Path, count: int, processes: Processes = ALONE):
        super().__init__(out, out / "settings.json", processes)
        self.count = count

    def is_occupied(self) -> bool:
        # Not the record, nor what it is written to before it has its name.
        names = (path.name for path in self.out.glob("[!.]*"))
        return any(not name.startswith(self.record.name) for name in names)

    def _file(self, number: int) -> Path:
        return self.out / f"{number:06d}.png"

    def missing(self, batch: Sequence[Job]) -> set[Job]:
        return {job for job in batch if not self._file(job[0]).exists()}

    def write(self, images: Sequence[Drawn]) -> None:
        for drawn in images:
            save_png(drawn.image, self._file(drawn.prompt_index))

    def finish(self) -> None:
        wait_for([self._file(i) for i in range(self.count)], self.processes.patience)


class ImageArray(Place):
    """So many images by number: one array in an .npz, and until all are there a file for each batch
    in OUT.npz.parts.
    """

    def __init__(self, out: Path, count: int, processes: Processes = ALONE):
        super().__init__(out, out.with_name(out.name + ".json"), processes)
        self.count, self._folder = count, out.with_name(out.name + ".parts")
        self._size, self._rows = (0, 0), count

    def check(self, known: dict) -> None:
        writable_file(self.out)
        super().check(known)

    @property
    def images(self) -> Path:
        return self.out if self.out.exists() else self._folder

    def is_occupied(self) -> bool:
        return self.out.exists() or any(self._folder.glob("*.npy"))

    def claim(self, settings: dict, about: dict, *, compared: set[str] | None = None) -> dict:
        """As for any place; the settings hold the images' "size" and the "batch_size"."""
        recorded = super().claim(settings, about, compared=compared)
        self._size, self._rows = settings["size"], settings["batch_size"]
        return recorded

    def _part(self, first: int) -> Path:
        """The file of the batch that begins with this number."""
        return self._folder / f"{first:08d}.npy"

    def missing(self, batch: Sequence[Job]) -> set[Job]:
        # Asked in this order: parts are removed when OUT is there.
        done = self._part(batch[0][0]).exists() or self.out.exists()
        return set() if done else set(batch)

    def write(self, images: Sequence[Drawn]) -> None:
        self._folder.mkdir(exist_ok=True)
        with (
            replacing(self._part(images[0].prompt_index)) as temporary,
            open(temporary, "wb") as file,
        ):
            np.save(file, np.stack([np.asarray(drawn.image) for drawn in images]))

    def finish(self) -> None:
        parts = [self._part(first) for first in range(0, self.count, self._rows)]
        if self.processes.is_main and not self.out.exists():
            wait_for(parts, self.processes.patience)
            _pack(parts, (self.count, *self._size, 3), self.out)

        def missing() -> list[Path]:
            there = self.out.exists()
            return [] if there else [self.out, *(part for part in parts if not part.exists())]

        wait_until_none(missing, self.processes.patience)
        if self.processes.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)


def _pack(parts: Sequence[Path], shape: tuple[int, ...], out: Path) -> None:
    """An uncompressed .npz of one uint8 array; its bytes depend on the array alone."""
    for left in out.parent.glob(f"{out.name}.*.tmp"):  # gigabytes, if this was killed before
        left.unlink()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        member = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with archive.open(member, "w", force_zip64=True) as target:
            np.lib.format.write_array_header_1_0(target, header)
            for part in parts:
                target.write(np.load(part).data)


# -- what images depend on -------------------------------------------------------------------------
def refuse_others(before: object, now: dict, *, images: Path, compared: set[str]) -> None:
    """UserError names what differs between recorded settings and those of now.

    Args:
        images: the folder or file of the images.
        compared: the keys that are looked at.
    """
    known = before if isinstance(before, dict) else {}
    changes = _changes(before, now, compared)
    if any(change.startswith("weights.") for change in changes):
        changes.insert(0, f"{_who(known)} there, {_who(now)} now")
    if changes:
        raise UserError(
            f"{images} holds images drawn otherwise ({'; '.join(changes)}); "
            "give another --out, or delete it"
        )


def _changes(before: object, now: dict, compared: set[str]) -> list[str]:
    known = before if isinstance(before, dict) else {}
    there, here = (dict(_flat({k: d.get(k) for k in compared})) for d in (known, now))
    return [
        f"{key} {_shown(there.get(key))} there, {_shown(here.get(key))} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def _who(settings: dict) -> str:
    """The model, as its program recorded it."""
    about = settings.get("about", {})
    return about.get("checkpoint") or about.get("backbone", {}).get("weights") or "another model"


def _flat(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of nested settings, as JSON would give them back."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    return value[:8] if isinstance(value, str) and _HASH.fullmatch(value) else repr(value)
