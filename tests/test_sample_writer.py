"""Drawing 50,000 images into one .npz or folder: streamed, resumed after a kill, shared by
processes, and in an order that scores can use.
"""

import errno
import json
import os
import time
import zipfile
from threading import Thread

import numpy as np
import pytest
import torch
from helpers import Killed, folder_content, in_threads
from PIL import Image

from t2i.errors import UserError
from t2i.evaluation import places
from t2i.evaluation.draw import fill, numbered_batches, numbered_place, sample_labels
from t2i.evaluation.fid.image_sets import open_images
from t2i.evaluation.generation_folder import sample_file
from t2i.evaluation.places import GenerationFolder
from t2i.files import read_json, write_json
from t2i.generation import Drawn
from t2i.imaging import save_png
from t2i.processes import ALONE, Processes

SIZE = (4, 6)


class Draw:
    """Draws images whose pixels all hold the image's number; raises `Killed` instead of drawing
    its batch number `dies_at`.
    """

    def __init__(self, dies_at=None):
        self.drawn, self.dies_at = [], dies_at

    def __call__(self, batch):
        if self.dies_at == len(self.drawn):
            raise Killed
        self.drawn.append((batch[0][0], batch[-1][0] + 1))
        pixels = [np.full((*SIZE, 3), i, np.uint8) for i, _ in batch]
        return [Drawn(*j, 0, Image.fromarray(p), None) for j, p in zip(batch, pixels, strict=True)]


def write(out, draw=None, settings=None, batch_size=3, processes=None, size=SIZE, overlap=False):
    place = numbered_place(out, 10, processes or Processes(patience=20))
    settings = settings or {"seed": 0}
    place.claim({**settings, "count": 10, "size": list(size), "batch_size": batch_size}, {})
    batches = numbered_batches(10, batch_size)
    fill(place, batches, draw or Draw(), overlap=overlap, progress=False)
    return out


def check(out):
    images = [image for batch in open_images(out).batches(4) for image in batch]
    assert np.array(images)[:, 0, 0, 0].tolist() == list(range(10))
    assert {image.shape for image in images} == {(*SIZE, 3)}


@pytest.fixture(params=["samples.npz", "samples"])
def out(request, tmp_path):
    """Where to write: an .npz file or a folder of PNG files."""
    return tmp_path / "deep" / request.param


def test_an_npz_and_its_settings_are_written(tmp_path):
    out = write(tmp_path / "samples.npz")
    check(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz", "samples.npz.json"]
    with np.load(out) as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].shape == (10, *SIZE, 3)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
    settings = json.loads((tmp_path / "samples.npz.json").read_text())
    shared = {"count": 10, "size": list(SIZE), "batch_size": 3}
    assert settings == {"seed": 0, **shared, "about": {}}


def test_png_files_are_written(tmp_path):
    out = write(tmp_path / "samples")
    check(out)
    assert len(list(out.glob("*.png"))) == 10
    assert np.asarray(Image.open(out / "000007.png")).tolist() == np.full((*SIZE, 3), 7).tolist()


@pytest.mark.parametrize("overlap", [False, True])
def test_resume_after_a_kill_between_batches(out, overlap):
    killed = Draw(dies_at=2)
    with pytest.raises(Killed):
        write(out, killed, overlap=overlap)
    rest = Draw()
    write(out, rest, overlap=overlap)
    assert killed.drawn + rest.drawn == [(0, 3), (3, 6), (6, 9), (9, 10)]
    check(out)
    again = Draw()
    write(out, again)
    assert again.drawn == []
    write(out.with_name("whole").with_suffix(out.suffix))
    found = folder_content(out.parent)
    assert found.pop(_record(out)) and all("part" not in name for name in found)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_next_batch_is_drawn_while_one_is_written(out, monkeypatch, overlap):
    draw = Draw()
    kind = type(numbered_place(out, 10))
    write_part, ahead = kind.write, []

    def write_late(self, images):
        batch = images[0].prompt_index // 3 + 1
        deadline = time.monotonic() + (20 if overlap else 0)
        while len(draw.drawn) < min(batch + 1, 4) and time.monotonic() < deadline:
            time.sleep(0.01)
        ahead.append(len(draw.drawn) - batch)
        write_part(self, images)

    monkeypatch.setattr(kind, "write", write_late)
    write(out, draw, overlap=overlap)
    assert set(ahead) == ({0, 1} if overlap else {0})
    check(out)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_full_disk_ends_drawing(out, monkeypatch, overlap):
    def full(self, images):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(numbered_place(out, 10)), "write", full)
    draw = Draw()
    with pytest.raises(UserError, match=f"cannot write {out}: no space is left"):
        write(out, draw, overlap=overlap)
    assert len(draw.drawn) == (2 if overlap else 1)


def _record(out):
    return f"{out.name}.json" if out.suffix else f"{out.name}/settings.json"


@pytest.mark.parametrize(
    "moment", ["record", "part", "second part", "packing", "packed", "tidying"]
)
def test_resume_after_a_kill_while_writing_an_npz(tmp_path, monkeypatch, moment):
    whole = folder_content(write(tmp_path / "whole" / "samples.npz").parent)
    out = tmp_path / "killed" / "samples.npz"
    calls = 0

    def dying(real, dies_at):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == dies_at:
                raise Killed
            return real(*arguments, **options)

        return call

    # os.replace is called for the record, a part for each of four batches, and the .npz.
    with monkeypatch.context() as patch:
        if moment == "packing":
            patch.setattr(np, "load", dying(np.load, 3))
        elif moment == "tidying":
            patch.setattr(places.shutil, "rmtree", dying(None, 1))
        else:
            dies_at = {"record": 1, "part": 2, "second part": 3, "packed": 6}[moment]
            patch.setattr(os, "replace", dying(os.replace, dies_at))
        with pytest.raises(Killed):
            write(out)
    (out.parent / "samples.npz.0123abcd.tmp").write_bytes(b"left by a process that was killed")
    rest = Draw()
    write(out, rest)
    batches = {"record": 4, "part": 4, "second part": 3}
    assert len(rest.drawn) == batches.get(moment, 0)
    found = folder_content(out.parent)
    if moment == "tidying":
        found.pop("samples.npz.0123abcd.tmp")
    assert found == whole


def test_a_missing_png_is_drawn_again_with_its_batch(tmp_path):
    out = write(tmp_path / "samples")
    whole = folder_content(out.parent)
    (out / "000004.png").unlink()
    rest = Draw()
    write(out, rest)
    assert rest.drawn == [(3, 6)] and folder_content(out.parent) == whole


@pytest.mark.parametrize("damage", [slice(0, 0), slice(-9), slice(0, None, 2)])
def test_a_damaged_png_is_drawn_again_with_its_batch(tmp_path, damage):
    """It was kept, for the scores to stumble over."""
    out = write(tmp_path / "samples")
    whole = folder_content(out.parent)
    file = out / "000004.png"
    file.write_bytes(file.read_bytes()[damage])
    rest = Draw()
    write(out, rest)
    assert rest.drawn == [(3, 6)] and folder_content(out.parent) == whole


def test_two_processes_write_what_one_writes(out):
    write(out)
    whole, drawn = folder_content(out.parent), [Draw(), Draw()]
    other = out.parent.parent / "two" / out.name

    def work(rank):
        write(other, drawn[rank], processes=Processes(rank, 2, patience=20))

    in_threads(work, (1, 0))
    assert folder_content(other.parent) == whole
    assert [draw.drawn for draw in drawn] == [[(0, 3), (6, 9)], [(3, 6), (9, 10)]]


def test_a_missing_process_is_noticed_and_its_batches_are_drawn_later(out):
    with pytest.raises(TimeoutError):
        write(out, processes=Processes(0, 2, patience=0.1))
    rest = Draw()
    write(out, rest)
    assert rest.drawn == [(3, 6), (9, 10)]
    check(out)


def claimed(out, processes):
    """A claimed place for four images in batches of one."""
    place = numbered_place(out, 4, processes)
    place.claim({"size": list(SIZE), "batch_size": 1}, {})
    return place


def test_patience_restarts_with_every_batch(tmp_path, monkeypatch):
    first = claimed(tmp_path / "a.npz", ALONE)
    waiting = claimed(tmp_path / "a.npz", Processes(1, 2, patience=10))
    now, todo = 0.0, numbered_batches(4, 1)

    def sleep(seconds):
        """Eight of the ten seconds pass, and another process draws a batch or, at last, ends."""
        nonlocal now
        now += 8
        if todo:
            first.write(Draw()(todo.pop(0)))
        elif finishes:
            (tmp_path / "a.npz").touch()

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    finishes = False
    with pytest.raises(TimeoutError, match=r"waited 10 s for .*a\.npz without progress"):
        waiting.finish()
    assert todo == [] and now == 8 * 6
    finishes = True
    waiting.finish()


def test_nothing_is_missing_once_the_file_exists(tmp_path):
    """Holds for a process that arrives after another has packed the parts and removed them."""
    late = claimed(tmp_path / "a.npz", ALONE)
    assert all(late.missing(batch) for batch in numbered_batches(4, 1))
    (tmp_path / "a.npz").touch()
    assert not any(late.missing(batch) for batch in numbered_batches(4, 1))


def test_images_of_other_settings_are_not_continued(out):
    with pytest.raises(Killed):
        write(out, Draw(dies_at=2))
    before = folder_content(out.parent)
    with pytest.raises(ValueError, match=r"drawn with other settings \(seed 0 there, 1 now\)"):
        write(out, settings={"seed": 1})
    with pytest.raises(ValueError, match=r"batch_size 3 there, 4 now"):
        write(out, batch_size=4)
    with pytest.raises(ValueError, match=r"size \[4, 6\] there, \[4, 7\] now"):
        write(out, size=(4, 7))
    with pytest.raises(ValueError, match=r"scale None there, 1\.5 now"):
        write(out, settings={"seed": 0, "scale": 1.5})
    assert folder_content(out.parent) == before


def test_a_damaged_batch_is_named(tmp_path):
    """It ended in a traceback; with too few images, in an array that could not be read."""
    out = tmp_path / "a.npz"
    with pytest.raises(Killed):
        write(out, Draw(dies_at=3))
    part = tmp_path / "a.npz.parts" / "00000000.npy"
    whole = np.load(part)
    for content in (whole[1:], whole[:, 1:], whole.astype(float), None):
        if content is None:
            part.write_bytes(part.read_bytes()[:-9])
        else:
            np.save(part, content)
        with pytest.raises(UserError, match=r"00000000\.npy is damaged: delete it"):
            write(out)
        assert not out.exists()
    part.unlink()
    write(out)
    assert len(np.load(out)["arr_0"]) == 10


def test_a_record_with_other_contents_is_other_settings(out):
    """Facts that are no object ended in a traceback."""
    with pytest.raises(Killed):
        write(out, Draw(dies_at=3))
    record = out.parent / _record(out)
    write_json(record, read_json(record) | {"weights": {"model": "x"}, "about": ["mine"]})
    with pytest.raises(UserError, match="another model there"):
        write(out, settings={"seed": 0, "weights": {"model": "y"}})


def test_a_run_stopped_before_its_first_image_claims_nothing(out):
    """A later run with other settings may use the place. It used to be refused as if there were
    images, in a file that did not even exist.
    """
    with pytest.raises(Killed):
        write(out, Draw(dies_at=0))
    assert (out.parent / _record(out)).is_file()
    others = []
    late = Thread(target=lambda: others.append(claim_other(out, Processes(1, 2, patience=20))))
    late.start()  # sees the stopped run's record
    time.sleep(0.2)
    write(out, settings={"seed": 1})
    late.join()
    assert others[0]["seed"] == 1 and read_json(out.parent / _record(out))["seed"] == 1
    with pytest.raises(ValueError, match=r"drawn with other settings \(seed 1 there, 0 now\)"):
        write(out)


def test_a_record_being_written_is_not_an_image(tmp_path):
    """The record's temporary file does not make a folder occupied. A process waiting for the record
    used to take the folder for occupied, and to compare its settings with the previous record.
    """
    place = numbered_place(tmp_path, 10)
    (tmp_path / f"{place.record.name}.0123abcd.tmp").touch()
    assert not place.is_occupied()
    (tmp_path / "000000.png").touch()
    assert place.is_occupied()


def claim_other(out, processes):
    settings = {"seed": 1, "count": 10, "size": list(SIZE), "batch_size": 3}
    return numbered_place(out, 10, processes).claim(settings, {})


def test_a_generation_folder_without_images_is_reused(tmp_path):
    first = GenerationFolder(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    first.claim({"seed": 0}, {})
    first.write_prompts([0, 1])
    place = GenerationFolder(tmp_path, [{"prompt": "c"}])
    place.check({"seed": 1})
    assert place.claim({"seed": 1}, {})["seed"] == 1
    place.write_prompts([0])
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["00000", "generation.json"]
    assert read_json(tmp_path / "00000" / "metadata.jsonl") == {"prompt": "c"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / sample_file(0, 0))
    with pytest.raises(UserError, match="images of other prompts"):
        first.claim({"seed": 1}, {})


def test_files_of_others_are_not_overwritten(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, *SIZE, 3), np.uint8))
    with pytest.raises(ValueError, match=r"samples\.npz holds files without samples\.npz\.json"):
        write(tmp_path / "samples.npz")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.png").touch()
    with pytest.raises(ValueError, match=r"folder holds files without settings\.json"):
        write(tmp_path / "folder")


def test_sample_labels():
    balanced = sample_labels(50, 8, balanced=True, seed=0)
    counts = balanced.bincount(minlength=8)
    assert counts.tolist() == [7, 7, 6, 6, 6, 6, 6, 6]
    assert len(balanced[:10].unique()) > 4 and not torch.equal(balanced, balanced.sort().values)
    assert torch.equal(balanced, sample_labels(50, 8, balanced=True, seed=0))
    assert not torch.equal(balanced, sample_labels(50, 8, balanced=True, seed=1))
    # Each part of 5,000 images, as used by the Inception Score, has nearly all classes.
    parts = sample_labels(50_000, 1000, balanced=True, seed=0).split(5000)
    assert min(len(part.unique()) for part in parts) > 980
    drawn = sample_labels(5000, 8, balanced=False, seed=0)
    assert drawn.bincount(minlength=8).min() > 500
    assert torch.equal(drawn[:50], sample_labels(50, 8, balanced=False, seed=0))
