"""Every kind of source gives the same samples, and every fault of a source one clear message."""

import gc
import io
import json
import tarfile
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import open_source
from PIL import Image

from t2i.data.data_report import load_sample, survey_source
from t2i.data.images import ImageRules, SkipSample
from t2i.errors import UserError

CAPTIONS = ["a red dot", "a green dot", "a blue dot"]


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))


def write_metadata(folder, rows, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tar(path, members: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data if isinstance(data, bytes) else data.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_parquet(path, columns: dict, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def image_structs(count=3):
    return [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)]


def levels(source) -> list[float | str]:
    """The red level of each image (or the reason why it is skipped), through the real loader."""
    results = [load_sample(sample, ImageRules(8)) for sample in source]
    return [
        r.reason if isinstance(r, SkipSample) else round((float(r[0, 0, 0, 0]) + 1) * 127.5)
        for r in results
    ]


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the hub by a local parquet file, and records what it was asked."""
    write_parquet(tmp_path / "hub.parquet", {"image": image_structs(), "text": CAPTIONS})
    real, asked = datasets.load_dataset_builder, {}

    def load_dataset_builder(path, **options):
        if path != "owner/name":
            return real(path, **options)
        asked.update(options)
        return real("parquet", data_files={"train": [str(tmp_path / "hub.parquet")]})

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return asked


def make(kind: str, folder):
    """Make a source of three images and captions; returns the arguments for open_source."""
    if kind == "metadata":
        write_images(folder / "images")
        rows = [{"file_name": f"images/{i}.png", "text": c} for i, c in enumerate(CAPTIONS)]
        write_metadata(folder, rows)
    elif kind == "csv":
        write_images(folder / "images")
        lines = [f'images/{i}.png, "{c}"' for i, c in enumerate(CAPTIONS)]
        (folder / "metadata.csv").write_bytes(
            "\r\n".join(["\ufefffile_name,text", *lines]).encode()
        )
    elif kind == "parquet names":
        write_images(folder)
        columns = {"file_name": [f"{i}.png" for i in range(3)], "text": CAPTIONS}
        write_parquet(folder / "metadata.parquet", columns)
    elif kind == "sidecar":
        write_images(folder)
        for i, caption in enumerate(CAPTIONS):
            (folder / f"{i}.txt").write_text(caption + "\n")
    elif kind.startswith("parquet"):
        for i, name in enumerate(("a", "b")):
            part = slice(0, 2) if i == 0 else slice(2, 3)
            columns = {"image": image_structs()[part], "caption": CAPTIONS[part]}
            write_parquet(folder / f"{name}.parquet", columns)
    elif kind.startswith("webdataset"):
        members = {}
        for i, caption in enumerate(CAPTIONS):
            members |= {f"{i}.png": png(i)}
            members |= (
                {f"{i}.json": json.dumps({"prompt": caption})}
                if kind == "webdataset json"
                else {f"{i}.txt": caption}
            )
        write_tar(folder / "0.tar", members)
    return "owner/name" if kind == "hub" else folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        *("metadata", "csv", "sidecar", "parquet", "parquet names"),
        *("webdataset", "webdataset json", "hub"),
    ],
)
def test_every_kind_gives_the_same_samples(kind, streaming, tmp_path, hub):
    place = make(kind, tmp_path / "data")
    source = open_source(place, streaming=streaming)
    samples = list(source)
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert [sample.captions for sample in samples] == [[caption] for caption in CAPTIONS]
    assert len({sample.key for sample in samples}) == 3
    assert levels(source) == [0, 1, 2]
    assert json.loads(json.dumps(source.identity)) == source.identity
    if streaming and kind in ("parquet", "parquet names", "hub"):
        assert source.length is None
        with pytest.raises(ValueError, match="no random access"):
            source[0]
    else:
        assert source.length == 3
        assert source[2] == samples[2]
    unread = [said for said in source.remarks if "data.streaming has no effect on" in said]
    assert len(unread) == (streaming and source.length is not None), "it was ignored silently"
    remarks = open_source(place, outside_images=True).remarks
    ignored = any("data.outside_images has no effect on" in said for said in remarks)
    assert ignored == (kind in ("sidecar", "webdataset", "webdataset json"))
    report, usable = survey_source(source, ImageRules(8), limit=2)
    assert (report.seen, report.usable, len(usable)) == (2, 2, 2)


def test_files_globs_and_lists(tmp_path):
    folder = make("parquet", tmp_path / "data")
    assert open_source(folder / "b.parquet")[0].captions == [CAPTIONS[2]]
    assert open_source(f"{folder}/*.parquet").length == 3


def test_captions_lists_and_unusable_values(tmp_path):
    write_images(tmp_path, 7)
    values = [["a", " b "], "", None, 3, ["", None], " c ", [7, "d"]]
    write_metadata(tmp_path, [{"file_name": f"{i}.png", "text": v} for i, v in enumerate(values)])
    source = open_source(tmp_path)
    assert [s.captions for s in source] == [["a", "b"], [], [], [], [], ["c"], ["d"]]
    assert levels(source) == [0, *["no caption"] * 2, "caption is not text", "no caption", 5, 6]


def test_metadata_traps(tmp_path):
    """A listed image may be missing, an existing one may not be listed: both are reported."""
    write_images(tmp_path / "sub", 3)
    rows = [{"file_name": "./0.png", "text": "zero"}, {"file_name": "gone.png", "text": "gone"}]
    write_metadata(tmp_path / "sub", [*rows, {"text": "no name"}])
    source = open_source(tmp_path)
    assert levels(source) == [0, "missing", "missing"]
    assert [s.key for s in source] == ["sub/0.png", "sub/gone.png", "row 2"]
    assert source.left_out == [("sub/1.png", "not in metadata"), ("sub/2.png", "not in metadata")]


@pytest.mark.parametrize(
    "name",
    [
        r"sub\A.png",
        r"C:\me\sub\A.png",
        "train/sub/A.png",
        "sub/a.png",
        "sub/A",
        "sub/A.jpg",
        "/x/A.png",
    ],
)
def test_images_that_metadata_names_elsewhere(tmp_path, name):
    """Paths of Windows or of another folder, endings left out, or in capitals: which image is meant
    was not said.
    """
    write_images(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "sub" / "A.png")
    write_metadata(
        tmp_path, [{"file_name": name, "text": "a"}, {"file_name": "1.png", "text": "b"}]
    )
    (said,) = open_source(tmp_path, outside_images=True).remarks
    assert f"{name} is not there, but sub/A.png is: names in metadata.jsonl are relative" in said
    write_metadata(tmp_path, [{"file_name": "sub/A.png", "text": "a"}])
    assert open_source(tmp_path).remarks == []


def test_a_misnamed_metadata_file_is_reported(tmp_path):
    write_images(tmp_path)
    write_metadata(tmp_path, [{"file_name": "0.png", "text": "x"}], "metadata.json1")
    with pytest.raises(ValueError, match=r"no captions.*\.jsonl.*metadata\.json1\? See docs/"):
        open_source(tmp_path)


def test_bad_metadata_lines(tmp_path):
    write_images(tmp_path)
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "0.png", "text": "x"}\n\n{"file_name": \n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 3 is not JSON"):
        open_source(tmp_path)
    # An array, an indented object, and what Python prints instead of JSON.
    row = "{'file_name': '0.png', 'text': 'x'}"
    for text in ('["0.png", "x"]\n', '[\n{"file_name": "0.png"}]', '{\n"file_name": "0.png"}', row):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"line 1 is not .*; each line must be one whole object"
        ):
            open_source(tmp_path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name;text\n0.png;a", "';' separates its columns; save it with commas"),
        ("file_name\ttext\n0.png\ta", "separates its columns; save it with commas"),
        ("file_name,text\n0.png,a dot, red", "line 2 has more cells than the header: put texts"),
        ("file_name,text,text\n0.png,a,b", "has two columns 'text'; delete one"),
        ('file_name,text\n0.png,"a\n1.png,b', "is not a CSV: .*; a cell that begins with a quote"),
        ("name,text\n0.png,a", "no image column found .*the columns are: name, text"),
        ("file_name,text\n", "holds no rows"),
    ],
)
def test_bad_csv(tmp_path, text, said):
    write_images(tmp_path)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        open_source(tmp_path)


def test_a_csv_for_splits_and_several_captions(tmp_path):
    """A table of the whole folder counts for all of its sub-folders, unlike captions within one."""
    for split in ("train", "test"):
        write_images(tmp_path / split, 1)
    (tmp_path / "metadata.csv").write_text('file_name,text\ntrain/0.png,"a\nb"\ntest/0.png,\n')
    (tmp_path / "README.txt").write_text("my pictures")
    source = open_source(tmp_path)
    assert [sample.captions for sample in source] == [["a", "b"], []]
    said = source.remarks[-1]
    assert "metadata.csv is next to them; leave the others out of metadata.csv to use one" in said
    for split in ("train", "test"):
        (tmp_path / split / "0.txt").write_text("c")
    assert [sample.captions for sample in open_source(tmp_path)] == [["c"]]


def test_columns(tmp_path):
    write_images(tmp_path)
    row = {"file_name": "0.png", "other": "1.png", "text": "a", "caption": "b"}
    write_metadata(tmp_path, [row])
    with pytest.raises(ValueError, match=r"any of text, caption; the columns are: file_name, oth"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"no column 'nope'; the columns are: file_name"):
        open_source(tmp_path, caption_column="nope")
    source = open_source(tmp_path, image_column="other", caption_column="caption")
    assert source[0].captions == ["b"]
    assert levels(source) == [1]
    write_metadata(tmp_path, [{"file_name": "0.png", "label": 3}])
    with pytest.raises(ValueError, match="no caption column found"):
        open_source(tmp_path)


def test_sidecar_captions(tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / "0.png").rename(tmp_path / "0.PNG")
    (tmp_path / "0.txt").write_text("\ufeffone\n\ntwo \n", encoding="utf-8")
    (tmp_path / "1.txt").write_bytes(b"\xfa")
    (tmp_path / "2.txt").write_text(" \n")
    (tmp_path / "2.TXT").write_text("another")
    (tmp_path / "readme.txt").write_text("no caption of anything")
    (tmp_path / "._0.png").write_bytes(b"resource fork")
    source = open_source(tmp_path)
    assert [s.captions for s in source] == [["one", "two"], [], [], []]
    assert levels(source) == [0, "caption is not UTF-8", "no caption", "no caption"]
    assert source.left_out == [
        ("2.TXT", "second caption file of an image"),
        ("readme.txt", "caption without image"),
        ("._0.png", "hidden file"),
    ]
    with pytest.raises(ValueError, match="no columns to choose"):
        open_source(tmp_path, caption_column="text")


def test_tar_traps(tmp_path):
    """A first sample without a caption, mixed formats, broken JSON and a truncated archive all have
    a defined result.
    """
    members = {
        "x/0.png": png(0),
        "x/1.PNG": png(1),
        "x/1.txt": "one",
        "x/2.jpg": b"junk",
        "x/2.txt": "two",
        "x/3.txt": "three",
        "x/4.png": png(4),
        "x/4.txt": b"\xff",
        "x/4.json": "{",
    }
    write_tar(tmp_path / "0.tar", members)
    source = open_source(tmp_path)
    assert source[1].key == "0.tar:x/1"
    assert levels(source) == ["no caption", 1, "corrupt", "missing", "caption is not UTF-8"]
    write_tar(tmp_path / "1.tar", {f"{i}.{kind}": png(i) for i in range(9) for kind in ("png",)})
    whole = (tmp_path / "1.tar").read_bytes()
    for cut, length in ((4 * 1024, 9), (4 * 1024 + 512, 10)):  # between two members, and inside one
        (tmp_path / "1.tar").write_bytes(whole[:cut])
        source = open_source(tmp_path)
        assert source.left_out == [("1.tar", "truncated archive")]
        assert source.length == length


def test_memory_does_not_grow_with_the_number_of_tars(tmp_path):
    """An index of all tars would take 1 kB per sample in every process, for the whole run."""
    held = {}
    for tars in (8, 40):
        for number in range(tars):
            members = {f"{number}_{i}.{kind}": b"x" for i in range(50) for kind in ("png", "txt")}
            write_tar(tmp_path / str(tars) / f"{number:02d}.tar", members)
        gc.collect()
        tracemalloc.start()
        source = open_source(tmp_path / str(tars))
        assert [s.captions for s in source] == [["x"]] * 50 * tars
        assert source[51].key == "01.tar:1_1" and source.length == 50 * tars
        gc.collect()
        held[tars] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del source
    assert held[40] - held[8] < 32 * 2000, "the index of a tar of fifty samples takes 40,000 bytes"


def test_wrong_tars(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"0\.tar is not an uncompressed tar"):
        open_source(tmp_path)
    write_tar(tmp_path / "0.tar", {"a.txt": "x", "a.cls": "1"})
    with pytest.raises(ValueError, match=r"images.*extensions: cls, txt.*--data\.image-column"):
        open_source(tmp_path)
    write_tar(tmp_path / "0.tar", {"a.txt": "x", "a.jpg": b"", "a.png": png(3)})
    with pytest.raises(ValueError, match=r"0\.tar:a holds several images \(jpg, png\)"):
        open_source(tmp_path)
    assert levels(open_source(tmp_path, image_column="png")) == [3]
    write_tar(tmp_path / "0.tar", {"a.png": png(3), "a.json": '{"title": "t"}'})
    with pytest.raises(ValueError, match=r"no caption column found.*json\.title"):
        open_source(tmp_path)
    assert open_source(tmp_path, caption_column="json.title")[0].captions == ["t"]


def test_parquet_traps(tmp_path):
    """Bytes without HF features, null images, other image columns, web addresses, nested names."""
    info = {"image": [*image_structs(2), None, {"bytes": b"junk", "path": None}]}
    names = ["0.png", None, f"file://{tmp_path}/0.png", ""]
    columns = info | {"file": names, "meta": [{"caption": c} for c in "abcd"]}
    write_parquet(tmp_path / "0.parquet", columns)
    write_images(tmp_path, 1)
    source = open_source(tmp_path / "0.parquet")
    assert [s.captions for s in source] == [["a"], ["b"], ["c"], ["d"]]
    assert levels(source) == [0, 1, "missing", "corrupt"]
    by_path = open_source(tmp_path / "0.parquet", image_column="file", outside_images=True)
    assert levels(by_path) == [0, "missing", 0, "missing"]
    write_parquet(tmp_path / "0.parquet", columns, write_statistics=False)
    assert ("0.png", tmp_path / "0.png") in open_source(tmp_path / "0.parquet").files()
    write_parquet(tmp_path / "0.parquet", {"image": ["https://x/y.png"], "text": ["a"]})
    with pytest.raises(ValueError, match=r"web addresses.*img2dataset"):
        open_source(tmp_path / "0.parquet")
    write_parquet(tmp_path / "0.parquet", {"pixels": ["x"], "text": ["a"]})
    with pytest.raises(ValueError, match=r"no image column found.*the columns are: pixels, text"):
        open_source(tmp_path / "0.parquet")
    write_parquet(tmp_path / "0.parquet", {"image": pa.array([], pa.binary()), "text": []})
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"0\.parquet holds no rows"):
            open_source(tmp_path / "0.parquet", streaming=streaming)
    # An empty part among others, which the library cannot read.
    write_parquet(tmp_path / "1.parquet", {"image": image_structs(2), "text": ["a", "b"]})
    for streaming in (False, True):
        assert levels(open_source(f"{tmp_path}/*.parquet", streaming=streaming)) == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_typed_image_columns_are_not_decoded(tmp_path, streaming):
    """In files written by the datasets library they would be, and a bad image would raise."""
    features = datasets.Features(
        photo=datasets.Image(), text=datasets.Value("string"), mask=datasets.Value("string")
    )
    structs = [{"bytes": data, "path": None} for data in (b"junk", png(1))]
    rows = {"photo": structs, "text": ["a", "b"], "mask": ["", ""]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "0.parquet")
    assert levels(open_source(tmp_path, streaming=streaming)) == ["corrupt", 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_parquet(tmp_path, streaming):
    write_parquet(tmp_path / "0.parquet", {"image": image_structs(), "text": CAPTIONS})
    (tmp_path / "1.parquet").write_bytes(b"PAR1 this is not parquet PAR1")
    with pytest.raises(ValueError, match=r"1\.parquet is not a readable parquet file"):
        list(open_source(tmp_path, streaming=streaming))


def test_splits(tmp_path, hub):
    for split, level in (("train", 0), ("test", 1)):
        part = {"image": [image_structs()[level]], "text": ["x"]}
        write_parquet(tmp_path / f"tables/{split}-0.parquet", part)
        write_tar(tmp_path / f"tars/{split}/0.tar", {"a.png": png(level), "a.txt": "x"})
        write_images(tmp_path / "images" / split, 1)
        (tmp_path / "images" / split / "0.png").write_bytes(png(level))
        (tmp_path / "images" / split / "0.txt").write_text("x")
    for kind in ("tables", "tars", "images"):
        assert levels(open_source(tmp_path / kind)) == [0]
        assert levels(open_source(tmp_path / kind, split="test")) == [1]
        with pytest.raises(ValueError, match="'validation'"):
            open_source(tmp_path / kind, split="validation")
    with pytest.raises(ValueError, match="by name have no splits"):
        open_source(tmp_path / "tars/test/0.tar", split="test")
    with pytest.raises(ValueError, match=r"owner/name.*'nope'"):
        open_source("owner/name", split="nope")


def test_hub_options_and_identity(hub):
    source = open_source("owner/name", config_name="small", revision="v1")
    assert hub == {"name": "small", "revision": "v1"}
    assert source.identity["revision"] == "v1"
    assert source.identity["content"]
    assert source.identity["columns"] == ["image", "text"]


def test_image_formats_that_are_not_read_are_reported(tmp_path):
    """Photos in a phone's format, next to others, used to be left out silently."""
    folder = make("sidecar", tmp_path / "data")
    (folder / "3.HEIC").write_bytes(b"ftypheic")
    source = open_source(folder)
    assert source.left_out == [("3.HEIC", "format that is not read")] and len(list(source)) == 3
    for name in ("a.heic", "all.tar.gz", "all.zip"):
        other = tmp_path / name / "data"
        other.mkdir(parents=True)
        (other / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"no tars; unpack or convert files such as {name}"):
            open_source(other)
    with pytest.raises(UserError, match=r"neither .parquet nor .tar. Unpack it first"):
        open_source(other / name)


def test_missing_and_empty_sources(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.md").write_text("x")
    with pytest.raises(ValueError, match="holds no images, no parquet files and no tars"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty" / "data.jsonl").write_text("{}")
    for place in (tmp_path / "empty", tmp_path / "empty" / "data.jsonl"):
        with pytest.raises(ValueError, match=r'Captions come from a file "metadata\.jsonl"'):
            open_source(place)
    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere", "lost/nowhere.tar"):
        with pytest.raises(ValueError, match=r"nowhere(\.tar)? does not exist"):
            open_source(missing)
    with pytest.raises(ValueError, match=r"neither \.parquet nor \.tar"):
        open_source(tmp_path / "note.md")
    # One of several was said to be meant.
    (tmp_path / "00.tar").touch()
    with pytest.raises(ValueError, match=r"Braces are not expanded: .* as '.*/\*\.tar'$"):
        open_source(f"{tmp_path}/{{00..12}}.tar")
    for sign in (",", " ", ":", ", "):
        with pytest.raises(ValueError, match="one that holds them, or links to them"):
            open_source(f"{tmp_path}{sign}{tmp_path / 'empty'}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_source("empty/typo")  # looks like a hub id, but the folder exists
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"somebody/nothing.*could not open"):
        open_source("somebody/nothing")
