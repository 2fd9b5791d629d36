"""The shapes world: prompts, scenes, the detector that recognizes them, and the data set writer."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import rare
from PIL import Image, ImageFilter

import geneval
from geneval.prompts import TAGS, color_attr, colors, counting, position, two_object
from geneval.rules import COLORS as GENEVAL_COLORS
from geneval.rules import relative_position
from t2i.shapes.scenes import (
    BACKGROUND,
    GAP,
    PALETTE,
    Scene,
    SceneObject,
    render,
    sample_scene,
)
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import (
    COLORS,
    HELD_OUT_TAGS,
    SHAPES,
    all_prompts,
    benchmark_prompts,
    is_held_out,
)
from t2i.shapes.shapes_source import write_dataset

DETECTOR = ShapesDetector()


def damaged(image, blur=0.0, noise=0.0, rng=None):
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)
    pixels = pixels + (rng.normal(0, noise, pixels.shape) if noise else 0)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def one(shape, size=20, color="blue"):
    return render(Scene((SceneObject(shape, color, 32, 32, size),), "colors", "", {}))


def test_prompts_follow_genevals_grammar():
    assert two_object("circle", "ring")["prompt"] == "a photo of a circle and a ring"
    assert counting("cross", 3) == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert colors("star", "orange")["prompt"] == "a photo of an orange star"
    assert position("circle", "left of", "square") == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a circle left of a square",
    }
    attributes = color_attr("heart", "red", "ring", "orange")
    assert attributes["prompt"] == "a photo of a red heart and an orange ring"
    assert [item["color"] for item in attributes["include"]] == ["red", "orange"]
    assert list(COLORS) == list(PALETTE)
    assert set(COLORS) < set(GENEVAL_COLORS)


def test_benchmark_prompts_are_unique_and_held_out():
    prompts = benchmark_prompts(seed=0, per_tag=20)
    assert prompts == benchmark_prompts(seed=0, per_tag=20) != benchmark_prompts(1, 20)
    for tag in TAGS:
        own = [m["prompt"] for m in prompts if m["tag"] == tag]
        assert len(own) == 20
        assert len(set(own)) == min(20, len(all_prompts(tag)))
    assert all(is_held_out(m) for m in prompts if m["tag"] in HELD_OUT_TAGS)


def test_scenes_are_a_pure_function_of_seed_and_index():
    assert sample_scene(3, 5) == sample_scene(3, 5)
    assert len({sample_scene(seed, 5).objects for seed in range(20)}) == 20
    # A frozen sample: the shipped models were trained on this world.
    scene = sample_scene(0, 0)
    assert scene.prompt == "a photo of a diamond left of a ring"
    assert scene.objects == (
        SceneObject("ring", "blue", 51, 34, 20),
        SceneObject("diamond", "green", 28, 43, 18),
    )


def test_scenes_match_their_metadata():
    for index in range(600):
        scene = sample_scene(1, index)
        assert not is_held_out(scene.metadata)
        wanted = {item["class"]: item["count"] for item in scene.metadata["include"]}
        assert collections.Counter(o.shape for o in scene.objects) == wanted
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                gap = max(abs(a.x - b.x), abs(a.y - b.y)) - (a.size + b.size) / 2
                assert gap >= GAP
        if scene.tag == "position":
            boxes = [np.array(o.box) for o in scene.objects]
            relation = scene.metadata["include"][1]["position"][0]
            assert relative_position(boxes[1], boxes[0]) == [relation]


@pytest.mark.parametrize(("size", "count"), [rare(64, 400), (64, 60), (96, 20), (128, 10)])
def test_detector_is_exact_on_rendered_scenes(size, count):
    scenes = [sample_scene(index % 4, index) for index in range(count)]
    assert size != 64 or {s.tag for s in scenes} == set(TAGS)
    for scene in scenes:
        image = render(scene, size)
        expected, seen = [], []
        for o in scene.objects:
            expected.append((o.shape, o.color, o.x * size / 64, o.y * size / 64))
        for shape, found in DETECTOR.detect(image).items():
            assert found.scores.min() > 0.99
            named = DETECTOR.classify_colors(image, shape, found)
            for box, mask, color in zip(found.boxes, found.masks, named, strict=True):
                rows, cols = np.nonzero(mask)
                ends = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
                assert box.tolist() == ends
                seen.append((shape, color, *(box[:2] + box[2:]) / 2))
        for a, b in zip(sorted(expected), sorted(seen), strict=True):
            assert a[:2] == b[:2]
            assert a[2:] == pytest.approx(b[2:], abs=1.5)


@pytest.mark.parametrize(("blur", "noise"), [(0, 0), rare(0.7, 0), rare(0, 10), (0.7, 10)])
def test_verdicts_survive_blur_and_noise(blur, noise):
    """The damage is of the kind that an autoencoder does."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(7, index) for index in range(120)]
    images = [damaged(render(scene), blur, noise, rng) for scene in scenes]
    report = geneval.score(images, [scene.metadata for scene in scenes], DETECTOR)
    assert report.summary.fraction_correct_images >= (0.97 if blur or noise else 1)


def test_other_scenes_are_judged_wrong():
    scenes = [sample_scene(2, index) for index in range(60)]
    images = [render(scene) for scene in scenes]
    others = [scene.metadata for scene in scenes[1:] + scenes[:1]]
    assert geneval.score(images, others, DETECTOR).summary.fraction_correct_images < 0.25


@pytest.mark.parametrize("shape", SHAPES)
def test_detection_scores_drop_with_damage(shape):
    whole = np.asarray(one(shape))
    scores = []
    for missing in (0, 3, 5, 10):  # of the shape's 20 columns, from the left
        pixels = whole.copy()
        pixels[:, : 22 + missing] = BACKGROUND
        found = DETECTOR.detect(pixels)
        scores.append(round(float(found[shape].scores[0]), 2) if shape in found else 0.0)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.99
    assert scores[2] < 0.9
    assert scores[3] < 0.3


def test_detector_ignores_specks_backgrounds_and_noise():
    rng = np.random.default_rng(0)
    specks = np.asarray(Image.new("RGB", (64, 64), BACKGROUND)).copy()
    for y, x in rng.integers(0, 60, (20, 2)):
        specks[y : y + 2, x : x + 3] = PALETTE["red"]
    for image in (
        specks,
        np.asarray(Image.new("RGB", (64, 64), PALETTE["green"])),
        rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
    ):
        found = DETECTOR.detect(image)
        assert all(detections.scores.max() < 0.3 for detections in found.values())
    with pytest.raises(ValueError, match="float64"):
        DETECTOR.detect(specks / 255)


def test_touching_shapes_of_two_colors_are_told_apart():
    pair = (SceneObject("square", "red", 22, 32, 20), SceneObject("circle", "blue", 42, 32, 20))
    found = DETECTOR.detect(render(Scene(pair, "two_object", "", {})))
    assert {shape: d.scores.min() > 0.9 for shape, d in found.items()} == {
        "square": True,
        "circle": True,
    }


def test_write_dataset_resumes_extends_and_refuses(tmp_path: Path):
    assert write_dataset(tmp_path, 4, seed=1) == (4, 0)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        scene = sample_scene(1, index)
        assert row["text"] == scene.prompt
        assert json.loads(row["metadata"]) == scene.metadata
        image = Image.open(tmp_path / row["file_name"])
        assert image.tobytes() == render(scene).tobytes()
    (tmp_path / rows[2]["file_name"]).unlink()
    assert write_dataset(tmp_path, 4, seed=1) == (1, 3)
    assert write_dataset(tmp_path, 6, seed=1) == (2, 4)
    assert write_dataset(tmp_path, 3, seed=1) == (0, 3)  # a smaller number deletes nothing
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 6
    with pytest.raises(ValueError, match="a different data set"):
        write_dataset(tmp_path, 4, seed=2)
    assert not list(tmp_path.rglob("*.tmp"))
