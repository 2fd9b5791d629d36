"""Files from others run no code, give no access outside their folder and do not fill the memory;
pages escape text.

There is a test for every way in ("door"), with a file that would leave a trace.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import GOLDEN_ROOT, edited, folder_content, open_source
from PIL import Image
from runs import tiny_run, write_tiny_base
from safetensors.torch import save_file

import geneval
import t2i
from dpg_bench.mplug.mplug_model import MPlug
from geneval import mmdet_weights
from t2i.data.data_report import load_sample
from t2i.data.images import FileSlice, ImageRules, RemoteFile, SkipSample, open_image
from t2i.data.sources.pretokenized import LlamaGenCodes
from t2i.errors import UserError
from t2i.evaluation.fid.image_sets import open_images, read_npz_array
from t2i.evaluation.generation_folder import load_image
from t2i.evaluation.review_page import open_column, write_review
from t2i.files import file_sha256
from t2i.models.llamagen.t5_files import load_tokenizer
from t2i.training.loop import train
from t2i.training.run_page import write_run_page
from t2i.weights import read_folder, read_state_dict


class Marks:
    """Creates a file if it is unpickled without restrictions."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path):
    """A file that code from a pickle would create; fails the test if it exists at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from a file was run"


# -- code ------------------------------------------------------------------------------------------
def _pickled(path: Path, mark: Path, raw: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if raw:
        path.write_bytes(pickle.dumps(Marks(mark)))
    else:
        torch.save({"model": {"w": torch.zeros(1)}, "more": Marks(mark)}, path)


@pytest.mark.parametrize("raw", [False, True], ids=["zip", "raw"])
@pytest.mark.parametrize("door", ["weights", "tokenizer", "text_encoder", "detector", "mplug"])
def test_a_pickle_with_code_is_not_run(tmp_path, mark, door, raw):
    if door in ("weights", "tokenizer", "text_encoder"):
        base = write_tiny_base(tmp_path / "base")
        place = {"weights": "gpt.pt", "tokenizer": "vq.pt"}.get(door, "text_encoder")
        if door == "text_encoder":
            next((base / place).glob("*.safetensors")).unlink()
            place += "/pytorch_model.bin"
        _pickled(base / place, mark, raw)
        with pytest.raises(ValueError):
            t2i.load_backbone("llamagen", base).caption_features()
    elif door == "detector":
        _pickled(tmp_path / "detector.pth", mark, raw)
        with pytest.raises(ValueError):
            mmdet_weights.load_mmdet(tmp_path / "detector.pth")
    else:
        source = GOLDEN_ROOT / "dpg_mplug" / "no_visn_fc"
        if not source.is_dir():
            pytest.skip("no mPLUG among the golden data")
        for path in source.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        _pickled(tmp_path / "pytorch_model.bin", mark, raw)
        with pytest.raises(ValueError):
            MPlug.load(tmp_path)


def test_a_pickle_next_to_the_training_state_is_not_read(plain, copied, tiny_world, mark):
    """Not even if the manifest lists it. Of the training state, only safetensors files are read."""
    folder = copied(plain)
    state = folder / "training_state"
    for path in (state / "zz.pt", state / "mp_rank_00_model_states.pt"):
        _pickled(path, mark, raw=False)
        with edited(folder / "manifest.json") as manifest:
            entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            manifest["files"][f"training_state/{path.name}"] = entry
    assert train(tiny_run(tiny_world, folder.parents[1].name, resume=True)) == folder


def test_a_pickle_instead_of_the_training_state_is_refused(plain, copied, tiny_world, mark):
    folder = copied(plain)
    path = next((folder / "training_state").glob("*.safetensors"))
    _pickled(path, mark, raw=False)
    with edited(folder / "manifest.json") as manifest:
        manifest["files"][f"training_state/{path.name}"] |= {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
    with pytest.raises(UserError, match=r"training_state cannot be read"):
        train(tiny_run(tiny_world, folder.parents[1].name, resume=True))


def test_yaml_builds_no_objects(tmp_path, mark):
    (tmp_path / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(UserError):
        MPlug.load(tmp_path)


def test_code_next_to_a_tokenizer_is_not_imported(tmp_path, mark, monkeypatch):
    """Not even if the answer to transformers' question whether to trust the code would be yes."""
    folder = write_tiny_base(tmp_path / "base") / "text_encoder"
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with edited(folder / "tokenizer_config.json") as settings:
        settings["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
        settings["tokenizer_class"] = "Own"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load_tokenizer(folder, 4096)
    except Exception as refused:
        assert "trust_remote_code" in str(refused)


@pytest.mark.parametrize("reader", [open_images, lambda path: read_npz_array(path, "mu")])
def test_object_arrays_are_refused(tmp_path, mark, reader):
    array = np.array([Marks(mark)], dtype=object)
    np.savez(tmp_path / "x.npz", mu=array, arr_0=array)
    with pytest.raises(UserError):
        list(reader(tmp_path / "x.npz").batches(1, 1))


def test_object_arrays_of_codes_are_refused(tmp_path, mark):
    for kind in ("imagenet256_codes", "imagenet256_labels"):
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / "0.npy", np.array([Marks(mark)], dtype=object))
    with pytest.raises(UserError):
        LlamaGenCodes(tmp_path).codes([0])


# -- files outside the folder ----------------------------------------------------------------------
def _png(size: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def secret(tmp_path):
    """A folder next to the data set, with an image and a text that must stay private."""
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "a.png").write_bytes(_png())
    (folder / "id_rsa").write_text("the private key")
    return folder


@pytest.mark.parametrize("how", ["../secret/a.png", "x/../../secret/a.png", "absolute"])
def test_images_outside_the_folder_of_metadata_are_skipped(tmp_path, secret, how):
    data = tmp_path / "data"
    data.mkdir()
    (data / "in.png").write_bytes(_png())
    name = str(secret / "a.png") if how == "absolute" else how
    rows = [{"file_name": n, "text": "a circle"} for n in ("in.png", name)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(data)
    good, bad = (load_sample(source[i], ImageRules(32)) for i in range(2))
    assert isinstance(good, torch.Tensor)
    assert isinstance(bad, SkipSample) and bad.reason.startswith("outside the folder")
    assert all(secret not in path.parents for _, path in source.files()), (
        "it must not even be hashed"
    )
    trusting = open_source(data, outside_images=True)
    assert isinstance(load_sample(trusting[1], ImageRules(32)), torch.Tensor)
    assert secret / "a.png" in [path for _, path in trusting.files()]


@pytest.mark.parametrize("how", ["../secret/a.png", "absolute", "address"])
def test_images_outside_the_folder_of_tables_are_skipped(tmp_path, secret, how):
    data = tmp_path / "data"
    data.mkdir()
    (data / "in.png").write_bytes(_png())
    name = {"absolute": str(secret / "a.png"), "address": f"file://{secret}/a.png"}.get(how, how)
    pq.write_table(pa.table({"image": ["in.png", name], "text": ["a", "b"]}), data / "0.parquet")
    source = open_source(data / "0.parquet")
    good, bad = (load_sample(sample, ImageRules(32)) for sample in source)
    assert isinstance(good, torch.Tensor)
    assert isinstance(bad, SkipSample) and bad.reason.startswith("outside the folder")
    assert len(source.files()) == 2, "it must not even be hashed"
    trusting = open_source(data / "0.parquet", outside_images=True)
    assert isinstance(load_sample(trusting[1], ImageRules(32)), torch.Tensor)


def test_a_caption_that_links_to_a_private_file_is_not_read(tmp_path, secret):
    """Its text would appear in pages and model cards. Links to caption files are followed."""
    data = tmp_path / "data"
    data.mkdir()
    (secret / "b.txt").write_text("a square")
    for name, target in (("a", "id_rsa"), ("b", "b.txt")):
        (data / f"{name}.png").write_bytes(_png())
        (data / f"{name}.txt").symlink_to(secret / target)
    source = open_source(data)
    assert [sample.captions for sample in source] == [[], ["a square"]]
    assert ("a.txt", "link to a file that is not a caption file") in source.left_out


def test_the_reason_is_named_if_all_captions_are_links(tmp_path, secret):
    """The message used to say that the caption file has no image of its name."""
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "a.txt").symlink_to(secret / "id_rsa")
    with pytest.raises(UserError, match=r"\(a\.txt: link to a file that is not a caption file\)"):
        open_source(tmp_path)


def test_links_into_content_addressed_stores_are_followed(tmp_path):
    """The caches of the hub and of DVC link to files that are named by hashes, which nobody can
    guess.
    """
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    pq.write_table(pa.table({"image": [_png()], "text": ["a dot"]}), tmp_path / "rows")
    contents = {"a.png": _png(), "a.txt": b"a dot", "0.parquet": (tmp_path / "rows").read_bytes()}
    for number, (name, content) in enumerate(contents.items()):
        blob = tmp_path / "blobs" / f"{number}{'0a1b2c3d4e' * 3}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    assert [s.captions for s in open_source(snapshot / "0.parquet")] == [["a dot"]]
    (snapshot / "0.parquet").unlink()
    (sample,) = open_source(snapshot)
    assert sample.captions == ["a dot"]
    assert isinstance(load_sample(sample, ImageRules(32)), torch.Tensor)


def test_tars_are_never_unpacked(tmp_path, secret):
    """Entries are read in place: names that lead outside write nothing, links are not followed."""
    path = tmp_path / "data" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, content in (("../../out.png", _png()), ("../../out.txt", b"a circle")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (("link.txt", secret / "id_rsa"), ("link.png", secret / "a.png")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, str(target)
            tar.addfile(entry)
    before = folder_content(tmp_path)
    source = open_source(path.parent)
    (only,) = list(source)
    assert only.captions == ["a circle"] and load_sample(only, ImageRules(32)).shape[-1] == 32
    assert folder_content(tmp_path) == before and not (tmp_path.parent / "out.png").exists()


def test_an_index_of_shards_may_only_name_files_in_its_folder(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"w": "../other.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not within the folder"):
        read_folder(tmp_path / "model")


@pytest.mark.parametrize("place", ["00000/stages/00000.json", "00000/samples/00001.png", "x"])
def test_a_review_does_not_copy_private_files(tmp_path, secret, place):
    """A review is made to be passed on, and its images may come from others. It used to copy
    whatever file a link among them led to.
    """
    images = tmp_path / "images"
    for name in ("samples", "stages"):
        (images / "00000" / name).mkdir(parents=True)
    (images / "00000" / "metadata.jsonl").write_text('{"prompt": "a circle"}')
    (images / "00000" / "samples" / "00000.png").symlink_to(secret / "a.png")
    (images / "00000" / "id_rsa").symlink_to(secret / "id_rsa")
    write_review(tmp_path / "review", [open_column("a", images)], title="t")
    brought = tmp_path / "review" / "brought" / "1-a" / "00000" / "samples" / "00000.png"
    assert not brought.is_symlink() and brought.read_bytes() == _png()
    if place == "x":
        assert not any(b"private" in c for c in folder_content(tmp_path / "review").values())
        return
    (images / place).symlink_to(secret / "id_rsa")
    with pytest.raises(UserError, match=r"is a link to .*id_rsa, which is no PNG"):
        write_review(tmp_path / "review", [open_column("a", images)], title="t")
    assert not any(b"private" in c for c in folder_content(tmp_path / "review").values())


# -- bombs -----------------------------------------------------------------------------------------
def _huge_png(path: Path, side: int = 60000) -> Path:
    """Write a PNG of 3.6 gigapixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


WANTED = {
    "tag": "single_object",
    "include": [{"class": "bus", "count": 1}],
    "prompt": "a photo of a bus",
}


def test_a_huge_image_is_refused_without_decoding(tmp_path):
    path = _huge_png(tmp_path / "x.png")
    with pytest.raises(SkipSample, match="too large"):
        open_image(path)
    with pytest.raises(UserError, match="not a readable image"):
        load_image(path)
    with pytest.raises(UserError, match="cannot be read as an image"):
        geneval.score([path], [WANTED])


def test_a_huge_image_file_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    with path.open("wb") as file:
        file.truncate(3 << 30)  # sparse
    with pytest.raises(SkipSample, match=r"too large: 3221225472 bytes"):
        open_image(path)
    monkeypatch.setattr("t2i.data.images._LARGEST_FILE", 1000)
    for place in (FileSlice(path, 0, 1001), RemoteFile(f"file://{path}")):
        with pytest.raises(SkipSample, match=r"too large: .*100"):
            open_image(place)


def test_an_npz_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("t2i.evaluation.fid.image_sets._LARGEST_ARRAY", 1 << 20)
    np.savez_compressed(tmp_path / "x.npz", mu=np.zeros(1 << 20))
    assert os.path.getsize(tmp_path / "x.npz") < 1 << 14
    with pytest.raises(UserError, match="mu unpacks to 8388736 bytes"):
        read_npz_array(tmp_path / "x.npz", "mu")
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.getinfo("mu.npy").compress_size < 1 << 14


def test_a_safetensors_header_of_gigabytes_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        read_state_dict(tmp_path / "x.safetensors")


# -- pages and secrets -----------------------------------------------------------------------------
def test_a_run_page_escapes_what_it_shows(tiny_world, plain, copied):
    run_dir = copied(plain, "page-<b>bold").parents[1]
    with edited(run_dir / "config.json") as config:
        config["sheet_prompts"] = ["<script>alert(1)</script>"]
    (run_dir / "samples").mkdir(exist_ok=True)
    for name in ("step_000001", '"><script>2'):  # the second is not a run's sheet
        (run_dir / "samples" / f"{name}.png").write_bytes(_png())
    page = write_run_page(run_dir).read_text()
    assert page.count("<script") == 1, "only the page's own script"
    assert "<b>" not in page and "2.png" not in page
    assert page.count("&lt;script&gt;") >= 2, (
        "the prompt appears below its sheet and in the settings"
    )


def test_no_token_is_written(tiny_world, monkeypatch, caplog, capfd):
    secrets = {"HF_TOKEN": "hf_abcdefgh", "WANDB_API_KEY": "0123456789abcdef" * 2}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = train(tiny_run(tiny_world, "secrets", steps=1, log__sample_every=1))
    written = folder_content(folder.parents[1]).values()
    said = caplog.text + "".join(capfd.readouterr())
    for value in secrets.values():
        assert value not in said and not any(value.encode() in content for content in written)
