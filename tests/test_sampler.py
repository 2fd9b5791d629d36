"""Filters, guidance, draws and the loop: what an image may and may not depend on."""

import pytest
import torch
from helpers import feed, golden_table, open_gates, tiny_codes, tiny_llamagen, tiny_prepared

from t2i.rng import make_keys, uniforms
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR, draw
from t2i.tensorar.sampler import (
    filter_logits,
    pick,
    prefill,
    sample_windows,
    window_logits,
)


@pytest.fixture
def model(backbone):
    return open_gates(TensorAR(backbone, presets.iclr2026()).eval())


def kept(logits, **settings):
    filtered = filter_logits(torch.tensor([logits]), SamplingConfig(**settings))
    return filtered[0].isfinite().nonzero().flatten().tolist()


# -- filters and draws ----------------------------------------------------------------------------


def test_filters_against_the_reference():
    for case in golden_table("top_k_top_p.json")["cases"]:
        for logits, expected in zip(case["logits"], case["kept"], strict=True):
            assert kept(logits, top_k=case["top_k"], top_p=case["top_p"]) == expected


def test_filters_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.1, 0.25, 0.15]).log().tolist()
    assert kept(logits, top_k=4) == [0, 1, 2, 3, 4], "ties with the k-th stay"
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_p=0.39) == [1], "the code that crosses the threshold stays"
    assert kept(logits, top_p=0.7) == [1, 3, 4]
    assert kept(logits, top_p=1e-6) == [1] and kept(logits, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(logits, temperature=0.5, top_p=0.55) == [1], "temperature comes before top-p"


def test_temperature_scales_and_zero_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.equal(filter_logits(logits, SamplingConfig(temperature=0.5)), logits * 2)
    greedy = SamplingConfig(temperature=0.0)
    for u in (0.0, 0.999):
        assert pick(logits, torch.tensor([u]), greedy).tolist() == [1]


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    u = (torch.arange(1000) + 0.5) / 1000
    codes = draw(probabilities.expand(1000, -1), u)
    assert codes.bincount(minlength=6).tolist() == [0, 200, 0, 500, 300, 0]
    ends = draw(probabilities.expand(2, -1), torch.tensor([0.0, 1 - 2.0**-24]))
    assert ends.tolist() == [1, 4], "a code of probability zero is never drawn"


@pytest.mark.parametrize(
    "bad",
    [
        {"cfg_scale": 0.5},
        {"cfg_interval": -2},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)


# -- guidance -------------------------------------------------------------------------------------


def logits_by_step(model, windows, config, rows):
    """Logits [B, N, k, V_s] of every sub-token while the given windows are fed."""
    collected = [[] for _ in range(windows.shape[-1])]
    h, state = prefill(model, tiny_prepared(model.backbone, rows), config)
    for i in range(model.windows.count):
        d = model.decode_slots(h)
        for s, logits in enumerate(collected):
            index = torch.tensor([i])
            logits.append(window_logits(model, d, windows[:, i, :, :s], index, state))
        if i + 1 < model.windows.count:
            h = feed(model, windows[:, i], i, state)
    return [torch.stack(logits, 1) for logits in collected]


def test_guidance_and_its_interval(model):
    windows = tiny_codes(model.backbone, 3, 16, 4)

    def logits(**settings):
        return torch.cat(logits_by_step(model, windows, SamplingConfig(**settings), 3), dim=-1)

    plain, two, three = (logits(cfg_scale=s) for s in (1.0, 2.0, 3.0))
    assert (two - plain).abs().max() > 0.5
    torch.testing.assert_close(three - two, two - plain, atol=1e-3, rtol=1e-3)
    some = logits(cfg_scale=3.0, cfg_interval=5)
    assert torch.equal(some[:, :7], three[:, :7])
    torch.testing.assert_close(some[:, 7:], plain[:, 7:], atol=1e-4, rtol=0)


def test_interval_counts_tokens_for_any_stride(backbone):
    model = open_gates(TensorAR(backbone, presets.iclr2026(stride=2)).eval())
    windows = tiny_codes(backbone, 2, 8, 4)
    plain, guided, some = (
        logits_by_step(model, windows, SamplingConfig(cfg_scale=s, cfg_interval=c), 2)[-1]
        for s, c in ((1.0, -1), (3.0, -1), (3.0, 5))
    )
    assert torch.equal(some[:, :4], guided[:, :4])  # windows 0..3 start at tokens 0..6
    torch.testing.assert_close(some[:, 4:], plain[:, 4:], atol=1e-4, rtol=0)


# -- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_image_depends_on_its_own_key_and_condition_only(model, cfg_scale):
    config = SamplingConfig(cfg_scale=cfg_scale, top_k=40, top_p=0.95)
    prepared, keys = tiny_prepared(model.backbone, 4), make_keys(3, torch.arange(4))

    def sample(rows):
        return sample_windows(model, {k: v[rows] for k, v in prepared.items()}, keys[rows], config)

    together = sample([0, 1, 2, 3])
    assert torch.equal(together, sample([0, 1, 2, 3])), "no hidden state between calls"
    for i in range(4):
        assert torch.equal(sample([i])[0], together[i])
    assert torch.equal(sample([3, 1, 0]), together[[3, 1, 0]])
    other = sample_windows(model, prepared, make_keys(4, torch.arange(4)), config)
    assert (other != together).float().mean() > 0.5


def test_every_slot_of_every_step_has_its_own_number(model):
    config = SamplingConfig(cfg_scale=2.0, top_k=30)
    keys = make_keys(0, torch.arange(3))
    windows = sample_windows(model, tiny_prepared(model.backbone, 3), keys, config)
    logits = logits_by_step(model, windows, config, 3)
    u = uniforms(keys, 4, 16, len(logits)).transpose(1, 2)
    for s, logits_s in enumerate(logits):
        assert torch.equal(pick(logits_s, u[..., s], config), windows[..., s])


def test_refinement_stages_and_progress(model):
    ticks = []
    windows = sample_windows(
        model,
        tiny_prepared(model.backbone, 2),
        make_keys(0, torch.arange(2)),
        SamplingConfig(),
        on_step=lambda: ticks.append(1),
    )
    assert windows.shape == (2, 16, 4, len(model.backbone.spec.subvocabs)) and len(ticks) == 16
    stages = [model.windows.stage_codes(windows, r) for r in range(1, model.windows.stages + 1)]
    assert torch.equal(stages[-1], model.windows.final_codes(windows))
    assert not torch.equal(stages[0], stages[-1])


def test_training_mode_is_refused():
    model = TensorAR(tiny_llamagen("class"), presets.iclr2026()).train()
    with pytest.raises(AssertionError, match="eval"):
        sample_windows(model, {"labels": torch.zeros(1)}, make_keys(0, 0), SamplingConfig())
