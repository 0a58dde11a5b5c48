"""The epoch table: every example once per epoch, in an order that the seed alone decides."""

import numpy as np
import pytest

from mmrjax.data import epochs
from mmrjax.data.defects import rows

EXAMPLES = 10


def table_of(examples, batch_size, seed, epoch):
    return epochs.Plan(batch_size).table(examples, seed, epoch)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 10, 16, 25])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_example_is_seen_exactly_once_per_epoch(batch_size, epoch):
    table, weight = table_of(EXAMPLES, batch_size, 54, epoch)
    assert sorted(table[weight == 1]) == list(range(EXAMPLES))
    assert weight.sum() == EXAMPLES


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 10, 16, 25])
def test_padding_has_weight_zero_and_fills_only_the_end_of_the_last_batch(batch_size):
    table, weight = table_of(EXAMPLES, batch_size, 54, 0)
    steps = epochs.steps_per_epoch(EXAMPLES, batch_size)
    assert table.shape == weight.shape == (steps, batch_size)
    assert (table.dtype, weight.dtype) == (np.int32, np.float32)
    padding = steps * batch_size - EXAMPLES
    assert 0 <= padding < batch_size
    np.testing.assert_array_equal(weight.ravel(), np.arange(weight.size) < EXAMPLES)
    assert set(table[weight == 0]) <= set(range(EXAMPLES))  # a padded row can still be read


def test_same_seed_and_epoch_give_the_same_table():
    first, again = (table_of(EXAMPLES, 4, 54, 3) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [
        tuple(table_of(EXAMPLES, 5, seed, epoch)[0].ravel())
        for seed in (54, 55, 56)
        for epoch in range(8)
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(range(EXAMPLES)) not in orders


def test_global_random_state_does_not_matter():
    state = np.random.get_state()
    try:
        np.random.seed(1)
        first = table_of(EXAMPLES, 4, 54, 0)[0]
        np.random.seed(2)
        again = table_of(EXAMPLES, 4, 54, 0)[0]
    finally:
        np.random.set_state(state)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_fewer_examples_than_a_batch_make_one_padded_batch(examples):
    table, weight = table_of(examples, 16, 0, 0)
    assert table.shape == (1, 16)
    assert weight[0].tolist() == [1.0] * examples + [0.0] * (16 - examples)
    assert sorted(table[0, :examples]) == list(range(examples))


@pytest.mark.parametrize(
    ("examples", "steps"),
    [(521, 33), (707, 45), (16, 1), (17, 2)],  # AeBAD-S and AeBAD-V in batches of 16
)
def test_steps_per_epoch_counts_the_last_partial_batch(examples, steps):
    assert epochs.steps_per_epoch(examples, 16) == steps


# --- plans with synthetic rows and domains in turn


def domains(*counts):
    return np.repeat(np.arange(len(counts)), counts).astype(np.int32)


@pytest.mark.parametrize(("examples", "steps"), [(578, 49), (240, 20), (12, 1), (16, 2), (13, 2)])
def test_an_epoch_shows_every_example_12_at_a_time(examples, steps):
    plan = epochs.Plan(16, defects=rows.Recipe(4))
    if examples < 16:
        with pytest.raises(
            ValueError, match=r"16 different training images, there are 1[23]; lower"
        ):
            plan.table(examples, 0, 0)
        return
    table, weight = plan.table(examples, seed=0, epoch=3)
    assert table.shape == (steps, 16)
    assert steps == plan.steps_per_epoch(examples) == -(-examples // 12)
    assert (weight == 1).all()  # exactly 4 to 12 in every batch, also in the last
    real = np.delete(table, np.s_[::4], axis=1)
    assert real.shape[1] == 12
    assert set(real.ravel()) == set(range(examples))
    assert np.bincount(real.ravel()).max() <= 2  # what fills the last batch
    assert all(len(set(row)) == 16 for row in table)  # synthetic or real, never both


@pytest.mark.parametrize(("every", "synthetic"), [(8, 2), (4, 4), (2, 8)])
def test_ratios_of_1_to_7_3_and_1(every, synthetic):
    plan = epochs.Plan(16, defects=rows.Recipe(every))
    assert plan.synthetic == synthetic
    assert plan.steps_per_epoch(100) == -(-100 // (16 - synthetic))


def test_the_real_rows_come_in_the_order_of_a_plan_without_synthetic_ones():
    plain, _ = epochs.Plan(12).table(36, seed=5, epoch=2)
    table, _ = epochs.Plan(16, defects=rows.Recipe(4)).table(36, seed=5, epoch=2)
    np.testing.assert_array_equal(np.delete(table, np.s_[::4], axis=1), plain)


@pytest.mark.parametrize("recipe", [None, rows.Recipe(1)])  # with 1 any row may get a defect
def test_a_plan_without_extras_is_the_table_of_mmr(recipe):
    tables = epochs.Plan(16, defects=recipe).table(37, 5, 2)
    for got, want in zip(tables, table_of(37, 16, 5, 2), strict=True):
        np.testing.assert_array_equal(got, want)


def test_epochs_and_seeds_draw_other_synthetic_rows():
    plan = epochs.Plan(16, defects=rows.Recipe(4))
    tables = [plan.table(100, *key)[0] for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    np.testing.assert_array_equal(tables[0], tables[3])
    assert not np.array_equal(tables[0][:, ::4], tables[1][:, ::4])
    assert not np.array_equal(tables[0][:, ::4], tables[2][:, ::4])


@pytest.mark.parametrize("counts", [(40, 40, 40, 40), (97, 20, 11, 5)])
def test_each_of_four_domains_gives_3_real_images_and_1_synthetic(counts):
    domain = domains(*counts)
    plan = epochs.Plan(16, defects=rows.Recipe(4), domain=domain)
    table, _ = plan.table(len(domain), seed=0, epoch=0)
    for row in table:
        assert len(set(row)) == 16
        assert np.bincount(domain[np.delete(row, np.s_[::4])]).tolist() == [3, 3, 3, 3]
        assert np.bincount(domain[row[::4]]).tolist() == [1, 1, 1, 1]


def test_six_domains_take_turns_as_evenly_as_can_be():
    domain = domains(95, 96, 97, 96, 97, 97)  # the magnetic tiles' exposures
    plan = epochs.Plan(16, defects=rows.Recipe(4), domain=domain)
    tables = np.concatenate([plan.table(578, 0, e)[0] for e in range(3)])
    real = np.stack(
        [np.bincount(domain[np.delete(row, np.s_[::4])], minlength=6) for row in tables]
    )
    assert (real == 2).all()
    synthetic = np.bincount(domain[tables[:, ::4].ravel()])
    assert synthetic.max() - synthetic.min() <= 6
    assert all(len(set(row)) == 16 for row in tables)


def test_domains_in_turn_without_synthetic_rows():
    domain = domains(30, 10)
    table, weight = epochs.Plan(8, domain=domain).table(40, 0, 0)
    assert table.shape == (5, 8)
    assert (weight == 1).all()
    assert all(np.bincount(domain[row]).tolist() == [4, 4] for row in table)


@pytest.mark.parametrize(("batch", "every"), [(16, 3), (10, 4)])
def test_a_batch_that_cannot_be_shared_is_refused(batch, every):
    with pytest.raises(ValueError, match=rf"every {every}th row of train.batch_size={batch} "):
        epochs.Plan(batch, defects=rows.Recipe(every))


def test_errors_name_the_field_that_the_method_reads():
    own = {"batch_field": "aminet.batch_size"}
    with pytest.raises(ValueError, match=r"row of aminet\.batch_size=10 cannot be synthetic"):
        epochs.Plan(10, defects=rows.Recipe(4), **own)
    with pytest.raises(ValueError, match=r"full batches only; lower aminet\.batch_size"):
        epochs.Plan(8, last_batch="drop", **own).check(7)
    with pytest.raises(ValueError, match=r"there are 3; lower aminet\.batch_size"):
        epochs.Plan(8, domain=domains(10, 3), **own).table(13, 0, 0)
