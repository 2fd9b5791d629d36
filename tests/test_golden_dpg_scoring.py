"""DPG-Bench's scores and grid crops against the official script's."""

import hashlib
import json
import os

import pytest
from helpers import GOLDEN_ROOT
from PIL import Image

from dpg_bench.image_files import crop_grid, split_grid
from dpg_bench.questions import COLUMNS, read_questions
from dpg_bench.score import format_scores, score

FOLDERS = {
    path.parent: config
    for path in sorted(GOLDEN_ROOT.rglob("config.json"))
    if "pic_num" in (config := json.loads(path.read_text(encoding="utf-8")))
}
assert FOLDERS or "T2I_GOLDEN" in os.environ, f"no DPG-Bench case under {GOLDEN_ROOT}"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(
    params=[
        pytest.param((folder, name, config), id=name)
        for folder, config in FOLDERS.items()
        for name in config["cases"]
    ]
)
def case(request):
    """(questions, answers, expected, images per prompt, what the official script printed)."""
    folder, name, config = request.param
    return (
        read_questions(folder / f"{name}.questions.csv"),
        read(folder / f"{name}.answers.json"),
        read(folder / f"{name}.expected.json"),
        config["pic_num"],
        (folder / f"{name}.official_summary.txt").read_text(encoding="utf-8"),
    )


def assert_equal(summary, expected):
    assert summary.overall.mean == pytest.approx(expected["overall"], abs=1e-9)
    assert len(summary.prompts) == expected["n_prompts_scored"]
    for level, means in (("L1", summary.l1), ("L2", summary.l2)):
        got = {name: mean.mean for name, mean in means.items()}
        assert got == pytest.approx(expected[level], abs=1e-9), level
        if f"{level}_n" in expected:
            assert {name: mean.n for name, mean in means.items()} == expected[f"{level}_n"]
    for item, want in expected.get("per_prompt", {}).items():
        got = summary.prompts[item]
        assert got.score == pytest.approx(want["score"], abs=1e-9), item
        assert got.per_image == pytest.approx(want["per_image"], abs=1e-9), item
        if "l2_source_scores_last_image" in want:
            last = {str(number): value for number, value in got.raw[-1].items()}
            assert last == want["l2_source_scores_last_image"], item
    if "per_prompt" in expected:
        assert set(summary.prompts) == set(expected["per_prompt"])


def failed_items(expected, graph):
    """The prompts at which the official script failed (it also lists stray files as failed)."""
    names = [m.removeprefix("Failed filename: ") for m in expected.get("failed_messages", ())]
    stems = {name.split()[0].split(".")[0] for name in names}
    return stems & set(graph.items)


def test_official(case):
    graph, answers, expected, count, printed = case
    report = score(graph, answers, images_per_prompt=count)
    want = expected["official_bug_compatible"]
    assert_equal(report.official, want)
    assert set(report.official.skipped) == failed_items(want, graph)
    assert f"DPG-Bench score: {want['overall']}" in printed
    assert report.missing == []


def test_corrected(case):
    graph, answers, expected, count, _ = case
    report = score(graph, answers, images_per_prompt=count)
    assert_equal(report.corrected, expected["corrected"])
    assert report.corrected.skipped == {}
    # The text labels both scores and names the judge.
    text = format_scores(report, "a table")
    columns = " | ± | images | prompts |"
    assert f"judged by a table | official{columns} corrected{columns}" in text
    for summary in (report.official, report.corrected):
        assert f"**{summary.overall.mean:.2f}** | {summary.overall.stderr:.2f}" in text


def test_fewer_images(case):
    graph, answers, expected, _, _ = case
    start = "official_bug_compatible_pic_num_"
    for key in [key for key in expected if key.startswith(start)]:
        count = int(key.removeprefix(start))
        first = {item: images[:count] for item, images in answers.items()}
        assert_equal(score(graph, first, images_per_prompt=count).official, expected[key])


def test_missing_images(case):
    graph, answers, expected, count, _ = case
    if "official_with_missing_and_stray_files" not in expected:
        pytest.skip("no run with missing files")
    want = expected["official_with_missing_and_stray_files"]
    there = {item: a for item, a in answers.items() if item not in want["missing_images"]}
    report = score(graph, there, images_per_prompt=count)
    assert_equal(report.official, want)
    assert sorted(report.missing) == sorted(want["missing_images"])
    assert f"INCOMPLETE: {len(report.missing)} prompts" in format_scores(report, "a table")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_columns(folder):
    assert list(COLUMNS) == FOLDERS[folder]["columns"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_grid_crops(folder):
    expected = read(folder / FOLDERS[folder]["grid"])
    grid = Image.open(folder / expected["grid"])
    right = split_grid(grid, expected["true_resolution"])
    for crop in expected["crops"]:
        image = crop_grid(grid, crop["resolution"])[crop["index"]].convert("RGB")
        assert list(image.size) == crop["size"]
        assert hashlib.sha256(image.tobytes()).hexdigest() == crop["rgb_sha256"]
        if crop["correct_resolution"]:
            assert right[crop["index"]].convert("RGB").tobytes() == image.tobytes()
        else:
            with pytest.raises(ValueError, match=f"not of {crop['resolution']} px"):
                split_grid(grid, crop["resolution"])
