"""The stateless data order: epochs, resume, world sizes, the held-out split."""

import pytest
import torch

from t2i.data.order import batch_indices, sample_index, split_indices


def test_every_epoch_visits_every_sample_once_in_its_own_order():
    epochs = [[sample_index(p, 50, 7) for p in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(50)]}) == 4
    assert epochs[0] != [sample_index(p, 50, 8) for p in range(50)]


def test_the_order_is_frozen():
    """Resuming an old run with a new version of the kit must see the same data."""
    assert [sample_index(p, 10, 0) for p in range(12)] == [1, 8, 6, 9, 2, 0, 4, 5, 3, 7, 3, 8]


def test_batches_follow_the_positions_across_epochs():
    seen = torch.cat([batch_indices(step, 8, 13, 3) for step in range(5)]).tolist()
    assert seen == [sample_index(p, 13, 3) for p in range(40)]
    assert batch_indices(3, 8, 13, 3).dtype == torch.int64
    assert sorted(batch_indices(0, 8, 3, 3).tolist()[:6]) == [0, 0, 1, 1, 2, 2]  # n < batch


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_global_batch_does_not_depend_on_the_world_size(world_size):
    for step in (0, 4, 100):
        parts = [batch_indices(step, 12, 31, 5, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), batch_indices(step, 12, 31, 5))


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        batch_indices(0, 8, 10, 0, 0, 3)
    with pytest.raises(ValueError, match="no samples"):
        batch_indices(0, 8, 0, 0)


def test_the_held_out_split_is_fixed_and_disjoint():
    train, validation = split_indices(100, 20, seed=1)
    assert len(validation) == 20
    assert sorted(train.tolist() + validation.tolist()) == list(range(100))
    assert torch.equal(validation, split_indices(100, 20, seed=1)[1])
    assert validation.tolist() == sorted(validation.tolist())
    assert not torch.equal(validation, split_indices(100, 20, seed=2)[1])
    # A longer validation set holds the shorter one.
    assert set(validation.tolist()) < set(split_indices(100, 30, seed=1)[1].tolist())
    assert len(split_indices(5, 0, seed=0)[0]) == 5
    with pytest.raises(ValueError, match="cannot hold out 5 of 5"):
        split_indices(5, 5, seed=0)
