"""The method's promises: equal to the base until trained, causal, cached steps equal to teacher
forcing.
"""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    BACKBONES,
    feed,
    open_gates,
    other_codes,
    prefill,
    rare,
    tiny_codes,
    tiny_llamagen,
    tiny_prepared,
)

from t2i.models.conditions import Condition
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.codec import _attend, _attend_shared
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows

BATCH = 3
BF16_RMS, BF16_MAX = 0.03, 0.3
"""Bounds on the error of bf16 logits, as shares of the standard deviation of the fp32 ones: root
mean square, and largest.
"""
KEYS = make_keys(0, torch.arange(BATCH))
GEOMETRIES = [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (5, 3), (16, 16)]  # (k, stride)


def attach(backbone, preset="iclr2026", **overrides) -> TensorAR:
    return TensorAR(backbone, presets.method(preset, **overrides)).eval()


def trained(backbone, preset="iclr2026", **overrides) -> TensorAR:
    return open_gates(attach(backbone, preset, **overrides))


def condition_of(model) -> Condition:
    return model.backbone.encode_condition(tiny_prepared(model.backbone, BATCH))


def codes_of(model, batch=BATCH) -> torch.Tensor:
    return tiny_codes(model.backbone, batch, model.windows.tokens)


def predict(model, windows, seed=1, stride=1):
    """Teacher-forced logits [B, N, k, sum of V]. The earlier sub-tokens that later ones are
    predicted from do not depend on the windows.
    """
    given = tiny_codes(model.backbone, *windows.shape[:3], seed=seed)
    with torch.no_grad():
        d = model.decode_slots(model.hidden(condition_of(model), windows, stride=stride))
        return torch.cat(model.slot_logits(d, given), dim=-1)


# -- at initialisation ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_images():
    """Images of a base model, drawn once per backbone and settings."""
    drawn = {}

    def images(base, config):
        key = (base.backbone.spec.family, base.backbone.spec.cond_kind, str(config))
        if key not in drawn:
            drawn[key] = images_of(base, config)
        return drawn[key]

    return images


def images_of(model, config):
    windows = sample_windows(model, tiny_prepared(model.backbone, BATCH), KEYS, config)
    return model.backbone.decode_images(model.windows.final_codes(windows))


IN_BRIEF = {
    ("iclr2026", 1): ("open_magvit2",),
    ("iclr2026", 4): BACKBONES,
    ("arxiv2505", 4): ("llamagen_class", "janus", "open_magvit2"),
}
"""The backbones that the default suite tests, by (preset, k); the others are slow tests."""


@pytest.mark.parametrize(
    ("backbone", "preset", "k"),
    [
        (b, p, k) if b in IN_BRIEF.get((p, k), ()) else rare(b, p, k)
        for b in BACKBONES
        for p in ("iclr2026", "arxiv2505")
        for k in (1, 2, 4, 8)
    ],
    indirect=["backbone"],
)
def test_attached_model_is_the_base_bit_for_bit(backbone, preset, k, base_images):
    base, model = attach(backbone, "base"), attach(backbone, preset, k=k)
    codes = codes_of(model)
    d, base_d = (
        m.decode_slots(m.hidden(condition_of(m), m.noised_windows(codes, KEYS)))
        for m in (model, base)
    )
    given = model.windows.gather(codes)
    for logits, base_logits, vocab in zip(
        model.slot_logits(d, given),
        base.slot_logits(base_d, given[:, :, :1]),
        backbone.spec.subvocabs,
        strict=True,
    ):
        assert logits.shape == (BATCH, 16, k, vocab)
        assert torch.equal(logits[:, :, :1], base_logits)
    for config in (
        SamplingConfig(temperature=0.0),
        SamplingConfig(temperature=0.0, cfg_scale=3.0),
        SamplingConfig(cfg_scale=2.0, top_k=20),
    ):
        images = [base_images(base, config), images_of(model, config)]
        assert images[0].shape == (BATCH, 8, 8, 3) and images[0].float().std() > 10
        assert torch.equal(*images)


def test_bf16(backbone):
    """bf16 changes teacher-forced logits by less than docs/imagenet.md states; sampling works."""
    model = trained(backbone)
    windows = model.noised_windows(codes_of(model), KEYS)
    exact = predict(model, windows)
    model.to(torch.bfloat16)
    error = predict(model, windows) - exact
    assert error.dtype == torch.float32
    assert 0 < error.pow(2).mean().sqrt() < BF16_RMS * exact.std()
    assert error.abs().max() < BF16_MAX * exact.std()
    config = SamplingConfig(cfg_scale=2.0, top_k=20)
    drawn = sample_windows(model, tiny_prepared(backbone, BATCH), KEYS, config)
    h, state = prefill(model, tiny_prepared(backbone, BATCH), config)
    assert h.dtype == state.cache.keys[0].dtype == torch.bfloat16
    assert (drawn >= 0).all() and (drawn < torch.tensor(backbone.spec.subvocabs)).all()


@pytest.mark.parametrize("preset", ["iclr2026", "arxiv2505"])
def test_drafts_start_near_uniform(backbone, preset):
    if backbone.spec.family == "open_magvit2":
        pytest.skip("its norm comes after the codec: small states do not make small logits")
    model = attach(backbone, preset)
    codes = codes_of(model)
    losses = model(codes, condition_of(model), model.noised_windows(codes, KEYS)).means()
    assert losses[1:].tolist() == pytest.approx([math.log(48)] * 3, abs=0.3)


def test_training_can_leave_the_base(backbone):
    """At the start the gates and draft slots have gradients; with open gates everything has."""
    model = attach(backbone)
    codes = codes_of(model)
    for gates_open in (False, True):
        if gates_open:
            open_gates(model)
        model.zero_grad()
        losses = model(codes, condition_of(model), model.noised_windows(codes, KEYS))
        losses.loss.backward()
        still = {n for n, p in model.codec.named_parameters() if not p.grad.abs().sum() > 0}
        assert not any("z_" in n or n.startswith("decoder.") for n in still)
        assert all(n.startswith("encoder.") for n in still) and (not gates_open or not still)


def test_shared_queries_attend_as_others_do():
    """Which of the two ways is taken depends on the device and the block."""
    generator = torch.Generator().manual_seed(0)
    q, read, own = (
        torch.randn(shape, generator=generator)
        for shape in ((3, 2, 4), (5, 6, 2, 2, 4), (3, 2, 2, 4))
    )
    valid = torch.rand(5, 6, generator=generator) < 0.5
    for mask in (None, valid):
        torch.testing.assert_close(_attend(q, read, own, mask), _attend_shared(q, read, own, mask))


# -- steps and causality --------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["arxiv2505", rare("iclr2026")])
@pytest.mark.parametrize("k, stride", [(1, 1), rare(2, 1), (4, 1), rare(8, 1), *GEOMETRIES[4:]])
def test_steps_agree_with_teacher_forcing(backbone, preset, k, stride):
    model = trained(backbone, preset, k=k)
    prepared = tiny_prepared(backbone, BATCH)
    config = SamplingConfig(temperature=0.0, cfg_scale=2.0, stride=stride)
    windows = sample_windows(model, prepared, KEYS, config)
    assert windows.shape[1] == -(-16 // stride)
    h, state = prefill(model, prepared, config)
    cached = [h]
    for i in range(windows.shape[1] - 1):
        cached.append(feed(model, windows[:, i], i, state))
    null = backbone.encode_condition(prepared, torch.ones(BATCH, dtype=torch.bool))
    with torch.no_grad():
        conditions = condition_of(model), null
        forced = torch.cat([model.hidden(c, windows, stride=stride) for c in conditions])
        torch.testing.assert_close(torch.stack(cached, 1), forced, atol=2e-5, rtol=0)
        every = model.slot_logits(model.decode_slots(forced), torch.cat([windows] * 2))
    for s, logits in enumerate(every):
        cond, null = logits.chunk(2)
        greedy = (null + 2.0 * (cond - null)).argmax(-1)
        assert torch.equal(greedy, windows[..., s]), (
            "the loop samples what teacher forcing predicts"
        )


@pytest.mark.parametrize("preset", ["iclr2026", rare("arxiv2505")])
@pytest.mark.parametrize("k, stride", GEOMETRIES[:-1])
def test_no_output_depends_on_later_windows(backbone, preset, k, stride):
    model, count = trained(backbone, preset, k=k), -(-16 // stride)
    windows = tiny_codes(backbone, BATCH, count, k)
    before = predict(model, windows, stride=stride)
    for m in (0, count // 2, count - 2):
        changed = windows.clone()
        changed[:, m:] = other_codes(backbone, changed[:, m:])
        after = predict(model, changed, stride=stride)
        assert torch.equal(after[:, : m + 1], before[:, : m + 1])
        assert (after[:, m + 1] - before[:, m + 1]).abs().max() > 0.1


@pytest.mark.parametrize("preset", ["iclr2026", "arxiv2505"])
def test_no_output_depends_on_codes_outside_its_inputs(backbone, preset):
    """Position p first enters through input window p - k + 1, which predicts window p - k + 2."""
    model = trained(backbone, preset, k=4)
    codes = codes_of(model)
    before = predict(model, model.noised_windows(codes, KEYS))
    for p in (5, 12):
        changed = codes.clone()
        changed[:, p:] = other_codes(backbone, changed[:, p:])
        after = predict(model, model.noised_windows(changed, KEYS))
        assert torch.equal(after[:, : p - 2], before[:, : p - 2])
        assert not torch.equal(after, before)


@pytest.mark.parametrize("k, stride", [(4, 1), (5, 2)])
def test_slots_past_the_end_have_no_influence(backbone, k, stride):
    model = trained(backbone, k=k)
    geometry = model.windows.shrunk(k, stride)
    windows = tiny_codes(backbone, BATCH, geometry.count, k)
    changed = windows.clone()
    changed[:, ~geometry.valid()] = 7
    assert not torch.equal(windows[:, :-1], changed[:, :-1])
    before, after = (predict(model, w, stride=stride) for w in (windows, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("stride", [2, 3])
def test_with_a_stride_an_attached_model_starts_as_the_base(backbone, stride):
    """Slot 0 gives the base's own prediction from all final codes, not only from those in slot 0;
    the untrained drafts after them have no influence.
    """
    base, model = attach(backbone, "base"), attach(backbone, k=4)
    config = SamplingConfig(cfg_scale=2.0, top_k=20, stride=stride)
    windows = sample_windows(model, tiny_prepared(backbone, BATCH), KEYS, config)
    final = model.windows.shrunk(4, stride).final_codes(windows)
    said = predict(base, base.windows.gather(final), seed=2)[:, ::stride]
    given = tiny_codes(backbone, BATCH, 16, 1, seed=2)[:, ::stride]
    with torch.no_grad():
        d = model.decode_slots(model.hidden(condition_of(model), windows, stride=stride))
        own = torch.cat(model.slot_logits(d[:, :, :1], given), dim=-1)
    torch.testing.assert_close(own, said, atol=1e-5, rtol=0)
    state = prefill(model, tiny_prepared(backbone, BATCH), config)[1]
    assert state.cache.length == condition_of(model).prefix.shape[1] + stride * (
        windows.shape[1] - 1
    ), "one cache entry per code fed"


def test_with_a_stride_a_window_is_fed_once_per_final_code(backbone):
    """A trained model reads the same inputs as in training, except for slots not yet known."""
    model = trained(backbone, k=4)
    codes = codes_of(model)
    windows = model.windows.shrunk(4, 2).gather(codes)
    seen = []
    model.codec.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    h = model.hidden(condition_of(model), windows, stride=2)
    known = seen[0].view(BATCH, -1, 4)[0]
    assert known.sum(-1).tolist() == [4, 3] * 7, "the last slot of the second window is not known"
    every = model.hidden(condition_of(model), model.windows.gather(codes))
    torch.testing.assert_close(h[:, :1], every[:, :1])
    # All four slots of input window 0 are the same; window 1 lacks its last one.
    one = model.embed_windows(windows[:, :1])
    torch.testing.assert_close(one, model.embed_windows(model.windows.gather(codes)[:, :1]))


def test_a_window_of_fewer_slots_is_read_as_one_whose_others_are_unknown(backbone):
    model = trained(backbone, k=4)
    windows = model.windows.gather(codes_of(model))
    known = torch.full((windows.shape[1],), 2)
    torch.testing.assert_close(
        model.embed_windows(windows[:, :, :2]), model.embed_windows(windows, known_n=known)
    )


def test_drafts_are_read(backbone):
    """With open gates, a draft changes the whole prediction of the next window, slot 0 included."""
    model = trained(backbone, k=2)
    windows = model.windows.gather(codes_of(model))
    changed = windows.clone()
    changed[:, 3, 1] = other_codes(backbone, changed[:, 3, 1])
    moved = (predict(model, changed) - predict(model, windows)).abs().amax((0, 2, 3))
    assert moved[:4].max() == 0 and moved[4] > 0.01


# -- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 5])
def test_loss_against_a_loop(backbone, k):
    model = trained(backbone, k=k, slot_weights=(1.0, 0.5, 0.25))
    codes = codes_of(model)
    windows = model.noised_windows(codes, KEYS)
    with torch.no_grad():
        d = model.decode_slots(model.hidden(condition_of(model), windows))
    every = [logits.log_softmax(-1) for logits in model.slot_logits(d, model.windows.gather(codes))]
    weights = [1.0, 0.5, 0.25, 0.25, 0.25][:k]
    total = norm = 0.0
    for b in range(BATCH):
        for i in range(model.windows.count):
            for j in range(k):
                if i + j < 16:
                    for s, log_p in enumerate(every):
                        total -= weights[j] * log_p[b, i, j, codes[b, i + j, s]].item()
                    norm += weights[j]
    losses = model(codes, condition_of(model), windows)
    assert model.config.weights() == weights
    assert losses.weighted(weights).item() == pytest.approx(total / norm, rel=1e-5)
    assert losses.counts.tolist() == [BATCH * n for n in model.windows.valid().sum(0).tolist()]
    only_first = losses.weighted([1.0] + [0.0] * (k - 1))
    assert only_first.item() == pytest.approx(losses.means()[0].item())


# -- the other options ----------------------------------------------------------------------------


def test_gaussian_noise(backbone):
    """Slot 0's embedding stays clean, the other slots get noise of variance 0.1; codes are
    unchanged.
    """
    model = trained(backbone, noise="gaussian", k=4)
    codes = codes_of(model)
    windows = model.noised_windows(codes, KEYS)
    assert torch.equal(windows, model.windows.gather(codes))
    seen = []
    model.codec.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    clean, noised = model.embed_windows(windows), model.embed_windows(windows, 0, KEYS)
    noise = (seen[1] - seen[0]).unflatten(0, (BATCH, -1))
    assert noise[:, :, 0].abs().max() == 0
    assert noise[:, :, 1:].var().item() == pytest.approx(0.1, rel=0.1)
    assert not torch.allclose(clean, noised)
    alone = model.embed_windows(windows[1:2], 0, KEYS[1:2])
    torch.testing.assert_close(alone[0], noised[1])


def test_residual_choices():
    """ "all" adds the hidden state to drafts too; "none" adds it nowhere, nor the embedding."""
    backbone = tiny_llamagen("class")
    first, every, none = (trained(backbone, residual=r) for r in ("first", "all", "none"))
    h = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    read = none.decode_slots(h)
    torch.testing.assert_close(first.decode_slots(h)[:, 1:], read[:, 1:])
    torch.testing.assert_close(every.decode_slots(h)[:, 1:], read[:, 1:] + h[:, None])
    gated = h + first.codec.decoder.z_out * read[:, 0]
    torch.testing.assert_close(first.decode_slots(h)[:, 0], gated)
    torch.testing.assert_close(every.decode_slots(h)[:, 0], gated)
    windows = first.windows.gather(codes_of(first, 2))
    content = backbone.embed_tokens(windows)[:, :, 0]
    expected = content + first.codec.encoder.z_in * none.embed_windows(windows)
    torch.testing.assert_close(first.embed_windows(windows), expected)


@pytest.mark.parametrize(
    "override",
    [
        {"noise": "salt"},
        {"schedule": "cosine"},
        {"residual": "some"},
        {"slot_weights": (0.0, 1.0)},
        {"slot_weights": ()},
        {"depth": 0},
        {"k": 0},
        {"k": 17},
    ],
)
def test_bad_methods(override):
    with pytest.raises(ValueError, match=next(iter(override)).split("_")[0]):
        TensorAR(tiny_llamagen("class"), presets.iclr2026(**override))


def test_every_setting_of_the_presets():
    paper = TensorARConfig(
        k=4,
        depth=1,
        mlp=False,
        residual="first",
        noise="categorical",
        schedule="exponential",
        noise_floor=0.0,
        own_drafts=0.0,
        anneal=False,
        detach=False,
        slot_weights=(1.0,),
    )
    earlier = {"depth": 2, "mlp": True, "noise": "codebook", "schedule": "sine"}
    assert presets.iclr2026() == paper and presets.arxiv2505() == replace(paper, **earlier)
    assert presets.tuned() == replace(paper, slot_weights=(1.0, 0.03), own_drafts=0.5)
    assert presets.base() == replace(paper, k=1)


def test_bad_preset_and_missing_tokenizer():
    with pytest.raises(
        ValueError, match=r"unknown preset 'iclr'.*iclr2026, arxiv2505, tuned, base"
    ):
        presets.method("iclr")
    backbone = tiny_llamagen("class")
    backbone.frozen.tokenizer = None
    with pytest.raises(ValueError, match="no image tokenizer"):
        TensorAR(backbone, presets.arxiv2505())


def test_codec_seed():
    backbone = tiny_llamagen("class")
    one, same, other = (
        TensorAR(backbone, presets.iclr2026(), seed=s).codec.state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["decoder.transformer.queries"], other["decoder.transformer.queries"])


# -- own drafts -----------------------------------------------------------------------------------


def own_drafts(model, codes, keys=KEYS, passes=1, rows=None):
    prepared = {
        k: v if rows is None else v[rows] for k, v in tiny_prepared(model.backbone, BATCH).items()
    }
    condition = model.backbone.encode_condition(prepared)
    return model.own_draft_windows(codes, condition, keys, passes)


@pytest.mark.parametrize("passes", [1, 2])
def test_own_drafts_hold_the_true_code_in_slot_0_only(backbone, passes):
    model = trained(backbone, k=4)
    codes, p = codes_of(model), 6
    changed = codes.clone()
    changed[:, p:] = other_codes(backbone, changed[:, p:])
    own, other = (own_drafts(model, c, passes=passes) for c in (codes, changed))
    assert torch.equal(own[:, :, 0], codes)
    # Truth at p first enters through slot 0 of input window p, which predicts window p + 1.
    assert torch.equal(own[:, :p], other[:, :p])
    assert torch.equal(own[:, p, 1:], other[:, p, 1:])
    assert torch.equal(predict(model, own)[:, : p + 1], predict(model, other)[:, : p + 1])
    clean = [model.windows.gather(c) for c in (codes, changed)]
    assert not torch.equal(*(predict(model, w)[:, : p + 1] for w in clean)), "clean drafts do leak"


def test_own_drafts_depend_on_their_own_key(backbone):
    model = trained(backbone, k=4)
    codes = codes_of(model)
    together = own_drafts(model, codes, passes=2)
    for i in range(BATCH):
        alone = own_drafts(model, codes[i : i + 1], KEYS[i : i + 1], passes=2, rows=[i])
        assert torch.equal(alone[0], together[i])


def test_own_drafts_follow_the_models_distribution():
    """Drawn with many keys, the first window's draft follows the distribution predicted from the
    prefix.
    """
    model = trained(tiny_llamagen("class"), k=2)
    codes = codes_of(model)
    rows = list(range(BATCH)) * 300
    draws = own_drafts(model, codes[rows], make_keys(0, torch.arange(len(rows))), rows=rows)
    drafts = draws[:, 0, 1, 0].view(300, BATCH).T
    frequencies = torch.nn.functional.one_hot(drafts, 48).float().mean(1)
    expected = predict(model, draws[:BATCH])[:, 0, 1].softmax(-1)
    torch.testing.assert_close(frequencies, expected, atol=0.1, rtol=0)
