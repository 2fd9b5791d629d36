"""Mask2Former against golden outputs of mmdet: pixels, logits, detections, and the judge's view."""

import hashlib
import json
from functools import lru_cache

import geneval_golden as golden
import numpy as np
import pytest
import torch
from geneval_golden import CASES, CONFIG, ROOT, RULES, SHAPE, state_dict, write_checkpoint
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from geneval import mmdet_weights
from geneval.mask2former import (
    MAX_DETECTIONS,
    InputRules,
    Mask2FormerDetector,
    mask_boxes,
    prepare,
    read_instances,
    resize_bilinear,
    scaled_size,
)
from geneval.mmdet_weights import load_mmdet, released_config
from geneval.object_names import OBJECT_NAMES
from geneval.rules import decide
from t2i.imaging import upright_rgb

LOGITS, SCORES, MASK_PIXELS = 1e-3, 1e-3, 2  # tolerances of the golden data


@pytest.fixture(scope="module", params=["v2", "v3"])
def detector(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "tiny.pth"
    write_checkpoint(path, state_dict(request.param), CLASSES=CONFIG["classnames"])
    return Mask2FormerDetector(load_mmdet(path, SHAPE), classes=CONFIG["classnames"], rules=RULES)


def image_of(case):
    return Image.open(ROOT / case["image"])


def expected_of(case):
    return np.load(ROOT / case["expected"])


def pytest_ids(case):
    return case["image"].split("/")[-1].removesuffix(".png")


def test_constants_are_the_released_ones():
    assert list(OBJECT_NAMES) == CONFIG["classnames"]
    assert CONFIG["max_per_image"] == MAX_DETECTIONS
    released = InputRules()
    assert (released.pad_divisor, released.pad_value) == (RULES.pad_divisor, RULES.pad_value)
    assert (released.mean, released.std) == (RULES.mean, RULES.std)


@pytest.mark.parametrize("case", CASES, ids=pytest_ids)
def test_preprocessing_is_bit_exact(case):
    pixels, unpadded = prepare(upright_rgb(image_of(case)), RULES)
    assert list(unpadded[::-1]) == case["resized_wh"]
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(ROOT / case["preproc"])))


def test_preprocessing_at_the_released_scale():
    folder = ROOT / "preproc_official_scale"
    samples = np.load(folder / "expected.npz")
    for case in json.loads((folder / "expected.json").read_text()):
        pixels, (height, width) = prepare(
            upright_rgb(Image.open(ROOT / case["image"])), InputRules()
        )
        assert [width, height] == case["resized_wh"]
        np.testing.assert_array_equal(pixels[:height:7, :width:7], samples[case["stride7_key"]])
        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        assert digest == case["sha256_of_padded_rgb_u8_row_major"]


@pytest.mark.parametrize("case", CASES, ids=pytest_ids)
def test_golden_logits(detector, case):
    pixels, _ = prepare(upright_rgb(image_of(case)), RULES)
    classes, masks = detector.logits(pixels)
    expected = expected_of(case)
    np.testing.assert_allclose(classes.numpy(), expected["cls_logits"], atol=LOGITS, rtol=0)
    if "mask_logits" in expected:
        np.testing.assert_allclose(masks.numpy(), expected["mask_logits"], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=pytest_ids)
def test_golden_detections(detector, case):
    found, expected = detector.detect(image_of(case)), expected_of(case)
    classes = CONFIG["classnames"]
    counts = np.bincount(expected["labels"], minlength=len(classes))
    assert {classes[i]: n for i, n in enumerate(counts) if n} == {
        name: len(detections) for name, detections in found.items()
    }
    height, width = expected["mask_hw"]
    packed = np.unpackbits(expected["masks_packed"], axis=1)[:, : height * width]
    masks = packed.reshape(-1, height, width).astype(bool)
    off_boxes = 0
    for index, label in enumerate(expected["labels"]):
        detections = found[classes[label]]
        # Equal scores have no order: take the most similar detection with this score.
        alike = np.abs(detections.scores - expected["scores"][index]) <= SCORES
        differing = (detections.masks != masks[index]).sum(axis=(1, 2)) + ~alike * height * width
        match = differing.argmin()
        assert differing[match] <= MASK_PIXELS, (classes[label], index)
        box_error = np.abs(detections.boxes[match] - expected["boxes"][index]).max()
        assert box_error <= 1
        off_boxes += box_error > 0
    assert off_boxes <= 0.01 * len(expected["labels"])


@pytest.mark.parametrize("tag", ["single_object", "counting"])
def test_the_judge_keeps_the_same_detections_as_the_official_one(detector, tag):
    threshold = 0.9 if tag == "counting" else 0.3
    for case in CASES:
        kept = decide({"tag": tag, "prompt": ""}, detector.detect(image_of(case)), None).details
        assert certain(kept, threshold) == {
            name: pytest.approx(np.array(rows), abs=2 * SCORES)
            for name, rows in certain(case[f"official_details_tag_{tag}"], threshold).items()
        }


def certain(details, threshold):
    """Scores whose distance to the threshold exceeds the tolerance, per class."""
    scores = {name: np.array([row[4] for row in rows]) for name, rows in details.items()}
    far = {name: s[s > threshold + SCORES] for name, s in scores.items()}
    return {name: s for name, s in far.items() if len(s)}


def test_a_wrong_patch_merging_order_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(mmdet_weights, "_merge_pixel_by_pixel", lambda tensor: tensor)
    path = write_checkpoint(tmp_path / "wrong.pth", state_dict())
    wrong = Mask2FormerDetector(load_mmdet(path, SHAPE), classes=CONFIG["classnames"], rules=RULES)
    for case in CASES[:2]:
        pixels, _ = prepare(upright_rgb(image_of(case)), RULES)
        error = np.abs(wrong.logits(pixels)[0].numpy() - expected_of(case)["cls_logits"]).max()
        assert error > 1000 * LOGITS


def test_patch_merging_order():
    """mmdet: channel, row, column. Swin: column, row, channel."""
    channels = 3
    column = torch.arange(4 * channels)
    weight = torch.stack([column, column + 100])
    merged = mmdet_weights._merge_pixel_by_pixel(weight)
    pixel = [0, 2, 1, 3]  # (row, column) (0, 0), (1, 0), (0, 1), (1, 1) as 2 row + column
    expected = [4 * channel + p for p in pixel for channel in range(channels)]
    assert merged.tolist() == [expected, [100 + i for i in expected]]
    assert mmdet_weights._merge_pixel_by_pixel(column).tolist() == expected  # the norm's vectors


def damaged(name):
    weights = state_dict()
    if name == "missing":
        del weights["panoptic_head.query_feat.weight"]
    if name == "unexpected":
        weights["backbone.layer1.0.downsample.1.num_batches_tracked"] = torch.tensor(1)
    if name == "mis-shaped":
        weights["panoptic_head.cls_embed.bias"] = torch.zeros(134)
    if name == "twice":
        weights |= state_dict("v3")
    return weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"missing \(1\): model.transformer_module.queries_features.weight"),
        ("unexpected", "unexpected backbone.layer1.0.downsample.1.num_batches_tracked"),
        ("mis-shaped", r"mis-shaped \(1\): class_predictor.bias"),
        ("twice", "unexpected panoptic_head.pixel_decoder.encoder.layers.0.self_attn"),
    ],
)
def test_weights_of_another_model_are_named(name, message, tmp_path):
    path = write_checkpoint(tmp_path / "wrong.pth", damaged(name))
    with pytest.raises(ValueError, match=message) as error:
        load_mmdet(path, SHAPE)
    assert "wrong.pth" in str(error.value)


class LossHistory:
    """An object of a training framework, left in a checkpoint's metadata."""

    restored = 0

    def __init__(self):
        self.values = np.zeros(3)

    def __setstate__(self, state):
        LossHistory.restored += 1


def test_foreign_objects_in_the_metadata_are_not_built(tmp_path):
    meta = {"hook": LossHistory(), "best": np.float64(0.5), "work_dir": tmp_path}
    path = write_checkpoint(tmp_path / "meta.pth", state_dict(), **meta)
    model = load_mmdet(path, SHAPE)
    assert LossHistory.restored == 0
    expected = tiny_model().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_masks_are_enlarged_and_cropped_in_the_right_order():
    """A mask that fills the unpadded part fills the image; the padding is never visible."""
    logits = torch.full((1, 8, 8), -5.0)
    logits[:, :, :6] = 5.0  # stride 4: 24 of 32 columns are image
    _, boxes, scores, masks = read_instances(
        torch.tensor([[8.0, 0.0, 0.0]]), logits, padded=(32, 32), unpadded=(32, 22), original=(9, 7)
    )
    assert masks.shape == (2, 9, 7)
    assert boxes.tolist() == [[0, 0, 7, 9]] * 2
    probability = torch.tensor([8.0, 0.0, 0.0]).softmax(0)[:2]
    assert scores.tolist() == pytest.approx((probability * 0.99331).tolist(), abs=1e-4)


def test_mask_boxes():
    masks = torch.zeros(2, 6, 9, dtype=torch.bool)
    masks[0, 2, 3] = masks[0, 4, 7] = True
    assert mask_boxes(masks).tolist() == [[3, 2, 8, 5], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((384, 384), (800, 800)), ((512, 256), (1333, 667)), ((300, 400), (800, 1067))],
)
def test_scaled_size(size, expected):
    assert scaled_size(*size, InputRules()) == expected


def test_shrinking_does_not_smooth():
    """As from 1024 to 800 px: an antialiasing filter would turn a fine checkerboard grey."""
    board = np.repeat(np.indices((64, 64)).sum(0)[..., None] % 2 * 255, 3, axis=2).astype(np.uint8)
    smoothed = Image.fromarray(board).resize((50, 50), Image.Resampling.BILINEAR)
    resized = resize_bilinear(torch.from_numpy(board), 50, 50).numpy()
    assert resized.std() > 1.5 * np.asarray(smoothed).std()


def test_exif_and_deep_images():
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    assert upright_rgb(image).size == (2, 4)
    with pytest.raises(ValueError, match="mode I;16"):
        upright_rgb(Image.new("I;16", (4, 2)))


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="the model has 80 classes, but GenEval needs 2"):
        Mask2FormerDetector(tiny_model(), classes=("dog", "cat"))


@lru_cache
def tiny_model():
    return load_mmdet(golden.CHECKPOINT, SHAPE)


@pytest.mark.slow
def test_the_released_size_runs_on_a_384_px_image():
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(released_config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(68.8e6, rel=2e-3)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (384, 384, 3), dtype=np.uint8))
    found = Mask2FormerDetector(model).detect(image)
    assert sum(len(d) for d in found.values()) == MAX_DETECTIONS
    for detections in found.values():
        assert detections.masks.shape[1:] == (384, 384)
        assert detections.boxes.min() >= 0
        assert detections.boxes.max() <= 384
