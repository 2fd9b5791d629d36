"""Weight files are found, verified and loaded by name; messages for users without a network."""

import json
from dataclasses import replace
from pathlib import Path

import geneval_golden as golden
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from geneval import colors, detectors, mmdet_weights
from geneval.colors import load_clip
from geneval.detector_rehearsal import write_archive
from geneval.detectors import CLIP, DETECTORS, MASK2FORMER, load_detector
from geneval.mmdet_weights import load_hub_folder, load_mmdet
from geneval.rules import judge_image
from t2i.files import file_sha256

TINY_CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for this test."""
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "geneval"


def test_addresses_names_and_hashes_agree():
    assert MASK2FORMER.url.endswith(f"/{MASK2FORMER.names[0]}")
    for name, digest in zip(MASK2FORMER.names, MASK2FORMER.hashes, strict=False):
        assert name.endswith(f"-{digest}.pth")
    assert CLIP.url.split("/")[-2:] == [CLIP.hashes[0], CLIP.names[0]]


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "upload.bin"
    path.write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"upload.bin is not the published Mask2Former") as error:
        load_detector("mask2former", weights=path)
    for part in (file_sha256(path), *MASK2FORMER.hashes, MASK2FORMER.url):
        assert part in str(error.value)
    with pytest.raises(
        ValueError, match=r"Mask2Former.*--detector-weights \(in training: --reward"
    ):
        load_detector("mask2former")


@pytest.fixture
def tiny_models(tmp_path, monkeypatch):
    """A folder with the golden Mask2Former and a tiny CLIP of OpenAI's format, as the real ones."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (tmp_path / "Tiny-CLIP.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "Tiny-CLIP.json")
    monkeypatch.setattr(colors, "load_clip", lambda path: load_clip(path, "Tiny-CLIP"))
    monkeypatch.setattr(mmdet_weights, "released_config", lambda: golden.SHAPE)
    write_archive(open_clip.CLIP(**TINY_CLIP), folder / "ViT-L-14.pt")
    clip_source = replace(CLIP, hashes=(file_sha256(folder / "ViT-L-14.pt"),))
    monkeypatch.setattr(detectors, "CLIP", clip_source)
    (folder / MASK2FORMER.names[0]).write_bytes(golden.CHECKPOINT.read_bytes())
    monkeypatch.setattr(
        detectors, "MASK2FORMER", replace(MASK2FORMER, hashes=(file_sha256(golden.CHECKPOINT),))
    )
    return folder


def test_the_official_detector_end_to_end(tiny_models, cache):
    detector = load_detector("mask2former", weights=tiny_models)
    identity = detector.identity()
    assert (identity["name"], identity["official"]) == ("mask2former", True)
    assert identity["weights"] == {
        MASK2FORMER.names[0]: file_sha256(golden.CHECKPOINT),
        "ViT-L-14.pt": file_sha256(tiny_models / "ViT-L-14.pt"),
    }
    assert json.loads(json.dumps(identity)) == identity
    image = Image.open(golden.ROOT / golden.CASES[0]["image"])
    found = detector.detect(image)
    name = next(iter(found))
    entry = {"tag": "colors", "prompt": "", "include": [{"class": name, "count": 1}]}
    entry["include"][0]["color"] = "red"
    verdict = judge_image(image, entry, detector)
    assert verdict.correct or "expected" in verdict.reason
    # The conversion is in the cache, and the second detector reads it from there.
    [converted] = cache.glob("mask2former-*/model.safetensors")
    written = converted.stat().st_mtime_ns
    again = load_detector("mask2former", weights=tiny_models / MASK2FORMER.names[0])
    assert converted.stat().st_mtime_ns == written
    weights = load_mmdet(golden.CHECKPOINT).state_dict()
    for key, value in again.objects.model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_the_archive_of_clip_is_loaded_completely(tiny_models):
    torch.manual_seed(1)
    model = open_clip.CLIP(**TINY_CLIP)
    path = tiny_models / "other.pt"
    write_archive(model, path)
    loaded = load_clip(path, "Tiny-CLIP")
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    model.visual.conv1 = nn.Conv2d(3, 60, 32, 32, bias=False)
    write_archive(model, path)
    with pytest.raises(ValueError, match=r"mis-shaped \(1\): visual.conv1.weight"):
        load_clip(path, "Tiny-CLIP")
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not OpenAI's archive"):
        load_clip(path, "Tiny-CLIP")


def test_another_file_needs_its_own_hash_and_is_marked(tiny_models, monkeypatch):
    monkeypatch.setattr(detectors, "MASK2FORMER", MASK2FORMER)
    with pytest.raises(ValueError, match="not the published Mask2Former"):
        load_detector("mask2former", weights=golden.CHECKPOINT)
    (tiny_models / "mine.pth").write_bytes(golden.CHECKPOINT.read_bytes())
    digest = file_sha256(golden.CHECKPOINT)
    mine = load_detector("mask2former", weights=tiny_models / "mine.pth", sha256=digest[:8])
    assert mine.identity()["official"] is False
    assert mine.identity()["weights"]["mine.pth"] == digest
    for hash_, weights in ((digest[:4], tiny_models), (digest, None)):
        with pytest.raises(ValueError, match="hash of at least 8"):
            load_detector("mask2former", weights=weights, sha256=hash_)


def test_another_file_is_not_taken_for_one_that_was_converted_before(tiny_models):
    content = torch.load(golden.CHECKPOINT, weights_only=True)
    content["state_dict"]["panoptic_head.cls_embed.bias"] += 1
    torch.save(content, tiny_models / "mine.pth")
    digest = file_sha256(tiny_models / "mine.pth")
    official = load_detector("mask2former", weights=tiny_models)
    mine = load_detector("mask2former", weights=tiny_models / "mine.pth", sha256=digest)
    biases = (detector.objects.model.class_predictor.bias for detector in (official, mine))
    assert not torch.equal(*biases)


def test_the_hubs_checkpoint_is_an_approximation(tiny_models, tmp_path):
    folder = tiny_models / "hub"
    load_mmdet(golden.CHECKPOINT).save_pretrained(folder)
    (folder / "ViT-L-14.pt").write_bytes((tiny_models / "ViT-L-14.pt").read_bytes())
    identity = load_detector("mask2former-hf", weights=folder).identity()
    assert (identity["name"], identity["official"]) == ("mask2former-hf", False)
    assert identity["weights"]["model.safetensors"] == file_sha256(folder / "model.safetensors")
    with pytest.raises(ValueError, match="not a folder"):
        load_detector("mask2former-hf", weights=golden.CHECKPOINT)
    with pytest.raises(ValueError, match=r"neither a local folder nor(.|\n)*--detector-weigh"):
        load_detector("mask2former-hf")


def test_the_hubs_layout_of_older_versions(tmp_path):
    """The hub's file holds constant tables, and lacks weights that do not affect the outputs."""
    model = load_mmdet(golden.CHECKPOINT, golden.SHAPE)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    table = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    # Until 5.9, transformers saved it itself, and read it.
    weights.setdefault(f"{table}.relative_position_index", torch.zeros(49, 49, dtype=torch.int64))
    for key in [k for k in weights if "swin.layernorm" in k or "criterion" in k]:
        del weights[key]
    save_file(weights, path, metadata={"format": "pt"})
    loaded = load_hub_folder(tmp_path).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value) or "swin.layernorm" in key, key
    weights["extra.weight"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected \(1\): extra\.weight\n"):
        load_hub_folder(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    model = load_mmdet(golden.CHECKPOINT, golden.SHAPE)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable folder"):
        load_hub_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_queries": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match=r"mis-shaped \(2\): model\.transformer_module\.queries"):
        load_hub_folder(tmp_path)


def test_an_unwritable_cache_is_named(tiny_models, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write .*T2I_CACHE"):
        load_detector("mask2former", weights=tiny_models)


def test_names():
    assert load_detector("shapes").identity()["name"] == "shapes"
    with pytest.raises(ValueError, match=r"unknown detector 'yolo'.*mask2former, mask2former-hf"):
        load_detector("yolo")
    with pytest.raises(ValueError, match="no weights"):
        load_detector("shapes", weights=Path("x"))
    assert DETECTORS[0] == "mask2former"
    assert colors.ARCHITECTURE == "ViT-L-14-quickgelu"
