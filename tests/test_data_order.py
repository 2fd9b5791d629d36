"""The stateless data order: epochs, resume, world sizes, the held-out split."""

import pytest
import torch

from t2i.data.order import sample_index, split_indices


def test_every_epoch_visits_every_sample_once_in_its_own_order():
    epochs = [[sample_index(p, 50, 7) for p in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(50)]}) == 4
    assert epochs[0] != [sample_index(p, 50, 8) for p in range(50)]


def test_the_order_is_frozen():
    """A newer version must resume an old run with the same data, and hold out the same."""
    assert [sample_index(p, 10, 0) for p in range(12)] == [1, 8, 6, 9, 2, 0, 4, 5, 3, 7, 3, 8]
    images = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 6, 7])
    assert split_indices(12, 3, 0)[1].tolist() == [1, 3, 11]
    assert split_indices(12, 3, 1, images)[1].tolist() == [0, 6, 7, 8, 9]


def test_the_held_out_split_is_fixed_and_disjoint():
    train, validation = split_indices(100, 20, seed=1)
    assert len(validation) == 20
    assert sorted(train.tolist() + validation.tolist()) == list(range(100))
    assert torch.equal(validation, split_indices(100, 20, seed=1)[1])
    assert validation.tolist() == sorted(validation.tolist())
    assert not torch.equal(validation, split_indices(100, 20, seed=2)[1])
    # A longer validation set contains the shorter one.
    assert set(validation.tolist()) < set(split_indices(100, 30, seed=1)[1].tolist())
    assert len(split_indices(5, 0, seed=0)[0]) == 5
    with pytest.raises(ValueError, match="cannot hold out 5 of 5"):
        split_indices(5, 5, seed=0)
