"""The images of a class-conditional evaluation: 50,000 of them into one .npz or into a folder of
PNGs.

    samples.npz                    arr_0 uint8 [N, H, W, 3], what ADM's evaluator and
    `launch/fid.py` read samples.npz.json               the settings that the images depend on,
    written before the first of them samples.npz.part.npy           the images until all are there

or, for a folder, 000000.png, 000001.png, ... and settings.json. Images are drawn in batches that
are fixed by the request. A batch is complete or absent, so a killed run goes on at the batches that
are missing, and any number of processes give the same file.

Shape legend: N = images, B = batch, H, W = pixels.
"""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i.evaluation.array_file import ArrayFile, remove_markers
from t2i.evaluation.records import claim, refuse_others
from t2i.files import read_json, replacing, saving, wait_for, writable_file, writable_folder
from t2i.imaging import save_png
from t2i.processes import ALONE, Processes
from t2i.progress import progress_bar
from t2i.rng import integers, make_keys

Draw = Callable[[range], np.ndarray]


def sample_labels(count: int, num_classes: int, *, balanced: bool, seed: int) -> Tensor:
    """The class of every image, int64 [count]; an image's class depends on its number, the seed and
    these arguments alone.

    Balanced classes have counts that differ by one at most. They come in random order, not sorted:
    the Inception Score of sorted images is wrong.
    """
    keys = make_keys(seed, torch.arange(count))
    if not balanced:
        return integers(keys, num_classes, 1)[:, 0]
    order = integers(keys, 1 << 62, 1)[:, 0].argsort(stable=True)
    return (torch.arange(count) % num_classes)[order]


def write_samples(
    out: Path,
    count: int,
    size: tuple[int, int],
    draw: Draw,
    *,
    settings: dict,
    batch_size: int,
    about: dict | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Path:
    """Draw and write the images that are not there yet; returns `out` when all of them are.

    Args:
        out: a name ending in .npz, or a folder for PNGs.
        count: N.
        size: (H, W).
        draw: numbers of images, B consecutive ones -> uint8 [B, H, W, 3]. The last batch may be
            shorter.
        settings: JSON-able, whatever the images depend on; compared with those of what is already
            there.
        batch_size: images per call of `draw`, a part of the settings.
        about: facts about the model that are recorded, but not compared.

    Raises:
        UserError: `out` holds images of other settings, which are named; images of another size.
        TimeoutError: another process stopped.
    """
    assert count > 0 and batch_size > 0, (count, batch_size)
    settings = {**settings, "count": count, "size": list(size), "batch_size": batch_size}
    _claim(out, settings, about or {}, processes)
    as_npz = out.suffix == ".npz"
    shape = (count, *size, 3)
    if as_npz:
        part = out.with_name(out.name + ".part.npy")
        if out.exists():
            return _tidy(part, out, processes)
        array = ArrayFile(part, shape, np.uint8, batch_size, out, processes)
        missing, write = array.missing(), array.write
    else:
        batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        mine = batches[processes.rank :: processes.world_size]
        missing = [rows for rows in mine if not _all_there(out, rows)]

        def write(rows: range, images: np.ndarray) -> None:
            for i, image in zip(rows, images, strict=True):
                save_png(Image.fromarray(image), _png(out, i))

    total = sum(map(len, missing))
    with progress_bar(
        total=total, desc="images", unit=" images", disable=not (progress and processes.is_main)
    ) as bar:
        for rows in missing:
            images = draw(rows)
            assert images.shape == (len(rows), *shape[1:]), (images.shape, shape)
            assert images.dtype == np.uint8, images.dtype
            with saving(out):
                write(rows, images)
            bar.update(len(rows))
    if not as_npz:
        wait_for([_png(out, i) for i in range(count)], processes.patience)
        return out
    if processes.is_main:
        array.wait_for_chunks()
        _pack(part, out)
    array.wait_for_sign()
    return _tidy(part, out, processes)


def record_file(out: Path) -> Path:
    """Where the settings are that the images of `out` depend on."""
    return out.with_name(out.name + ".json") if out.suffix == ".npz" else out / "settings.json"


def check_place(out: Path, settings: dict) -> None:
    """Whether images with these settings (some of them) can be added to `out`, before anything is
    drawn.

    Raises:
        UserError: it cannot be written, or holds images of other settings.
    """
    (writable_file if out.suffix == ".npz" else writable_folder)(out)
    if (record := record_file(out)).is_file():
        refuse_others(read_json(record), settings, images=out, compared=set(settings))


def _claim(out: Path, settings: dict, about: dict, processes: Processes) -> None:
    """Write the settings before the first image, or compare them with those of the images that are
    there.
    """
    record, settings_now = record_file(out), settings | {"about": about}
    if processes.is_main:
        check_place(out, {})
        occupied = out.exists() if out.suffix == ".npz" else any(out.glob("[!.]*"))
        claim(record, settings_now, images=out, compared=set(settings), occupied=occupied)
    wait_for([record], processes.patience)
    refuse_others(read_json(record), settings_now, images=out, compared=set(settings))


def _png(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _all_there(folder: Path, rows: range) -> bool:
    return all(_png(folder, i).exists() for i in rows)


def _pack(array: Path, out: Path) -> None:
    """An uncompressed .npz of one array; its bytes depend on the array alone."""
    for left in out.parent.glob(f"{out.name}.*.tmp"):  # gigabytes, if this was killed before
        left.unlink()
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        member = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with open(array, "rb") as source, archive.open(member, "w", force_zip64=True) as target:
            shutil.copyfileobj(source, target, 1 << 22)


def _tidy(part: Path, out: Path, processes: Processes) -> Path:
    """Remove what the finished file was made from."""
    if processes.is_main:
        remove_markers(part)
        part.unlink(missing_ok=True)
    return out
