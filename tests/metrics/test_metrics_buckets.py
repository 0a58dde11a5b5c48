"""Buckets keep the order of scores; counts equal NumPy's, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.metrics import buckets
from mmrjax.runtime import mesh as mesh_lib

EXTREME = [-np.inf, -3.4e38, -1.0, -1e-38, -0.0, 0.0, 1e-38, 0.5, 1.0, 3.4e38, np.inf]


def bucket(scores):
    return np.asarray(buckets.bucket(jnp.asarray(scores, jnp.float32)))


def oracle(maps, row):
    """Counts with NumPy, one histogram after the other."""
    values = bucket(maps)
    return np.stack([np.bincount(values[row == i], minlength=1 << 16) for i in range(128)])


def make_batch(b=8, size=12):
    rng = np.random.default_rng(5)
    maps = rng.normal(size=(b, size, size)).astype(np.float32)
    row = rng.integers(-1, 131, maps.shape).astype(np.int32)  # some belong to no histogram
    row[:, :, :4] = 0  # the same histogram gets pixels on every device
    return maps, row


def count(maps, row, devices, width=1 << 12):
    mesh = mesh_lib.make_mesh(devices)
    maps, row = mesh_lib.put_batch((maps, row), mesh)
    columns, counts, occupied = buckets.count(maps, row, mesh, width)
    assert counts.dtype == jnp.int32
    wide = np.zeros((buckets.ROWS, buckets.BUCKETS + 1), np.int64)
    np.add.at(wide, (slice(None), np.asarray(columns)), np.asarray(counts))
    return wide[:, :-1], int(occupied)


def test_buckets_rise_with_the_scores_and_equal_scores_share_one():
    assert (np.diff(bucket(EXTREME)) >= 0).all()
    rng = np.random.default_rng(1)
    scores = np.sort(rng.normal(size=4000) * 10.0 ** rng.integers(-30, 30, 4000))
    assert (np.diff(bucket(scores)) >= 0).all()
    assert bucket([-0.0]) == bucket([0.0])
    assert len(set(bucket([1.0, 1.003, 1.005]).tolist())) == 1
    assert len(set(bucket([1.0, 1.01, 1.02]).tolist())) == 3  # 128 per doubling


def test_finite_scores_and_only_they_lie_in_the_finite_buckets():
    assert all(b in buckets.FINITE for b in bucket(EXTREME[1:-1]).tolist())
    assert not any(b in buckets.FINITE for b in bucket([np.inf, -np.inf, np.nan, -np.nan]).tolist())


def test_edges_are_the_smallest_scores_of_their_buckets():
    edges, numbers = buckets.edges(), np.array(buckets.FINITE)
    exact = (np.abs(edges) >= np.finfo(np.float32).tiny) | (edges == 0)  # below: flushed to zero
    np.testing.assert_array_equal(
        bucket(edges)[exact & (edges >= 0)], numbers[exact & (edges >= 0)]
    )
    below = np.nextafter(edges[exact & (edges > 0)], np.float32(-np.inf))
    assert (bucket(below) < numbers[exact & (edges > 0)]).all()


@pytest.mark.parametrize("devices", [1, 8])
def test_counts_equal_numpy_on_any_number_of_devices(devices):
    maps, row = make_batch()
    counts, occupied = count(maps, row, devices)
    expected = oracle(maps, row)
    np.testing.assert_array_equal(counts, expected)
    assert occupied == (expected.sum(axis=0) > 0).sum()


def test_a_width_that_is_too_small_is_told():
    maps, row = make_batch()
    _, occupied = count(maps, row, 1, width=16)
    assert occupied == count(maps, row, 1)[1] > 16


def test_only_sums_of_counts_cross_devices():
    mesh = mesh_lib.make_mesh(8)
    maps, row = mesh_lib.put_batch(make_batch(), mesh)
    text = buckets.count.lower(maps, row, mesh, 64).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_a_batch_that_could_overflow_int32_is_refused():
    mesh = mesh_lib.make_mesh(1)
    maps = jax.ShapeDtypeStruct((1 << 11, 1024, 1024), jnp.float32)
    row = jax.ShapeDtypeStruct(maps.shape, jnp.int32)
    with pytest.raises(ValueError, match=r"too many for int32.*eval\.batch_size"):
        buckets.count.lower(maps, row, mesh, 64)
