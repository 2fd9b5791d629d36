"""The stages of an evaluation, with a toy benchmark: finished work is kept, faults are named, and
scores cover all images.
"""

import errno
import json
import os
import re
import shutil
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_llamagen
from PIL import Image

import t2i
from dpg_bench.dpg_benchmark import by_prompt as by_question
from geneval.summary import by_prompt
from t2i.errors import UserError
from t2i.evaluation import runner
from t2i.evaluation.bootstrap import mean_over_prompts, paired_differences
from t2i.evaluation.evaluation_options import BenchmarkOptions, Scope
from t2i.evaluation.gallery import Card
from t2i.evaluation.judging import Judged
from t2i.evaluation.results import Score, compare_folders, markdown_table
from t2i.evaluation.review_page import open_column
from t2i.evaluation.runner import claim_output, evaluate, is_shapes_world
from t2i.imaging import save_png
from t2i.processes import Processes

SCOPE = Scope(samples=2)


class Bright:
    """A benchmark: is the image brighter than gray? `asked` collects the images it judged."""

    name, label, best, decimals = "Bright", "toy prompts", 1.0, 2
    legend = "the rate of bright images"

    def __init__(self, count=4, threshold=128, stop_after=None):
        self.entries = [{"prompt": f"light {i}", "tag": "ab"[i % 2]} for i in range(count)]
        self.threshold, self.stop_after, self.asked = threshold, stop_after, []

    def identity(self):
        return {"threshold": self.threshold, "versions": {}}

    def judge(self, prompt_index, image, filename):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(filename)
        correct = bool(np.asarray(image).mean() > self.threshold)
        row = {"filename": filename, "prompt": prompt_index, "correct": correct}
        return Judged(row, None if correct else Image.new("RGBA", image.size, (255, 0, 0, 99)))

    def scores(self, rows):
        mean = sum(row["correct"] for row in rows) / len(rows)
        return [Score("overall", mean, None, len(rows), len({r["prompt"] for r in rows}), True)]

    def card(self, row):
        return None if row["correct"] else Card("overall", f"prompt {row['prompt']}", ["dark"])


def groups_of(rows):
    groups = {}
    for row in rows:
        groups.setdefault("all", {}).setdefault(row["prompt"], []).append(row["correct"])
    return groups


@pytest.fixture
def images(tmp_path):
    """A folder of 4 prompts x 2 images: sample 0 is dark, sample 1 bright."""
    folder = tmp_path / "pictures"
    for index, entry in enumerate(Bright().entries):
        for sample, level in enumerate((40, 200)):
            image = Image.new("RGB", (8, 8), (level + index,) * 3)
            save_png(image, folder / f"{index:05d}" / "samples" / f"{sample:05d}.png")
        (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(entry))
    return folder


def test_a_refusal_by_the_main_process_ends_the_others(images, tmp_path):
    """The others used to wait for the main process forever, unless a launcher ended them."""

    class Other(Processes):
        def on_main(self, work):
            raise UserError("said by the main process")

        def barrier(self):
            raise AssertionError("waits")

    with pytest.raises(UserError, match="said by the main process"):
        evaluate(Bright(), tmp_path / "out", images=images, scope=SCOPE, processes=Other(1, 2))


def test_verdicts_are_kept_until_the_image_or_the_judge_changes(images, tmp_path, caplog):
    out = tmp_path / "out"
    stopped = Bright(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, out, images=images, scope=SCOPE)
    assert not (out / "results.json").exists()
    second = Bright()
    results = evaluate(second, out, images=images, scope=SCOPE)
    assert len(stopped.asked + second.asked) == len({*stopped.asked, *second.asked}) == 8
    assert results["scores"]["overall"]["mean"] == 0.5 and results["status"] == "complete"
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    third = Bright()
    assert evaluate(third, out, images=images, scope=SCOPE) == results and third.asked == []
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files

    save_png(Image.new("RGB", (8, 8), "white"), images / "00002/samples/00000.png")
    mine = out / "gallery" / "pictures" / "mine.jpg"
    mine.touch()
    changed = Bright()
    results = evaluate(changed, out, images=images, scope=SCOPE)
    assert changed.asked == ["00002/samples/00000.png"]
    assert results["scores"]["overall"]["mean"] == 0.625
    overlays = {p.name for p in out.glob("verdicts/*/overlays/*")}
    assert overlays == {f"{i:05d}_00000.png" for i in (0, 1, 3)}, (
        "only failed images have an overlay"
    )
    assert len(list((out / "gallery" / "pictures").glob("*.webp"))) == 3
    assert mine.exists(), "a user's file was deleted with pictures that are no longer shown"

    (path,) = out.glob("verdicts/*/00001.jsonl")
    lines = path.read_text()
    path.write_text(lines.replace('"correct": false', '"correct": true'))
    with pytest.raises(UserError, match=r"00001.jsonl has changed .* delete it to judge again"):
        evaluate(Bright(), out, images=images, scope=SCOPE)
    # Of an older version or another tool: its rows, which may lack anything, ended in tracebacks.
    unchecked = re.sub(r', "check": "\w+"', "", lines)
    path.write_text(re.sub('"correct": false, ', "", unchecked))
    again = Bright()
    assert evaluate(again, out, images=images, scope=SCOPE) == results
    assert again.asked == ["00001/samples/00000.png", "00001/samples/00001.png"]
    assert "00001.jsonl: verdicts without a checksum are judged again" in caplog.text

    stricter = Bright(threshold=250)
    evaluate(stricter, out, images=images, scope=SCOPE)
    assert len(stricter.asked) == 8

    for path in out.glob("verdicts/*/00001.jsonl"):
        path.write_text('{"sample": 0, "sha256": "0"}\n')
    with pytest.raises(UserError, match=r"00001.jsonl is damaged .* delete it to judge again"):
        evaluate(Bright(), out, images=images, scope=SCOPE)


@pytest.mark.parametrize("place", ["00002.jsonl", "index.html", "results.json"])
def test_a_full_disk_is_named_and_the_rest_is_judged_later(images, tmp_path, monkeypatch, place):
    """Case 7: the disk fills up while verdicts, the gallery or the report are written."""
    replace_file = os.replace

    def full(source, target):
        if Path(target).name == place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(source, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space is left"):
        patch.setattr(os, "replace", full)
        evaluate(first := Bright(), tmp_path / "out", images=images, scope=SCOPE)
    assert not (tmp_path / "out/results.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    evaluate(second := Bright(), tmp_path / "out", images=images, scope=SCOPE)
    twice = {*first.asked} & {*second.asked}
    assert twice == ({"00002/samples/00000.png"} if place == "00002.jsonl" else set())


def test_copies_are_pointed_out(images, tmp_path, caplog):
    """As when the seed is set again before every image."""
    evaluate(Bright(), tmp_path / "out", images=images, scope=SCOPE)
    assert "copies" not in caplog.text
    first = images / "00000/samples/00001.png"
    for again in ("00000/samples/00000.png", "00003/samples/00001.png"):
        shutil.copy(first, images / again)
    results = evaluate(Bright(), tmp_path / "out", images=images, scope=SCOPE)
    assert results["coverage"]["copies"] == 2
    assert "2 of 8 images are copies of others" in caplog.text


def test_the_result_does_not_depend_on_earlier_limits(images, tmp_path):
    partial = evaluate(Bright(), tmp_path / "a", images=images, scope=replace(SCOPE, limit=2))
    assert partial["status"] == "PARTIAL: 2 of 4 prompts"
    assert partial["coverage"]["expected"] == partial["scores"]["overall"]["images"] == 4
    assert "PARTIAL" in (tmp_path / "a/report.md").read_text()
    assert "PARTIAL" in (tmp_path / "a/gallery/index.html").read_text()
    rest = Bright()
    full = evaluate(rest, tmp_path / "a", images=images, scope=SCOPE)
    assert full == evaluate(Bright(), tmp_path / "b", images=images, scope=SCOPE)
    assert len(rest.asked) == 4


def test_limits_are_spread_over_all_prompts():
    assert Scope(limit=3).select(9) == [0, 3, 6]
    assert Scope(limit=20).select(2) == [0, 1]
    assert Scope().select(3) == [0, 1, 2]
    with pytest.raises(ValueError, match="limit=0"):
        Scope(limit=0)


def spoil(path: Path, how: str) -> None:
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "text":
        path.write_text("no picture")
    else:
        path.rename(path.with_name(how))


@pytest.mark.parametrize(
    ("name", "how", "messages"),
    [
        (
            "00001/samples/00001.png",
            "remove",
            ["1 of 8 images are missing", "00001/samples/00001.png"],
        ),
        ("00001/samples/00001.png", "b.png", ["are missing", "not read: 00001/samples/b.png"]),
        ("00003", "prompt3", ["2 of 8 images are missing", "not read: prompt3"]),
        ("00003", "00009", ["folder 00009 belongs to none of 4 prompts"]),
        (
            "00001/samples/00001.png",
            "00007.png",
            ["00001/samples/00007.png are more than the 2 samples of a prompt; give --samples"],
        ),
        (
            "00001/samples/00001.png",
            "0.png",
            ["00001/samples/0.png and 00000.png are the same number"],
        ),
        ("00001/samples/00001.png", "truncate", ["1 of 8 images cannot be judged", "00001.png"]),
        ("00001/samples/00001.png", "text", ["1 of 8 images cannot be judged", "00001.png"]),
        ("00002/metadata.jsonl", "remove", ["00002 has no metadata.jsonl, which would say"]),
        ("00002/metadata.jsonl", "text", ["00002/metadata.jsonl cannot be read"]),
    ],
)
def test_faults_of_a_folder_are_named(images, tmp_path, name, how, messages):
    spoil(images / name, how)
    with pytest.raises(ValueError) as refused:
        evaluate(Bright(), tmp_path / "out", images=images, scope=SCOPE)
    assert all(message in str(refused.value) for message in messages), refused.value
    assert ("its own prompts" in str(refused.value)) == ("belongs to none" in messages[0])
    assert not (tmp_path / "out" / "results.json").exists()


def test_too_few_samples_of_every_prompt_suggest_the_option(images, tmp_path):
    with pytest.raises(
        ValueError, match="if you meant 2 per prompt, give --samples 2; else add them"
    ):
        evaluate(Bright(), tmp_path / "out", images=images, scope=replace(SCOPE, samples=4))
    (images / "00001/samples/00001.png").unlink()
    with pytest.raises(ValueError, match="and 3 more; add them"):
        evaluate(Bright(), tmp_path / "out", images=images, scope=replace(SCOPE, samples=4))


@pytest.mark.parametrize(
    "content",
    [
        '{"model": "sdxl"}',
        '["a"]',
        '{"seed": 1, "sampling": 2}',
        '{"seed": 1, "sampling": {}, "about": {"backbone": "sdxl"}}',
    ],
)
def test_another_programs_generation_json_is_ignored(images, tmp_path, content):
    """Valid JSON of another program is ignored; invalid JSON is refused before judging.
    The report used to end in a traceback, after all images had been judged.
    """
    (images / "generation.json").write_text(content)
    results = evaluate(Bright(threshold=255), tmp_path / "out", images=images, scope=SCOPE)
    assert results["generation"] is None and results["status"] == "complete"
    assert not is_shapes_world(BenchmarkOptions(images=images))
    (images / "generation.json").write_text("{")
    unasked = Bright()
    with pytest.raises(UserError, match=r"generation\.json"):
        evaluate(unasked, tmp_path / "again", images=images, scope=SCOPE)
    assert unasked.asked == []


def test_results_name_files_as_they_are_on_disk(images, tmp_path):
    """GenEval's own code writes 1/samples/0000.png; results and gallery used to name
    00001/samples/00000.png instead.
    """
    for path in images.glob("*/samples/*.png"):
        path.rename(path.with_name(path.name[1:]))
    (images / "00001").rename(images / "1")
    evaluate(Bright(threshold=255), tmp_path / "out", images=images, scope=SCOPE)
    rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert sum((images / row["filename"]).is_file() for row in rows) == 8
    (images / "1").rename(images / "00001")  # a new name is no reason to judge again
    evaluate(Bright(threshold=255), tmp_path / "out", images=images, scope=SCOPE)
    rows = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert sum((images / row["filename"]).is_file() for row in rows) == 8
    assert "00001/samples/0000.png" in (tmp_path / "out" / "gallery" / "index.html").read_text()


def deep_grey(path):
    """Write 16 bits per channel, of which Pillow's conversion makes all but the darkest white."""
    Image.fromarray(np.full((8, 8), 500, np.uint16)).save(path)


def damaged_header(path):
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack(">I", 2) + data[12:])


@pytest.mark.parametrize("spoil", [deep_grey, damaged_header])
def test_unreadable_images_are_named(images, tmp_path, spoil):
    """A 16-bit image used to be judged as white, and a damaged header to end in a traceback."""
    spoil(images / "00001/samples/00000.png")
    with pytest.raises(UserError, match=r"1 of 8 images cannot be judged: .*00001/samples/00000"):
        evaluate(Bright(), tmp_path / "out", images=images, scope=SCOPE)
    scope = replace(SCOPE, allow_incomplete=True)
    results = evaluate(Bright(), tmp_path / "out", images=images, scope=scope)
    assert results["coverage"]["judged"] == 7


@pytest.mark.parametrize("how", ["remove", "truncate"])
def test_incomplete_folders_give_flagged_results_on_request(images, tmp_path, how):
    spoil(images / "00001/samples/00000.png", how)
    scope = replace(SCOPE, allow_incomplete=True)
    results = evaluate(Bright(), tmp_path / "out", images=images, scope=scope)
    assert results["scores"]["overall"]["mean"] == 4 / 7, "a lost image does not count as a failure"
    assert results["status"].startswith("INCOMPLETE: 7 of 8 images")
    coverage = results["coverage"]
    assert "00001/samples/00000.png" in "".join(coverage["missing"] + coverage["unreadable"])
    save_png(Image.new("RGB", (8, 8), "white"), images / "00001/samples/00000.png")
    repaired = Bright()
    assert evaluate(repaired, tmp_path / "out", images=images, scope=SCOPE)["status"] == "complete"
    assert repaired.asked == ["00001/samples/00000.png"]


def test_unusable_folders_are_refused(images, tmp_path):
    def message(out=tmp_path / "out", folder=images, benchmark=None, **scope) -> str:
        with pytest.raises(ValueError) as refused:
            evaluate(benchmark or Bright(), out, images=folder, scope=replace(SCOPE, **scope))
        return str(refused.value)

    assert "does not exist" in message(folder=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "none of the 8 expected images" in message(folder=tmp_path / "empty")
    assert "none of the 8" in message(folder=tmp_path / "empty", allow_incomplete=True)
    (tmp_path / "empty" / "images").mkdir()
    assert f"is {tmp_path / 'empty' / 'images'} meant?" in message(folder=tmp_path / "empty")
    other = Bright()
    other.entries[2] = {"prompt": "darkness", "tag": "a"}
    text = message(benchmark=other)
    assert "00002 holds images of 'light 2' instead of 'darkness'" in text
    assert "A benchmark judges images of its own prompts: let it draw them (--ckpt), or" in text
    other.entries[2] = {"prompt": "light 2", "tag": "c"}
    assert "00002 holds images of tag 'a' instead of tag 'c'" in message(benchmark=other)
    (tmp_path / "file").write_text("")
    assert f"cannot write to {tmp_path / 'file' / 'out'}" in message(out=tmp_path / "file" / "out")
    evaluate(Bright(), tmp_path / "out", images=images, scope=SCOPE)
    copy = tmp_path / "copy"
    images.rename(copy)
    assert f"holds the results of {images}" in message(folder=copy)
    with pytest.raises(ValueError, match="either --ckpt"):
        BenchmarkOptions()


def test_unrelated_files_are_left_alone(images, tmp_path, caplog):
    for name in (
        "grid.png",
        "00001/grid.png",
        ".DS_Store",
        "00001/samples/00000.png.tmp",
        "notes.txt",
    ):
        (images / name).write_text("")
    assert evaluate(Bright(), tmp_path / "out", images=images, scope=SCOPE)["status"] == "complete"
    assert "names that are not read: notes.txt" in caplog.text


# -- comparison ------------------------------------------------------------------------------------
def test_paired_differences_cancel_the_difficulty_of_prompts():
    rng = np.random.default_rng(0)
    hard, gain = rng.uniform(0.1, 0.9, 60), rng.normal(0.05, 0.02, 60)
    a = {"x": {str(i): [v] for i, v in enumerate(hard)}}
    b = {"x": {str(i): [v] for i, v in enumerate(hard + gain)}}
    overall, by_group = paired_differences(a, b)
    assert overall.difference == by_group["x"].difference == pytest.approx(gain.mean())
    assert overall.stderr == pytest.approx(gain.std() / 60**0.5, rel=0.1)
    assert overall.low < gain.mean() < overall.high and overall.low > 0
    shuffled = {"x": dict(reversed(b["x"].items()))}
    assert paired_differences(a, shuffled) == (overall, by_group)
    back, _ = paired_differences(b, a)
    assert (back.difference, back.stderr) == pytest.approx((-overall.difference, overall.stderr))


def test_prompts_are_resampled_with_all_their_values():
    found, means = mean_over_prompts([[1.0], [0.0, 0.0, 0.0]])
    assert (found.mean, set(means.tolist())) == (0.25, {0.0, 0.25, 1.0})
    assert found.stderr == means.std(ddof=1)


def test_groups_are_resampled_independently():
    rng = np.random.default_rng(1)
    same = {str(i): [value] for i, value in enumerate(rng.normal(1, 1, 40))}
    b = {"x": same, "y": same}
    a = {name: {key: [0.0] for key in values} for name, values in b.items()}
    overall, by_group = paired_differences(a, b)
    errors = [difference.stderr for difference in by_group.values()]
    assert overall.stderr == pytest.approx(np.hypot(*errors) / 2, rel=0.1)
    assert overall.low < overall.difference < overall.high


def test_overall_difference_weighs_groups_equally():
    a = {"x": {"1": [0, 0], "2": [0, 0]}, "y": {str(i): [0.0] for i in range(9)}}
    b = {"x": {"1": [1, 1], "2": [1, 1]}, "y": {str(i): [0.0] for i in range(9)}}
    overall, by_group = paired_differences(a, b)
    assert overall.difference == 0.5 and by_group["y"].difference == 0
    assert overall.stderr == 0, "all prompts of a group have the same difference"
    single, _ = paired_differences({"x": {"1": [0]}}, {"x": {"1": [1]}})
    assert single.stderr is None
    with pytest.raises(ValueError, match="1 in both, 1 only in A, 0 only in B"):
        paired_differences({"x": {"1": [0], "2": [0]}}, {"x": {"1": [0]}})
    several = {"x": {"1": [0], "2": [0]}, "y": {"1": [0], "2": [0]}}
    with pytest.raises(ValueError, match="1 in both, 1 only in A, 0 only in B"):
        paired_differences(several, {"x": {"1": [0]}, "y": {"1": [0]}})


def test_cells_are_shown_as_they_are():
    """A bar would begin another cell; `<sks>` would be an unknown tag, which is not shown."""
    found = markdown_table(["a|b", "n"], [["c|<d>", 1]])
    assert found == "| a\\|b | n |\n|---|---|\n| c\\|\\<d> | 1 |"


def test_only_comparable_folders_are_compared(images, tmp_path):
    evaluate(Bright(), tmp_path / "a", images=images, scope=SCOPE)
    evaluate(Bright(), tmp_path / "c", images=images, scope=replace(SCOPE, limit=2))
    evaluate(Bright(threshold=9), tmp_path / "d", images=images, scope=SCOPE)
    for index in (0, 1):
        save_png(Image.new("RGB", (8, 8), "white"), images / f"{index:05d}/samples/00000.png")
    evaluate(Bright(), tmp_path / "b", images=images, scope=SCOPE)
    with pytest.raises(UserError, match=r"results.json holds .*a file: give its folder, .*a\)$"):
        compare_folders(tmp_path / "a" / "results.json", tmp_path / "b", groups_of)
    text = compare_folders(tmp_path / "a", tmp_path / "b", groups_of)
    assert "| **overall** | 0.50 | 0.75 | +0.25 | 0.12 | +0.00 to +0.50 | 4 |" in text
    for index in range(4):
        save_png(Image.new("RGB", (8, 8), "white"), images / f"{index:05d}/samples/00000.png")
    evaluate(Bright(), tmp_path / "w", images=images, scope=SCOPE)
    text = compare_folders(tmp_path / "a", tmp_path / "w", groups_of)
    assert "| +0.50 | 0.00 | +0.50 to +0.50 * | 4 |" in text
    text = compare_folders(tmp_path / "w", tmp_path / "a", groups_of)
    assert "| -0.50 | 0.00 | -0.50 to -0.50 * | 4 |" in text
    for other, message in (
        ("c", "not about the same prompts"),
        ("d", "judged differently"),
        ("e", "no finished"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_folders(tmp_path / "a", tmp_path / other, groups_of)
    # results.json of another program or version
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    wrong = [results | {"scores": 1}, results | {"scores": {"overall": 1}}]
    wrong += [results | {"decimals": places} for places in (True, -1, 1000)]
    for content in ({}, [], {"scores": {}, "images": "a"}, *wrong):
        (tmp_path / "b" / "results.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"results.json (is not a benchmark's|must hold)"):
            compare_folders(tmp_path / "a", tmp_path / "b", groups_of)
        with pytest.raises(UserError, match=r"results.json (is not a benchmark's|must hold)"):
            claim_output(tmp_path / "b", images)
    for other in (by_prompt, by_question):
        with pytest.raises(UserError, match="hold results of Bright: compare them with its prog"):
            compare_folders(tmp_path / "a", tmp_path / "a", other)


def test_a_model_frees_what_it_holds_before_images_are_judged(images, tmp_path, monkeypatch):
    """Recorded steps keep the cache of a batch, which can be gigabytes, and judges need memory."""
    model, held = t2i.attach(tiny_llamagen("text"), t2i.presets.base()), []

    def draw(request, jobs, folder, processes):
        shutil.copytree(images, folder, dirs_exist_ok=True)
        request.model.held.fetch("a batch", lambda: "graphs")

    class Watching(Bright):
        def judge(self, *asked):
            held.append(model.held.content)
            return super().judge(*asked)

    monkeypatch.setattr(runner, "draw_prompts", draw)
    evaluate(Watching(), tmp_path / "out", model=model, scope=SCOPE)
    assert held == [None] * 8


@pytest.mark.parametrize("lost", ["first", "last", "all"])
def test_results_whose_lines_have_changed_are_refused(images, tmp_path, lost):
    """A cut or edited results.jsonl used to be compared and shown like the whole one."""
    evaluate(Bright(), out := tmp_path / "a", images=images, scope=SCOPE)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    kept = {"first": lines[1:], "last": lines[:-1], "all": []}[lost]
    (out / "results.jsonl").write_text("".join(kept))
    for read in (partial(compare_folders, out, out, groups_of), partial(open_column, "a", out)):
        with pytest.raises(UserError, match=r"results\.jsonl has changed since"):
            read()
    evaluate(Bright(), out, images=images, scope=SCOPE)  # from the verdicts
    assert (out / "results.jsonl").read_text() == "".join(lines)
