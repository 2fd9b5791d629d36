"""Refused settings, the shapes source by name, and the option to train on own drafts."""

import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from helpers import tiny_llamagen

from t2i.errors import UserError
from t2i.evaluation.generation_folder import refuse_other_images
from t2i.rng import make_keys
from t2i.shapes.scenes import render, sample_scene
from t2i.shapes.shapes_source import FINE_TUNING_SEED, parse_shapes
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.training.check import look_before_work
from t2i.training.config import DataOptions, LogOptions, OptimOptions, TrainConfig
from t2i.training.logs import MetricsLog, choose_tracker
from t2i.training.open_data import open_data
from t2i.tuning import LoRAConfig


def test_shapes_source_draws_the_fine_tuning_world():
    source = parse_shapes("shapes:12")
    assert source.length == 12
    scene = sample_scene(FINE_TUNING_SEED, 7)
    assert source[7].captions == [scene.prompt]
    assert source[7].image.tobytes() == render(scene).tobytes()
    assert parse_shapes("shapes").identity != source.identity
    assert parse_shapes("my_images") is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: parse_shapes("shapes:none"), "shapes:N"),
        (lambda: parse_shapes("shapes:²"), "shapes:N"),
        (lambda: presets.iclr2026(shedule="sine"), "perhaps you meant schedule"),
        (lambda: presets.iclr2026(own_drafts=1.5), "own_drafts"),
        (lambda: presets.iclr2026(own_drafts=0.5, noise="gaussian"), "set own_drafts to 0"),
        (lambda: OptimOptions(codec_lr=-1.0), "codec_lr"),
        (lambda: OptimOptions(warmup_steps=-1), "warmup_steps"),
        (lambda: OptimOptions(grad_clip=0.0), "grad_clip"),
        (lambda: LoRAConfig(rank=0), "lora.rank"),
        (
            lambda: TrainConfig(lora=LoRAConfig(rank=64, dropout=0.1)),
            "lora.rank=64, lora.dropout=0.1 has no effect with tuning=full",
        ),
        (
            lambda: open_data(DataOptions(source="shapes:3", split="val")),
            "data.split=val has no effect on shapes",
        ),
        (
            lambda: open_data(DataOptions(source="shapes", caption_column="text")),
            "data.caption_column=text has no effect on shapes",
        ),
        (lambda: choose_tracker("no_such_package"), "pip install"),
    ],
)
def test_bad_settings_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wandb_is_asked_before_the_work_and_takes_any_folders_name(tmp_path, monkeypatch):
    """Without a key it refused, or waited for one at the terminal, when all data were encoded; a
    colon in the folder's name failed then, too.
    """
    wandb, started = ModuleType("wandb"), []
    wandb.__spec__, wandb.Error = ModuleSpec("wandb", None), type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb.init = lambda **options: started.append(options)
    run_dir = tmp_path / "lr:1e-4 #2"
    config = TrainConfig(run_dir=run_dir, log=LogOptions(tracker="wandb"))
    run_dir.mkdir()
    MetricsLog(config, 0)
    assert re.fullmatch(r"lr-1e-4--2-\w{8}", started[0]["id"])

    def refuse(**options):
        raise wandb.Error("No API key configured")

    wandb.login = wandb.init = refuse
    with pytest.raises(UserError, match=r"No API key.*`wandb login`, or set WANDB_MODE=offline"):
        MetricsLog(config, 0)
    with pytest.raises(UserError, match="No API key"):
        look_before_work(config, 1, None)


def test_training_windows_mix_own_drafts_by_sample():
    backbone = tiny_llamagen("class")
    codes = torch.arange(64 * 16).view(64, 16, 1) % backbone.spec.subvocabs[0]
    keys = make_keys(3, torch.arange(64))
    condition = backbone.encode_condition({"labels": torch.zeros(64, dtype=torch.long)})

    def windows(share):
        model = TensorAR(backbone, presets.iclr2026(own_drafts=share)).eval()
        return model.training_windows(codes, condition, keys)

    noised, own, mixed = windows(0.0), windows(1.0), windows(0.5)
    is_noised, is_own = ((mixed == w).flatten(1).all(1) for w in (noised, own))
    assert (is_noised | is_own).all()
    assert 16 < is_own.sum() < 48
    assert not torch.equal(noised, own)


def test_a_folder_with_other_prompts_is_refused(tmp_path):
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(UserError, match="00000: 'a cat' there, 'a dog' now"):
        refuse_other_images(tmp_path, [{"prompt": "a dog"}])
