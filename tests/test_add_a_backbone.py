"""docs/add_a_backbone.md followed literally: with its folder and one line of registration, the
example family goes from a weight file through training to an export.
"""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import open_gates, rare, tiny_codes, tiny_prepared
from PIL import Image
from programs import program

import t2i
from t2i import models
from t2i.models import families
from t2i.models.families import module_if_any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add_a_backbone.md"


def code_of_the_page(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Registers the page's family and returns its backbone class."""
    first, model, _ = code_of_the_page("python")
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
def base(toy, tmp_path, monkeypatch):
    """The page's folder with a tiny model."""
    monkeypatch.chdir(tmp_path)
    exec(code_of_the_page("python")[2], {})
    return tmp_path / "tiny_toy"


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
    prepared, codes = tiny_prepared(model.backbone, 2), tiny_codes(model.backbone, 2, 36)
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


EXTRAS = {
    "launch/train_imagenet.py": "--steps 2 --batch-size 4 --engine.micro-batch 4 --optim.warmup-steps 0",
    "launch/sample_imagenet.py": "--count 4",
    "launch/export.py": "--dtype float32",
}
"""Options that shorten the page's commands, by program; fp32, so that exports draw the same."""


@pytest.mark.parametrize("tuning", ["full", rare("lora")])
def test_the_pages_commands_from_a_tiny_model_to_an_export(base, tmp_path, tuning):
    for label in range(20):
        folder = tmp_path / "my_images" / "train" / f"c{label}"
        folder.mkdir(parents=True)
        Image.new("RGB", (24, 24), (12 * label, 60, 100)).save(folder / "0.png")
    commands = code_of_the_page("bash")[0].replace("\\\n", "")
    for _, script, *given in map(shlex.split, commands.splitlines()):
        more = [*EXTRAS[script].split(), *(["--tuning", tuning] if "train" in script else [])]
        program(import_module(script.removesuffix(".py").replace("/", ".")), *given, *more)
    trained, exported = (
        np.load(tmp_path / "outputs" / name)["arr_0"] for name in ("toy.npz", "toy-exported.npz")
    )
    assert trained.shape == (4, 24, 24, 3) and np.array_equal(trained, exported)


def test_what_a_family_leaves_out_is_not_offered(toy):
    """`launch/rehearse.py` used to offer every family, and to fail with a traceback."""
    assert module_if_any("rar", "rehearsal") and module_if_any("rar", "recipes")
    assert module_if_any("toy", "rehearsal") is module_if_any("toy", "recipes") is None
