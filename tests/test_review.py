"""The review page: its data, and the page itself in headless Chromium."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from programs import program

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
from t2i.evaluation.review import Column, open_column, write_review
from t2i.files import write_json, write_text
from t2i.imaging import save_png

PROMPTS = ["a <b id=evil>red</b> circle</script>", "two stars", "a bus"]
RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"
CODES = [
    [[0], [0], [0], [0], [0], [0]],
    [[0], [5], [0], [0], [0], [0]],
    [[0], [5], [0], [0], [0], [7]],
]
"""Stages of an image of 2 x 3 codes: the second changes code 1, the third code 5."""


def _folder(root: Path, color: str, *, staged: bool = False, samples: int = 2) -> Path:
    """Images of `PROMPTS`, 24 x 16 pixels; drafts are blue."""
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
    """GenEval's results of the images in folder/images, of which one is wrong."""
    rows = [
        {"filename": sample_file(p, s), "correct": (name := sample_file(p, s)) != wrong,
         "reason": "" if name != wrong else "expected 2 stars\nfound 1"}
        for p in range(3) for s in range(2)
    ]  # fmt: skip
    write_text(folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / REPORT_FILE, "")
    known = {"benchmark": "GenEval", "label": "shapes prompts", "images": "images"}
    write_json(folder / RESULTS_FILE, known)


def _content(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script id="review" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A review of two models: one refines, one is judged; moved after it was written."""
    root = tmp_path_factory.mktemp("review")
    _folder(root / "judged" / "images", GREEN)
    _judge(root / "judged", sample_file(1, 0))
    columns = [
        open_column("refined", _folder(root / "r" / "columns" / "refined", RED, staged=True)),
        open_column("judged <i>", root / "judged"),
    ]
    write_review(root / "r", columns, title="One & <u>two</u>")
    shutil.rmtree(root / "judged")
    return shutil.move(root / "r", root / "moved") / "index.html"


def test_what_the_page_knows(page):
    content = _content(page)
    assert [p["text"] for p in content["prompts"]] == PROMPTS
    refined, judged = content["columns"]
    assert refined["place"] == "columns/refined" and refined["grid"] == [2, 3]
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


def test_columns_that_do_not_belong_together(tmp_path):
    a, b = _folder(tmp_path / "a", RED), _folder(tmp_path / "b", RED)
    with pytest.raises(UserError, match="two columns are called x"):
        write_review(tmp_path, [open_column("x", a), open_column("x", b)], title="t")
    write_prompt(b, 0, {"prompt": "something else"})
    with pytest.raises(UserError, match="images of other prompts"):
        write_review(tmp_path, [open_column("x", a), open_column("y", b)], title="t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in GenEval's layout"):
        open_column("z", tmp_path / "empty")


def test_images_that_changed_are_brought_again(tmp_path):
    source = _folder(tmp_path / "elsewhere", RED)
    column = Column("a", source, {})
    write_review(tmp_path / "r", [column], title="t")
    save_png(Image.new("RGB", (24, 16), GREEN), source / sample_file(0, 0))
    write_review(tmp_path / "r", [column], title="t")
    there = tmp_path / "r" / "columns" / "a" / sample_file(0, 0)
    assert there.read_bytes() == (source / sample_file(0, 0)).read_bytes()


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


def test_what_cannot_be_shown(refusal):
    assert "give --ckpt, --against or --images" in refusal("--prompt", "x")
    assert "no --ckpt is given" in refusal("--with-base", "--against", "shapes", "--prompt", "x")
    assert "needs something trained" in refusal("--with-base", "--ckpt", "shapes", "--prompt", "x")
    assert "does not exist" in refusal(
        "--ckpt", "shapes", "--against", "runs/gone", "--prompt", "x"
    )


# -- in a browser ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium (Debian: apt install chromium)")
    with api.sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-background-networking", "--disable-sync"]
        with playwright.chromium.launch(executable_path=chromium, args=quiet) as browser:
            yield browser


@pytest.fixture
def tab(browser, page):
    """The page in a context of its own; an error in it fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    tab, errors = context.new_page(), []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.goto(page.as_uri())
    yield tab
    context.close()
    assert not errors


def _sources(tab) -> set[str]:
    return set(tab.eval_on_selector_all(".cell img", "all => all.map(i => i.getAttribute('src'))"))


def test_prompts_and_names_stay_text(tab):
    assert tab.title() == "One & <u>two</u>"
    assert tab.locator(".prompt h2").first.text_content() == PROMPTS[0]
    assert tab.locator(".head b").nth(1).text_content() == "judged <i>"
    assert tab.locator("#evil, h1 u, .head i").count() == 0
    assert tab.locator(".cell img").count() == 12


def test_stages_and_what_they_changed(tab):
    assert all("/samples/" in source for source in _sources(tab))
    tab.locator(".stage").fill("2")
    drafts = {f"columns/refined/{stage_file(p, s, 2)}" for p in range(3) for s in range(2)}
    assert drafts < _sources(tab)
    assert sum("/samples/" in source for source in _sources(tab)) == 6  # of the model that has none
    assert tab.locator(".stage-name").text_content() == "draft 2"
    tab.locator(".map").check()
    canvases = tab.locator(".cell canvas")
    assert canvases.count() == 6
    red = "c => { const d = c.getContext('2d').getImageData(0, 0, 3, 2).data; return [0,1,2,3,4,5].filter(i => d[4 * i] > 100) }"
    assert canvases.first.evaluate(red) == [1]
    tab.keyboard.press("m")
    assert canvases.count() == 0
    tab.get_by_text("Play", exact=True).click()
    tab.wait_for_function("document.querySelector('.stage-name').textContent === 'draft 1'")
    tab.wait_for_function("document.querySelector('.stage-name').textContent === 'final'")


def test_filters(tab):
    visible = tab.locator(".prompt:visible h2")
    tab.keyboard.press("/")
    tab.keyboard.type("STARS")
    assert visible.all_text_contents() == ["two stars"]
    tab.locator("#search").fill("")
    tab.locator("#tag").select_option("single")
    assert visible.all_text_contents() == [PROMPTS[0], "a bus"]
    tab.locator("#tag").select_option("")
    tab.locator("#verdict").select_option("wrong")
    assert visible.all_text_contents() == ["two stars"]
    tab.locator("#search").fill("bus")
    assert visible.count() == 0 and tab.locator(".empty").is_visible()


def test_one_picture_large(tab):
    tab.locator(".cell figure").first.click()
    title = tab.locator("#zoom header span").first
    assert title.text_content() == "refined, sample 0"
    tab.keyboard.press("ArrowRight")
    assert title.text_content() == "judged <i>, sample 0"
    for _ in range(2):
        tab.keyboard.press("ArrowDown")
    assert tab.locator("#zoom h3").text_content() == "two stars"
    assert tab.locator("#zoom li").all_text_contents() == ["expected 2 stars", "found 1"]
    tab.keyboard.press("Escape")
    assert not tab.locator("#zoom").is_visible()


def test_blind_votes_and_notes_are_saved_and_loaded(tab, browser, page, tmp_path):
    tab.locator("textarea").nth(1).fill("too few")
    tab.locator("#vote-blind").click()
    dialog = tab.locator("#vote")
    assert "refined" not in dialog.text_content() and "judged" not in dialog.text_content()
    for i in range(6):
        assert f"{i + 1} of 6" in dialog.text_content()
        if i == 2:
            tab.keyboard.press("2")
            tab.keyboard.press("u")
        right = dialog.locator("img").nth(1).get_attribute("src").startswith("columns/refined/")
        tab.keyboard.press("2" if right else "1")  # always the model that refines
    assert dialog.locator("td").all_text_contents()[-6:-1] == [
        "refined",
        "judged <i>",
        "6",
        "0",
        "0",
    ]
    dialog.get_by_text("Close").click()
    with tab.expect_download() as download:
        tab.locator("#save").click()
    saved = tmp_path / "votes.json"
    download.value.save_as(saved)
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert len(content["votes"]) == 6 and content["notes"] == {"00001": "too few"}

    with browser.new_context() as elsewhere:
        other = elsewhere.new_page()
        other.goto(page.as_uri())
        other.locator("#load").set_input_files(saved)
        other.wait_for_function(
            "document.getElementById('message').textContent.startsWith('6 votes')"
        )
        assert other.locator("textarea").nth(1).input_value() == "too few"
        saved.write_text(json.dumps(content | {"review": "another"}), encoding="utf-8")
        other.locator("#load").set_input_files(saved)
        other.wait_for_function(
            "document.getElementById('message').textContent.includes('another review')"
        )


def test_notes_survive_a_reload(tab):
    tab.locator("textarea").first.fill("good")
    tab.reload()
    assert tab.locator("textarea").first.input_value() == "good"


def test_on_a_phone_and_in_the_dark(browser, page):
    with browser.new_context(
        viewport={"width": 375, "height": 800}, color_scheme="dark"
    ) as context:
        tab = context.new_page()
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
        assert tab.locator(".cell .name").first.is_visible()
        tab.locator("#vote-blind").click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375
