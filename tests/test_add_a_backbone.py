"""docs/add_a_backbone.md followed literally: with its folder and one line of registration, the
example family goes from a weight file through training to an export.
"""

import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import open_gates, randomize, tiny_codes, tiny_prepared, tiny_vq
from PIL import Image

import t2i
from t2i import models
from t2i.export_folder import export
from t2i.files import write_json
from t2i.model_options import ExportOptions
from t2i.models import families
from t2i.tensorar.method import TensorARConfig
from t2i.training.config import (
    BackboneOptions,
    EngineOptions,
    LabelledOptions,
    LogOptions,
    OptimOptions,
    TrainConfig,
)
from t2i.training.loop import train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add_a_backbone.md"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Registers the page's family and returns its backbone class."""
    first, model = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    folder = tmp_path / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(first)
    (folder / "toy_model.py").write_text(model)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder.parent)])
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, "toy"))
    yield families.find_family("toy").backbone_class
    for name in [name for name in sys.modules if name.startswith("t2i.models.toy")]:
        del sys.modules[name]


@pytest.fixture
def base(toy, tmp_path):
    """A backbone folder with a tiny model of the family."""
    config_type = toy.config_type
    backbone = toy(config_type(32, 2, 2, grid=(4, 4), vocab_size=48, num_classes=4))
    randomize(backbone)
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(backbone.official_state_dict(), folder / "toy.pt")
    torch.save(tiny_vq().state_dict(), folder / "vq.pt")
    content = {"family": "toy", "weights": "toy.pt", "tokenizer": "vq.pt"}
    write_json(folder / "config.json", content | {"config": asdict(backbone.config)})
    return folder


def test_published_names_load_and_wrong_files_are_refused(toy, base):
    outline = t2i.load_backbone("toy", "owner/repo:toy_S.pt", device="meta")
    assert outline.spec.dim == 384 and outline.image_size == (256, 256)
    assert toy.infer_config(outline.official_state_dict(), "toy_S", None) == outline.config
    with pytest.raises(t2i.UserError, match=r"toy\.pt: not a published size"):
        t2i.load_backbone("toy", base / "toy.pt")
    with pytest.raises(t2i.UserError, match=r"vq\.pt: not a Toy"):
        t2i.load_backbone("toy", base / "vq.pt")


def test_cached_steps_equal_teacher_forcing(base):
    model = open_gates(t2i.attach(t2i.load_backbone("toy", base), t2i.presets.iclr2026(k=2)))
    prepared, codes = tiny_prepared(model.backbone, 2), tiny_codes(model.backbone, 2, 16)
    x = model.backbone.embed_tokens(codes)
    condition = model.backbone.encode_condition(prepared)
    x = torch.cat([condition.prefix, x], dim=1)
    whole = model.backbone.trunk(x, torch.arange(x.shape[1]), condition)
    cache = model.backbone.new_cache(2, x.shape[1])
    for i in range(x.shape[1]):
        at = torch.tensor([i])
        step = model.backbone.trunk(
            x[:, i : i + 1], at, condition, cache.at(at, cache.bucket(i + 1))
        )
        torch.testing.assert_close(step[:, 0], whole[:, i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_from_a_folder_through_training_to_an_export(base, tmp_path, tuning):
    for label in range(4):
        folder = tmp_path / "images" / "train" / f"c{label}"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * label, 60 * i, 100)).save(folder / f"{i}.png")
    every = dict.fromkeys(("validate_every", "sample_every", "save_every"), 0)
    config = TrainConfig(
        run_dir=tmp_path / "run",
        backbone=BackboneOptions(family="toy", weights=str(base)),
        method=TensorARConfig(k=2),
        tuning=tuning,
        data=LabelledOptions(
            source=(str(tmp_path / "images"),),
            views="flip",
            cache_dir=tmp_path / "cache",
            validation_samples=4,
        ),
        optim=OptimOptions(codec_lr=1e-3, backbone_lr=1e-3),
        engine=EngineOptions(micro_batch=4),
        log=LogOptions(log_every=1, prompts=("0",), **every),
        batch_size=4,
        steps=2,
    )
    checkpoint = train(config)
    images = t2i.generate(t2i.from_pretrained(checkpoint), [1, 3], progress=False)
    options = {"prompt": ("1", "3"), "samples": 1, "dtype": "float32"}
    out = export(ExportOptions(checkpoint, tmp_path / "out", **options))
    drawn = t2i.generate(t2i.from_pretrained(out), [1, 3], progress=False)
    assert [i.tobytes() for i in drawn] == [i.tobytes() for i in images]
