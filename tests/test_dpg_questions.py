"""Question files: which are read or refused, and how the official file gets into the cache."""

import logging
from dataclasses import replace

import pytest

from dpg_bench import questions
from dpg_bench.dpg_benchmark import load_questions
from dpg_bench.questions import COLUMNS, git_blob_sha1, read_questions

ROWS = [
    # item, text, proposition, dependency, tuple, question
    ["7", '"A red bike, and\na hat"', "1", "0", "entity - whole (bike)", "Is there a bike?"],
    ["7", '"A red bike, and\na hat"', "2", "0", "entity - whole (hat)", "Is there a hat?"],
    ["7", '"A red bike, and\na hat"', "3", '"1, 2"', '"relation - spatial (bike, hat)"', "Near?"],
    ["x1", "A photo", "1", "0", "global - (photo)", "Is it a photo?"],
    ["x1", "A photo", "2", '"0,1"', '"attribute - color (photo, grey)"', "Is it grey?"],
]


def write(tmp_path, rows=ROWS, header=COLUMNS, start=""):
    lines = [",".join(header)]
    for item, text, proposition, dependency, tuple_, question in rows:
        lines.append(f"{item},{text},k,{proposition},{dependency},b,d,{tuple_},{question}")
    path = tmp_path / "questions.csv"
    path.write_text(start + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def changed(index, column, value):
    rows = [list(row) for row in ROWS]
    rows[index][column] = value
    return rows


def test_reading(tmp_path):
    graph = read_questions(write(tmp_path, start="\ufeff"))
    assert list(graph.items) == ["7", "x1"]
    assert graph.prompts == {"7": "A red bike, and\na hat", "x1": "A photo"}
    assert [q.parents for q in graph.questions] == [(), (), (1, 2), (), (1,)]
    assert [q.line for q in graph.questions] == [2, 4, 6, 8, 9]
    last = graph.questions[-1]
    assert (last.category, last.broad_category) == ("attribute - color", "attribute")
    assert graph.questions[3].category == "global -"
    assert len(graph.questions) == 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            changed(4, 4, "mood - happy (photo)"),
            r"line 9 \(item x1, proposition 2\): unknown cat.*mood - happy",
        ),
        (changed(4, 4, "attribute (photo)"), "line 9 .*unknown category 'attribute'"),
        (changed(4, 3, "3"), "line 9 .*depends on 3, which the item does not have"),
        (changed(0, 3, "3"), r"line 2 .*depends on itself \(1 -> 3 -> 1\)"),
        (changed(1, 3, "2"), r"line 4 \(item 7, proposition 2\): depends on itself \(2 -> 2\)"),
        (changed(4, 2, "1"), "line 9 .*proposition 1 is repeated"),
        (changed(4, 2, "two"), "line 9 .*must be a number"),
        (changed(4, 2, "0"), "line 9 .*start at 1"),
        (changed(4, 3, "one"), "line 9 .*must be a number.*'one'"),
        (changed(4, 3, ""), "line 9 .*dependency is empty"),
        (changed(2, 5, " "), "line 6 .*question_natural_language is empty"),
        (changed(4, 1, "Another"), "line 9 .*differs from line 8"),
        (ROWS[:1] + ROWS[3:4] + ROWS[1:2], "line 5 .*not together"),
        (changed(4, 5, "Is it grey, or not?"), "line 9 has more cells than the header"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_questions(write(tmp_path, rows))


def test_a_child_may_come_before_its_parent(tmp_path):
    rows = changed(0, 3, "2")
    assert read_questions(write(tmp_path, rows)).questions[0].parents == (2,)


def test_files_that_hold_no_questions(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_questions(tmp_path / "absent.csv")
    path = write(tmp_path)
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):  # as spreadsheets may save it
        (tmp_path / "other.csv").write_text(path.read_text().replace(",", sign))
        with pytest.raises(ValueError, match=f"commas; {name} separate its columns"):
            read_questions(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="no column tuple"):
        read_questions(write(tmp_path, header=[c.replace("tuple", "triple") for c in COLUMNS]))
    with pytest.raises(ValueError, match="two columns text"):
        read_questions(write(tmp_path, header=[c.replace("keywords", "text") for c in COLUMNS]))
    # The rest of the file was taken for the question's text.
    with pytest.raises(ValueError, match=r"is not a CSV: .* a cell that begins with a quote"):
        read_questions(
            write(tmp_path, [*ROWS[:3], [*ROWS[3][:5], '"Is it?'], ["x1", *ROWS[3][1:]]])
        )
    with pytest.raises(ValueError, match="has no rows"):
        read_questions(write(tmp_path, rows=[]))
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="not a CSV in UTF-8"):
        read_questions(tmp_path / "image.csv")
    (tmp_path / "image.csv").write_bytes("item_id,text".encode("utf-16"))
    with pytest.raises(
        ValueError, match=r"image.csv is UTF-16, not UTF-8: save it as UTF-8 \(iconv"
    ):
        read_questions(tmp_path / "image.csv")


def test_errors_about_many_propositions_are_short(tmp_path):
    """Thousands of questions that depend on each other were printed whole."""
    numbers = range(1, 3001)
    circle = [["x", "a bus", i, 1 + i % 3000, "global - (photo)", "Is it?"] for i in numbers]
    lost = [["x", "a bus", 1, f'"{",".join(map(str, numbers[1:]))}"', *circle[0][4:]]]
    wrong = [["x", "a bus", 1, "?" * 3000, *circle[0][4:]]]
    said = ("depends on itself", "which the item does not have", "must be a number")
    for rows, words in zip((circle, lost, wrong), said, strict=True):
        with pytest.raises(ValueError, match=words) as error:
            read_questions(write(tmp_path, rows))
        assert len(str(error.value)) < 500


def test_git_blob_hash():
    assert git_blob_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_blob_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_oddities_of_the_official_file_are_accepted(tmp_path, monkeypatch, caplog):
    path = write(tmp_path, changed(1, 3, "2"))
    monkeypatch.setattr(questions, "OFFICIAL_BLOB", git_blob_sha1(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        graph = read_questions(path)
    assert graph.is_official
    assert "depends on itself" in caplog.text


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A local file that stands in for the official one; there is no other network."""
    path = write(tmp_path)
    blob = git_blob_sha1(path.read_bytes())
    monkeypatch.setattr(questions, "OFFICIAL_BLOB", blob)
    source = replace(questions.OFFICIAL_FILE, url=path.as_uri(), hashes=(blob,))
    monkeypatch.setattr("dpg_bench.dpg_benchmark.OFFICIAL_FILE", source)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    return path


def test_the_file_is_fetched_once_and_verified(tmp_path, published):
    assert load_questions("official").is_official
    published.unlink()
    assert len(load_questions("official").questions) == 5  # from the cache
    cached = tmp_path / "cache" / "dpg_bench" / "dpg_bench.csv"
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"not the published question file.*delete it"):
        load_questions("official")


def test_the_offline_message_says_what_to_do(published):
    published.unlink()
    with pytest.raises(ValueError, match=r"cannot be downloaded.*--questions PATH.*shapes"):
        load_questions("official")


def test_another_file_at_the_address_is_refused_and_not_kept(tmp_path, published):
    published.write_bytes(b"<html>moved</html>")
    with pytest.raises(ValueError, match=r"18 bytes .* are not the published question file"):
        load_questions("official")
    assert not (tmp_path / "cache" / "dpg_bench" / "dpg_bench.csv").exists()


def test_a_given_file_needs_no_network(tmp_path):
    assert questions.OFFICIAL_FILE.hashes == (questions.OFFICIAL_BLOB,)
    path = write(tmp_path)
    assert not load_questions(str(path)).is_official
    near = f"give official, shapes or a .csv file; perhaps you meant {path}"
    with pytest.raises(ValueError, match=f"there are no questions .*: {near}"):
        load_questions(str(path.with_name(f"{path.name}s")))
