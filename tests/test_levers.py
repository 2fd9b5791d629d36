"""The options beyond the papers: each does what its help says, and nothing else."""

import pytest
import torch
from helpers import open_gates, tiny_codes, tiny_llamagen, tiny_prepared

from t2i.rng import make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.noise import schedule_strengths
from t2i.tensorar.sampler import sample_windows

BATCH = 4
KEYS = make_keys(0, torch.arange(BATCH))


def fresh(**method) -> TensorAR:
    return TensorAR(tiny_llamagen("text"), presets.iclr2026(**method)).eval()


def sample(model: TensorAR, rows=slice(None), **options) -> torch.Tensor:
    prepared = {k: v[rows] for k, v in tiny_prepared(model.backbone, BATCH).items()}
    return sample_windows(model, prepared, KEYS[rows], SamplingConfig(cfg_scale=2.0, **options))


# -- training -------------------------------------------------------------------------------------


def test_noise_floor_squeezes_the_schedule():
    plain, floored = (schedule_strengths("linear", 4, floor) for floor in (0.0, 0.6))
    assert plain == pytest.approx([0, 0.25, 0.5, 0.75])
    assert floored == pytest.approx([0, 0.7, 0.8, 0.9])


def test_own_drafts_grow_with_progress():
    model, n = fresh(own_drafts=1.0, anneal=True), 32
    codes, keys = tiny_codes(model.backbone, n, 16), make_keys(1, torch.arange(n))
    condition = model.backbone.encode_condition(tiny_prepared(model.backbone, n))
    noised = model.noised_windows(codes, keys)

    def untouched(progress):
        windows = model.training_windows(codes, condition, keys, progress)
        return int((windows == noised).flatten(1).all(1).sum())

    assert [untouched(p) for p in (0.0, 1.0)] == [n, 0]
    assert n // 4 < untouched(0.5) < 3 * n // 4


@pytest.mark.parametrize("detach", [False, True])
def test_detached_drafts_give_the_trunk_no_gradient(detach):
    model = open_gates(fresh(detach=detach, slot_weights=(1e-9, 1.0)))
    codes = tiny_codes(model.backbone, BATCH, 16)
    condition = model.backbone.encode_condition(tiny_prepared(model.backbone, BATCH))
    model(codes, condition, model.noised_windows(codes, KEYS)).loss.backward()
    pull = max(p.grad.abs().max() for p in model.backbone.gpt.layers.parameters())
    assert (pull < 1e-7) == detach
    assert model.codec.decoder.transformer.queries.grad.abs().max() > 1e-5


# -- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 2},
        {"renoise": 1.0},
        {"draft_temperature": 0.0},
    ],
    ids=str,
)
def test_draft_options_reach_the_image_only_through_the_encoder(options):
    """With closed gates the image is the base's; with open gates it differs."""
    model = fresh()
    plain, other = sample(model), sample(model, **options)
    size = options.get("window", 4)
    assert other.shape == (BATCH, 16, size, 1)
    assert torch.equal(other[:, :, 0], plain[:, :, 0])
    if "draft" in str(options):
        assert not torch.equal(other[:, :, 1:], plain[:, :, 1:])
    open_gates(model)
    assert not torch.equal(sample(model, **options)[:, :, 0], sample(model)[:, :, 0])


def test_renoising_depends_on_an_images_own_key():
    model = open_gates(fresh())
    together = sample(model, renoise=0.7, window=3)
    for i in range(BATCH):
        assert torch.equal(sample(model, [i], renoise=0.7, window=3)[0], together[i])


def test_greedy_drafts_are_greedy():
    model = open_gates(fresh())
    mixed, greedy, hot = (
        sample(model, **options)[:, 0]
        for options in (
            {"draft_temperature": 0.0, "temperature": 20.0},
            {"temperature": 0.0},
            {"temperature": 20.0},
        )
    )
    assert torch.equal(mixed[:, 1:], greedy[:, 1:]) and torch.equal(mixed[:, 0], hot[:, 0])
    assert not torch.equal(greedy[:, 1:], hot[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renoise": 1.5}, "renoise"),
        ({"window": -1}, "window"),
        ({"window": 5}, "larger than the model's k=4"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(fresh(), **options)
