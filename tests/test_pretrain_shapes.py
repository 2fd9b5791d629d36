"""Pre-training of the shapes base at a tiny size: its data, its time limit, its results."""

import json
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import rare, tiny_llamagen, tiny_open_magvit2, tiny_rar

import t2i
from geneval.prompts import TAGS
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.shapes import caption_bases
from t2i.shapes.caption_bases import drawn_scenes, every_caption, scene_codes
from t2i.shapes.shapes_prompts import every_prompt, is_held_out
from t2i.shapes.tiny_recipes import CaptionBase
from t2i.sources import ASSETS


def recipe(out, **changes) -> CaptionBase:
    sizes = {"dim": 32, "layers": 1, "scenes": 20, "gpt_steps": 5, "gpt_batch": 4}
    files = {"tokenizer": ASSETS / "shapes" / "vq.pt", "device": "cpu"}
    return CaptionBase(out=out, **{**sizes, **files, **changes})


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_llamagen("text"), lambda: tiny_llamagen("class"), tiny_rar, tiny_open_magvit2],
)
def test_new_weights_depend_on_their_generator_alone(make):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        backbone = type(made := make())(made.config)
        part = getattr(backbone, "gpt", None) or backbone.transformer
        part.initialize(torch.Generator().manual_seed(0))
        states.append(part.state_dict())
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@pytest.mark.slow
def test_worker_processes_draw_the_same_scenes_in_order(tmp_path):
    alone, shared = (list(drawn_scenes(recipe(tmp_path, workers=w), 8)) for w in (0, 2))
    assert [len(images) for images, _ in alone] == [8, 8, 4]
    for (images, texts), (others, other_texts) in zip(alone, shared, strict=True):
        assert np.array_equal(images, others) and texts == other_texts


def test_held_out_prompts_are_not_trained_on(tmp_path):
    held_out = {m["prompt"] for m in every_prompt() if is_held_out(m)}
    drawn = drawn_scenes(recipe(tmp_path, scenes=300), 300)
    assert held_out and not held_out & {text for _, texts in drawn for text in texts}


def test_codes_are_those_of_their_scenes_and_are_kept(tmp_path):
    cfg = recipe(tmp_path)
    first, again = (scene_codes(cfg, cfg.tokenizer) for _ in range(2))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.prompts, again.prompts)
    images, texts = next(iter(drawn_scenes(cfg, 20)))
    assert [every_caption()[i] for i in first.prompts] == texts
    backbone = t2i.load_backbone("llamagen", "shapes")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(backbone.encode_images(pixels)[..., 0], first.codes.long())


def test_too_little_time_for_scenes_is_reported(tmp_path, caplog):
    """A base that had time for 1,024 of 300,000 scenes memorized them, without any warning."""
    cfg = recipe(tmp_path, scenes=200)
    assert len(scene_codes(cfg, cfg.tokenizer, end=0).codes) == 64
    assert "time for only 64 of 200 scenes" in caplog.text


@pytest.mark.parametrize("family", [rare("llamagen"), "janus"])
def test_a_run_writes_two_bases_and_their_scores(family, tmp_path, monkeypatch):
    seconds = count()  # the clock: a second per call, so about a second per step
    monkeypatch.setattr(caption_bases, "time", SimpleNamespace(time=lambda: next(seconds)))
    cfg = recipe(tmp_path / "run", family=family, scenes=10**9, gpt_steps=10**9)
    scenes = scene_codes(cfg, cfg.tokenizer, end=0)  # stops after the first 64 scenes
    assert len(scenes.codes) == len(scenes.prompts) == 64
    learner = caption_bases.new_learner(cfg, VQTokenizer.load(cfg.tokenizer))
    caption_bases.train(cfg, learner, scenes, end=next(seconds) + 20)
    assert next(seconds) < 30
    caption_bases.score(cfg, per_tag=1, samples=1)
    weights = [
        t2i.load_backbone(family, folder).official_state_dict()
        for folder in (cfg.out, cfg.out / "constant_rate")
    ]
    changed = [name for name in weights[0] if not torch.equal(*(w[name] for w in weights))]
    assert changed and all(w.abs().sum() > 0 for w in weights[1].values())
    scores = json.loads((cfg.out / "scores.json").read_text())
    assert set(scores) == {"base", "constant_rate"}
    assert set(scores["base"]) == {*TAGS, "overall"}


@pytest.mark.slow
def test_the_tokenizer_and_the_text_encoder_are_trained(tmp_path):
    cfg = recipe(tmp_path, tokenizer=None, image_size=16, vq_steps=30, vq_batch=8, scenes=8)
    pixels = caption_bases.to_pixels(caption_bases.draw_scenes(1, 16, range(16))[0])

    def error(steps: int) -> float:
        tokenizer = caption_bases.trained_tokenizer(replace(cfg, vq_steps=steps))
        return (tokenizer.decode(tokenizer.encode(pixels)) - pixels).abs().mean().item()

    assert error(30) < 0.5 * error(1)
    tokenizer = VQTokenizer.load(ASSETS / "shapes" / "vq.pt")
    learner = caption_bases.new_learner(cfg, tokenizer)
    before = learner.text_encoder[0].encoder.embed_tokens.weight.clone()
    scenes = scene_codes(cfg, ASSETS / "shapes" / "vq.pt")
    caption_bases.train(cfg, learner, scenes, end=time.time() + 60)
    assert not torch.equal(learner.text_encoder[0].encoder.embed_tokens.weight, before)
