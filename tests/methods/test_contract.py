"""Every method keeps the contract of methods/base.py; so do two toys that no real method covers."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrjax import methods
from mmrjax.methods import base
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import step as state


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=sorted(methods.METHODS))
def fitted(request, tiny_config, images):
    method = methods.create(request.param, tiny_config)
    frozen, facts = method.load_frozen()
    variables, _ = method.init(jax.random.key(0), frozen)
    if method.fits:
        variables = method.fit(variables, frozen, [(images, 8), (images, 5)], 13, jax.random.key(1))
    return method, variables, frozen, facts


def test_prediction_has_the_promised_shapes_types_and_names(fitted, images):
    method, variables, frozen, _ = fitted
    result = jax.jit(method.predict)(variables, frozen, jnp.asarray(images) / 255.0)
    assert result["map"].shape == (8, 64, 64)
    assert result["score"].shape == (8,)
    assert result["map"].dtype == result["score"].dtype == jnp.float32
    assert result["parts"]
    assert all(part.shape == (8, 64, 64) for part in result["parts"].values())
    assert np.isfinite(result["map"]).all()


def test_a_score_does_not_depend_on_the_rest_of_the_batch(fitted, images):
    method, variables, frozen, _ = fitted
    predict = jax.jit(method.predict)
    alone = predict(variables, frozen, jnp.asarray(images[2:3]) / 255.0)
    together = predict(variables, frozen, jnp.asarray(images) / 255.0)
    # PatchCore subtracts squared norms above 13 down to 0.024: one rounding is 2e-5 of the score.
    np.testing.assert_allclose(alone["score"][0], together["score"][2], rtol=1e-4)
    np.testing.assert_allclose(alone["map"][0], together["map"][2], rtol=1e-4, atol=1e-5)


def test_loss_is_a_scalar_and_its_gradient_reaches_every_parameter(fitted, images):
    method, variables, frozen, _ = fitted
    if not method.trains:
        assert variables["params"] == {}
        return
    batch = {
        "image": jnp.asarray(images) / 255.0,
        "weight": jnp.ones(8),
        "keys": jax.random.split(jax.random.key(0), 8),
    }
    progress = {"step": jnp.int32(0), "epoch": jnp.int32(0)}

    def loss(params, frozen):
        return method.loss(
            {**variables, "params": params}, frozen, batch, jax.random.key(3), progress
        )

    slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (collections, logs)), gradients = slope(variables["params"], frozen)
    assert value.shape == ()
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    assert all(leaf.shape == () for leaf in jax.tree.leaves(logs))
    assert set(collections) <= set(variables)


def test_facts_name_the_teacher_and_say_that_it_is_random(fitted):
    teacher = fitted[3]["teacher"]
    assert teacher["name"] == "resnet18"
    assert teacher["random"] is True


def test_unknown_method_lists_the_known(tiny_config):
    with pytest.raises(ValueError, match=r"unknown method 'mmmr'; available: .*patchcore"):
        methods.create("mmmr", tiny_config)


class BatchNormToy(base.Method):
    """Statistics travel in a collection."""

    name = "toy"

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))

    net = Net()

    def init(self, key, frozen):
        return dict(self.net.init(key, jnp.zeros((1, 64, 64, 3)), False)), {}

    def loss(self, variables, frozen, batch, key, progress):
        out, changed = self.net.apply(variables, batch["image"], True, mutable=["batch_stats"])
        per_image = jnp.mean(out**3, axis=(1, 2, 3))
        loss = jnp.sum(per_image * batch["weight"]) / batch["weight"].sum()
        return loss, (changed, {"epoch": progress["epoch"].astype(jnp.float32)})


class TwoOptimiserToy(BatchNormToy):
    """Two halves of the parameters with optimisers of their own, as a GAN has."""

    def optimiser(self, steps_per_epoch):
        def label(path, _):
            return "fast" if path[0].key == "BatchNorm_0" else "still"

        both = {"fast": optax.sgd(1.0), "still": optax.sgd(0.0)}
        return optax.partition(both, lambda p: jax.tree_util.tree_map_with_path(label, p))


class OwnUpdateToy(BatchNormToy):
    """A stage that is not the gradient of one loss."""

    def update(self, current, frozen, batch, key, progress):
        params = jax.tree.map(lambda x: x - 0.5, current.params)
        return current.replace(step=current.step + 1, params=params), {"loss": jnp.float32(1.5)}


class OwnFieldsToy(BatchNormToy):
    """Brings epochs and a learning rate of its own."""

    own: ClassVar = {"train.epochs": "aminet.epochs", "optim.warmup": "aminet.warmup"}


def test_a_method_trains_by_its_own_fields_and_leaves_the_shared_ones_alone(tiny_config):
    method = OwnFieldsToy(tiny_config)
    assert method.config.train.epochs == tiny_config.aminet.epochs != tiny_config.train.epochs
    assert method.config.optim.warmup == tiny_config.aminet.warmup
    assert method.config.train.batch_size == tiny_config.train.batch_size
    assert tiny_config.train.epochs == 4
    assert BatchNormToy(tiny_config).config is tiny_config


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_fields_that_a_method_names_exist_and_its_own_have_the_type_of_the_shared(
    name, tiny_config
):
    flat = config_lib.flatten(tiny_config)
    method = methods.METHODS[name]
    for prefix in method.fields:
        assert any(field.startswith(prefix) for field in flat), prefix
    for shared, own in method.own.items():
        assert type(flat[shared]) is type(flat[own]), own


def one_step(method):
    mesh = mesh_lib.make_mesh(2)
    variables, _ = method.init(jax.random.key(0), {})
    tx = method.optimiser(steps_per_epoch=2)
    augment = lambda key, image, size: image[:64, :64] / 255.0  # noqa: E731
    step = state.make_train_step(method, tx, augment, 2, mesh)
    image = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    resident = {"image": image, "size": np.full((4, 2), 64, np.int32)}
    chunk = {"index": np.int32([[0, 1, 2, 3]]), "weight": np.ones((1, 4), np.float32)}
    before = jax.device_get(variables)
    initial = mesh_lib.replicate(state.create(variables, tx), mesh)
    after, logs = step(initial, {}, resident, chunk, jax.random.key(0))
    return before, jax.device_get(after), logs


def test_batch_statistics_are_updated_without_gradient(tiny_config):
    before, after, logs = one_step(BatchNormToy(tiny_config))
    old, new = before["batch_stats"], after.collections["batch_stats"]
    assert not np.allclose(old["BatchNorm_0"]["mean"], new["BatchNorm_0"]["mean"])
    assert set(logs) == {"loss", "epoch"}
    assert set(after.params) == {"Dense_0", "BatchNorm_0"}


def test_a_method_may_bring_two_optimisers(tiny_config):
    before, after, _ = one_step(TwoOptimiserToy(tiny_config))
    old, new = before["params"], after.params
    np.testing.assert_array_equal(new["Dense_0"]["kernel"], old["Dense_0"]["kernel"])
    assert not np.allclose(new["BatchNorm_0"]["scale"], old["BatchNorm_0"]["scale"])


def test_a_method_may_bring_its_own_update(tiny_config):
    before, after, logs = one_step(OwnUpdateToy(tiny_config))
    old, new = before["params"]["Dense_0"]["bias"], after.params["Dense_0"]["bias"]
    np.testing.assert_allclose(new, old - 0.5)
    assert int(after.step) == 1
    assert float(logs["loss"][0]) == 1.5
