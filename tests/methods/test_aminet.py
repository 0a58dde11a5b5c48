"""AMI-Net's features, distances, mask, loss and maps against closed forms and slow oracles."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from mmrjax import methods
from mmrjax.methods import aminet, clustering
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import logs

total_loss = jax.jit(clustering.total_loss, static_argnames="squared")
distances_of = jax.jit(clustering.distances, static_argnames="squared")
adaptive_visible = jax.jit(clustering.adaptive_visible)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def slow_distance(u, v):
    u, v = u.astype(float), v.astype(float)
    cosine = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
    return np.linalg.norm(u - v) * (1 - cosine)


def slow_resize(x, n_out, axis):
    """Linear interpolation with aligned corners along one axis."""
    n_in = x.shape[axis]
    at = np.linspace(0, n_in - 1, n_out)
    return np.apply_along_axis(lambda line: np.interp(at, np.arange(n_in), line), axis, x)


@pytest.fixture(scope="module")
def wide(tiny_config):
    """AMI-Net for images of 32 x 48 px."""
    config = tiny_config.copy_and_resolve_references()
    config.data.image_size = config.data.resize = (32, 48)
    return methods.create("aminet", config)


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


# --- features


def test_pooling_counts_the_zeros_beyond_the_border():
    rows, columns = (aminet.resize_and_pool(n, 2 * n, 3) for n in (4, 6))
    pooled = rows @ np.full((4, 6), 9.0) @ columns.T
    assert pooled.shape == (8, 12)
    np.testing.assert_allclose(pooled[0, 0], 4, rtol=1e-6)
    np.testing.assert_allclose(pooled[0, 1:-1], 6, rtol=1e-6)
    np.testing.assert_allclose(pooled[1:-1, 1:-1], 9, rtol=1e-6)
    np.testing.assert_array_equal(aminet.resize_and_pool(5, 5, 1), np.eye(5))


def test_features_are_resized_then_pooled_then_joined_in_the_order_of_layers(wide):
    layers = {1: draw(1, 8, 12, 2), 3: draw(1, 2, 3, 4), 2: draw(1, 4, 6, 3)}
    backbone = types.SimpleNamespace(
        apply=lambda *_: {k: jnp.asarray(v) for k, v in layers.items()}
    )
    part = types.SimpleNamespace(backbone=backbone, config=wide.config)
    got = aminet.AMINet.features(part, {"teacher": None}, jnp.zeros((1, 32, 48, 3)))
    want = []
    for layer in (1, 2, 3):
        x = slow_resize(slow_resize(layers[layer][0].astype(float), 8, 0), 12, 1)
        want.append(ndimage.uniform_filter(x, (3, 3, 1), mode="constant"))
    np.testing.assert_allclose(got[0], np.concatenate(want, axis=-1), atol=1e-5)


# --- maps


def test_maps_and_score_of_a_non_square_image_equal_scipy():
    features, predicted = draw(1, 8, 12, 5), draw(1, 8, 12, 5, seed=1)
    got = aminet.error_maps(jnp.asarray(predicted), jnp.asarray(features), (32, 48))
    f, p = features[0].astype(float), predicted[0].astype(float)
    lengths = np.linalg.norm(f, axis=-1) * np.linalg.norm(p, axis=-1)
    cells = {"length": ((f - p) ** 2).mean(axis=-1), "direction": 1 - (f * p).sum(-1) / lengths}
    want = {
        name: ndimage.gaussian_filter(slow_resize(slow_resize(x, 32, 0), 48, 1), 4)
        for name, x in cells.items()
    }
    for name in cells:
        np.testing.assert_allclose(got[name][0], want[name], atol=1e-5)
    total = got["length"] * got["direction"]
    score = np.std(want["length"] * want["direction"])  # divided by the number of pixels
    method = aminet.AMINet(config_lib.load("configs/folder.py"))
    assert method.score(total)[0] == pytest.approx(score, rel=1e-4)


@pytest.mark.slow
def test_map_is_the_product_of_its_parts_and_repeats(wide):
    frozen, _ = wide.load_frozen()
    variables, _ = wide.init(jax.random.key(0), frozen)
    images = jnp.asarray(np.random.default_rng(0).random((2, 32, 48, 3)), jnp.float32)
    predict = jax.jit(wide.predict)
    first, second = (predict(variables, frozen, images) for _ in range(2))
    assert first["map"].shape == (2, 32, 48)
    np.testing.assert_array_equal(first["map"], second["map"])
    product = first["parts"]["length"] * first["parts"]["direction"]
    np.testing.assert_allclose(first["map"], product, rtol=1e-5)


# --- training


def test_decay_reaches_every_parameter_with_torchs_default(wide):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "mask_token": jnp.ones(2)}
    tx = wide.stages(range(20))[0].tx
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 1 - 1e-4 * 0.01, rtol=0, atol=1e-7)


def test_its_stage_trains_by_fields_of_its_own(wide, tiny_config):
    (stage,) = wide.stages(range(20))
    own = tiny_config.aminet
    assert (stage.epochs, stage.augment, stage.plan.batch_size) == (2, "none", own.batch_size)
    assert tiny_config.train.epochs == 4
    np.testing.assert_allclose(stage.rates, own.learning_rate)
    assert "aminet.learning_rate" in logs.remedy(stage.rate_field)
    assert stage.batch_field == "aminet.batch_size"


def test_image_sizes_that_do_not_fill_patches_are_refused(tiny_config):
    config = config_lib.load("configs/folder.py", ["data.image_size=60,64"])
    with pytest.raises(ValueError, match=r"multiple of 16 px .* try 64,64"):
        methods.create("aminet", config)
