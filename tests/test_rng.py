"""Random numbers: well distributed, independent of batch and order, and never changing."""

import pytest
import torch

from t2i.rng import fold, gumbels, integers, make_keys, normals, uniforms

# The keys and uniforms were also computed with Python's integers.
FIXED_KEYS = [5609551638696251041, 4116032926249438170]
FIXED_UNIFORMS = [
    [0.4422959089279175, 0.18835699558258057],
    [0.250007688999176, 0.9998896718025208],
]
FIXED_INTEGERS = [[11251, 9819, 5728], [7382, 7681, 9845]]
FIXED_NORMALS = [[0.7234975, 2.2496316], [-1.0409207, 1.0141275]]


def test_fixed_values():
    """Seeds in papers and checkpoints mean these numbers: a change changes every image."""
    keys = make_keys(7, 3, torch.arange(2))
    assert keys.tolist() == FIXED_KEYS
    assert torch.equal(uniforms(keys, 2), torch.tensor(FIXED_UNIFORMS))
    assert integers(keys, 16384, 3).tolist() == FIXED_INTEGERS
    torch.testing.assert_close(normals(keys, 2), torch.tensor(FIXED_NORMALS), atol=1e-6, rtol=0)


def test_uniforms_look_uniform():
    u = uniforms(make_keys(0, torch.arange(200)), 500)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-square with 99 degrees of freedom
    centred = u - 0.5
    pairs = {
        "neighbours": (centred[:, 1:] * centred[:, :-1]).mean(),
        "keys": (centred[1:] * centred[:-1]).mean(),
        "same place, next seed": (
            centred * (uniforms(make_keys(1, torch.arange(200)), 500) - 0.5)
        ).mean(),
    }
    for name, covariance in pairs.items():
        assert covariance.abs() < 4 / 12 / u.numel() ** 0.5, name


def test_normals_and_integers():
    x = normals(make_keys(0, torch.arange(100)), 1000)
    assert x.mean().abs() < 0.01 and (x.var() - 1).abs() < 0.02
    assert (x.pow(4).mean() - 3).abs() < 0.1
    counts = integers(make_keys(0), 7, 70000).bincount(minlength=7)
    assert len(counts) == 7 and (counts - 10000).abs().max() < 400


def test_gumbels():
    x = gumbels(make_keys(0, torch.arange(100)), torch.arange(1000))
    assert x.isfinite().all()
    ordered = x.flatten().sort().values
    expected = (-torch.exp(-ordered)).exp()
    assert (expected - (torch.arange(100_000) + 0.5) / 100_000).abs().max() < 0.006  # Kolmogorov
    some = torch.tensor([998, 3, 0])
    assert torch.equal(gumbels(make_keys(0, torch.arange(100)), some), x[:, some])


def test_a_number_depends_on_its_own_key_only():
    keys = make_keys(5, torch.tensor([4, 1, 9]), torch.tensor([0, 2, 0]))
    whole = uniforms(keys, 6, 2)
    assert torch.equal(whole, torch.cat([uniforms(k[None], 6, 2) for k in keys]))
    assert torch.equal(whole[[2, 0]], uniforms(keys[[2, 0]], 6, 2))
    assert keys[1] == make_keys(5, 1, 2) == fold(make_keys(5), 1, 2)
    assert torch.equal(whole[:, :3], uniforms(keys, 3, 2)), "a longer draw extends a shorter one"


def test_keys_are_distinct():
    seeds = [make_keys(s, torch.arange(50)[:, None], torch.arange(50)).flatten() for s in range(4)]
    assert torch.cat(seeds).unique().numel() == 4 * 50 * 50
    assert make_keys(0, 1, 2) != make_keys(0, 2, 1)


@pytest.mark.parametrize("seed", [0, -1, 2**62])
def test_extreme_seeds(seed):
    assert 0.4 < uniforms(make_keys(seed, 0), 1000).mean() < 0.6
