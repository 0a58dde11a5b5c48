"""Distances, loss and masks of AMI-Net's clustering against closed forms and slow oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.methods import clustering

total_loss = jax.jit(clustering.total_loss, static_argnames="squared")
distances_of = jax.jit(clustering.distances, static_argnames="squared")
adaptive_visible = jax.jit(clustering.adaptive_visible)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def slow_distance(u, v):
    u, v = u.astype(float), v.astype(float)
    cosine = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
    return np.linalg.norm(u - v) * (1 - cosine)


# --- distance and loss


def test_distance_is_length_times_cosine_distance():
    u, v = jnp.asarray([[[1.0, 0]]]), jnp.asarray([[[0.0, 1]]])
    assert distances_of(u, v, squared=False)[0, 0, 0] == pytest.approx(2**0.5)
    assert distances_of(u, v, squared=True)[0, 0, 0] == pytest.approx(2)
    tokens, centres = draw(2, 5, 4), draw(2, 3, 4, seed=1)
    want = [
        [[slow_distance(u, v) for v in c] for u in t] for t, c in zip(tokens, centres, strict=True)
    ]
    got = distances_of(jnp.asarray(tokens), jnp.asarray(centres), squared=False)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_loss_is_five_cosine_one_squared_and_the_clustering_of_real_rows():
    patches, predicted = draw(3, 5, 8), draw(3, 5, 8, seed=1)
    tokens, centres = draw(3, 5, 4, seed=2), draw(3, 3, 4, seed=3)
    got, parts = total_loss(
        *map(jnp.asarray, (patches, tokens, centres, predicted)),
        jnp.asarray([1.0, 1, 0]),
        squared=False,
    )
    cosine, within, between = [], [], []
    for i in range(2):  # the third row is padding
        for p, q in zip(patches[i], predicted[i], strict=True):
            cosine.append(1 - p @ q / np.linalg.norm(p) / np.linalg.norm(q))
        within += [min(slow_distance(t, c) for c in centres[i]) for t in tokens[i]]
        pairs = [
            slow_distance(centres[i][j], centres[i][k])
            for j in range(3)
            for k in range(3)
            if j != k
        ]
        between.append(np.mean(pairs))
    squared = np.mean((patches[:2] - predicted[:2]) ** 2)
    cluster = np.mean(within) - 0.1 * np.mean(between)
    assert got == pytest.approx(5 * np.mean(cosine) + squared + cluster, rel=1e-4)
    assert parts["loss_cosine"] == pytest.approx(np.mean(cosine), rel=1e-4)
    assert parts["loss_squared"] == pytest.approx(squared, rel=1e-4)
    assert parts["loss_cluster"] == pytest.approx(cluster, rel=1e-4)


def test_gradient_of_the_clustering_is_that_of_finite_differences():
    tokens, centres = draw(1, 5, 4, seed=2), draw(1, 3, 4, seed=3)

    def value(centres):
        return clustering.cluster_loss(jnp.asarray(tokens), centres, squared=False)[0]

    def slow(c):
        within = np.mean([min(slow_distance(t, x) for x in c) for t in tokens[0]])
        pairs = [slow_distance(c[j], c[k]) for j in range(3) for k in range(3) if j != k]
        return within - 0.1 * np.mean(pairs)

    slope = np.asarray(jax.jit(jax.grad(value))(jnp.asarray(centres)))[0]
    want = np.zeros((3, 4))
    for at in np.ndindex(3, 4):
        step = np.zeros((3, 4))
        step[at] = 1e-5
        want[at] = (slow(centres[0] + step) - slow(centres[0] - step)) / 2e-5
    np.testing.assert_allclose(slope, want, atol=1e-4)  # finite although R(c, c) has a root of 0


def test_perfect_prediction_costs_nothing_but_clustering():
    patches = jnp.asarray(draw(1, 4, 8))
    tokens, centres = jnp.asarray(draw(1, 4, 4)), jnp.asarray(draw(1, 3, 4))
    _, parts = total_loss(patches, tokens, centres, patches, jnp.ones(1), squared=False)
    assert parts["loss_squared"] == 0
    assert parts["loss_cosine"] == pytest.approx(0, abs=1e-6)


# --- masks


@pytest.mark.parametrize(
    ("distances", "hidden"),
    [
        ([1, 2, 3], [False, False, True]),  # 2 + 0.5 * 1 = 2.5; divided by n it would be 2.41
        ([1, 1], [True, True]),  # equal: all on the boundary
        ([7], [False]),  # alone
    ],
)
def test_boundary_of_one_cluster(distances, hidden):
    other = np.full(len(distances), 99.0)
    distance = jnp.asarray(np.stack([distances, other], axis=1)[None], jnp.float32)
    visible = adaptive_visible(distance, 0.5)[0]
    assert np.asarray(~visible).tolist() == hidden


def test_boundary_divides_by_count_less_one():
    """1, 2, 3 and scale 1.1: with the unbiased deviation 3.1 hides none, with the other 2.9 one."""
    distance = jnp.asarray([[[1.0, 9], [2, 9], [3, 9]]])
    assert adaptive_visible(distance, 1.1).all()


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 1e9])
def test_mask_equals_a_loop_over_clusters(scale):
    distance = np.abs(draw(3, 40, 5))
    visible = np.ones((3, 40), bool)
    for i in range(3):
        nearest, cluster = distance[i].min(axis=1), distance[i].argmin(axis=1)
        for k in range(5):
            members = np.flatnonzero(cluster == k)
            if len(members) > 1:
                boundary = nearest[members].mean() + scale * nearest[members].std(ddof=1)
                visible[i, members[nearest[members] >= boundary]] = False
    got = adaptive_visible(jnp.asarray(distance), scale)
    np.testing.assert_array_equal(got, visible)
    assert visible.all() == (scale == 1e9)


def test_random_mask_hides_the_whole_part_of_a_share():
    share = jnp.asarray([0.0, 0.29, 0.999])
    noise = jnp.asarray(np.random.default_rng(0).random((3, 16)))
    hidden = np.asarray(~clustering.random_visible(share, noise)).sum(axis=1)
    assert hidden.tolist() == [0, 4, 15]
