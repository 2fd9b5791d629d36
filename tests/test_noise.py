"""Schedules and corruptions of drafts."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_codes, tiny_llamagen, tiny_open_magvit2

from t2i.rng import fold, integers, make_keys
from t2i.sampling import SamplingConfig
from t2i.tensorar import presets
from t2i.tensorar.model import TensorAR
from t2i.tensorar.noise import (
    corrupt_bits,
    corrupt_categorical,
    corrupt_codebook,
    schedule_strengths,
)
from t2i.tensorar.sampler import new_drawing

TABLES = {  # b(j) for k = 4
    "linear": [0, 0.25, 0.5, 0.75],
    "sine": [0, 0.382683, 0.707107, 0.92388],
    "sqrt": [0, 0.5, 0.707107, 0.866025],
    "exponential": [0, 0.393469, 0.632121, 0.77687],
}


@pytest.mark.parametrize("schedule", TABLES)
def test_schedules(schedule):
    assert schedule_strengths(schedule, 4) == pytest.approx(TABLES[schedule], abs=1e-6)
    for k in (1, 2, 8):
        b = schedule_strengths(schedule, k)
        assert len(b) == k and b[0] == 0 and sorted(set(b)) == b and b[-1] < 1
    assert schedule_strengths(schedule, 2)[1] == schedule_strengths(schedule, 4)[2], "u = j / k"


STRENGTHS = torch.tensor([0.0, 0.3, 0.7, 0.95])


def categorical(windows, keys):
    return corrupt_categorical(windows, STRENGTHS, (48, 31), keys)


def codebook(windows, keys):
    tables = [torch.randn(v, 5, generator=torch.Generator().manual_seed(v)) for v in (48, 31)]
    return corrupt_codebook(windows, STRENGTHS, tuple(tables), keys)


def bits(windows, keys):
    return corrupt_bits(windows, STRENGTHS, (64, 4096), keys)


def some_windows(batch, count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(31, (batch, count, 4, 2), generator=generator)


@pytest.mark.parametrize("corrupt", [categorical, codebook, bits])
def test_noise_depends_on_the_samples_key_only(corrupt):
    windows, keys = some_windows(5), make_keys(3, torch.arange(5))
    noised = corrupt(windows, keys)
    assert torch.equal(noised, torch.cat([corrupt(windows[:2], keys[:2]), noised[2:]]))
    order = torch.tensor([4, 0, 2])
    assert torch.equal(noised[order], corrupt(windows[order], keys[order]))
    assert not torch.equal(noised, corrupt(windows, make_keys(4, torch.arange(5))))


@pytest.mark.parametrize("corrupt", [categorical, codebook, bits])
def test_slot_0_stays_clean_and_noise_grows(corrupt):
    windows = some_windows(64, 64)
    noised = corrupt(windows, make_keys(0, torch.arange(64)))
    changed = (noised != windows).any(-1).float().mean((0, 1))
    assert changed[0] == 0 and changed[1] > 0.2 and (changed.diff() > 0).all()


def test_slot_0_stays_clean_where_two_codes_share_a_direction():
    table = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    windows = torch.ones(1, 1, 4, 1, dtype=torch.long)
    assert corrupt_codebook(windows, STRENGTHS, (table,), make_keys(0, torch.arange(1)))[0, 0, 0]


def test_categorical_rate_and_distribution():
    windows = torch.zeros(100, 100, 4, 2, dtype=torch.long)
    noised = categorical(windows, make_keys(0, torch.arange(100)))
    # A uniform token of both sub-tokens equals the old one with probability 1 / (48 * 31).
    rate = (noised != 0).any(-1).float().mean((0, 1))
    torch.testing.assert_close(rate, STRENGTHS * (1 - 1 / (48 * 31)), atol=0.02, rtol=0)
    replaced = noised[:, :, 3][(noised[:, :, 3] != 0).any(-1)]
    for s, vocab in enumerate((48, 31)):
        counts = replaced[:, s].bincount(minlength=vocab).float()
        assert len(counts) == vocab
        torch.testing.assert_close(
            counts / counts.sum(), torch.full((vocab,), 1 / vocab), atol=0.007, rtol=0
        )


def test_codebook_noise_against_algorithm_2():
    windows, keys = some_windows(3), make_keys(9, torch.arange(3))
    tables = [torch.randn(v, 5, generator=torch.Generator().manual_seed(v)) for v in (48, 31)]
    noised = codebook(windows, keys)
    for s, table in enumerate(tables):
        n = integers(fold(keys, 1 + s), len(table), 16, 4)
        for index in torch.cartesian_prod(torch.arange(3), torch.arange(16), torch.arange(4)):
            b, i, j = index.tolist()
            x, strength = windows[b, i, j, s], STRENGTHS[j]
            mixed = (1 - strength) * table[x] + strength * table[n[b, i, j]]
            assert noised[b, i, j, s] == F.cosine_similarity(mixed[None], table).argmax()


def test_bit_noise_flips_each_bit_independently():
    """A bit flips with probability b/2, independently of the others; strength 1 leaves nothing of
    the code.
    """
    windows = torch.tensor([45, 2718]).expand(100, 50, 4, 2)
    strengths = torch.tensor([0.0, 0.3, 0.7, 1.0])
    noised = corrupt_bits(windows, strengths, (64, 4096), make_keys(0, torch.arange(100)))
    places = [(s, i) for s, n in enumerate((6, 12)) for i in range(n)]
    flips = torch.stack([(noised ^ windows)[..., s] >> i & 1 for s, i in places], dim=-1).float()
    rates = flips.mean((0, 1))
    torch.testing.assert_close(rates, (strengths / 2)[:, None].expand(4, 18), atol=0.03, rtol=0)
    same = (noised == windows).all(-1).float().mean((0, 1))
    torch.testing.assert_close(same, (1 - strengths / 2) ** 18, atol=0.02, rtol=0)
    for j in (1, 2, 3):
        off_diagonal = flips[:, :, j].flatten(0, 1).T.corrcoef() - torch.eye(18)
        assert off_diagonal.abs().max() < 0.07
    assert (noised >= 0).all() and noised[..., 0].max() == 63 and noised[..., 1].max() > 4000


def test_renoising_keeps_final_slots_and_scales_the_strength_of_the_others():
    model = TensorAR(tiny_llamagen("class"), presets.iclr2026())
    windows, keys = torch.full((100, 60, 3, 1), 7), make_keys(0, torch.arange(100))
    config = SamplingConfig(window=3, stride=2, renoise=0.5)
    drawing = new_drawing(model, None, keys, torch.zeros(8, 100, 3, 1).long(), config)
    changed = (drawing.corrupt(windows, keys) != windows).float().mean((0, 1))
    rate = 0.5 * schedule_strengths("exponential", 4)[2] * (1 - 1 / 48)
    assert changed[:, 0].tolist() == [0, 0, pytest.approx(rate, abs=0.03)]


@pytest.mark.parametrize("kind", ["bits", "vectors"])
def test_codebook_noise_is_chosen_by_the_backbone(kind):
    backbone = tiny_open_magvit2() if kind == "bits" else tiny_llamagen("class")
    model = TensorAR(backbone, presets.arxiv2505())
    codes, keys = tiny_codes(backbone, 2, 16), make_keys(0, torch.arange(2))
    windows, b = model.windows.gather(codes), torch.tensor(schedule_strengths("sine", 4))
    expected = (
        corrupt_bits(windows, b, backbone.spec.subvocabs, keys)
        if kind == "bits"
        else corrupt_codebook(windows, b, backbone.code_vectors(), keys)
    )
    assert torch.equal(model.noised_windows(codes, keys), expected)
