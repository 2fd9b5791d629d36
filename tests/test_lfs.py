"""Files that Git LFS has not fetched are reported as Git LFS pointers, whatever reads them."""

import shutil
from pathlib import Path

import pytest
from helpers import open_source
from runs import tiny_run

import t2i
from t2i.errors import UserError
from t2i.evaluation.fid.image_sets import NpzImages
from t2i.evaluation.generation_folder import load_image
from t2i.export_folder import export
from t2i.fields import read_object
from t2i.model_options import ExportOptions
from t2i.training.loop import train

NAMED = r"is a Git LFS pointer, not the file: run `git lfs pull` there"
ASSETS = Path(t2i.__file__).parent / "assets"


def pointer(path: Path) -> Path:
    """Write the pointer that `git clone` leaves of a file if Git LFS is not installed."""
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "metadata.jsonl"])
def test_files_of_a_data_set(tiny_world, tmp_path, name):
    shutil.copy(next((tiny_world / "data").rglob("*.png")), tmp_path)
    if name != "metadata.jsonl":
        next(tmp_path.iterdir()).unlink()
    pointer(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} {NAMED}"):
        open_source(tmp_path)


def test_pointers_among_images_and_captions_are_counted(tiny_world, tmp_path, caplog):
    """Used to read a caption's pointer as the caption."""
    images = sorted((tiny_world / "data").rglob("*.png"))
    for name, image in zip("abcd", images, strict=False):
        shutil.copy(image, tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red circle")
    pointer(tmp_path / "a.png"), pointer(tmp_path / "b.txt")
    train(tiny_run(tiny_world, "lfs", data__source=str(tmp_path), data__validation_samples=1))
    assert "2 of 4 samples are used; 1 Git LFS pointer (a.png: run `git lfs pull`" in caplog.text
    assert "1 caption is a Git LFS pointer (b.png: run `git lfs pull` there" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "gpt.pt", "text_encoder/config.json"),
        *("text_encoder/tokenizer.json", "text_encoder/model.safetensors"),
    ],
)
def test_files_of_a_base(tmp_path, name):
    base = shutil.copytree(ASSETS / "shapes", tmp_path / "base")
    pointer(base / name)
    with pytest.raises(UserError, match=rf"{name} {NAMED}"):
        t2i.load_backbone("llamagen", base)


def test_the_tokenizer_of_a_janus(tiny_world, tmp_path):
    base = shutil.copytree(tiny_world / "janus", tmp_path / "janus")
    pointer(base / "tokenizer.json")
    with pytest.raises(UserError, match=rf"tokenizer.json {NAMED}"):
        t2i.load_backbone("janus", base)


@pytest.mark.parametrize(
    "name",
    [
        *("tensorar/codec.safetensors", "model.pt", "tokenizer.safetensors"),
        *("text_encoder/model.safetensors", "text_encoder/tokenizer.json"),
    ],
)
def test_files_of_an_export(shapes_ckpt, tmp_path, name):
    """What a clone of a model on the hub has; they were called changed, or cut short."""
    out = export(ExportOptions(shapes_ckpt, tmp_path / "out"))
    pointer(out / name)
    with pytest.raises(UserError, match=rf"{name} {NAMED}"):
        t2i.from_pretrained(out)


@pytest.mark.parametrize("read", [NpzImages, load_image, read_object])
def test_files_to_be_judged(tmp_path, read):
    with pytest.raises(UserError, match=NAMED):
        read(pointer(tmp_path / "file"))
