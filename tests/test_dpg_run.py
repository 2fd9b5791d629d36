"""`dpg_bench/run.py` on the shipped shapes base: both scores, kills, processes, grids, mistakes,
and its page in a browser.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from browser import CHROMIUM, open_browser
from helpers import folder_content
from PIL import Image
from programs import (
    assert_two_do_what_one_does,
    numbers,
    program,
    result_rows,
    results,
    start_and_kill,
)

from dpg_bench import image_files, run
from dpg_bench.answerers import answer_prompt, load_answerer
from dpg_bench.dpg_benchmark import DPGBench
from dpg_bench.questions import QuestionGraph
from dpg_bench.score import format_scores, score
from t2i.evaluation import draw, judging
from t2i.evaluation.evaluation_options import Scope
from t2i.evaluation.generation_folder import load_image, sample_file, write_prompt
from t2i.evaluation.results import table
from t2i.evaluation.runner import evaluate
from t2i.imaging import save_png
from t2i.shapes.shapes_questions import PATH, shapes_questions

FEW = ("--limit", "4", "--samples", "2")
# Two batches, the last one not full; a temperature at which the base makes mistakes.
SMALL = (*FEW, "--batch-size", "5", "--temperature", "3")


@pytest.fixture(scope="session")
def drawn(shapes_ckpt, tmp_path_factory):
    """An uninterrupted run of one process: 4 of the 60 prompts, 2 images each."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    program(run, "--ckpt", shapes_ckpt, "--out", out, *SMALL)
    return out


@pytest.fixture
def folder(drawn, tmp_path):
    """The drawn images, as four images each of two prompts in the common layout."""
    images = [load_image(drawn / "images" / row["filename"]) for row in result_rows(drawn)]
    entries = DPGBench(shapes_questions(), load_answerer("shapes")).entries
    for place, index in enumerate(Scope(limit=2).select(60)):
        write_prompt(tmp_path / "folder", index, entries[index])
        for sample in range(4):
            save_png(images[4 * place + sample], tmp_path / "folder" / sample_file(index, sample))
    return tmp_path / "folder"


@pytest.fixture
def grids(folder, tmp_path):
    """The same images in the official layout: one grid per prompt."""
    for path in folder.iterdir():
        images = [load_image(p) for p in sorted(path.glob("samples/*.png"))]
        grid = Image.new("RGB", (128, 128))
        for place, image in enumerate(images):
            grid.paste(image, (place % 2 * 64, place // 2 * 64))
        save_png(grid, tmp_path / "grids" / f"{item_of(path)}.png")
    return tmp_path / "grids"


def item_of(prompt_folder) -> str:
    return json.loads((prompt_folder / "metadata.jsonl").read_text())["item_id"]


# -- numbers ---------------------------------------------------------------------------------------
def test_results_show_both_ways_to_count_and_the_judge(drawn):
    content = results(drawn)
    assert content["status"] == "PARTIAL: 4 of 60 prompts"
    assert content["label"] == "shapes questions, judged by shapes (not the official judge)"
    assert content["judge"]["answers"]["judge"] == "shapes"
    ways = ("official", "corrected")
    assert [k for k, s in content["scores"].items() if s["headline"]] == [
        f"overall ({w})" for w in ways
    ]
    names = {"attribute", "attribute - color", "entity", "global -", "other - count"}
    assert {f"{n} ({w})" for n in names for w in ways} <= set(content["scores"])
    corrected, official = (content["scores"][f"entity ({w})"] for w in ("corrected", "official"))
    assert (corrected["images"], official["images"]) == (8, 3), (
        "the first prompt's image is dropped"
    )
    text = (drawn / "report.md").read_text()
    head = f"| DPG-Bench: {content['label']} | official | ± | images | prompts | corrected |"
    assert head in text and content["legend"] in text and "PARTIAL" in text
    row = result_rows(drawn)[-1]
    assert row["filename"] == "00045/samples/00001.png"
    assert row["corrected"] == sum(q["passed"] for q in row["questions"]) / len(row["questions"])


def test_the_library_gives_the_same_scores(drawn):
    graph, judge = shapes_questions(), load_answerer("shapes")
    answers = {}
    for path in sorted((drawn / "images").glob("0*")):
        images = [load_image(p) for p in sorted(path.glob("samples/*.png"))]
        answers[item_of(path)] = answer_prompt(judge, images, graph.items[item_of(path)])
    report = score(graph, answers, images_per_prompt=2)
    scores = results(drawn)["scores"]
    for way in ("official", "corrected"):
        overall = getattr(report, way).overall
        assert scores[f"overall ({way})"]["mean"] == overall.mean
        assert scores[f"overall ({way})"]["stderr"] == overall.stderr > 0
    assert 0 < scores["overall (corrected)"]["mean"] < 100, "the base draws some of them"
    lines = format_scores(report, "shapes").splitlines()
    assert lines[2:-4] == table(results(drawn)).splitlines()[4 : 4 + len(lines[2:-4])]


@pytest.mark.slow
def test_a_killed_run_completes_with_the_same_result_and_repeats_nothing(
    drawn, shapes_ckpt, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    before = start_and_kill(run, out, "--ckpt", shapes_ckpt, *SMALL)
    assert 2 <= len(before) < 8 and not (out / "results.json").exists()
    asked = []
    answer = judging._answer
    monkeypatch.setattr(judging, "_answer", lambda *a: asked.append(a[3]) or answer(*a))
    program(run, "--ckpt", shapes_ckpt, "--out", out, *SMALL)
    assert {p: p.stat().st_mtime_ns for p in before} == before and len(asked) == 8
    monkeypatch.setattr(draw, "draw_images", None)  # nothing is drawn any more
    program(run, "--ckpt", shapes_ckpt, "--out", out, *SMALL)
    assert len(asked) == 8, "nothing is judged again"
    assert folder_content(out) == folder_content(drawn)


@pytest.mark.slow
def test_two_processes_give_the_same_as_one(drawn, shapes_ckpt, tmp_path):
    assert_two_do_what_one_does(run, drawn, tmp_path / "out", "--ckpt", shapes_ckpt, *SMALL)


# -- folders of images -----------------------------------------------------------------------------
def test_a_folder_of_images_gives_the_same_numbers(drawn, tmp_path):
    program(run, "--images", drawn / "images", "--out", tmp_path / "out", *FEW)
    assert numbers(tmp_path / "out") == numbers(drawn)
    assert result_rows(tmp_path / "out") == result_rows(drawn)


def test_grids_and_single_files_give_the_same_numbers(folder, grids, tmp_path, monkeypatch, caplog):
    for path in folder.iterdir():
        for sample in range(4):
            (tmp_path / "single").mkdir(exist_ok=True)
            source = path / "samples" / f"{sample:05d}.png"
            shutil.copy(source, tmp_path / "single" / f"{item_of(path)}_{sample}.png")
    arguments = ("--questions", "shapes", "--limit", 2)
    program(run, "--images", folder, "--out", tmp_path / "a", *arguments)
    program(run, "--images", tmp_path / "single", "--out", tmp_path / "b", *arguments)
    (grids / "notes.txt").write_text("mine")
    of_grids = ("--images", grids, "--out", tmp_path / "c", "--resolution", 64, *arguments)
    program(run, *of_grids)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") == numbers(tmp_path / "c")
    assert result_rows(tmp_path / "a") == result_rows(tmp_path / "c")
    assert results(tmp_path / "c")["coverage"]["judged"] == 8
    assert "names that are not read: notes.txt" in caplog.text
    before = folder_content(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "save_png", None)  # nothing is copied again
        program(run, *of_grids)
    assert folder_content(tmp_path / "c") == before
    Image.new("RGB", (128, 128)).save(grids / "single_object0.png")
    program(run, *of_grids)
    changed = {n for n, data in folder_content(tmp_path / "c").items() if before.get(n) != data}
    assert {sample_file(0, s) for s in range(4)} <= {n.removeprefix("images/") for n in changed}
    assert not any("images/00030" in name for name in changed)


def test_one_image_per_prompt_is_reported(grids, tmp_path, refusal):
    images = ("--images", grids, "--questions", "shapes", "--limit", 2, "--out", tmp_path / "out")
    text = refusal(*images)
    assert "single_object0.png (128 x 128 px) may be one image (then use --samples 1)" in text
    assert "--resolution 64" in text
    program(run, *images, "--samples", 1)
    assert results(tmp_path / "out")["coverage"]["judged"] == 2
    assert load_image(tmp_path / "out/images/00000/samples/00000.png").size == (128, 128)


def test_images_of_another_format_are_refused(grids, tmp_path, refusal, caplog):
    """The message used to ask for GenEval's layout, which was not what the user meant."""
    for path in grids.iterdir():
        path.rename(path.with_suffix(".jpg"))
    some = ("--questions", "shapes", "--limit", 2, "--resolution", 64, "--out", tmp_path / "out")
    text = refusal("--images", grids, *some)
    assert "none of the 2 expected images (single_object0.png ...)" in text
    assert "names that are not read" in caplog.text and "single_object0.jpg" in caplog.text


def test_mistakes_in_flat_files(grids, tmp_path, refusal, caplog):
    some = ("--images", grids, "--questions", "shapes", "--limit", 2)
    grid = (*some, "--resolution", 64, "--out", tmp_path / "out")
    assert "holds images of 64 px, not of 32 px" in refusal(*grid[:-3], 32, *grid[-2:])
    assert "--resolution is only for grids" in refusal("--ckpt", "shapes", "--resolution", 32)
    assert "4 images, not --samples 5" in refusal(*grid, "--samples", 5)
    shutil.copy(grids / "single_object0.png", grids / "single_object0_1.png")
    assert "single_object0_1.png is next to single_object0.png" in refusal(*grid)
    (grids / "single_object0_1.png").unlink()
    path = grids / "single_object0.png"
    whole = path.read_bytes()
    path.unlink()
    assert "1 of 2 images are missing: single_object0.png" in refusal(*grid)
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} is not a readable image" in refusal(*grid)
    assert not (tmp_path / "out" / "results.json").exists()
    program(run, *grid, "--allow-incomplete")
    assert "single_object0.png is not a readable image" in caplog.text
    content = results(tmp_path / "out")
    assert (
        content["status"]
        == "PARTIAL: 2 of 60 prompts; INCOMPLETE: 4 of 8 images (4 missing, 0 unreadable)"
    )
    path.write_bytes(whole)
    program(run, *grid)
    assert results(tmp_path / "out")["status"] == "PARTIAL: 2 of 60 prompts"
    shutil.rmtree(tmp_path / "out" / "images")  # the copies; they were said to be missing
    program(run, *grid)
    path.unlink()
    path.mkdir()
    assert "1 of 2 images are missing: single_object0.png" in refusal(*grid)
    path.rmdir()
    path.write_bytes(whole)
    other = tmp_path / "other"
    grids.rename(other)
    assert f"holds the images of {grids}" in refusal("--images", other, *grid[2:])
    (tmp_path / "out" / "source.json").write_text("{}")
    assert "holds the images of unknown origin" in refusal("--images", other, *grid[2:])


def test_mistakes_in_folders(folder, tmp_path, refusal):
    some = ("--images", folder, "--questions", "shapes", "--limit", 2, "--out", tmp_path / "out")
    path = folder / sample_file(0, 1)
    os.truncate(path, 100)
    assert "1 of 8 images cannot be judged" in refusal(*some)
    path.unlink()
    text = refusal(*some)
    assert "1 of 8 images are missing: 00000/samples/00001.png" in text
    assert not (tmp_path / "out" / "results.json").exists()
    program(run, *some, "--allow-incomplete")
    assert "INCOMPLETE: 7 of 8 images" in (tmp_path / "out" / "report.md").read_text()


def test_drawn_images_are_not_mixed_with_copied_ones(drawn, grids, shapes_ckpt, tmp_path, refusal):
    out = shutil.copytree(drawn, tmp_path / "out")
    some = ("--questions", "shapes", "--limit", 2, "--out", out)
    text = refusal("--images", grids, "--resolution", 64, *some)
    assert "holds drawn images; give another --out" in text
    program(run, "--images", grids, "--resolution", 64, *some[:-1], tmp_path / "new")
    text = refusal("--ckpt", shapes_ckpt, *some[:-1], tmp_path / "new")
    assert "holds files without generation.json" in text


# -- questions -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("entity - whole (ring)", "entity - hole (ring)", "line 2 (item single_object0, proposition 1): unknown category"),
        ("ring,2,0,", "ring,2,7,", "line 3 (item single_object0, proposition 2): depends on 7"),
        ("ring,2,0,", "ring,2,2,", "line 3 (item single_object0, proposition 2): depends on itself"),
        ("global - (plain background)", "global - (blue sky)", "line 4 (item single_object0, proposition 3)"),
    ],
)  # fmt: skip
def test_a_bad_row_is_reported_before_drawing(old, new, message, shapes_ckpt, tmp_path, refusal):
    path = tmp_path / "questions.csv"
    path.write_text(PATH.read_text().replace(old, new, 1))
    out = tmp_path / "out"
    assert message in refusal("--ckpt", shapes_ckpt, "--questions", path, "--out", out, *SMALL)
    assert not (out / "images").exists()


def test_more_mistakes(drawn, tmp_path, refusal, monkeypatch):
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    out = ("--out", tmp_path / "out")
    assert "--questions PATH" in refusal("--images", tmp_path, *out)
    shapes = ("--questions", "shapes", *out)
    assert "does not exist" in refusal("--images", tmp_path / "nowhere", *shapes)
    weights = ("--judge", "mplug", "--judge-weights", tmp_path / "nowhere")
    assert "is neither a local folder nor a model" in refusal(
        "--images", drawn / "images", *shapes, *weights, *FEW
    )
    assert "give either --ckpt" in refusal(*shapes)


def test_a_missing_judge_is_reported_before_images_are_copied(grids, tmp_path, refusal):
    """And wrong file names are reported before a judge is loaded."""
    some = ("--images", grids, "--questions", "shapes", "--limit", 2, "--resolution", 64)
    out = tmp_path / "out"
    some += ("--out", out, "--judge", "mplug", "--judge-weights", tmp_path / "nowhere")
    assert "is neither a local folder nor a model" in refusal(*some)
    assert not out.exists()
    (grids / "single_object0.png").unlink()
    assert "1 of 2 images are missing: single_object0.png" in refusal(*some)


def test_changed_questions_are_asked_again(drawn, tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text(PATH.read_text().replace("single_object0,a photo of a ring,ring,3", "single_object0,a photo of a ring,ring,4"))  # fmt: skip
    out = shutil.copytree(drawn, tmp_path / "out")
    some = ("--images", out / "images", "--questions", path, "--judge", "shapes", "--out", out)
    program(run, *some, *FEW)
    assert len(list(out.glob("verdicts/*"))) == 2
    assert [q["proposition"] for q in result_rows(out)[0]["questions"]] == [1, 2, 4]


def test_the_official_judge_answers_any_questions(drawn, tmp_path, capsys):
    weights = Path(__file__).parent / "golden" / "dpg_mplug" / "no_visn_fc"  # tiny, random
    some = ("--images", drawn / "images", "--questions", PATH, "--judge", "mplug")
    program(run, *some, "--judge-weights", weights, "--out", tmp_path / "out", *FEW)
    assert f"DPG-Bench: {PATH} questions, judged by mplug |" in capsys.readouterr().out
    judge = load_answerer("mplug", weights)
    row = result_rows(tmp_path / "out")[0]
    questions = shapes_questions().items[row["item_id"]]
    image = load_image(drawn / "images" / row["filename"])
    assert [q["answer"] for q in row["questions"]] == judge.answer(image, questions)
    assert set(results(tmp_path / "out")["judge"]["answers"]["sha256"]) > {"pytorch_model.bin"}


# -- comparison ------------------------------------------------------------------------------------
class YesMan:
    """A judge that says yes to everything, or no to everything."""

    def __init__(self, says="yes", name="yes-man"):
        self.says, self.name = says, name

    def identity(self):
        return {"judge": self.name, "weights": "none/at-all"}

    def answer(self, image, questions):
        return [self.says] * len(questions)


def test_compare_prints_paired_differences_of_one_judge(drawn, tmp_path, capsys, refusal):
    program(run, "--images", drawn / "images", "--out", tmp_path / "b", *FEW)
    capsys.readouterr()
    program(run, "compare", drawn, tmp_path / "b")
    printed = capsys.readouterr().out
    for way in ("official", "corrected"):
        (line,) = (x for x in printed.splitlines() if x.startswith(f"| **overall ({way})** |"))
        mean = f"{results(drawn)['scores'][f'overall ({way})']['mean']:.2f}"
        assert line.startswith(f"| **overall ({way})** | {mean} | {mean} | +0.00 | 0.00 |")
    assert "| attribute - color (corrected) |" in printed and "**A: PARTIAL" in printed
    assert "| **overall** |" not in printed, "the mean over categories is not a DPG-Bench score"
    assert "judged by shapes" in printed
    scope = Scope(samples=2, limit=4)
    bench = DPGBench(shapes_questions(), YesMan(), questions="shapes")
    evaluate(bench, tmp_path / "c", images=drawn / "images", scope=scope)
    text = refusal("compare", drawn, tmp_path / "c")
    assert "judged differently" in text and "yes-man" in text and "ShapesDetector" in text


def test_the_same_weights_are_the_same_judge_wherever_they_are():
    def identity(weights):
        judge = YesMan()
        judge.identity = lambda: {"judge": "mplug", "weights": weights, "sha256": {"a": "1"}}
        return DPGBench(shapes_questions(), judge).identity()

    assert identity("here") == identity("there")
    bench = DPGBench(shapes_questions(), YesMan(), questions="shapes")
    assert bench.identity()["answers"]["weights"] == "none/at-all"
    label = "shapes questions, judged by yes-man (none/at-all, not the official judge)"
    assert bench.label == label


# -- the page --------------------------------------------------------------------------------------
def row_of(answers: dict[int, str], item="dense0") -> dict:
    """A row about an item's image; questions not in `answers` are answered yes."""
    graph = shapes_questions()
    small = QuestionGraph(tuple(graph.items[item]), blob="")
    judge = YesMan()
    judge.answer = lambda image, questions: [answers.get(q.proposition, "yes") for q in questions]
    return DPGBench(small, judge).judge(0, Image.new("RGB", (8, 8)), "0.png").row


def test_a_card_shows_failed_questions_with_what_they_depend_on():
    bench = DPGBench(shapes_questions(), load_answerer("shapes"))
    assert bench.card(row_of({})) is None
    row = row_of({1: "no"})
    asked = {q["proposition"]: q for q in row["questions"]}
    relation = next(q for q in row["questions"] if q["category"] == "relation - spatial")
    assert [asked[1]["passed"], asked[2]["passed"], relation["passed"]] == [False, False, False]
    card = bench.card(row)
    assert card.tags == ["attribute", "entity", "relation"]
    assert card.note == "dense0: 4 of 7 questions passed" and card.title == row["prompt"]
    entity, color, spatial = card.reasons
    arrow = " →\N{NO-BREAK SPACE}"
    assert entity == f"{asked[1]['question']}{arrow}no"
    lines = [f"{asked[2]['question']}{arrow}yes (void)", f"depends on: {entity}"]
    assert color.split("\n") == lines
    parents = [f"depends on: {asked[2]['question']}{arrow}yes (void)"]
    parents.append(f"depends on: {asked[4]['question']}{arrow}yes")
    assert spatial.split("\n") == [f"{relation['question']}{arrow}yes (void)", *parents]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_gallery_works_in_a_browser(drawn, tmp_path):
    failed = [row for row in result_rows(drawn) if row["corrected"] < 1]
    cards = "[...document.querySelectorAll('section article')].filter(a => a.offsetParent)"
    with open_browser(tmp_path / "profile") as page:
        page.open(drawn / "gallery" / "index.html")
        assert page.run(f"{cards}.length") == len(failed) > 0
        text = page.run("document.body.innerText")
        assert "Official" in text and "Corrected" in text and "judged by shapes" in text
        assert page.run("document.querySelectorAll('.headline .bar').length") == 2
        assert page.run("document.querySelector('.tools label') == null"), "there are no boxes"
        first = page.run(f"{cards}[0].innerText")
        wrong = [q for q in failed[0]["questions"] if not q["passed"]]
        assert all(q["question"] in first for q in wrong) and failed[0]["item_id"] in first

        of_entity = [
            row
            for row in failed
            if any(q["category"] == "entity - whole" and not q["passed"] for q in row["questions"])
        ]
        page.run("[...document.querySelectorAll('.scores a')].find(a => a.innerText == 'Entity').click()")  # fmt: skip
        page.wait(f"{cards}.length == {len(of_entity)}")
        assert page.run("document.querySelector('.chip.on').dataset.task") == "entity"
        page.run(f"{cards}[0].click()")
        assert of_entity[0]["filename"] in page.run("document.getElementById('zoom').innerText")
        assert page.errors == []
