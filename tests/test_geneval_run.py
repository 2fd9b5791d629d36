"""`geneval/run.py` on the shipped shapes base: its figures, kills, processes, mistakes, and its
page in a browser.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, WIDTH, open_browser, phone_in_the_dark
from helpers import folder_content, tiny_llamagen, tiny_vq
from PIL import Image, ImageColor
from programs import (
    assert_two_do_what_one_does,
    numbers,
    program,
    result_rows,
    results,
    start_and_kill,
)

import geneval
import t2i
from geneval import detectors, run
from geneval.detector import Detections
from geneval.geneval_benchmark import draw_masks
from geneval.object_names import OBJECT_NAMES
from geneval.prompts import metadata_line, official_prompts
from geneval.rules import COLORS, Verdict
from t2i.charts import TINTS
from t2i.checkpoint import save_pretrained
from t2i.evaluation import draw, places
from t2i.imaging import save_png
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import benchmark_prompts

SMALL = (
    "--limit",
    "6",
    "--samples",
    "2",
    "--batch-size",
    "8",
)  # two batches, the last one not full


@pytest.fixture(scope="session")
def finished(shapes_ckpt, tmp_path_factory):
    """An uninterrupted run of one process: 6 of the 120 prompts, 2 images each."""
    out = tmp_path_factory.mktemp("finished") / "out"
    program(run, "--ckpt", shapes_ckpt, "--out", out, *SMALL)
    return out


def test_results_explain_themselves(finished, shapes_ckpt):
    content = results(finished)
    assert content["status"] == "PARTIAL: 6 of 120 prompts"
    assert content["label"].startswith("shapes prompts, judged by shapes")
    # 18 of the shapes prompts, say, are 17 in the table, since two are equal.
    assert "entries that are equal are one prompt" in content["legend"]
    tags = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert list(content["scores"]) == ["overall", *tags, "correct images", "correct prompts"]
    scores = [content["scores"][tag]["mean"] for tag in tags]
    assert content["scores"]["overall"]["mean"] == pytest.approx(sum(scores) / 6)
    assert 0 < content["scores"]["overall"]["mean"] < 1, "the base draws some of them"
    generation = content["generation"]
    assert generation["seed"] == 0 and generation["sampling"]["cfg_scale"] == 2.5
    assert {len(v) for v in generation["weights"].values()} == {64}
    assert generation["about"]["checkpoint"] == str(shapes_ckpt)
    assert content["judge"]["detector"]["name"] == "shapes" and "torch" in content["versions"]
    rows = result_rows(finished)
    assert len(rows) == 12 and rows[0]["filename"] == "00000/samples/00000.png"


def test_the_library_gives_the_same_verdicts(finished):
    rows = result_rows(finished)
    images = [Image.open(finished / "images" / row["filename"]).convert("RGB") for row in rows]
    metadata = [json.loads(row["metadata"]) for row in rows[::2]]
    report = geneval.score(images, metadata, ShapesDetector())
    assert [v.correct for v in report.verdicts] == [row["correct"] for row in rows]
    assert report.summary.overall == results(finished)["scores"]["overall"]["mean"]


def test_a_folder_of_images_gives_the_same_numbers(finished, tmp_path):
    images = finished / "images"
    program(run, "--images", images, "--out", tmp_path / "out", "--limit", "6", "--samples", "2")
    assert numbers(tmp_path / "out") == numbers(finished)
    kept = {
        name: data
        for name, data in folder_content(finished).items()
        if not name.startswith("images/")
    }
    kept.pop("results.json"), kept.pop("report.md")  # these two contain the name of the folder
    assert {name: folder_content(tmp_path / "out")[name] for name in kept} == kept


@pytest.mark.slow
def test_a_killed_run_completes_with_the_same_result_and_repeats_nothing(
    finished, shapes_ckpt, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    drawn = start_and_kill(run, out, "--ckpt", shapes_ckpt, *SMALL)
    assert 2 <= len(drawn) < 12 and not (out / "results.json").exists()
    written = []
    write = places.save_png
    monkeypatch.setattr(places, "save_png", lambda *args: written.append(write(*args)))
    program(run, "--ckpt", shapes_ckpt, "--out", out, *SMALL)
    assert len(written) == 12 - len(drawn) and not set(written) & set(drawn)
    assert {p: p.stat().st_mtime_ns for p in drawn} == drawn
    monkeypatch.setattr(draw, "draw_images", None)  # nothing is drawn any more
    program(run, "--ckpt", shapes_ckpt, "--out", out, *SMALL)
    assert folder_content(out) == folder_content(finished)


@pytest.mark.slow
def test_two_processes_give_the_same_as_one(finished, shapes_ckpt, tmp_path):
    assert_two_do_what_one_does(run, finished, tmp_path / "out", "--ckpt", shapes_ckpt, *SMALL)


def test_a_base_is_judged(tmp_path):
    """Case 25: a shipped base can be evaluated from the command line."""
    out = tmp_path / "out"
    program(run, "--ckpt", "shapes", "--limit", 1, "--samples", 1, "--out", out)
    content = results(out)
    assert content["label"].startswith("shapes prompts, judged by shapes")
    assert content["generation"]["about"]["backbone"]["weights"] == "shapes"


def test_own_prompts_of_a_shapes_model_are_judged_exactly(tmp_path):
    """They used to need Mask2Former, which was not trained on drawings of shapes."""
    (prompts := tmp_path / "own.jsonl").write_text(metadata_line(benchmark_prompts()[0]))
    program(run, "--ckpt", "shapes", "--prompts", prompts, "--samples", 1, "--out", tmp_path / "o")
    assert "own.jsonl prompts, judged by shapes (" in results(tmp_path / "o")["label"]


# -- mistakes --------------------------------------------------------------------------------------
def test_other_settings_are_refused(refusal, finished, shapes_ckpt):
    before = folder_content(finished)

    def message(*arguments) -> str:
        return refusal("--ckpt", shapes_ckpt, "--out", finished, *SMALL, *arguments)

    assert "drawn with other settings (seed 0 there, 1 now)" in message("--seed", 1)
    text = message("--cfg-scale", 3, "--dtype", "bfloat16")
    assert "sampling.cfg_scale 2.5 there, 3" in text and "dtype 'float32' there, 'bfloat16'" in text
    images = finished / "images"
    assert f"holds the results of {images}" not in refusal("--images", images, "--out", finished)
    assert folder_content(finished) == before


def test_a_repaired_folder_continues(finished, shapes_ckpt, tmp_path, caplog):
    out = tmp_path / "out"
    for name, data in folder_content(finished).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    path = next(out.glob("images/*/samples/*.png"))
    os.truncate(path, 100)
    program(run, "--ckpt", shapes_ckpt, "--out", out, *SMALL)
    assert f"{path} is not a readable image" in caplog.text and "drawing it again" in caplog.text
    assert folder_content(out) == folder_content(finished)


class SeesOneBench:
    """Replaces the photo detector, whose weights would have to be downloaded."""

    classes, colors = OBJECT_NAMES, COLORS

    def detect(self, image):
        return {"bench": Detections([[1, 1, 9, 9]], [0.95])}

    def classify_colors(self, image, class_name, detections):
        return ["red"] * len(detections)

    def identity(self):
        return {"name": "mask2former", "official": True, "libraries": {}}


def test_photos_are_judged_on_the_official_prompts(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        detectors, "load_detector", lambda name, **options: asked.append(name) or SeesOneBench()
    )
    entries = official_prompts()
    for index in (0, 184, 368):  # an even sample of three
        folder = tmp_path / f"images/{index:05}"
        save_png(Image.new("RGB", (16, 16)), folder / "samples/00000.png")
        (folder / "metadata.jsonl").write_text(metadata_line(entries[index]))
    limits = ("--limit", "3", "--samples", "1")
    program(run, "--images", tmp_path / "images", "--out", tmp_path / "out", *limits)
    content = results(tmp_path / "out")
    assert content["status"].startswith("PARTIAL: 3 of 553 prompts")
    assert content["label"] == "official prompts, judged by mask2former" and asked == [
        "mask2former"
    ]
    rows = result_rows(tmp_path / "out")
    assert [row["prompt"] for row in rows] == [entries[i]["prompt"] for i in (0, 184, 368)]
    assert [row["correct"] for row in rows] == [True, False, False]


def test_mistakes_are_reported(refusal, finished, shapes_ckpt, tiny_world, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "give either --ckpt" in refusal(*out)
    assert "give either --ckpt" in refusal("--ckpt", "a", "--images", "b", *out)
    assert "nowhere does not exist" in refusal("--ckpt", tmp_path / "nowhere", *out)
    drawn = ("--images", finished / "images", "--cfg-scale", 5, "--seed", 7, "--base.family", "rar")
    named = "--base.family, --seed, --cfg-scale: only for a model that draws"
    assert named in refusal(*drawn, *out), "these options used to be ignored silently"
    assert "nowhere does not exist" in refusal(
        "--images", tmp_path / "nowhere", "--prompts", "shapes", *out
    )
    assert "is not a complete checkpoint folder" in refusal("--ckpt", tiny_world / "data", *out)
    assert "--detector-weights" in refusal("--ckpt", shapes_ckpt, *out, "--detector-weight", "x")
    prompts = tmp_path / "prompts.jsonl"
    for line, message in (
        ('{"prompt": "a cat"}', "prompt 0 is {'prompt': 'a cat'}, which is not GenEval metadata"),
        ('{"prompt": "a cat", "tag": "colors", "include": [{"class": "cat"}]}', "is not GenEval"),
        (
            '{"prompt": "a cat", "tag": "colors", "include": [{"class": "cat", "count": 1}]}',
            "the detector does not know 'cat'",
        ),
        ("{", "prompts.jsonl line 1 is not JSON"),
    ):
        prompts.write_text(line + "\n")
        asked = ("--prompts", prompts, "--detector", "shapes", *out)
        assert message in refusal("--ckpt", shapes_ckpt, *asked)
    # Before a detector is loaded, whose weights are not there.
    official = ("--images", finished / "images", "--detector-weights", tmp_path / "nowhere")
    assert "00000 holds images of" in refusal(*official, "--prompts", "official", *out)
    prompts.write_text('{"prompt": "a cat"}')
    assert "is not GenEval metadata" in refusal(*official, "--prompts", prompts, *out)
    assert not any((tmp_path / "out").glob("[!.]*"))


def test_a_model_of_classes_is_refused(refusal, tmp_path):
    backbone = tiny_llamagen("class")
    weights = {"weights": "gpt.pt", "tokenizer": "vq.pt"}
    content = {"family": "llamagen", **weights, "config": vars(backbone.config)}
    (tmp_path / "config.json").write_text(json.dumps(content))
    torch.save({"model": backbone.official_state_dict()}, tmp_path / "gpt.pt")
    torch.save(tiny_vq().state_dict(), tmp_path / "vq.pt")
    model = t2i.attach(t2i.load_backbone("llamagen", tmp_path), t2i.presets.base())
    save_pretrained(model, tmp_path / "ckpt", tuning="codec")
    shapes = ("--prompts", "shapes", "--out", tmp_path / "out")
    # Before a detector is loaded, whose weights are not there.
    official = ("--detector", "mask2former", "--detector-weights", tmp_path / "nowhere")
    assert "draws classes" in refusal("--ckpt", tmp_path / "ckpt", *shapes, *official)


def test_images_without_a_record_are_not_completed(refusal, finished, shapes_ckpt, tmp_path):
    save_png(Image.new("RGB", (64, 64)), tmp_path / "out/images/00000/samples/00000.png")
    text = refusal("--ckpt", shapes_ckpt, "--out", tmp_path / "out", *SMALL)
    assert "holds files without generation.json" in text


def test_compare_prints_paired_differences(finished, tmp_path, capsys):
    program(
        run, "--images", finished / "images", "--out", tmp_path / "b", "--limit", 6, "--samples", 2
    )
    capsys.readouterr()
    program(run, "compare", finished, tmp_path / "b")
    printed = capsys.readouterr().out
    assert "| **overall** |" in printed and "+0.000" in printed and "**A: PARTIAL" in printed
    assert printed.count("| 1 |") == 6, "one prompt of each task"


# -- the page --------------------------------------------------------------------------------------
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_gallery_works_in_a_browser(finished, tmp_path):
    failed = [row for row in result_rows(finished) if not row["correct"]]
    gallery = tmp_path / "moved"
    (finished / "gallery").rename(gallery)  # the gallery must not need files outside it
    try:
        with open_browser(tmp_path / "profile") as page:
            page.open(gallery / "index.html")
            drive(page, failed, tmp_path)
            assert page.errors == []
    finally:
        gallery.rename(finished / "gallery")


def drive(page, failed: list[dict], tmp_path: Path) -> None:
    visible = "[...document.querySelectorAll('section article')].filter(a => a.offsetParent).length"
    assert page.run(visible) == len(failed) > 0
    assert "PARTIAL: 6 of 120 prompts" in page.run("document.body.innerText")
    pictures = "[...document.querySelectorAll('section img')]"
    page.run(f"{pictures}.forEach(i => {{ i.loading = 'eager' }})")
    page.wait(f"{pictures}.every(i => i.complete && i.naturalWidth == 64)")
    first = page.run("document.querySelector('article').innerText")
    assert failed[0]["prompt"] in first and failed[0]["reason"].split("\n")[0] in first

    boxed = "[...document.querySelectorAll('.box')].filter(b => b.offsetParent).length"
    boxes = sum(len(b) for row in failed for b in json.loads(row["details"]).values())
    assert page.run(boxed) == boxes > 0
    page.run("document.getElementById('boxes').click()")
    assert page.run(boxed) == 0
    page.press("b")
    assert page.run(boxed) == boxes

    tag = failed[-1]["tag"]
    page.run(f"document.querySelector('.chip[data-task={tag}]').click()")
    page.wait(f"document.querySelector('.chip.on').dataset.task == '{tag}'")
    assert page.run(visible) == sum(row["tag"] == tag for row in failed)
    search = "document.getElementById('search')"
    page.press("/")
    assert page.run(f"document.activeElement == {search}")
    page.run(f"{search}.value = 'no such thing'; {search}.dispatchEvent(new Event('input'))")
    assert page.run(visible) == 0 and page.run(
        "document.getElementById('nothing').offsetParent != null"
    )
    page.run("location.hash = '#'")
    page.wait(f"{visible} == {len(failed)}")

    before = page.screenshot(tmp_path / "page.png")
    page.run("document.querySelector('article').click()")
    assert page.run("document.getElementById('zoom').open")
    page.press("ArrowRight")
    assert failed[1]["filename"] in page.run("document.getElementById('zoom').innerText")
    assert page.screenshot(tmp_path / "zoom.png").read_bytes() != before.read_bytes()
    page.run("document.querySelector('#zoom article').click()")
    assert not page.run("document.getElementById('zoom').open")
    with phone_in_the_dark(page):
        page.run("document.querySelector('article').click()")
        assert page.run(WIDTH) <= 375


def test_shapes_prompts_are_those_of_the_quickstart():
    from geneval.geneval_benchmark import load_prompts

    assert load_prompts("shapes") == benchmark_prompts(seed=0, per_tag=20)


def test_masks_of_a_failure():
    """Hatched, in the colors of their classes; the most confident is on top."""
    masks = np.zeros((2, 20, 40), bool)
    masks[0, :, :20] = masks[1, :, 10:] = True
    boxes = np.array([[0, 0, 20, 20], [10, 0, 40, 20]])
    found = {
        "cat": Detections(boxes[:1], np.array([0.4]), masks[:1]),
        "dog": Detections(boxes[1:], np.array([0.9]), masks[1:]),
    }
    verdict = Verdict(False, "", {}, {"cat": [0], "dog": [0]})
    overlay = draw_masks((40, 20), found, verdict)
    assert overlay.size == (40, 20) and overlay.info["transparency"] == 0
    label_HW = np.asarray(overlay)
    shown = label_HW > 0
    assert shown.mean() == 0.25, "one of four diagonals"
    assert set(label_HW[:, :10][shown[:, :10]]) == {1} and set(label_HW[:, 10:][shown[:, 10:]]) == {
        2
    }
    colors = np.asarray(overlay.convert("RGB"))
    assert {tuple(c) for c in colors[:, :10][shown[:, :10]]} == {ImageColor.getrgb(TINTS[0])}
    assert {tuple(c) for c in colors[:, 10:][shown[:, 10:]]} == {ImageColor.getrgb(TINTS[1])}
    bare = {name: Detections(of.boxes, of.scores) for name, of in found.items()}
    assert draw_masks((40, 20), bare, verdict) is None
