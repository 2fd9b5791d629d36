"""Places for drawn images: which images they hold, and which settings these depend on.

    OUT/00000/samples/00000.png   a generation folder (t2i.evaluation.generation_folder)
    OUT/000000.png                a folder of numbered PNGs
    OUT.npz                       one array `arr_0` uint8 [N, H, W, 3], as ADM's evaluator reads it

The settings are written next to the images before the first one (generation.json, settings.json,
OUT.npz.json), and compared before more are added, so that all images of a place come from the same
model, seed and sampling settings. An image is written completely or not at all (in an .npz: a
batch, in OUT.npz.parts). A killed run therefore resumes with the missing images, and any number of
processes give the same files.
"""

import json
import logging
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

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
from t2i.fields import leaves
from t2i.files import read_json, replacing, writable_file, writable_folder, write_json
from t2i.generation import Drawn, Job
from t2i.imaging import save_png
from t2i.manifest import refuse_in_checkpoint
from t2i.processes import ALONE, Processes

log = logging.getLogger(__name__)

_HASH = re.compile(r"[0-9a-f]{64}")


class Place(ABC):
    """Where drawn images are written."""

    def __init__(self, out: Path, record: Path, processes: Processes):
        """record: the file with the settings that the images depend on."""
        self.out, self.record, self.processes = out, record, processes

    def check(self, known: dict) -> None:
        """Raise what `claim` would raise, as far as that is known before a model is loaded.

        Args:
            known: the settings that are known already.
        """
        refuse_in_checkpoint(self.out, "--out")
        writable_folder(self.record.parent, make=False)
        if self.record.is_file() and self.is_occupied():
            self._refuse_others(self._recorded(), known, set(known))

    def claim(self, settings: dict, about: dict, *, compared: set[str] | None = None) -> dict:
        """Record the settings of new images, or compare them with those of the existing images;
        every process calls this. Returns the recorded settings.

        A record without images is left by a run that stopped before its first one; it is replaced.

        Args:
            about: facts that are recorded but not compared.
            compared: the settings that images depend on; all of them if None.

        Raises:
            UserError: the place holds images of other or unknown settings, or cannot be written.
            TimeoutError: the main process stopped.
        """
        settings, compared = settings | {"about": about}, compared or set(settings)
        if self.processes.is_main:
            self.check({})
            if not (self.record.is_file() and self.is_occupied()):
                self._begin(settings)

        def unsettled() -> list[Path]:
            there = self.record.is_file()
            same = there and not _changes(self._recorded(), settings, compared)
            return [] if same or (there and self.is_occupied()) else [self.record]

        self.processes.wait_until_none(unsettled)
        recorded = self._recorded()
        self._refuse_others(recorded, settings, compared)
        return recorded

    def _recorded(self) -> dict:
        """The recorded settings; none if something else wrote the file."""
        content = read_json(self.record)
        return content if isinstance(content, dict) else {}

    def _refuse_others(self, before: dict, now: dict, compared: set[str]) -> None:
        """UserError, naming the differences, if the current settings are not the recorded ones."""
        changes = _changes(before, now, compared)
        if any(change.startswith("weights.") for change in changes):
            changes.insert(0, f"{_who(before)} there, {_who(now)} now")
        if changes:
            raise UserError(
                f"{self.images} holds images drawn with other settings ({'; '.join(changes)}); "
                "give another --out, or delete it"
            )

    def _begin(self, settings: dict) -> None:
        if self.is_occupied():
            raise UserError(
                f"{self.images} holds files without {self.record.name}, so it is not known how "
                "they were drawn; give another --out"
            )
        writable_folder(self.record.parent)
        write_json(self.record, settings)

    @property
    def images(self) -> Path:
        """The file or folder that holds the existing images."""
        return self.out

    @abstractmethod
    def is_occupied(self) -> bool:
        """Whether the place holds anything besides the record."""

    @abstractmethod
    def missing(self, batch: Sequence[Job]) -> set[Job]:
        """The images of a batch that the place lacks; call `claim` first."""

    def parts(self, images: Sequence[Drawn]) -> list[Sequence[Drawn]]:
        """Split the missing images of a batch into parts, which may be written at the same time."""
        return [[one] for one in images]

    @abstractmethod
    def write(self, images: Sequence[Drawn]) -> None:
        """Add a part of a batch."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all processes have added their images; every process calls this."""


class GenerationFolder(Place):
    """GenEval's layout: prompt by prompt, with the prompts' metadata and refinement stages."""

    def __init__(
        self, out: Path, entries: Sequence[dict], processes: Processes = ALONE, *, stages: int = 0
    ):
        """entries: all prompts. stages: how many refinement stages of an image to keep."""
        super().__init__(out, out / GENERATION_FILE, processes)
        self.entries, self.stages = entries, stages

    def check(self, known: dict) -> None:
        if self.is_occupied() or not self.record.is_file():
            refuse_other_images(self.out, self.entries)
        super().check(known)

    def is_occupied(self) -> bool:
        return any(self.out.glob("[0-9]*/samples/*")) or any(self.out.glob("[0-9]*/stages/*"))

    def _begin(self, settings: dict) -> None:
        stopped = self.record.is_file()  # a run that drew nothing
        if not (stopped or self.is_occupied()):
            self._look_at_others()
        super()._begin(settings)
        for metadata in self.out.glob("[0-9]*/metadata.jsonl") if stopped else ():
            metadata.unlink()
            with suppress(OSError):
                metadata.parent.rmdir()

    def _look_at_others(self) -> None:
        """UserError for a sheet that would be overwritten, a warning for any other image."""
        names = sorted(path.name for path in self.out.glob("*"))
        if sheets := SHEETS.intersection(names):
            raise UserError(
                f"{self.out / min(sheets)} would be overwritten, and is not a sheet of images that "
                "were drawn there; move it, or give another --out"
            )
        if others := [name for name in names if is_image(Path(name))]:
            text = "%s holds other images (%s, ...); sheets and folders are written next to them"
            log.warning(text, self.out, others[0])

    def missing(self, batch: Sequence[Job]) -> set[Job]:
        return {job for job in batch if not self._has(job)}

    def _has(self, job: Job) -> bool:
        """Whether an image is there and readable, with as many stages as are asked for."""
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
        """Write the metadata of these prompts (in the main process)."""
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
        # Waiting for files would not do: a damaged one exists before it is drawn again.
        self.processes.barrier()


class NumberedImages(Place):
    """A given number of images: PNGs in a folder, named by number."""

    def __init__(self, out: Path, count: int, processes: Processes = ALONE):
        super().__init__(out, out / "settings.json", processes)
        self.count = count

    def is_occupied(self) -> bool:
        # The record does not count, nor the temporary file that becomes the record.
        names = (path.name for path in self.out.glob("[!.]*"))
        return any(not name.startswith(self.record.name) for name in names)

    def _file(self, number: int) -> Path:
        return self.out / f"{number:06d}.png"

    def missing(self, batch: Sequence[Job]) -> set[Job]:
        return {job for job in batch if not self._has(self._file(job[0]))}

    def _has(self, file: Path) -> bool:
        """Whether an image is there and its checksums are right; reading 50,000 takes minutes."""
        if not file.exists():
            return False
        try:
            with Image.open(file) as image:
                image.verify()
        except Exception as error:  # for damaged files, Pillow's parsers raise nearly anything
            log.error("%s is damaged (%s); drawing it again", file, error)
            return False
        return True

    def write(self, images: Sequence[Drawn]) -> None:
        for drawn in images:
            save_png(drawn.image, self._file(drawn.prompt_index))

    def finish(self) -> None:
        self.processes.wait_for([self._file(i) for i in range(self.count)])


class ImageArray(Place):
    """A given number of images: one array in an .npz. Until all are drawn, a file per batch in
    OUT.npz.parts.
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
        """See `Place.claim`; the settings must hold the images' "size" and the "batch_size"."""
        recorded = super().claim(settings, about, compared=compared)
        self._size, self._rows = settings["size"], settings["batch_size"]
        return recorded

    def _part(self, first: int) -> Path:
        """The file of the batch whose first image has this number."""
        return self._folder / f"{first:08d}.npy"

    def missing(self, batch: Sequence[Job]) -> set[Job]:
        # The order matters: parts are removed once OUT exists.
        done = self._part(batch[0][0]).exists() or self.out.exists()
        return set() if done else set(batch)

    def parts(self, images: Sequence[Drawn]) -> list[Sequence[Drawn]]:
        return [images]  # one file

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
            self.processes.wait_for(parts)
            _pack(parts, (self.count, *self._size, 3), self.out)

        def missing() -> list[Path]:
            there = self.out.exists()
            return [] if there else [self.out, *(part for part in parts if not part.exists())]

        self.processes.wait_until_none(missing)
        if self.processes.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)


def _pack(parts: Sequence[Path], shape: tuple[int, ...], out: Path) -> None:
    """Write one uint8 array as an uncompressed .npz; its bytes depend on the array alone."""
    for leftover in out.parent.glob(f"{out.name}.*.tmp"):  # gigabytes, if this was killed before
        leftover.unlink()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        member = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with archive.open(member, "w", force_zip64=True) as target:
            np.lib.format.write_array_header_1_0(target, header)
            for part, end in zip(parts, [*map(_first, parts[1:]), shape[0]], strict=True):
                target.write(_batch(part, (end - _first(part), *shape[1:])).data)


def _first(part: Path) -> int:
    return int(part.stem)


def _batch(part: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The images of a batch, uint8 of this shape; UserError if its file is damaged."""
    with suppress(ValueError, EOFError):
        images = np.load(part)
        if images.dtype == np.uint8 and images.shape == shape:
            return images
    raise UserError(f"{part} is damaged: delete it, and the same command draws it again")


# -- comparing settings ----------------------------------------------------------------------------
_UNRECORDED = {"model"}
"""Settings that earlier versions did not record; their folders are still continued."""


def _changes(before: dict, now: dict, compared: set[str]) -> list[str]:
    now = json.loads(json.dumps(now))  # as it is recorded: without tuples
    compared = compared - (_UNRECORDED - before.keys())
    there, here = (leaves({k: d.get(k) for k in compared}) for d in (before, now))
    return [
        f"{key} {_shown(there.get(key))} there, {_shown(here.get(key))} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def _who(settings: dict) -> str:
    """The model's name, as the program that drew with it recorded it."""
    about = settings.get("about")
    about = about if isinstance(about, dict) else {}
    base = about.get("backbone")
    base = base if isinstance(base, dict) else {}
    return about.get("checkpoint") or base.get("weights") or "another model"


def _shown(value: object) -> str:
    return value[:8] if isinstance(value, str) and _HASH.fullmatch(value) else repr(value)
