"""The pre-training of the shapes base, tiny: what it draws, when it ends, what it leaves."""

import json
import time

import numpy as np
import pytest
import torch

import t2i
from launch.lab import pretrain_shapes
from launch.lab.pretrain_shapes import Pretrain, drawn_scenes, every_prompt, scene_codes
from t2i.loading import ASSETS
from t2i.shapes.shapes_prompts import TAGS, all_prompts, benchmark_prompts, is_held_out


def recipe(out, **changes) -> Pretrain:
    sizes = {"dim": 32, "layers": 1, "scenes": 20, "gpt_steps": 5, "gpt_batch": 4}
    files = {"tokenizer": ASSETS / "shapes" / "vq.pt", "device": "cpu"}
    return Pretrain(out=out, **{**sizes, **files, **changes})


@pytest.mark.slow
def test_worker_processes_draw_the_same_scenes_in_order(tmp_path):
    alone, shared = (list(drawn_scenes(recipe(tmp_path, workers=w), 8)) for w in (0, 2))
    assert [len(images) for images, _ in alone] == [8, 8, 4]
    for (images, texts), (others, other_texts) in zip(alone, shared, strict=True):
        assert np.array_equal(images, others) and texts == other_texts


def test_nothing_held_out_is_trained_on(tmp_path):
    held_out = {m["prompt"] for tag in TAGS for m in all_prompts(tag) if is_held_out(m)}
    drawn = drawn_scenes(recipe(tmp_path, scenes=300), 300)
    assert held_out and not held_out & {text for _, texts in drawn for text in texts}


def test_codes_are_those_of_their_scenes_and_kept(tmp_path):
    cfg, vq = recipe(tmp_path), tmp_path / "vq.pt"
    vq.write_bytes(cfg.tokenizer.read_bytes())
    first, again = scene_codes(cfg, vq), scene_codes(cfg, vq)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.prompts, again.prompts)
    images, texts = next(drawn_scenes(cfg, 20))
    assert [every_prompt()[i] for i in first.prompts] == texts
    backbone = t2i.load_backbone("llamagen", "shapes")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(backbone.encode_images(pixels)[..., 0], first.codes.long())


def test_a_run_leaves_two_bases_and_their_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pretrain_shapes, "benchmark_prompts", lambda seed, per_tag: benchmark_prompts(seed, 1)
    )
    cfg = recipe(tmp_path / "run", scenes=10**9, gpt_steps=10**9, minutes=0.05)
    start = time.time()
    scenes = scene_codes(cfg, cfg.tokenizer, end=start)  # it stops after its first 64 scenes
    assert len(scenes.codes) == len(scenes.prompts) == 64
    cfg.out.mkdir()
    (cfg.out / "vq.pt").write_bytes(cfg.tokenizer.read_bytes())
    pretrain_shapes.train_gpt(cfg, scenes, end=start + 3)
    assert time.time() - start < 60
    pretrain_shapes.score(cfg)
    weights = [
        t2i.load_backbone("llamagen", folder).gpt.output.weight
        for folder in (cfg.out, cfg.out / "constant_rate")
    ]
    assert not torch.equal(*weights) and all(w.abs().sum() > 0 for w in weights)
    scores = json.loads((cfg.out / "scores.json").read_text())
    assert set(scores) == {"base", "constant_rate"}
    assert set(scores["base"]) == {*TAGS, "overall"}
