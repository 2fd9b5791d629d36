"""Parquet files and tars as users have them: replaced, oddly named, with texts that are not
text.
"""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import open_source
from test_data_sources import (
    CAPTIONS,
    image_structs,
    levels,
    png,
    private_datasets_cache,  # noqa: F401
    write_parquet,
    write_tar,
)

from t2i.data.sources import tars
from t2i.errors import UserError

STREAMED_OR_NOT = pytest.mark.parametrize("streaming", [False, True])


def not_text(values: list[bytes]) -> pa.Array:
    """Bytes declared as a string, which careless writers produce."""
    return pa.array(values, pa.binary()).view(pa.string())


@STREAMED_OR_NOT
def test_a_replaced_parquet_file_is_read_again(tmp_path, streaming):
    """With the old path and date, as `cp -p` and rsync leave it, the library's copy with the old
    rows used to go into a cache under the new content's key.
    """
    path = tmp_path / "data" / "0.parquet"
    for captions in (CAPTIONS, ["x", "y", "z"]):
        write_parquet(path, {"image": image_structs(), "text": captions})
        os.utime(path, (1e9, 1e9))
        source = open_source(path.parent, streaming=streaming)
        assert [sample.captions for sample in source] == [[caption] for caption in captions]


@STREAMED_OR_NOT
@pytest.mark.parametrize("bad", [0, 1])
def test_a_caption_that_is_not_text_loses_only_its_row(tmp_path, streaming, bad):
    """A stream used to end there, after every restart again; in the first row, it could not even be
    opened.
    """
    texts = [b"a", b"b", b"c"]
    texts[bad] = b"\xff\xfe"
    columns = {"image": pa.array(image_structs()), "text": not_text(texts)}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    source = open_source(tmp_path, streaming=streaming)
    expected = [0, 1, 2]
    expected[bad] = "caption is not UTF-8"
    assert levels(source) == expected


@STREAMED_OR_NOT
def test_columns_that_one_may_expect_to_be_read(tmp_path, streaming):
    """All parts of one table that holds several, as flickr30k does, were trained on in silence; and
    of two columns of captions, one was chosen in silence.
    """
    columns = {"image": image_structs(), "caption": ["a", "b", "c"], "re_caption": ["x", "y", "z"]}
    columns |= {"negative_prompt": ["", "", ""], "split": ["train", "test", None]}
    write_parquet(tmp_path / "a.parquet", columns)
    others = (
        "captions are read from caption, not from re_caption; name the one to use with "
        "--data.caption-column"
    )
    split = 'the column "split" is not read: the rows of train, test are all used'
    splits = [] if streaming else [split]
    assert open_source(tmp_path, streaming=streaming).remarks == [others, *splits]
    named = {"caption_column": "caption", "streaming": streaming}
    assert open_source(tmp_path, **named).remarks == splits
    for number, split in enumerate(([["a"]] * 3, [1, 2, 3])):
        folder = tmp_path / str(number)
        write_parquet(folder / "a.parquet", columns | {"split": split})
        assert open_source(folder, streaming=streaming).remarks == [others]


@STREAMED_OR_NOT
def test_nested_texts_that_are_not_text(tmp_path, streaming):
    """In a field of a caption, one of several captions, or the name of an image."""
    texts = not_text([b"\xff", b"b", b"c"])
    columns = {
        "image": pa.array(image_structs()),
        "meta": pa.StructArray.from_arrays([texts, texts], ["caption", "other"]),
        "several": pa.ListArray.from_arrays([0, 2, 3, 3], texts),
        "file": texts,
    }
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    source = open_source(tmp_path, streaming=streaming)
    assert levels(source) == ["caption is not UTF-8", 1, 2]
    several = open_source(tmp_path, streaming=streaming, caption_column="several")
    assert [sample.captions for sample in several] == [["b"], ["c"], []]
    named = open_source(tmp_path, streaming=streaming, image_column="file")
    assert levels(named)[1:] == ["missing", "missing"]
    assert [name for name, _ in named.files()] == ["0.parquet", "b", "c"]


@STREAMED_OR_NOT
@pytest.mark.parametrize("name", ["my[1]data", "what?*", "50%20 a"])
def test_parquet_in_oddly_named_folders(tmp_path, streaming, name):
    """The library would take such a path for a pattern."""
    write_parquet(tmp_path / name / "0.parquet", {"image": image_structs(), "text": CAPTIONS})
    assert levels(open_source(tmp_path / name, streaming=streaming)) == [0, 1, 2]


@STREAMED_OR_NOT
def test_parquet_files_with_other_columns(tmp_path, streaming):
    """A stream used to break at the first row of such a file, in mid-run; otherwise the message was
    a dump of schemas.
    """
    rows = {"image": image_structs(), "text": CAPTIONS}
    write_parquet(tmp_path / "0.parquet", rows)
    write_parquet(tmp_path / "1.parquet", {"text": CAPTIONS, "image": image_structs()})
    assert levels(open_source(tmp_path, streaming=streaming)) == [0, 1, 2] * 2
    write_parquet(tmp_path / "2.parquet", rows | {"score": [1, 2, 3]})
    words = r"2\.parquet and 1\.parquet do not have the same columns \(score in one only\)"
    for given in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(UserError, match=rf"{words}.* such as '{tmp_path}/a\*\.parquet'"):
            open_source(given, streaming=streaming)


@STREAMED_OR_NOT
def test_a_damaged_parquet_file_is_named(tmp_path, streaming):
    """The library says only what is wrong with one of them."""
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", {"image": image_structs(), "text": CAPTIONS})
    damaged = tmp_path / "b.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.parquet is not a readable parquet file"):
        open_source(tmp_path, streaming=streaming)


def test_a_web_datasets_address_may_be_no_text(tmp_path):
    rows = {"image": image_structs(), "text": CAPTIONS}
    write_parquet(tmp_path / "0.parquet", rows | {"__key__": [1, 2, 3], "__url__": [7, 8, 9]})
    assert [sample.key for sample in open_source(tmp_path)] == ["7:1", "8:2", "9:3"]


def test_the_message_about_a_saved_data_set(tmp_path):
    """`save_to_disk` writes Arrow files; the advice of the message works."""
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    data = datasets.Dataset.from_dict({"image": images, "text": CAPTIONS})
    data = data.cast_column("image", datasets.Image())
    datasets.DatasetDict(test=data, train=data).save_to_disk(tmp_path / "saved")
    advice = r"/train was saved by .*load_from_disk\('.*/saved/train'\).*'train\.parquet'"
    for name in ("saved", "saved/train"):
        with pytest.raises(UserError, match=advice):
            open_source(tmp_path / name)
    datasets.load_from_disk(tmp_path / "saved" / "train").to_parquet(tmp_path / "train.parquet")
    assert levels(open_source(tmp_path / "train.parquet")) == [0, 1, 2]


@STREAMED_OR_NOT
@pytest.mark.parametrize(
    ("image", "said"),
    [
        ([[1, 2, 3]], r"column 'image' holds values such as \[\[1, 2, 3\]\]: give .* bytes"),
        (7, "column 'image' holds values such as 7: give .* bytes"),
        ("iVBORw0K" * 600, "column 'image' holds texts such as 'iVB.*base64"),
    ],
    ids=["pixels", "number", "base64"],
)
def test_a_column_of_something_else_than_images(tmp_path, streaming, image, said):
    """Used to be reported as corrupt images: a bytes-like object is required, not 'list'."""
    write_parquet(tmp_path / "0.parquet", {"image": [image] * 3, "text": CAPTIONS})
    with pytest.raises(UserError, match=said):
        open_source(tmp_path, streaming=streaming)


# -- tars ------------------------------------------------------------------------------------------
def test_the_first_json_of_a_tar_may_lack_the_caption(tmp_path, monkeypatch):
    """The columns used to be those of the first JSON, so no other could be given."""
    members = {}
    for i, fields in enumerate([{"url": "x"}, {"caption": "b"}, {"caption": "c", "long": "d"}]):
        members |= {f"{i}.png": png(i), f"{i}.json": json.dumps(fields)}
    write_tar(tmp_path / "0.tar", members)
    assert levels(open_source(tmp_path)) == ["no caption", 1, 2]
    assert levels(open_source(tmp_path, caption_column="json.long")) == ["no caption"] * 2 + [2]
    with pytest.raises(UserError, match=r"no column 'json\.longer'.*json\.caption, json\.long"):
        open_source(tmp_path, caption_column="json.longer")
    monkeypatch.setattr(tars, "_ASKED", 2)  # later samples are not examined
    assert levels(open_source(tmp_path, caption_column="json.long"))[2] == 2


def test_a_tar_whose_images_and_texts_are_apart(tmp_path):
    """The message used to be "4 missing, 4 no caption", without saying how a tar must be
    organized.
    """
    members = {f"{i}.png": png(i) for i in range(4)} | {f"{i}.txt": "x" for i in range(4)}
    write_tar(tmp_path / "0.tar", members)
    (remark,) = open_source(tmp_path).remarks
    assert "apart (0.tar:0): the members of a sample must be neighbors" in remark
    write_tar(tmp_path / "0.tar", dict(sorted(members.items())) | {"4.png": png(4), "5.txt": "x"})
    assert open_source(tmp_path).remarks == []
