"""AMI-Net's features, maps and stage against closed forms and slow oracles."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from mmrjax import methods
from mmrjax.methods import aminet
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import logs


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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
    teacher = types.SimpleNamespace(
        normalise=lambda x: x, apply=lambda *_: {k: jnp.asarray(v) for k, v in layers.items()}
    )
    part = types.SimpleNamespace(teacher=teacher, config=wide.config)
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
    assert stage.plan.batch_field == "aminet.batch_size"


def test_image_sizes_that_do_not_fill_patches_are_refused(tiny_config):
    config = config_lib.load("configs/folder.py", ["data.image_size=60,64"])
    with pytest.raises(ValueError, match=r"multiple of 16 px .* try 64,64"):
        methods.create("aminet", config)
