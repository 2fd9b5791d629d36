"""Ideas that only the long grid has: drafts that share the final codes' noise, training on the
model's own samples, and redrawing unlikely codes.
"""

import pytest
import torch
from helpers import open_gates, tiny_codes, tiny_llamagen, tiny_prepared

from launch.lab import long_ways
from launch.lab.long_objectives import Correction, SharedNoise, noise_given
from t2i.rng import fold, make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.drawing import noise_keys
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import encode_rows, sample_windows
from t2i.training.batches import Batch

SETTINGS = SamplingConfig(cfg_scale=2.0, top_p=0.9)


@pytest.fixture
def model():
    return open_gates(TensorAR(tiny_llamagen("text"), presets.tuned(own_drafts=1.0)).eval())


def batch_of(codes, prepared, keys):
    rows = torch.arange(len(codes))
    return Batch(codes, prepared, keys, drop=None, progress=0.5, indices=rows)


def test_noise_given_a_code_draws_that_code_and_is_gumbel_noise_on_average():
    keys = make_keys(0, torch.arange(20_000))
    logits = torch.tensor([0.5, 2.0, -1.0, 0.0]).expand(len(keys), 4)
    codes = torch.distributions.Categorical(logits=logits[0]).sample((len(keys),))
    noise = noise_given(logits, codes, keys)
    assert torch.equal((logits + noise).argmax(-1), codes)
    # Over codes drawn from the logits it is plain Gumbel noise: mean 0.5772, variance pi^2 / 6.
    assert noise.mean(0).tolist() == pytest.approx([0.5772] * 4, abs=0.04)
    assert noise.var(0).tolist() == pytest.approx([torch.pi**2 / 6] * 4, rel=0.06)
    assert (noise.T.corrcoef() - torch.eye(4)).abs().max() < 0.03


def test_drafts_with_shared_noise_keep_their_distribution_and_predict_the_code(model):
    """The true codes are drawn by the model itself here."""
    rows = 400
    prepared = {
        n: v.expand(rows, *v.shape[1:]) for n, v in tiny_prepared(model.backbone, 1).items()
    }
    keys = make_keys(5, torch.arange(rows))
    codes = model.windows.final_codes(sample_windows(model, prepared, keys, SamplingConfig()))
    batch = batch_of(codes, prepared, keys)
    condition = model.backbone.encode_condition(prepared)
    drafts = SharedNoise().windows(model, batch, condition)[:, 0, 1, 0]
    plain = model.own_draft_windows(codes, condition, fold(keys, 7), passes=1)[:, 0, 1, 0]
    truth, vocab = codes[:, 1, 0], model.backbone.spec.subvocabs[0]
    agreed, by_chance = ((d == truth).float().mean() for d in (drafts, plain))
    assert agreed > by_chance + 0.2
    counts = [torch.bincount(d, minlength=vocab) / rows for d in (drafts, plain)]
    assert (counts[0] - counts[1]).abs().max() < 0.1


def test_correction_feeds_windows_of_own_samples_to_half_of_the_images(model):
    codes, prepared = tiny_codes(model.backbone, 16, 16), tiny_prepared(model.backbone, 16)
    batch = batch_of(codes, prepared, make_keys(3, torch.arange(16)))
    condition = model.backbone.encode_condition(prepared)
    windows = Correction(0.5).windows(model, batch, condition)
    first = windows[:, :, 0]
    whole = (windows == model.windows.gather(first)).flatten(1).all(1)
    assert 2 < whole.sum() < 14
    assert torch.equal(first[~whole], batch.codes[~whole]), "the others: the truth, then own drafts"
    changed = (first != batch.codes)[whole].float().mean()
    assert 0.05 < changed < 0.5


def test_shared_noise_does_not_change_the_noise_of_final_codes(model):
    keys = make_keys(0, torch.arange(3))
    own = noise_keys(keys, model.windows, 1)
    shared = {
        which: long_ways.shared_noise(keys, model.windows, which) for which in ("drafts", "all")
    }
    for which, noise in shared.items():
        assert torch.equal(noise[:, :, 0], own[:, :, 0])
        assert torch.equal(noise[2, :, 2], noise[1, :, 3]), "two drafts of position 4"
        assert torch.equal(noise[4, :, 0], noise[1, :, 3]) == (which == "all")
    prepared = tiny_prepared(model.backbone, 3)
    drawn = {
        which: long_ways.draw(model, prepared, keys, SETTINGS, noise=which)
        for which in ("", "drafts", "all")
    }
    assert torch.equal(drawn[""], sample_windows(model, prepared, keys, SETTINGS))
    stages = {
        which: (windows[:, :-1, 1] == windows[:, 1:, 0]).float().mean()
        for which, windows in drawn.items()
    }
    assert stages["all"] > stages[""]


def test_the_least_likely_codes_are_redrawn(model):
    prepared, keys = tiny_prepared(model.backbone, 3), make_keys(0, torch.arange(3))
    before = long_ways.draw(model, prepared, keys, SETTINGS)
    after = long_ways.draw(model, prepared, keys, SETTINGS, again=0.25)
    assert torch.equal(before[:, :, 1:], after[:, :, 1:])
    changed = (before != after)[:, :, 0, 0]
    assert (changed.sum(1) <= 4).all() and changed.sum() > 3, "4 of 16 codes; some come out equal"
    codes = model.windows.final_codes(before)
    read = torch.cat([model.windows.gather(codes)] * 2)
    condition = encode_rows(model.backbone, prepared, guided=True)
    with torch.no_grad():
        logits = model.slot_logits(model.decode_slots(model.hidden(condition, read)), read)[0]
    said, unsaid = logits[:, :, 0].chunk(2)
    log_p = (unsaid + SETTINGS.cfg_scale * (said - unsaid)).log_softmax(-1)
    rank = log_p.gather(-1, codes)[..., 0].argsort(1).argsort(1)
    assert (rank[changed] < 4).all()
