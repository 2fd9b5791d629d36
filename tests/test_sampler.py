"""Filters, guidance, draws and the sampling loop, and what an image may depend on."""

import pytest
import torch
from helpers import (
    BACKBONES,
    feed,
    filter_logits,
    golden_table,
    open_gates,
    prefill,
    rare,
    tiny_codes,
    tiny_llamagen,
    tiny_prepared,
)

from t2i.errors import NotFiniteError, UserError
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig, SubTokenSampling
from t2i.tensorar import presets, sampler
from t2i.tensorar.drawing import candidates, check_finite, likeliest, noise_keys, pick
from t2i.tensorar.model import TensorAR
from t2i.tensorar.sampler import sample_windows, window_logits
from t2i.tensorar.windows import Windows


@pytest.fixture
def model(backbone):
    return open_gates(TensorAR(backbone, presets.iclr2026()).eval())


def kept(logits, **settings):
    filtered = filter_logits(torch.tensor([logits]), SubTokenSampling(**settings))
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


def test_equally_likely_codes_are_kept_in_order():
    """When ties cross top-p, the lower codes are kept, in a batch of any shape."""
    logits = torch.zeros(3, 5000)
    _, codes = candidates(logits, SubTokenSampling(top_p=0.5))
    assert torch.equal(codes, torch.arange(5000).expand(3, -1))


def test_temperature_scales_and_zero_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.equal(filter_logits(logits, SubTokenSampling(temperature=0.5)), logits * 2)
    greedy = SubTokenSampling(temperature=0.0)
    assert pick(logits.expand(99, -1), make_keys(0, torch.arange(99)), greedy).tolist() == [1] * 99


def chi_square(counts, expected):
    """Chi-square over its degrees of freedom; asserts that no code of probability 0 was drawn."""
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum() / (len(counts) - 1))


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"temperature": 0.7}, {"top_k": 20, "top_p": 0.9}),
        *(rare({"top_k": 9}), rare({"top_p": 0.8})),
    ],
    ids=str,
)
def test_draws_follow_the_softmax_distribution(settings):
    """The test has the power to notice a temperature that is 5 % off."""
    n, rule = 200_000, SubTokenSampling(**settings)
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    logits[7], logits[8] = -torch.inf, logits[9]
    codes = pick(logits.expand(n, -1), make_keys(1, torch.arange(n)), rule)
    counts = codes.bincount(minlength=40).float()
    expected = n * filter_logits(logits, rule).softmax(-1)
    assert chi_square(counts, expected) < 2
    wrong = pick(logits.expand(n, -1) / 1.05, make_keys(1, torch.arange(n)), rule)
    assert chi_square(wrong.bincount(minlength=40).float(), expected) > 10


def test_rare_codes_are_drawn_at_their_probability():
    """In a large vocabulary, 16 codes together have a probability of 0.004. Drawing them twice or a
    fifth as often would be noticed in 97 of 100 cases.
    """
    n, vocab, share = 10_000, 4096, 4e-3
    p = torch.full((vocab,), (1 - share) / (vocab - 16))
    p[:16] = share / 16
    drawn = [
        pick(p.log().expand(len(keys), -1), keys, SubTokenSampling())
        for keys in make_keys(0, torch.arange(n)).split(2000)
    ]
    assert abs(int((torch.cat(drawn) < 16).sum()) - n * share) < 4 * (n * share) ** 0.5


@pytest.mark.parametrize(
    "bad",
    [
        {"cfg_scale": 0.5},
        {"cfg_interval": -2},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stride": 0},
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
    for i in range(windows.shape[1]):
        d = model.decode_slots(h)
        for s, logits in enumerate(collected):
            index = torch.tensor([i])
            logits.append(window_logits(model, d, windows[:, i, :, :s], index, state))
        if i + 1 < windows.shape[1]:
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
    model = open_gates(TensorAR(backbone, presets.iclr2026()).eval())
    windows = tiny_codes(backbone, 2, 8, 4)
    plain, guided, some = (
        logits_by_step(model, windows, SamplingConfig(cfg_scale=s, cfg_interval=c, stride=2), 2)[-1]
        for s, c in ((1.0, -1), (3.0, -1), (3.0, 5))
    )
    assert torch.equal(some[:, :4], guided[:, :4])  # windows 0..3 start at tokens 0..6
    torch.testing.assert_close(some[:, 4:], plain[:, 4:], atol=1e-4, rtol=0)


# -- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "cfg_scale", "stride"),
    [
        *((name, 2.0, 1) for name in ("llamagen_class", "janus", "rar")),
        *((name, 2.0, 3) for name in ("llamagen_text", "open_magvit2")),
        *(rare(name, 2.0, 1) for name in ("llamagen_text", "open_magvit2")),
        *(rare(name, 1.0, 1) for name in BACKBONES),
        *(rare(name, 2.0, 3) for name in ("llamagen_class", "janus", "rar")),
    ],
    indirect=["backbone"],
)
def test_an_image_depends_on_its_own_key_and_condition_only(model, cfg_scale, stride):
    config = SamplingConfig(cfg_scale=cfg_scale, top_k=40, top_p=0.95, stride=stride)
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


def test_every_slot_of_every_step_has_its_own_noise(model):
    config = SamplingConfig(cfg_scale=2.0, top_k=30)
    keys = make_keys(0, torch.arange(3))
    windows = sample_windows(model, tiny_prepared(model.backbone, 3), keys, config)
    logits = logits_by_step(model, windows, config, 3)
    noise = noise_keys(keys, model.windows, len(logits))
    assert noise.unique().numel() == noise.numel()
    for s, logits_s in enumerate(logits):
        drawn = pick(logits_s, noise[..., s].transpose(0, 1), SubTokenSampling(top_k=30))
        assert torch.equal(drawn, windows[..., s])


def test_noise_belongs_to_the_position():
    """A final code has one noise, whatever k and stride; drafts have their own."""
    keys = make_keys(0, torch.arange(2))
    plain = noise_keys(keys, Windows(12, 1), 2)[:, :, 0]
    for k, stride in ((4, 1), (4, 2), (5, 3)):
        windows = Windows(12, k, stride)
        noise = noise_keys(keys, windows, 2)
        assert torch.equal(windows.final_codes(noise.transpose(0, 1)), plain.transpose(0, 1))
        drafts = noise[0, :, stride:]
        assert not (drafts == plain[stride:k].transpose(0, 1)).any()


def surprise(model, rows):
    """Compares two counts with the model's own predictions given all that it had read: how often
    each code was drawn (chi-square over its degrees of freedom), and how often a final code equals
    its last draft (z-score).
    """
    prepared = tiny_prepared(model.backbone, 1)
    prepared = {name: value.expand(rows, *value.shape[1:]) for name, value in prepared.items()}
    config = SamplingConfig(temperature=1.5)
    windows = sample_windows(model, prepared, make_keys(0, torch.arange(rows)), config)
    with torch.no_grad():
        hidden = model.hidden(model.backbone.encode_condition(prepared), windows)
        logits = model.slot_logits(model.decode_slots(hidden), windows)[0]
    p, final, draft = (logits[:, 1:, 0] / 1.5).softmax(-1), windows[:, 1:, 0, 0], windows[:, :-1, 1]
    drawn = torch.nn.functional.one_hot(final, p.shape[-1])
    counts = (drawn - p).sum(0).square() / (p * (1 - p)).sum(0)
    q = p.gather(-1, draft[..., :1])[..., 0]
    agreed = ((final == draft[..., 0]).float() - q).sum() / (q * (1 - q)).sum().sqrt()
    return float(counts.mean()), float(agreed)


def test_sequences_follow_the_models_own_distribution(model, monkeypatch):
    """Also when the model reads drafts. If drafts shared the noise of the final code, they would
    come true too often.
    """
    counts, agreed = surprise(model, 400)
    assert counts < 1.2 and abs(agreed) < 3.5

    def shared(keys, windows, sub_tokens):
        plain = noise_keys(keys, Windows(windows.tokens, 1), sub_tokens)[:, :, 0]
        return plain[windows.positions(keys.device).clamp(max=windows.tokens - 1)].transpose(1, 2)

    monkeypatch.setattr(sampler, "noise_keys", shared)
    assert surprise(model, 400)[1] > 20


def test_refinement_stages_and_progress(model):
    ticks = []
    windows = sample_windows(
        model,
        tiny_prepared(model.backbone, 2),
        make_keys(0, torch.arange(2)),
        SamplingConfig(),
        on_step=lambda windows: ticks.append(windows.clone()),
    )
    assert windows.shape == (2, 16, 4, len(model.backbone.spec.subvocabs)) and len(ticks) == 16
    for i, seen in enumerate(ticks, start=1):
        assert torch.equal(seen[:, :i], windows[:, :i]) and not seen[:, i:].any()
    stages = [model.windows.stage_codes(windows, r) for r in range(1, model.windows.stages + 1)]
    assert torch.equal(stages[-1], model.windows.final_codes(windows))
    assert not torch.equal(stages[0], stages[-1])


def test_a_stride_above_the_window_size_is_refused(model):
    prepared, keys = tiny_prepared(model.backbone, 1), make_keys(0, torch.arange(1))
    for config in (SamplingConfig(stride=5), SamplingConfig(stride=3, window=2)):
        with pytest.raises(UserError, match=r"stride=. must be between 1 and the window size k="):
            sample_windows(model, prepared, keys, config)
    base = TensorAR(model.backbone, presets.base()).eval()
    with pytest.raises(UserError, match="stride=2 must be between 1 and the window size k=1"):
        sample_windows(base, prepared, keys, SamplingConfig(stride=2))


def test_images_of_numbers_that_are_not_finite_are_refused(model):
    """float16 overflows in many models, and what is drawn from NaN looks like an image."""
    prepared, keys = tiny_prepared(model.backbone, 2), make_keys(0, torch.arange(2))
    *_, last = model.backbone.image_layers().values()
    with torch.no_grad():
        [*last.parameters()][-1].fill_(torch.nan)  # those of the last sub-token alone
    for settings in ({}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.9}):
        with pytest.raises(NotFiniteError, match="in float32, the model's outputs are NaN"):
            sample_windows(model, prepared, keys, SamplingConfig(**settings))
    for total in (torch.inf, -torch.inf):
        with pytest.raises(NotFiniteError, match="in float16"):
            check_finite(torch.tensor(total), torch.float16)


def test_training_mode_is_refused():
    model = TensorAR(tiny_llamagen("class"), presets.iclr2026()).train()
    with pytest.raises(AssertionError, match="eval"):
        sample_windows(model, {"labels": torch.zeros(1)}, make_keys(0, 0), SamplingConfig())


def test_top_k_keeps_the_lower_of_equal_codes_in_any_batch():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.5, -0.0, 0.0, 0.5, -torch.inf])
    assert likeliest(logits, 6).tolist() == [2, 0, 3, 6, 4, 5]
    many = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(likeliest(many, 100)[7], likeliest(many[7], 100))
    values = many.gather(-1, likeliest(many, 100))
    assert torch.equal(values, many.topk(100).values)
