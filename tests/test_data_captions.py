"""Cases 14-16: which captions are read from each kind of source, and what happens to unusable
ones.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Killed, open_source
from test_data_sources import (
    image_structs,
    levels,
    png,
    private_datasets_cache,  # noqa: F401
    write_images,
    write_metadata,
    write_tar,
)
from test_data_store import build, report_of

import t2i
from t2i.data.data_report import UNREADABLE, survey_source
from t2i.data.images import ImageRules
from t2i.data.samples import read_captions
from t2i.data.store import CodeStore
from t2i.errors import UserError
from t2i.training.config import DataOptions
from t2i.training.open_data import open_data


# -- 14: captions that cleaning empties ------------------------------------------------------------
def notes(captions):
    """The notes of a text encoder that reads no Chinese and only three words."""
    return [None if c == "\u5706" else ["caption cut"] * (len(c.split()) > 3) for c in captions]


def test_unreadable_captions(tmp_path):
    """Case 14: the survey, the encoding and a cache hit report skipped and cut captions."""
    write_images(tmp_path / "data", 4)
    values = ["a dot", "\u5706", ["\u5706", "a dot"], "a dot with more"]
    rows = [{"file_name": f"{i}.png", "text": v} for i, v in enumerate(values)]
    write_metadata(tmp_path / "data", rows)
    source = open_source(tmp_path / "data")
    survey, usable = survey_source(source, caption_notes=notes, rules=ImageRules(8))
    for _ in range(2):
        folder = build(source, tmp_path / "cache", caption_notes=notes)
        report = report_of(folder)
        assert report["skipped"] == {UNREADABLE: {"count": 1, "first": ["1.png"]}}
        assert {k: v["first"] for k, v in report["noted"].items()} == {
            UNREADABLE: ["2.png"],
            "caption cut": ["3.png"],
        }
        assert report["lines"] == CodeStore(folder).manifest["report"]["lines"] == survey.lines()
    cache = CodeStore(folder)
    assert [cache.condition(i, 1) for i in range(3)] == ["a dot", "a dot", "a dot with more"]
    assert len(usable) == len(cache) == 3
    write_metadata(tmp_path / "data", [{"file_name": "0.png", "text": "\u5706"}])
    with pytest.raises(UserError, match=rf"no usable sample .*1 {UNREADABLE} \(0\.png\)"):
        build(open_source(tmp_path / "data"), tmp_path / "cache", caption_notes=notes)


def test_a_trigger_does_not_make_a_caption_readable(tmp_path):
    """Case 14: with trigger words, samples used to be trained on these words alone."""
    write_images(tmp_path / "data", 3)
    values = ["a dot", "\u5706", ["\u5706", "xyz"]]
    rows = [{"file_name": f"{i}.png", "text": v} for i, v in enumerate(values)]
    write_metadata(tmp_path / "data", rows)
    source = open_data(DataOptions(source=str(tmp_path / "data"), trigger="xyz"))
    survey, usable = survey_source(source, caption_notes=read_no_chinese, rules=ImageRules(8))
    assert [sample.captions for sample in usable] == [["xyz, a dot"], ["xyz"]]
    assert survey.keys == {UNREADABLE: ["1.png"]} and survey.noted == {UNREADABLE: ["2.png"]}


def read_no_chinese(captions):
    return [[] if c.replace("\u5706", "").strip() else None for c in captions]


@pytest.mark.parametrize("family", ["llamagen", "janus"])
def test_prompts_that_lose_words(family, tiny_world, monkeypatch, caplog):
    """Case 14: sampling says once for each prompt what it loses."""

    def drawn(*args, **options):
        raise Killed

    monkeypatch.setattr("t2i.generation.sample_windows", drawn)
    base = tiny_world / ("base" if family == "llamagen" else family)
    model = t2i.attach(t2i.load_backbone(family, str(base)), t2i.presets.iclr2026())
    long = "a photo of two red circle " * 200
    for _ in range(2):
        with pytest.raises(Killed):
            t2i.generate(model, ["a photo of a red circle", "\u5706", "", long], progress=False)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "'a photo of a red circle'" in line or "''" in line] == []
    assert sum("has no text the encoder can read" in line for line in said) == (
        family == "llamagen"
    )
    (cut,) = [line for line in said if line.startswith("prompt 'a photo of two red")]
    assert f": caption cut to {12 if family == 'llamagen' else 512} tokens" in cut


# -- 15 and 16: what a caption is ------------------------------------------------------------------
NO_TEXT = "caption holds characters that are not text"
NO_LETTERS = "caption without letters"
SETTINGS = "caption holds settings of an image generator"
ADDED = "caption holds what a language model added"
AS_JSON = "caption is JSON, used as text"


@pytest.mark.parametrize(
    ("value", "captions", "said"),
    [
        ("a\nb\r\n\nc\r", ["a", "b", "c"], ()),
        ([" a ", "b\nc"], ["a", "b", "c"], ()),
        (b"\xef\xbb\xbfa\nb", ["a", "b"], ()),
        ("a \ud83d dot", ["a  dot"], (NO_TEXT,)),
        ("\ud83d", [], (NO_TEXT,)),
        ("r\0e\0d\x07", ["red"], (NO_TEXT,)),
        ("a\tdot \U0001f642", ["a\tdot \U0001f642"], ()),
        ("\u200b \ufeff", [], ()),
        ("a\u200b red\ufeff \u2068photo\xadgraph\u2069", ["a red photograph"], ()),
        (
            "\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f467",
            ["\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f467"],
            (),
        ),
        ('{"caption": "a"}', ['{"caption": "a"}'], (AS_JSON,)),
        ("{\n'<CAPTION>': 'a'\n}", ["{", "'<CAPTION>': 'a'", "}"], (AS_JSON, NO_LETTERS)),
        ("a {red|blue} dot [big]", ["a {red|blue} dot [big]"], ()),
        ("NaN", ["NaN"], ("caption is only 'nan'",)),
        ("a dot &amp; a ring", ["a dot &amp; a ring"], ("caption holds HTML",)),
        ("<b>a dot</b>", ["<b>a dot</b>"], ("caption holds HTML",)),
        ("a {color} dot", ["a {color} dot"], ("caption holds an unfilled {field}",)),
        ("[trigger], a dot", ["[trigger], a dot"], ("caption holds an unfilled {field}",)),
        ("a dot</s>", ["a dot</s>"], (ADDED,)),
        ("<image>\nA dot.", ["<image>", "A dot."], (ADDED,)),
        ("I'm sorry, I can't help.", ["I'm sorry, I can't help."], (ADDED,)),
        ("**Caption:** a <s> dot", ["**Caption:** a <s> dot"], (ADDED,)),
        ("a dot --ar 16:9 --v 6", ["a dot --ar 16:9 --v 6"], (SETTINGS,)),
        ("a dot <lora:x:0.8>", ["a dot <lora:x:0.8>"], (SETTINGS,)),
        ("a dot\nNegative prompt: blur", ["a dot", "Negative prompt: blur"], (SETTINGS,)),
        ("a <sks> dot & ring; 3 < 4 -- no", ["a <sks> dot & ring; 3 < 4 -- no"], ()),
        ("0 0.5 0.5 0.1\na dot", ["0 0.5 0.5 0.1", "a dot"], (NO_LETTERS,)),
        ("...", ["..."], (NO_LETTERS,)),
        ("\u4e00", ["\u4e00"], ()),
        (b"\xff", [], ("caption is not UTF-8",)),
        ("a dot".encode("utf-16"), [], ("caption is UTF-16 (save it as UTF-8)",)),
        (7, [], ("caption is not text",)),
        ([["a"], "b"], ["b"], ("caption is not text",)),
        ({"a": "b"}, [], ("caption is not text",)),
        ([None, ""], [], ()),
        ("x" * 6000, ["x" * 5000], ("caption of more than 5000 characters cut",)),
        ("x\n" * 101, ["x"] * 100, ("captions after the first 100 left out",)),
    ],
)
def test_captions_of_any_value(value, captions, said):
    """Cases 15 and 16: the same rule in every kind of source."""
    assert read_captions(value) == (captions, said)


@pytest.mark.parametrize(
    "kind", ["metadata", "sidecar", "webdataset", "webdataset json", "parquet"]
)
def test_the_same_text_is_the_same_captions(kind, tmp_path):
    """Cases 15, 16: three lines are three alternatives everywhere. A lone surrogate is removed from
    JSON; other files with one are not UTF-8.
    """
    text, surrogate = "one\ntwo\nthree", "a \ud83d dot"
    values = [text, surrogate, 7]
    if kind == "metadata":
        write_images(tmp_path)
        write_metadata(
            tmp_path, [{"file_name": f"{i}.png", "text": v} for i, v in enumerate(values)]
        )
    elif kind == "sidecar":
        write_images(tmp_path)
        (tmp_path / "0.TXT").write_text(text)
        (tmp_path / "1.txt").write_bytes(surrogate.encode("utf-8", "surrogatepass"))
    elif kind == "parquet":
        texts = pa.array([text.encode(), surrogate.encode("utf-8", "surrogatepass"), None])
        images = pa.array(image_structs())
        columns = {"image": images, "text": texts.cast(pa.string(), safe=False)}
        pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    else:
        members = {}
        for i, value in enumerate(values):
            members[f"{i}.png"] = png(i)
            members |= (
                {f"{i}.json": json.dumps({"text": value})}
                if "json" in kind
                else {f"{i}.txt": str(value).encode("utf-8", "surrogatepass")}
            )
        write_tar(tmp_path / "0.tar", members)
    source = open_source(tmp_path)
    assert source[0].captions == ["one", "two", "three"]
    survey, _ = survey_source(source, rules=ImageRules(8))
    assert "1 have several captions (lines of a text or items of a list)" in survey.describe()
    json_like = kind in ("metadata", "webdataset json")
    assert source[1].captions == (["a  dot"] if json_like else [])
    assert source[1].notes == ((NO_TEXT,) if json_like else ())
    assert levels(source)[1] == (1 if json_like else "caption is not UTF-8")
    if json_like:
        assert levels(source)[2] == "caption is not text"


def test_damaged_json_and_huge_files(tmp_path):
    """Case 15: JSON nested deeper than Python can follow, and a "caption" of two megabytes."""
    write_images(tmp_path, 1)
    (tmp_path / "0.txt").write_bytes(b"x" * (2 << 20))
    assert levels(open_source(tmp_path)) == ["caption too large"]
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        open_source(tmp_path)
