"""Nearest rows, the greedy coreset and learnt distances of a memory bank against slow oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.methods import memory_bank


def slow_greedy(points, rows, start):
    distance = np.mean([np.linalg.norm(points - points[i], axis=1) for i in start], axis=0)
    chosen = []
    for _ in range(rows):
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        distance[chosen] = -1
    return chosen


def test_coreset_equals_a_slow_greedy_selection():
    points = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    key = jax.random.key(5)
    got = memory_bank.greedy_coreset(jnp.asarray(points), 30, key, projection=6, start_points=10)
    start = jax.random.choice(jax.random.split(key)[1], 200, (10,), replace=False)
    assert np.asarray(got).tolist() == slow_greedy(points, 30, np.asarray(start))


def test_coreset_keeps_both_clusters_and_has_no_duplicates():
    points = jnp.asarray([[0.0, 0], [1, 0], [10, 0], [11, 0]])
    got = memory_bank.greedy_coreset(points, 2, jax.random.key(0), projection=2, start_points=1)
    assert {bool(i >= 2) for i in np.asarray(got)} == {True, False}
    same = jnp.zeros((9, 3))
    every = memory_bank.greedy_coreset(same, 9, jax.random.key(0), projection=3, start_points=2)
    assert sorted(np.asarray(every).tolist()) == list(range(9))


@pytest.mark.parametrize("bank", [5, memory_bank.BANK_ROWS_PER_CHUNK + 3])
def test_nearest_distance_equals_brute_force(bank):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((7, 4)).astype(np.float32)
    rows = rng.standard_normal((bank, 4)).astype(np.float32)
    want = ((queries[:, None] - rows[None]) ** 2).sum(axis=-1).min(axis=1)
    got = memory_bank.nearest_squared_distance(jnp.asarray(queries), jnp.asarray(rows))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_bank_row_is_at_distance_zero():
    rows = jnp.asarray(100 * np.random.default_rng(0).standard_normal((50, 64)), jnp.float32)
    got = memory_bank.nearest_squared_distance(rows, rows)
    assert float(got.min()) >= 0
    squares = np.sum(np.asarray(rows, np.float64) ** 2, axis=1)
    # |q|^2 - 2 q m + |m|^2 cancels: a few float32 roundings of |row|^2 remain.
    assert (np.asarray(got) / squares).max() < 8 * np.finfo(np.float32).eps


def good_and_damaged(rng):
    """Patches [images, n, d] that vary much along one channel, little along the other four."""
    good = rng.standard_normal((12, 60, 5)) * np.array([5, 0.1, 0.1, 0.1, 0.1])
    return good.astype(np.float32)


def test_whitened_good_patches_are_about_one_apart_in_every_direction():
    patches = good_and_damaged(np.random.default_rng(0))
    matrix = memory_bank.whitening(patches, 1e-3, jax.random.key(0))
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(0))[0], 12))
    rows, queries = (patches[half].reshape(-1, 5) for half in (order[:6], order[6:]))
    nearest = ((queries[:, None] - rows[None]) ** 2).sum(-1).argmin(1)
    left = (queries - rows[nearest]) @ matrix
    np.testing.assert_allclose(left.T @ left / len(left) * 5, np.eye(5), atol=0.01)


def test_whitening_finds_a_change_that_a_harmless_one_hides():
    rng = np.random.default_rng(0)
    patches = good_and_damaged(rng)
    matrix = memory_bank.whitening(patches, 0.1, jax.random.key(0))
    bank = patches.reshape(-1, 5)[::10]  # along the first channel all are far
    new = good_and_damaged(rng).reshape(-1, 5)[:200]
    damaged = new + np.float32([0, 0.5, 0, 0, 0])
    ahead = []  # how often a damaged patch is farther than a good one
    for m in (np.eye(5, dtype=np.float32), matrix):
        far, near = (memory_bank.nearest_squared_distance(x @ m, bank @ m) for x in (damaged, new))
        ahead.append((np.asarray(far)[:, None] > np.asarray(near)).mean())
    assert ahead[1] > ahead[0] + 0.05
    assert ahead[1] > 0.9


def test_a_channel_that_never_moves_does_not_outweigh_the_others():
    patches = good_and_damaged(np.random.default_rng(0))
    patches[..., 4] = 0
    matrix = memory_bank.whitening(patches, 1.0, jax.random.key(0))
    assert np.isfinite(matrix).all()
    assert np.abs(matrix[4]).max() < 1000 * np.abs(matrix[0]).max()


@pytest.mark.parametrize("bank", [5, memory_bank.BANK_ROWS_PER_CHUNK + 3])
def test_nearest_row_equals_brute_force(bank):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((7, 4)).astype(np.float32)
    rows = rng.standard_normal((bank, 4)).astype(np.float32)
    away = np.where(np.arange(bank) % 3, 0, np.inf).astype(np.float32)
    every = ((queries[:, None] - rows[None]) ** 2).sum(axis=-1) + away
    distance, row = memory_bank.nearest_row(jnp.asarray(queries), jnp.asarray(rows), away)
    np.testing.assert_array_equal(row, every.argmin(1))
    np.testing.assert_allclose(distance, every.min(1), atol=1e-5)


def test_a_row_expects_what_patches_of_other_images_have():
    bank = np.array([[0, 0], [0, 0.5], [10, 0], [50, 0]], np.float32)
    image = np.array([0, 1, 1, 2])
    patches = np.zeros((3, 2, 2), np.float32)
    patches[0] = [[0, 0], [10, 1]]  # 0.25 from row 1, not 0 from its own; 1 from row 2
    patches[1] = [[0, 2], [3, 0]]  # 4 and 9 from row 0, not 2.25 from row 1
    patches[2] = [[10, 0], [10, 3]]  # 0 and 9 from row 2
    mean = (0.25 + 1 + 4 + 9 + 0 + 9) / 6
    want = [(4 + 9) / 2, mean, mean, mean]  # 0.25, (1 + 0 + 9) / 3 and nothing are less
    got = memory_bank.expected_distances(patches, jnp.asarray(bank), image)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_equal_images_expect_no_zero():
    patches = np.ones((2, 3, 2), np.float32)
    got = memory_bank.expected_distances(patches, jnp.ones((2, 2)), np.array([0, 1]))
    assert np.isfinite(1 / np.asarray(got)).all()


@pytest.mark.parametrize(("candidates", "block"), [(5, 3), (40, 40), (40, 1), (1000, 7)])
def test_choosing_among_the_farthest_points_is_choosing_among_all(monkeypatch, candidates, block):
    """With many equal points, too; other sizes than those of the program need more passes."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.standard_normal((150, 3)), rng.integers(0, 3, (50, 3))])
    points = points.astype(np.float32)
    start = jax.random.choice(jax.random.split(jax.random.key(5))[1], 200, (10,), replace=False)
    monkeypatch.setattr(memory_bank, "CANDIDATES", candidates)
    monkeypatch.setattr(memory_bank, "BLOCK", block)
    got = memory_bank.greedy_coreset(jnp.asarray(points), 60, jax.random.key(5), 3, 10)
    assert np.asarray(got).tolist() == slow_greedy(points, 60, np.asarray(start))
