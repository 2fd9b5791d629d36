"""Data in the forms that users have, where a file or column other than the expected one is read, or
reported.
"""

import json

import pytest
from helpers import open_source
from PIL import Image
from test_data_sources import (
    image_structs,
    private_datasets_cache,  # noqa: F401
    write_images,
    write_metadata,
    write_parquet,
    write_tar,
)
from test_data_sources import png as picture

from t2i.data.sources.classes import find_classes
from t2i.errors import UserError
from t2i.training.check import check
from t2i.training.loop import Run
from t2i.training.recipes import recipe


def captions(source) -> list[list[str]]:
    return [sample.captions for sample in source]


def test_captions_named_caption(tmp_path):
    """kohya's trainers use .caption files. If there are both, the .txt counts and the other is
    reported.
    """
    write_images(tmp_path)
    for name in ("0.caption", "1.CAPTION", "2.caption", "2.txt"):
        (tmp_path / name).write_text(name)
    source = open_source(tmp_path)
    assert captions(source) == [["0.caption"], ["1.CAPTION"], ["2.txt"]]
    assert source.left_out == [("2.caption", "second caption file of an image")]


@pytest.mark.parametrize("name", ["0.json", "0.png.txt", "0.tags"])
def test_captions_in_other_files(tmp_path, name):
    """Text files next to images without a caption are reported, with what to do."""
    write_images(tmp_path)
    (tmp_path / name).write_text('{"caption": "x"}')
    words = f"{name} is not read; its caption belongs in 0.txt"
    with pytest.raises(UserError, match=words):
        open_source(tmp_path)
    (tmp_path / "1.txt").write_text("a dot")
    (tmp_path / "1.json").write_text("{}")  # next to a caption: img2dataset writes both
    assert open_source(tmp_path).remarks == [
        f"1 text files are next to images that have no caption: {words}"
    ]


def test_captions_next_to_a_table(tmp_path):
    """metadata.jsonl takes precedence over .txt files, and a column of splits has no effect: both
    are reported.
    """
    write_images(tmp_path)
    (tmp_path / "0.txt").write_text("another")
    parts = ("train", "train", "test")
    rows = [{"file_name": f"{i}.png", "text": "x", "split": part} for i, part in enumerate(parts)]
    write_metadata(tmp_path, rows)
    source = open_source(tmp_path)
    assert captions(source) == [["x"]] * 3
    assert source.remarks == [
        'the column "split" is not read: the rows of train, test are all used',
        "1 text files such as 0.txt are not read: captions are in metadata.jsonl",
    ]


@pytest.mark.parametrize("kind", ["metadata", "parquet"])
def test_captions_in_a_field(kind, tmp_path):
    """A column of objects is not a column of captions; its fields are offered, for every kind of
    table.
    """
    texts = [{"en": "a dot", "de": "ein Punkt"}] * 3
    if kind == "metadata":
        write_images(tmp_path)
        rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
        write_metadata(tmp_path, rows)
    else:
        write_parquet(tmp_path / "0.parquet", {"image": image_structs(), "text": texts})
    with pytest.raises(
        UserError, match=r"no caption column .* (text\.en, text\.de|text\.de, text\.en)\."
    ):
        open_source(tmp_path)
    assert captions(open_source(tmp_path, caption_column="text.de")) == [["ein Punkt"]] * 3


def test_a_text_that_is_an_object_in_one_row(tmp_path):
    write_images(tmp_path)
    texts = ["a dot", {"en": "a dot"}, None]
    write_metadata(tmp_path, [{"file_name": f"{i}.png", "text": t} for i, t in enumerate(texts)])
    assert captions(open_source(tmp_path)) == [["a dot"], [], []]


@pytest.mark.parametrize("kind", ["metadata", "parquet"])
def test_absolute_names_of_the_folder_itself(kind, tmp_path):
    """They point into the folder, so images outside it need not be allowed."""
    data = tmp_path / "data"
    write_images(data)
    (tmp_path / "database").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "database" / "3.png")
    names = [f"{data}/{i}.png" for i in range(3)] + [f"{data}base/3.png", f"{data}/../x.png"]
    if kind == "metadata":
        write_metadata(data, [{"file_name": name, "text": "x"} for name in names])
        source = open_source(data)
    else:
        write_parquet(data / "0.parquet", {"image": names, "text": ["x"] * 5})
        source = open_source(data / "0.parquet")
    assert [bool(sample.captions) for sample in source] == [True] * 3 + [False] * 2
    named = [name for name, _ in source.files()]
    assert named[1:] == ["0.png", "1.png", "2.png"]
    assert source.left_out == []
    # With images outside allowed, the identity is the same as before: it includes their names.
    path = data if kind == "metadata" else data / "0.parquet"
    named = [name for name, _ in open_source(path, outside_images=True).files()]
    assert named[1:4] == names[:3]


def test_splits_by_other_names(tmp_path):
    """Training is a train split, val2017 a validation split; several parts of one split belong
    together.
    """
    for name in ("train2014", "Training", "val2017", "testing"):
        write_images(tmp_path / name, 1)
        (tmp_path / name / "0.txt").write_text(name)
    source = open_source(tmp_path)
    assert sorted(captions(source)) == [["Training"], ["train2014"]]
    assert [name for name, _ in source.left_out] == ["testing/ (1 files)", "val2017/ (1 files)"]
    for split in ("val", "validation", "val2017"):
        assert captions(open_source(tmp_path, split=split)) == [["val2017"]]
    write_images(tmp_path / "train_station", 1)
    (tmp_path / "train_station" / "0.txt").write_text("x")
    assert "since not all of them are named like splits" in open_source(tmp_path).remarks[0]
    for name in ("training-0", "testing-0"):
        write_tar(tmp_path / "tars" / f"{name}.tar", {"a.png": picture(0), "a.txt": name})
    assert captions(open_source(tmp_path / "tars")) == [["training-0"]]


def test_a_missing_split_of_classes(tmp_path):
    """Neither its siblings nor the classes themselves are used instead."""
    for name in ("Train/cat", "Train/dog", "val/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
    assert find_classes(tmp_path, "train") == (tmp_path / "Train", ["cat", "dog"])
    with pytest.raises(UserError, match=r"no sub-folder 'test' .* only Train, val"):
        find_classes(tmp_path, "test")
    with pytest.raises(UserError, match=r"no sub-folder 'val' .* only cat, dog"):
        find_classes(tmp_path / "val", "val")
    (tmp_path / "val").rename(tmp_path / "val2017")
    assert find_classes(tmp_path, "validation")[0] == tmp_path / "val2017"
    (tmp_path / "val2017").rename(tmp_path / "val")
    (tmp_path / "Train").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"no sub-folder 'train' .* only test, val"):
        find_classes(tmp_path, "train")


def test_dots_in_names_of_a_tar(tmp_path):
    """A few of the images whose name continues after its first dot are named."""
    good = {
        f"{i}.{end}": picture(i) if end == "png" else "x" for i in (0, 1) for end in ("png", "txt")
    }
    dotted = {f"a.v{i}.png": picture(i) for i in range(30)}
    write_tar(tmp_path / "0.tar", good | dotted)
    (remark,) = open_source(tmp_path).remarks
    assert remark.startswith("images that end in v0.png, v1.png, v10.png, and 27 more are not")
    write_tar(tmp_path / "0.tar", dotted)
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    assert "and 10 more" in str(error.value) and "rename a.b.png" in str(error.value)
    write_tar(
        tmp_path / "0.tar", {"a.left.png": picture(0), "a.right.png": picture(1), "a.txt": "x"}
    )
    source = open_source(tmp_path, image_column="left.png")  # WebDataset's way to name it
    assert source.length == 1 and source.remarks == []


def test_a_caption_with_a_second_dot_in_its_name(tmp_path):
    """It used to be offered as a column and accepted, and then no sample had a caption."""
    write_tar(tmp_path / "0.tar", {"a.image.png": picture(0), "a.caption.txt": "x"})
    named = {"image_column": "image.png", "caption_column": "caption.txt"}
    assert captions(open_source(tmp_path, **named)) == [["x"]]


def test_two_captions_of_a_tar(tmp_path):
    """If a text and a JSON field differ, a remark says which one is read, unless it was asked
    for.
    """
    same = {"0.png": picture(0), "0.txt": "x", "0.json": json.dumps({"caption": " x", "n": 1})}
    write_tar(tmp_path / "0.tar", same)
    assert open_source(tmp_path).remarks == []
    write_tar(tmp_path / "0.tar", same | {"0.json": json.dumps({"caption": "y"})})
    source = open_source(tmp_path)
    assert captions(source) == [["x"]]
    assert source.remarks == ["captions are read from txt, not from json.caption, which differs"]
    assert open_source(tmp_path, caption_column="txt").remarks == []


def test_options_of_the_hub(tmp_path):
    write_images(tmp_path)
    (tmp_path / "0.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"data\.config_name=en, data\.revision=v1: only for data on"
    ):
        open_source(tmp_path, revision="v1", config_name="en")


def test_a_folder_that_looks_like_an_address(tmp_path):
    folder = tmp_path / "a::b"
    write_parquet(folder / "0.parquet", {"image": image_structs(), "text": ["x"] * 3})
    with pytest.raises(UserError, match=r"a::b/0\.parquet: .* rename"):
        open_source(folder)


def test_a_single_image_before_the_run(tmp_path):
    """--check reports it as training would: all rows of one image are on one side of the split."""
    write_metadata(tmp_path / "data", [{"file_name": "a.png", "text": "x"} for _ in range(12)])
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "a.png")
    options = {"data.source": str(tmp_path / "data"), "data.validation_samples": 2}
    report = check(recipe("shapes-control", options | {"run_dir": str(tmp_path / "run")}))
    assert "training would end at once: cannot hold out 2 of 12 samples" in report
    assert "only 1 different images" in report and report.endswith("would end at once")


def test_what_is_held_out_before_the_run(tmp_path):
    """--check used to count the minimum, even where copies of an image make it more."""
    options = {"data.source": str(tmp_path / "data"), "data.validation_samples": 2, "epochs": 4}
    options |= {"data.cache_dir": str(tmp_path / "cache"), "run_dir": str(tmp_path / "run")}
    rows = [{"file_name": "a.png" if i < 8 else f"{i}.png", "text": "x"} for i in range(12)]
    write_metadata(tmp_path / "data", rows)
    for i, name in enumerate({row["file_name"]: 0 for row in rows}):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "data" / name)
    options |= {"steps": None, "batch_size": 2, "engine.micro_batch": 2}
    config = recipe("shapes-control", options)
    report, plan = check(config), Run(config).plan
    assert plan.held_out >= 8
    assert f"{plan.held_out} of 12 samples held out" in report
    assert f"{plan.steps} steps = 4.00 passes over {plan.training}" in report


def test_mixed_folders_are_ambiguous(tmp_path):
    write_images(tmp_path)
    write_tar(tmp_path / "0.tar", {"a.png": picture(0), "a.txt": "x"})
    words = rf"holds \.tar files and also 0\.png.*'{tmp_path}/\*\.tar'"
    for given in (tmp_path, tmp_path / "*"):
        with pytest.raises(ValueError, match=words):
            open_source(given)


def test_shards_of_img2dataset(tmp_path):
    """It writes a list of each shard, without images, next to the shard's tar or folder."""
    shard = {"0.png": picture(0), "0.txt": "a dot", "0.json": '{"caption": "a dot"}'}
    for kind in ("tars", "folders"):
        root = tmp_path / kind
        write_parquet(root / "00000.parquet", {"url": ["http://x"], "caption": ["a dot"]})
        (root / "00000_stats.json").write_text("{}")
        if kind == "tars":
            write_tar(root / "00000.tar", shard)
        else:
            write_images(root / "00000", 1)
            (root / "00000" / "0.txt").write_text("a dot")
        for given in (root, root / "0*") if kind == "tars" else (root,):
            source = open_source(given)
            assert captions(source) == [["a dot"]]
            assert not source.left_out
