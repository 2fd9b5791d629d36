"""The review page: its data, and the page itself in headless Chromium."""

import json
import re
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import WIDTH, click, phone_in_the_dark, seen, text, type_in
from PIL import Image
from programs import program, refused

from launch import analyze
from launch import review as run
from t2i.errors import UserError
from t2i.evaluation.generation_folder import (
    codes_file,
    sample_file,
    stage_file,
    write_codes,
    write_prompt,
)
from t2i.evaluation.results import REPORT_FILE, RESULTS_FILE, ROWS_FILE
from t2i.evaluation.review_page import Column, open_column, write_review
from t2i.export_folder import export
from t2i.files import write_json, write_text
from t2i.imaging import save_png
from t2i.model_options import DrawingModelOptions, ExportOptions

PROMPTS = ["a <b id=evil>red</b> circle</script>", "two stars", "a bus"]
REFINED = "refined #1? 50%"
"""A folder's name that is no part of an address as it is."""
RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"
CODES = [
    [[0], [0], [0], [0], [0], [0]],
    [[0], [5], [0], [0], [0], [0]],
    [[0], [5], [0], [0], [0], [7]],
]
"""The stages of an image of 2 x 3 codes: the second stage changes code 1, the third code 5."""


def _folder(root: Path, color: str, *, staged: bool = False, samples: int = 2) -> Path:
    """Write images of `PROMPTS`, 24 x 16 pixels; drafts are blue."""
    for p, prompt in enumerate(PROMPTS):
        write_prompt(root, p, {"prompt": prompt, "tag": "counting" if p == 1 else "single"})
        for s in range(samples):
            save_png(Image.new("RGB", (24, 16), color), root / sample_file(p, s))
            if staged:
                for r in (1, 2, 3):
                    picture = Image.new("RGB", (24, 16), color if r == 3 else BLUE)
                    save_png(picture, root / stage_file(p, s, r))
                write_codes(root / codes_file(p, s), CODES)
    return root


def _judge(folder: Path, wrong: str) -> None:
    """Write GenEval's results for the images in folder/images; only the image `wrong` is wrong."""
    rows = [
        {"filename": sample_file(p, s), "correct": (name := sample_file(p, s)) != wrong,
         "reason": "" if name != wrong else "expected 2 stars\nfound 1"}
        for p in range(3) for s in range(2)
    ]  # fmt: skip
    _write_results(folder, "GenEval", rows)


def _write_results(folder: Path, benchmark: str, rows: list[dict]) -> None:
    write_text(folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / REPORT_FILE, "")
    known = {"benchmark": benchmark, "label": "shapes prompts", "images": "images", "decimals": 3}
    known |= {"scores": {}, "judge": {}, "status": "complete"}
    write_json(folder / RESULTS_FILE, known)


def _content(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script id="review" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A review of two models, one that refines and one that is judged, moved after it was
    written.
    """
    root = tmp_path_factory.mktemp("review")
    _folder(root / "judged" / "images", GREEN)
    _judge(root / "judged", sample_file(1, 0))
    columns = [
        open_column("refined", _folder(root / "r" / "columns" / REFINED, RED, staged=True)),
        open_column("judged <i>", root / "judged"),
    ]
    write_review(root / "r", columns, title="One & <u>two</u>")
    shutil.rmtree(root / "judged")
    return shutil.move(root / "r", root / "moved") / "index.html"


def test_the_data_of_the_page(page):
    content = _content(page)
    assert [p["text"] for p in content["prompts"]] == PROMPTS
    refined, judged = content["columns"]
    assert refined["place"] == f"columns/{REFINED}" and refined["grid"] == [2, 3]
    image = refined["images"][sample_file(2, 1)]
    assert image == {"changed": ["40", "04"], "verdict": None}  # bits 010000(00), 000001(00)
    assert judged["judge"] == "GenEval: shapes prompts" and judged["grid"] is None
    shares = {name: image["verdict"]["share"] for name, image in judged["images"].items()}
    assert shares == {
        sample_file(p, s): float((p, s) != (1, 0)) for p in range(3) for s in range(2)
    }
    assert judged["images"][sample_file(1, 0)]["verdict"]["why"] == ["expected 2 stars", "found 1"]
    for column in content["columns"]:
        for name in column["images"]:
            assert (page.parent / column["place"] / name).is_file()


def test_a_column_names_its_seed_and_unusual_settings(tmp_path):
    """Those that are 0 were left out: a greedy model looked like one with the usual settings."""
    folder = _folder(tmp_path / "columns" / "greedy", RED)
    sampling = {"temperature": 0.0, "top_k": 0, "cfg_scale": 4.0}
    write_json(folder / "generation.json", {"seed": 0, "sampling": sampling})
    written = write_review(tmp_path, [open_column("greedy", folder)], title="")
    (column,) = _content(written)["columns"]
    assert column["about"] == "seed 0, temperature 0.0, cfg scale 4.0"


def test_verdicts_of_dpg_bench_are_shares_of_passed_questions(tmp_path):
    _folder(tmp_path / "d" / "images", RED, samples=1)
    answers = [("Is there a bus?", "yes", True), ("Is it red?", "no", False)]
    keys = ("question", "answer", "passed")
    questions = [dict(zip(keys, said, strict=True)) for said in answers]
    rows = [{"filename": sample_file(p, 0), "questions": questions[: 2 - p]} for p in (0, 1)]
    _write_results(tmp_path / "d", "DPG-Bench", rows)
    column = open_column("d", tmp_path / "d")
    assert column.verdicts == {
        (0, 0): {"share": 0.5, "why": ["Is it red? no"]},
        (1, 0): {"share": 1.0, "why": []},
    }


def test_mismatched_columns_are_refused(tmp_path):
    a, b = _folder(tmp_path / "a", RED), _folder(tmp_path / "b", RED)
    with pytest.raises(UserError, match="two columns are called x"):
        write_review(tmp_path, [open_column("x", a), open_column("x", b)], title="t")
    write_prompt(b, 0, {"prompt": "something else"})
    with pytest.raises(UserError, match="images of other prompts"):
        write_review(tmp_path, [open_column("x", a), open_column("y", b)], title="t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in GenEval's layout"):
        open_column("z", tmp_path / "empty")


def test_image_names_with_fewer_digits_are_found(tmp_path):
    """GenEval's own code writes samples/0000.png; the page of such a folder used to be empty."""
    source = _folder(tmp_path / "a" / "images", RED)
    _judge(tmp_path / "a", sample_file(1, 0))
    for folder in [p for p in source.iterdir() if p.is_dir()]:
        for path in sorted((folder / "samples").iterdir()):
            path.rename(path.with_name(f"{int(path.stem):04d}.png"))
        folder.rename(source / f"{int(folder.name):03d}")
    columns = [open_column("a", tmp_path / "a"), open_column("b", _folder(tmp_path / "b", GREEN))]
    page = write_review(tmp_path / "r", columns, title="t")
    (column, _) = _content(page)["columns"]
    assert sorted(column["images"]) == [sample_file(p, s) for p in range(3) for s in range(2)]
    assert column["images"][sample_file(1, 0)]["verdict"]["share"] == 0
    assert all((page.parent / column["place"] / name).is_file() for name in column["images"])
    shutil.copy(source / "000/samples/0000.png", source / "000/samples/0.png")
    with pytest.raises(UserError, match=r"0.png and 0000.png are the same number"):
        write_review(tmp_path / "r", columns, title="t")


def test_columns_are_matched_by_prompts_not_numbers(tmp_path):
    """A benchmark of every 30th prompt writes 00000, 00030, ...; a model that draws the same
    prompts writes 00000, 00001, ...
    """
    drawn = _folder(tmp_path / "r" / "columns" / "drawn", RED)
    spread = _folder(tmp_path / "s" / "images", GREEN)
    _judge(tmp_path / "s", sample_file(2, 1))
    rows = (tmp_path / "s" / ROWS_FILE).read_text()
    for number in (2, 1):
        (spread / f"{number:05d}").rename(spread / f"{30 * number:05d}")
        rows = rows.replace(f"{number:05d}/samples", f"{30 * number:05d}/samples")
    write_text(tmp_path / "s" / ROWS_FILE, rows)
    for order in ((drawn, tmp_path / "s"), (tmp_path / "s", drawn)):
        columns = [open_column(str(i), folder) for i, folder in enumerate(order)]
        page = write_review(tmp_path / "r", columns, title="t")
        content = _content(page)
        folders = [prompt["folder"] for prompt in content["prompts"]]
        assert folders == [
            "00000",
            *(["00001", "00002"] if order[0] == drawn else ["00030", "00060"]),
        ]
        for column in content["columns"]:
            assert {name[:5] for name in column["images"]} == set(folders)
            assert all((page.parent / column["place"] / n).is_file() for n in column["images"])
        judged = content["columns"][order.index(tmp_path / "s")]["images"]
        assert [n for n, i in judged.items() if not i["verdict"]["share"]] == [
            f"{folders[2]}/samples/00001.png"
        ]
    assert len(list(drawn.glob("*/samples/*.png"))) == 6, "drawn images stay"


def test_changed_images_are_copied_again(tmp_path):
    source = _folder(tmp_path / "elsewhere", RED)
    column = Column("a", source, {})
    write_review(tmp_path / "r", [column], title="t")
    save_png(Image.new("RGB", (24, 16), GREEN), source / sample_file(0, 0))
    write_review(tmp_path / "r", [column], title="t")
    there = tmp_path / "r" / "brought" / "1-a" / sample_file(0, 0)
    assert there.read_bytes() == (source / sample_file(0, 0)).read_bytes()


def test_columns_whose_names_give_the_same_folder_stay_apart(tmp_path):
    """The second column's images used to replace the first one's."""
    columns = [
        open_column(name, _folder(tmp_path / color, color))
        for name, color in (("a b", RED), ("a-b", GREEN), ("..", BLUE))
    ]
    content = _content(write_review(tmp_path / "r", columns, title="t"))
    for column, color in zip(content["columns"], (RED, GREEN, BLUE), strict=True):
        with Image.open(tmp_path / "r" / column["place"] / sample_file(0, 0)) as image:
            assert image.getpixel((0, 0)) == tuple(bytes.fromhex(color[1:]))


def test_a_rewritten_page_shows_no_earlier_images(tmp_path):
    """Earlier samples and stages that the new images lack used to stay and be shown as theirs."""
    before = _folder(tmp_path / "before", RED, staged=True, samples=4)
    now = _folder(tmp_path / "now", GREEN)
    for source in (before, now):
        content = _content(write_review(tmp_path / "r", [open_column("a", source)], title="t"))
    (column,) = content["columns"]
    assert len(column["images"]) == 6 and column["grid"] is None
    files = [path for path in (tmp_path / "r" / "brought").rglob("*") if path.is_file()]
    assert len(files) == 6 + 3, "images and metadata"


def test_names_outside_the_layout_are_ignored(tmp_path):
    """They used to end the program with a traceback."""
    source = _folder(tmp_path / "a", RED)
    for name in ("00000/samples/00000 (1).png", "00000/samples/copy.png", "0 copy/samples/0.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(Image.new("RGB", (24, 16), RED), source / name)
    (column,) = _content(write_review(tmp_path / "r", [open_column("a", source)], title="t"))[
        "columns"
    ]
    assert sorted(column["images"]) == [sample_file(p, s) for p in range(3) for s in range(2)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("images/00001/metadata.jsonl", '["a"]', "has no text under"),
        ("images/00001/metadata.jsonl", '{"tag": "x"}', "has no text under"),
        ("results.json", '{"label": "x"}', "is not a benchmark's: it lacks a valid benchmark, "),
        ("results.jsonl", '{"filename": 1}', "not in the form that a benchmark writes"),
        ("results.jsonl", '["x"]', "line 1 is not a JSON object"),
        ("images/00000/stages/00000.json", '{"a": 1}', "holds no codes"),
        ("images/00000/stages/00000.json", "[[[0]], [[0], [1]]]", "holds no codes"),
        ("images/00000/stages/00000.json", "[[], []]", "holds no codes"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    _folder(tmp_path / "a" / "images", RED, staged=True)
    _judge(tmp_path / "a", "")
    write_text(tmp_path / "a" / name, content)
    with pytest.raises(UserError, match=message):
        write_review(tmp_path / "r", [open_column("x", tmp_path / "a")], title="t")


def test_judged_images_that_are_gone_are_named(tmp_path):
    """The results' folder was said to hold no images."""
    _folder(tmp_path / "a" / "images", RED)
    _judge(tmp_path / "a", "")
    (tmp_path / "a" / "images").rename(tmp_path / "b")
    with pytest.raises(UserError, match=r"a holds the results of .*images, which does not exist"):
        open_column("x", tmp_path / "a")


def test_results_of_another_program_are_no_verdicts(tmp_path):
    """The folder used to be refused, for FID's scores of it, say."""
    folder = _folder(tmp_path / "a", RED)
    for place in (tmp_path, folder):
        write_json(place / "results.json", {"benchmark": "FID (ADM)"})
    assert not open_column("x", folder).verdicts


def test_the_program_draws_what_is_missing(tmp_path, shapes_ckpt, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [
        "--ckpt",
        shapes_ckpt,
        "--with-base",
        "--samples",
        1,
        "--prompt",
        "a photo of a star",
    ]
    program(run, *options, "--out", "r")
    refined, base = _content(tmp_path / "r" / "index.html")["columns"]
    assert [refined["name"], base["name"]] == [Path(shapes_ckpt).name, "shapes"]
    assert len(refined["images"][sample_file(0, 0)]["changed"]) == 3  # k = 4
    assert base["images"][sample_file(0, 0)]["changed"] == []
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*.png")}
    assert len(before) == 1 + 4 + 1
    program(run, *options, "--out", "r", "--names", "after", "before")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*.png")}
    columns = _content(tmp_path / "r" / "index.html")["columns"]
    assert [column["name"] for column in columns] == ["after", "before"]


def test_bad_models_are_refused(refusal):
    assert "give --ckpt, --against or --images" in refusal("--prompt", "x")
    assert "no --ckpt is given" in refusal("--with-base", "--against", "shapes", "--prompt", "x")
    assert "is itself a base" in refusal("--with-base", "--ckpt", "shapes", "--prompt", "x")
    mistyped = refusal("--with-base", "--ckpt", "runs/gone", "--prompt", "x")
    assert "runs/gone does not exist" in mistyped, "it was called a base"
    assert "does not exist" in refusal(
        "--ckpt", "shapes", "--against", "runs/gone", "--prompt", "x"
    )


def test_windows_of_every_model_are_checked_before_drawing(refusal, shapes_ckpt, monkeypatch):
    """Those of the second model used to be checked after all images of the first were drawn."""
    monkeypatch.setattr(DrawingModelOptions, "load", None)
    message = refusal("--ckpt", shapes_ckpt, "--against", "shapes", "--prompt", "x", "--window", 2)
    assert "shapes: window=2 is larger than the model's k=1" in message


def test_a_page_of_the_users_own_is_kept(refusal, tmp_path):
    """It used to be overwritten."""
    page = tmp_path / "index.html"
    page.write_text("<title>mine</title>")
    message = refusal("--ckpt", "shapes", "--prompt", "x", "--out", tmp_path)
    assert "index.html would be overwritten" in message and page.read_text().endswith(
        "mine</title>"
    )


def test_pages_of_other_programs_are_kept(refusal, capsys, shapes_ckpt, tmp_path):
    """`analyze` overwrote the page of `review`, and the other way round."""
    few = ("--prompt", "a red star", "--samples", 1, "--out")
    for one, other in ((run, analyze), (analyze, run)):
        program(one, "--ckpt", shapes_ckpt, *few, tmp_path / one.__name__)
        program(one, "--ckpt", shapes_ckpt, *few, tmp_path / one.__name__)  # its own
        said = refused(other, capsys, "--ckpt", shapes_ckpt, *few, tmp_path / one.__name__)
        assert "index.html would be overwritten, and is not a page of this program" in said


def test_the_page_of_a_run_is_kept(refusal, plain):
    """It used to be overwritten, and nothing would write a finished run's page again."""
    run_dir = plain.parents[1]
    message = refusal("--ckpt", "shapes", "--prompt", "x", "--out", run_dir)
    assert f"{run_dir / 'index.html'} is the page of a training run" in message


def test_titles_and_folders_are_checked_first(refusal, tmp_path):
    """A title that is not UTF-8 used to fail after all images were drawn."""
    asked = ("--ckpt", "shapes", "--prompt", "x", "--out", tmp_path / "out")
    assert "--names: '\\udcff' contains a lone surrogate" in refusal(*asked, "--names", "\udcff")
    assert "--names has an empty value" in refusal(*asked, "--names", "")
    (tmp_path / "file").write_text("")
    for name, what in (("file", "is a file, not a folder"), ("none", "does not exist")):
        message = refusal(*asked, "--images", tmp_path / name)
        assert f"image folder {tmp_path / name} {what}" in message
    assert not (tmp_path / "out").exists()


def test_with_base_is_refused_for_an_export(tmp_path, refusal, shapes_ckpt):
    """An export does not contain its base. The message used to say: give it as --ckpt, which is
    what the user had done.
    """
    out = export(ExportOptions(Path(shapes_ckpt), tmp_path / "out"))
    message = refusal("--ckpt", out, "--with-base", "--prompt", "x")
    assert "does not contain its own base" in message


def test_model_options_are_refused_if_no_model_draws(tmp_path, refusal):
    there = _folder(tmp_path / "there", RED)
    message = refusal("--images", there, "--prompt", "x", "--cfg-scale", 3, "--samples", 2)
    assert "--cfg-scale, --prompt, --samples: only for a model that draws" in message


def test_mismatched_columns_are_refused_before_drawing(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(DrawingModelOptions, "load", None)
    there = _folder(tmp_path / "there", RED)
    asked = ("--ckpt", "shapes", "--out", tmp_path / "out")
    some = (*asked, "--prompt", "a photo of a star", "--images")
    assert "hold images of other prompts" in refusal(*some, there)
    assert "gone" in refusal(*some, tmp_path / "gone")
    assert "1 names for 2 columns" in refusal(*some, there, "--names", "a")
    assert "two columns are called a" in refusal(*asked, "--images", there, "--names", "a", "a")
    assert not (tmp_path / "out").exists()


# -- in a browser ----------------------------------------------------------------------------------
@pytest.fixture
def tab(browser, page):
    """The page in a browser, with empty local storage; an error on it fails the test."""
    browser.open(page)
    browser.run("localStorage.clear()")
    browser.open(page)
    yield browser
    assert browser.errors == []


SHOWN = seen(".prompt h2", "e.textContent")
SOURCES = seen(".cell img", "e.getAttribute('src')")


def test_prompts_and_names_are_escaped(tab):
    assert tab.run("document.title") == "One & <u>two</u>"
    assert tab.run(SHOWN) == PROMPTS
    assert tab.run(seen(".head b", "e.textContent")) == ["refined", "judged <i>"]
    assert tab.run("document.querySelectorAll('#evil, h1 u, .head i').length") == 0
    assert len(tab.run(SOURCES)) == 12
    assert set(tab.run(seen(".cell img", "e.loading"))) == {"lazy"}, (
        "a large page must not load all its images at once"
    )


def test_stages_and_their_changed_codes_are_shown(tab):
    assert all("/samples/" in source for source in tab.run(SOURCES))
    tab.run(type_in(".stage", "2"))
    drafts = {f"columns/{quote(REFINED)}/{stage_file(p, s, 2)}" for p in range(3) for s in range(2)}
    shown = tab.run(SOURCES)
    assert drafts < set(shown)
    assert sum("/samples/" in source for source in shown) == 6, "images of the model without stages"
    assert tab.run(text(".stage-name")) == "draft 2"
    tab.run(click(".map"))
    pixels = "e.getContext('2d').getImageData(0, 0, 3, 2).data"
    changed = f"(d => [0, 1, 2, 3, 4, 5].filter(i => d[4 * i] > 100))({pixels})"
    assert tab.run(seen(".cell canvas", changed)) == [[1]] * 6
    tab.press("m")
    assert tab.run(seen(".cell canvas", "1")) == []
    tab.run("[...document.querySelectorAll('button')].find(e => e.innerText == 'Play').click()")
    tab.wait(text(".stage-name") + " == 'draft 1'")
    tab.wait(text(".stage-name") + " == 'final'")


def test_filters_by_text_tag_and_verdict(tab):
    tab.press("/")
    assert tab.run("document.activeElement.id") == "search"
    tab.run(type_in("#search", "STARS"))
    assert tab.run(SHOWN) == ["two stars"]
    tab.run(type_in("#search", ""))
    tab.run(type_in("#tag", "single"))
    assert tab.run(SHOWN) == [PROMPTS[0], "a bus"]
    tab.run(type_in("#tag", ""))
    tab.run(type_in("#verdict", "wrong"))
    assert tab.run(SHOWN) == ["two stars"]
    tab.run(type_in("#search", "bus"))
    assert tab.run(SHOWN) == [] and tab.run(seen(".empty", "1")) == [1]


def test_an_image_is_shown_large(tab):
    tab.run(click(".cell figure"))
    title = text("#zoom header span")
    assert tab.run(title) == "refined, sample 0"
    tab.press("ArrowRight")
    assert tab.run(title) == "judged <i>, sample 0"
    for _ in range(2):
        tab.press("ArrowDown")
    assert tab.run(text("#zoom h3")) == "two stars"
    assert tab.run(seen("#zoom li", "e.textContent")) == ["expected 2 stars", "found 1"]
    for number, moved in enumerate(["refined, sample 0", "judged <i>, sample 0"]):  # touch buttons
        tab.run(click("#zoom .moves button", number))
        assert tab.run(title) == moved
    tab.run(click("#zoom .moves button", 2))
    assert tab.run(text("#zoom h3")) != "two stars"
    tab.run(click("#zoom figure"))
    assert not tab.run("document.querySelector('#zoom').open")


def test_blind_votes_and_notes_are_saved_and_loaded(tab, page, tmp_path):
    tab.run(type_in("textarea", "too few", 1))
    tab.run(click("#vote-blind"))
    for i in range(6):
        shown = tab.run(text("#vote"))
        assert f"{i + 1} of 6" in shown and "refined" not in shown and "judged" not in shown
        if i == 2:
            tab.press("2")
            tab.press("u")
        sides = tab.run(seen("#vote img", "e.getAttribute('src')"))
        # Always vote for the refined image.
        tab.press("2" if sides[1].startswith("columns/refined") else "1")
    cells = tab.run(seen("#vote td", "e.textContent"))
    assert cells[:5] == ["refined", "judged <i>", "6", "0", "0"]
    # Keep the offered download in a variable.
    tab.run("URL.createObjectURL = blob => { blob.text().then(t => window.saved = t); return '#' }")
    tab.run(click("#save"))
    tab.wait("window.saved")
    content = json.loads(tab.run("window.saved"))
    assert len(content["votes"]) == 6 and content["notes"] == {"00001": "too few"}

    tab.run("localStorage.clear()")
    tab.open(page)
    saved = tmp_path / "votes.json"
    votes = content["votes"]
    for change, said in (
        ({}, "6 votes and 1 notes"),
        ({"review": "other"}, "another review"),
        ({"votes": [*votes[:5], votes[0]]}, "is damaged"),  # was counted twice
        ({"votes": [None]}, "is damaged"),  # nobody could vote any more
        ({"votes": [votes[0] | {"choice": "yes"}]}, "is damaged"),
        ({"notes": "mine"}, "is damaged"),  # later notes were lost
        (None, "another review"),
    ):
        found = None if change is None else content | change
        saved.write_text(json.dumps(found), encoding="utf-8")
        root = tab.call("DOM.getDocument")["root"]["nodeId"]
        upload = tab.call("DOM.querySelector", nodeId=root, selector="#load")["nodeId"]
        tab.call("DOM.setFileInputFiles", nodeId=upload, files=[str(saved)])
        tab.wait(text("#message") + f".includes('{said}')")
        assert tab.run("document.querySelectorAll('textarea')[1].value") == "too few"


def test_notes_survive_a_reload(tab, page):
    tab.run(type_in("textarea", "good"))
    for _ in range(20):  # in a busy browser, the next page may see the stored note a little later
        tab.open(page)
        if tab.run("document.querySelector('textarea').value") == "good":
            return
        time.sleep(0.5)
    pytest.fail("the note is gone")


def test_the_page_fits_a_phone_in_dark_mode(tab):
    with phone_in_the_dark(tab):
        assert len(tab.run(seen(".cell .name", "1"))) == 6
        tab.run(click("#vote-blind"))
        assert tab.run(WIDTH) <= 375
