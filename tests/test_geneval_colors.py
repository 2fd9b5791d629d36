"""Crops, texts and color decisions against golden data of GenEval and clip_benchmark."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
from helpers import golden_folder
from PIL import Image
from torchvision import transforms

from geneval import colors
from geneval.colors import (
    ColorClassifier,
    class_embeddings,
    clip_pixels,
    color_logits,
    color_texts,
    first_largest,
    load_tokenizer,
    object_crops,
    require_quick_gelu,
)
from geneval.detector import Detections
from geneval.object_names import OBJECT_NAMES

ROOT = golden_folder("geneval_colors")
CONFIG = json.loads((ROOT / "config.json").read_text())
# The official script also has other backgrounds and whole images, which GenEval does not use.
OBJECTS = [o for o in json.loads((ROOT / "objects.json").read_text()) if not o["options"]]
CLASSIFICATION = json.loads((ROOT / "classification.json").read_text())


def crop_of(entry):
    *box, score = entry["box_xyxy_score"]
    masks = None
    if entry["mask"] is not None:
        masks = np.asarray(Image.open(ROOT / entry["mask"]))[None] > 0
    [crop] = object_crops(Image.open(ROOT / entry["image"]), Detections([box], [score], masks))
    return crop


def rgb_sha256(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_constants_are_the_official_ones():
    assert list(colors.COLORS) == CONFIG["colors"]
    official = [t.replace("{class}", "{name}") for t in CONFIG["templates"]]
    assert list(colors.TEMPLATES) == official
    assert (colors.BACKGROUND, CONFIG["crop"]) == (CONFIG["background"], True)
    assert (CONFIG["clip_size"], CONFIG["logit_scale"]) == (colors.SIDE, colors.LOGIT_SCALE)
    normalise = clip_pixels.transforms[-1]
    assert [*normalise.mean, *normalise.std] == CONFIG["clip_mean"] + CONFIG["clip_std"]


@pytest.mark.parametrize("entry", OBJECTS, ids=lambda entry: entry["id"])
def test_golden_crops(entry):
    crop = crop_of(entry)
    assert (crop.mode, list(crop.size)) == (entry["crop_mode"], entry["crop_size"])
    assert rgb_sha256(crop) == entry["crop_rgb_sha256"], entry["note"]
    if "clip224" in entry:
        view = transforms.Compose(clip_pixels.transforms[:-2])(crop)
        assert rgb_sha256(view) == entry["clip224_rgb_sha256"], entry["note"]
        samples = np.load(ROOT / "clip224_normalised_stride16.npz")
        if entry["id"] in samples:
            normalised = clip_pixels(crop)[:, ::16, ::16].numpy()
            np.testing.assert_allclose(normalised, samples[entry["id"]], atol=1e-6, rtol=0)


def test_golden_texts_and_tokens():
    golden = json.loads((ROOT / "prompts.json").read_text())
    assert golden["prompts"].keys() == set(OBJECT_NAMES)
    for name, texts in golden["prompts"].items():
        assert color_texts(name) == [texts[color] for color in golden["colors"]]
    tokens = json.loads((ROOT / "tokens.json").read_text())
    ids = load_tokenizer()(list(tokens["tokens"]))
    assert ids.shape[1] == tokens["context_length"]
    for row, expected in zip(ids.tolist(), tokens["tokens"].values(), strict=True):
        assert row == expected + [tokens["pad"]] * (len(row) - len(expected))


@pytest.mark.parametrize("name", CLASSIFICATION["classes"])
def test_golden_classification(name):
    arrays, golden = np.load(ROOT / "classification.npz"), CLASSIFICATION["classes"][name]
    rows = {text: i for i, text in enumerate(CLASSIFICATION["text_prompts_in_row_order"])}
    texts = arrays["text_embeddings"].astype(np.float32)
    chosen = np.array([[texts[rows[text]] for text in group] for group in color_texts(name)])
    classifier = class_embeddings(torch.from_numpy(chosen))
    expected = arrays[f"{golden['prefix']}.classifier"]
    np.testing.assert_allclose(classifier.numpy(), expected, atol=1e-6, rtol=0)
    images = torch.from_numpy(arrays["image_embeddings"].astype(np.float32))
    logits = color_logits(images, classifier)
    np.testing.assert_allclose(
        logits.numpy(), arrays[f"{golden['prefix']}.logits_fp32"], atol=1e-4, rtol=0
    )
    named = [CONFIG["colors"][i] for i in first_largest(logits)]
    zero = (images == 0).all(dim=1).tolist()
    for row, (color, expected_color) in enumerate(
        zip(named, golden["expected_colors"], strict=True)
    ):
        if golden["top2_margin"][row] > 1e-3 or zero[row]:
            assert color == expected_color, row


def tiny_clip(quick_gelu=True):
    torch.manual_seed(0)
    vision = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu)


def test_quick_gelu_is_required():
    assert open_clip.get_model_config(colors.ARCHITECTURE)["quick_gelu"]
    require_quick_gelu(tiny_clip())
    with pytest.raises(ValueError, match=r"needs QuickGELU, but this model has GELU"):
        ColorClassifier(tiny_clip(quick_gelu=False), load_tokenizer())
    mixed = tiny_clip()
    mixed.visual.transformer.resblocks[1].mlp.gelu = torch.nn.GELU()
    with pytest.raises(ValueError, match="QuickGELU"):
        require_quick_gelu(mixed)


def test_a_class_is_judged_crop_by_crop():
    """More crops than fit into one batch give the same as each crop alone."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    x0, y0 = rng.integers(0, 60, 20), rng.integers(0, 40, 20)
    boxes = np.stack([x0, y0, x0 + rng.integers(2, 20, 20), y0 + rng.integers(2, 20, 20)], axis=1)
    everything = Detections(boxes, np.ones(20), rng.random((20, 60, 80)) < 0.9)
    classifier = ColorClassifier(tiny_clip(), load_tokenizer())
    together = classifier.classify(image, "dog", everything)
    alone = [classifier.classify(image, "dog", everything.take([i]))[0] for i in range(20)]
    assert together == alone
    assert len(set(together)) > 1
    assert classifier.precision == "float32"


def test_the_class_name_counts():
    """Texts differ by class, so one class's classifier is not reused for another."""
    classifier = ColorClassifier(tiny_clip(), load_tokenizer())
    image, box = Image.new("RGB", (20, 20), "red"), Detections([[0, 0, 20, 20]], [1])
    for name in ("dog", "cat"):
        classifier.classify(image, name, box)
    first, second = (classifier._classifiers[name] for name in ("dog", "cat"))
    assert not torch.equal(first, second)
