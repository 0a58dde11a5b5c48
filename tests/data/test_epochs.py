"""The epoch table: every example once per epoch, in an order that the seed alone decides."""

import numpy as np
import pytest

from mmrjax.data import epochs

INDICES = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 10, 16, 25])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_example_is_seen_exactly_once_per_epoch(batch_size, epoch):
    table, weight = epochs.epoch_table(INDICES, batch_size, 54, epoch)
    assert sorted(table[weight == 1]) == INDICES.tolist()
    assert weight.sum() == len(INDICES)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 10, 16, 25])
def test_padding_has_weight_zero_and_fills_only_the_end_of_the_last_batch(batch_size):
    table, weight = epochs.epoch_table(INDICES, batch_size, 54, 0)
    steps = epochs.steps_per_epoch(len(INDICES), batch_size)
    assert table.shape == weight.shape == (steps, batch_size)
    assert (table.dtype, weight.dtype) == (np.int32, np.float32)
    padding = steps * batch_size - len(INDICES)
    assert 0 <= padding < batch_size
    np.testing.assert_array_equal(weight.ravel(), np.arange(weight.size) < len(INDICES))
    assert set(table[weight == 0]) <= set(INDICES)  # a padded row can still be read


def test_same_seed_and_epoch_give_the_same_table():
    first, again = (epochs.epoch_table(INDICES, 4, 54, 3) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [
        tuple(epochs.epoch_table(INDICES, 5, seed, epoch)[0].ravel())
        for seed in (54, 55, 56)
        for epoch in range(8)
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(INDICES) not in orders


def test_global_random_state_does_not_matter():
    state = np.random.get_state()
    try:
        np.random.seed(1)
        first = epochs.epoch_table(INDICES, 4, 54, 0)[0]
        np.random.seed(2)
        again = epochs.epoch_table(INDICES, 4, 54, 0)[0]
    finally:
        np.random.set_state(state)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_fewer_examples_than_a_batch_make_one_padded_batch(examples):
    table, weight = epochs.epoch_table(np.arange(7, 7 + examples), 16, 0, 0)
    assert table.shape == (1, 16)
    assert weight[0].tolist() == [1.0] * examples + [0.0] * (16 - examples)
    assert sorted(table[0, :examples]) == list(range(7, 7 + examples))


@pytest.mark.parametrize(
    ("examples", "steps"),
    [(521, 33), (707, 45), (16, 1), (17, 2)],  # AeBAD-S and AeBAD-V in batches of 16
)
def test_steps_per_epoch_counts_the_last_partial_batch(examples, steps):
    assert epochs.steps_per_epoch(examples, 16) == steps
