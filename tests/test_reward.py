"""Reward fine-tuning: the images drawn are the ones scored and trained on; the policy's loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import open_gates, tiny_janus, tiny_llamagen, tiny_open_magvit2, tiny_prepared
from runs import assert_same_weights

from t2i.lora import add_lora
from t2i.reward import policy
from t2i.reward.policy import (
    DrawnBatch,
    PolicyLoss,
    Start,
    advantages,
    code_distributions,
    score_codes,
)
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar import sampler
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.tuning import LoRAConfig

CPU = torch.device("cpu")
BRIGHT = "reward_functions:brightness"


# -- what is drawn is what is scored ---------------------------------------------------------------
def drawn_and_logged(model: TensorAR, prepared: dict, sampling: SamplingConfig, monkeypatch):
    """Windows, and the log-probabilities [B, N, s] of their final codes under the logits they were
    sampled from.
    """
    plain_pick, steps, subs = sampler.pick, [], len(model.backbone.spec.subvocabs)

    def pick(logits, keys, rule):
        codes = plain_pick(logits, keys, rule)
        log_p = (logits / rule.temperature).log_softmax(-1)
        steps.append(log_p.gather(-1, codes[..., None])[..., 0][:, : sampling.stride])
        return codes

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "pick", pick)
        windows = sampler.sample_windows(model, prepared, make_keys(3, torch.arange(4)), sampling)
    log_p = torch.stack(steps).unflatten(0, (-1, subs)).sum(1).transpose(0, 1)
    valid = sampler.drawn_windows(model, sampling).valid()
    return windows, log_p * valid[:, : sampling.stride]


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(3.0, temperature=0.8)])
@pytest.mark.parametrize(("k", "stride"), [(1, 1), (3, 1), (4, 3)])
@pytest.mark.parametrize("make", [lambda: tiny_llamagen("text"), tiny_janus, tiny_open_magvit2])
def test_the_ratio_is_1_at_the_first_update(make, k, stride, sampling, monkeypatch):
    """Log-probabilities from the sampler (step by step, cached) equal the teacher-forced ones: with
    guidance, drafts, strides that do not divide the image, and several sub-tokens.
    """
    model = open_gates(TensorAR(make(), TensorARConfig(k=k))).eval()
    sampling = replace(sampling, stride=stride)
    prepared = tiny_prepared(model.backbone, 4)
    windows, drawn = drawn_and_logged(model, prepared, sampling, monkeypatch)
    scored = score_codes(model, prepared, windows, sampling)
    ratio = (scored.log_p - drawn).exp()
    assert (ratio - 1).abs().max() < 1e-4
    assert scored.log_p.grad_fn is not None and not scored.entropy.requires_grad
    assert drawn.std() > 0.1, "otherwise everything would be equal"
    other = score_codes(model, prepared, windows, SamplingConfig(2.0, stride=stride))
    assert ((other.log_p - drawn).exp() - 1).abs().max() > 0.01, "other settings would be noticed"


def test_chunking_the_logits_changes_nothing(monkeypatch):
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    prepared = tiny_prepared(model.backbone, 4)
    windows = sampler.sample_windows(
        model, prepared, make_keys(0, torch.arange(4)), SamplingConfig()
    )
    others = code_distributions(model, prepared, windows, SamplingConfig(3.0))
    whole = score_codes(model, prepared, windows, SamplingConfig(2.0), others)
    monkeypatch.setattr(TensorAR, "windows_at_once", lambda self, slots: 5)
    others = code_distributions(model, prepared, windows, SamplingConfig(3.0))
    parts = score_codes(model, prepared, windows, SamplingConfig(2.0), others)
    for name in ("log_p", "entropy", "divergence"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


# -- the loss --------------------------------------------------------------------------------------
def test_advantages():
    rewards = torch.tensor(
        [[0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0.1]], dtype=torch.float64
    )
    found, kept = advantages(rewards, by_spread=True)
    assert kept.tolist() == [True, False, True]
    assert found[0].tolist() == [-1, -1, 1, 1] and found[1].tolist() == [0] * 4
    assert found[2, 3] == pytest.approx(3**0.5), "a small spread counts as much as a large one"
    alike, _ = advantages(rewards, by_spread=False)
    assert alike[2, 3] == pytest.approx(alike[0, 3] * 0.075 / 0.5)
    nothing, kept = advantages(rewards[1:2], by_spread=False)
    assert not kept.any() and nothing.tolist() == [[0] * 4]


def batch_of(model: TensorAR, **changes) -> DrawnBatch:
    sampling = SamplingConfig()
    prepared = tiny_prepared(model.backbone, 4)
    windows = sampler.sample_windows(model, prepared, make_keys(0, torch.arange(4)), sampling)
    with torch.no_grad():
        start = score_codes(model, prepared, windows, sampling).log_p
    gain, share = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([0.5, 0.25, 0.25, 0.0])
    return replace(DrawnBatch(windows, prepared, gain, share, start), **changes)


def test_the_loss_is_the_policy_gradient():
    """That of advantage times log-probability, over the images that are kept; at the start the pull
    adds nothing.
    """
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    batch = batch_of(model)
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    log_p = score_codes(model, batch.prepared, batch.windows, SamplingConfig()).log_p
    (-(log_p.mean((1, 2)) * batch.advantage * batch.share).sum()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, msg=name)
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["clipped"] == 0
    assert 0 < found["entropy"] < np.log(48) and sums[-1] == 3 * 16, "one image has no weight"


def test_a_step_makes_the_better_images_likelier():
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    batch, sampling = batch_of(model), SamplingConfig()
    loss, _ = PolicyLoss(model, sampling, clip=0.2, kl=0.0)(batch)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(1e-2 * p.grad)
        moved = score_codes(model, batch.prepared, batch.windows, sampling).log_p - batch.start
    better = moved.mean((1, 2))
    assert better[0] > 0 > better[1] and better[2] > 0


def test_clipping_and_the_pull():
    """A ratio outside the clip range gains nothing more; away from the start the pull has a
    gradient.
    """
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    batch = batch_of(model)
    far = replace(batch, before=batch.start - 1.0, advantage=torch.ones(4), share=torch.ones(4) / 4)
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.0)(far)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["clipped"] == 1 and found["ratio_off"] == pytest.approx(np.e - 1, rel=1e-4)
    pulled = replace(batch, start=batch.start - 0.5, advantage=torch.zeros(4))
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=1.0)(pulled)
    loss.backward()
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["kl"] == pytest.approx(np.exp(-0.5) - 0.5, rel=1e-4)
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("make", [lambda: tiny_llamagen("text"), tiny_open_magvit2])
def test_a_guided_start_pulls_by_whole_distributions(make):
    """The pull is the mean, over what the start would draw guided, of how much likelier the start
    makes it. It falls along its gradient, and is 0 if the run draws as the start does.
    """
    model = open_gates(TensorAR(make(), TensorARConfig(k=3))).eval()
    batch, guided = batch_of(model), SamplingConfig(3.0, temperature=0.8)
    of = (model, batch.prepared, batch.windows)
    others = code_distributions(*of, guided)
    picked = [
        every.gather(-1, batch.windows[:, :, :1, sub, None])[..., 0]
        for sub, every in enumerate(others)
    ]
    log_q = score_codes(*of, guided)
    torch.testing.assert_close(sum(picked) * log_q.valid, log_q.log_p)
    own = code_distributions(*of, SamplingConfig())
    expected = sum((q.exp() * (q - p)).sum(-1) for p, q in zip(own, others, strict=True))
    batch = replace(batch, start=others, advantage=torch.zeros(4))
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(batch)
    loss.backward()
    per_image = expected.mean((1, 2))
    assert loss.item() == pytest.approx(0.5 * float((per_image * batch.share).sum()), rel=1e-4)
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["kl"] == pytest.approx(float(per_image[:3].mean()), rel=1e-4)
    assert found["kl"] > 0.01
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(1e-3 * p.grad / p.grad.norm().clamp(min=1e-9))
    nearer, _ = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(batch)
    assert nearer < loss
    level = replace(batch, start=code_distributions(*of, SamplingConfig()))
    assert abs(PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(level)[0]) < 1e-6


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_start_is_what_the_run_began_with(tuning):
    """Also with adapters and a fully trained codec; afterwards the model has its own weights
    again.
    """
    backbone = tiny_janus()
    if tuning == "lora":
        add_lora(backbone, LoRAConfig(rank=2))
    model = open_gates(TensorAR(backbone, TensorARConfig(k=2))).eval()
    batch, start = batch_of(model), Start(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    now = {name: p.clone() for name, p in model.state_dict().items()}
    of = (batch.prepared, batch.windows, SamplingConfig())
    moved, revision = score_codes(model, *of).log_p, backbone.revision
    with start.applied(), torch.no_grad():
        assert torch.equal(score_codes(model, *of).log_p, batch.start)
    assert (moved - batch.start).abs().max() > 0.1
    assert_same_weights(model.state_dict(), now)
    assert torch.equal(score_codes(model, *of).log_p, moved) and backbone.revision == revision
