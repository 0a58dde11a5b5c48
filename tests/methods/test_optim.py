"""AdamW and its schedule: the official numbers, and torch's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from mmrjax.methods import optim
from mmrjax.models import student
from mmrjax.weights import torch_names


@pytest.fixture
def fields() -> ConfigDict:
    return common.get_config().optim


@pytest.fixture(scope="module")
def shapes():
    """Variables of a small student, as shapes."""
    model = student.MaskedStudent(width=48, depth=2, heads=3, channels={1: 8, 2: 16, 3: 32})
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def apply(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


# --- the schedule


def test_learning_rates_of_200_epochs_are_the_official_ones(fields):
    rates = optim.learning_rates(fields, 200)
    table = {0: 0, 1: 2e-5, 49: 9.8e-4, 50: 1e-3, 118: 1e-3, 119: 1e-4, 158: 1e-4, 159: 1e-5}
    table[199] = 1e-5
    assert rates.shape == (200,)
    assert rates.dtype == np.float32
    assert rates[0] == 0  # exactly
    for epoch, rate in table.items():
        assert rates[epoch] == pytest.approx(rate, rel=1e-6), epoch
    assert rates.sum(dtype=np.float64) == pytest.approx(0.09791, abs=1e-8)


def test_40_epochs_warm_up_over_10_and_drop_at_23_and_31(fields):
    rates = optim.learning_rates(fields, 40)
    np.testing.assert_allclose(rates[:10], 1e-3 * np.arange(10) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:23], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(rates[23:31], 1e-4, rtol=1e-6)
    np.testing.assert_allclose(rates[31:], 1e-5, rtol=1e-6)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 7, 20, 100, 400])
def test_any_number_of_epochs_has_finite_rates_that_never_exceed_the_given_one(fields, epochs):
    rates = optim.learning_rates(fields, epochs)
    assert rates.shape == (epochs,)
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert rates.max() <= np.float32(1e-3)
    assert rates.any()


@pytest.mark.parametrize("epochs", [200, 400, 1000])
def test_floors_do_not_suffer_from_rounding(fields, epochs):
    scale = epochs // 200
    rates = optim.learning_rates(fields, epochs)
    drops = np.flatnonzero(np.diff(rates) < 0) + 1
    assert drops.tolist() == [119 * scale, 159 * scale]
    assert np.argmax(rates == rates.max()) == 50 * scale


def test_without_warm_up_and_drops_the_rate_is_constant(fields):
    fields.warmup, fields.drops = 0.0, ()
    np.testing.assert_array_equal(optim.learning_rates(fields, 5), np.full(5, 1e-3, np.float32))


# --- weight decay


def test_what_decays_is_what_the_official_code_decays(shapes):
    """There: every trained tensor of two or more dimensions whose name does not end in .bias."""
    mask = optim.decay_mask(shapes["params"])
    assert jax.tree.structure(mask) == jax.tree.structure(shapes["params"])
    official = torch_names.student_to_torch(
        jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    )
    flags = {jax.tree_util.keystr(p, simple=True, separator="/"): flag
             for p, flag in jax.tree_util.tree_leaves_with_path(mask)}  # fmt: skip
    seen = set()
    for key, path, _ in torch_names.student_names((1, 2, 3)):
        if not path.startswith("params/"):
            continue
        value = official[key.format(i=0)]
        name = path.removeprefix("params/")
        assert flags[name] == (value.ndim > 1 and not key.endswith(".bias")), key
        seen.add(name)
    assert seen == flags.keys()


def test_tokens_decay_and_biases_and_norms_do_not(shapes):
    mask = optim.decay_mask(shapes["params"])
    assert mask["cls_token"]
    assert mask["mask_token"]
    assert mask["patch_kernel"]
    assert mask["encoder"]["blocks"]["attn"]["qkv"]["kernel"]
    assert not mask["patch_bias"]
    assert not mask["encoder"]["blocks"]["attn"]["qkv"]["bias"]  # [depth, 3 d]: two dimensions
    assert not mask["encoder"]["blocks"]["norm1"]["scale"]
    assert not mask["encoder"]["norm"]["bias"]


def test_decay_shrinks_only_decayed_parameters_by_rate_times_decay(fields):
    fields.warmup, fields.drops = 0.0, ()
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((2, 3), 2.0)}
    tx = optim.optimiser(fields, 1, 1)
    after, _ = apply(tx, params, tx.init(params), jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(after["kernel"], 2 * (1 - 1e-3 * 0.05), rtol=1e-7)
    np.testing.assert_array_equal(after["bias"], 2)


# --- steps


def random_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "cls_token": (1, 1, 5),
        "mask_token": (1, 1, 5),
        "patch_kernel": (12, 5),
        "patch_bias": (5,),
        "block": {"fc1": {"kernel": (2, 5, 7), "bias": (2, 7)}, "norm1": {"scale": (2, 5)}},
    }
    return jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


def test_first_epoch_moves_nothing_but_adams_moments(fields):
    params = jax.tree.map(jnp.asarray, random_tree(0))
    tx = optim.optimiser(fields, 200, 3)
    state = tx.init(params)
    for step in range(3):
        after, state = apply(tx, params, state, random_tree(step + 1))
        jax.tree.map(np.testing.assert_array_equal, after, params)
    adam = state[0]
    assert int(adam.count) == 3
    for moments in (adam.mu, adam.nu):
        assert all((np.asarray(leaf) != 0).all() for leaf in jax.tree.leaves(moments))
    after, _ = apply(tx, params, state, random_tree(9))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        assert (new != old).any()  # and the second epoch does move


def test_rate_is_constant_within_an_epoch_and_stays_at_its_last_value(fields):
    """A gradient of constant sign and size moves a parameter by exactly the learning rate."""
    fields.weight_decay, fields.beta1, fields.beta2 = 0.0, 0.0, 0.0
    rates = optim.learning_rates(fields, 8)
    tx = optim.optimiser(fields, 8, 3)
    params = {"bias": jnp.zeros(1)}
    state, moved = tx.init(params), []
    for _ in range(8 * 3 + 2):
        before = params
        params, state = apply(tx, params, state, {"bias": jnp.ones(1)})
        moved.append(float(before["bias"][0] - params["bias"][0]))
    expected = np.concatenate([np.repeat(rates, 3), [rates[-1]] * 2])
    np.testing.assert_allclose(moved, expected, atol=1e-9)


@pytest.mark.torch
def test_steps_equal_those_of_torch(fields):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    flatten = jax.tree_util.tree_leaves_with_path
    params = jax.tree.map(jnp.asarray, random_tree(0))
    names = [jax.tree_util.keystr(path) for path, _ in flatten(params)]
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(params)]
    is_decayed = [any(w in n for w in ("kernel", "token")) for n in names]
    assert 0 < sum(is_decayed) < len(names)
    groups = [
        {
            "params": [t for t, d in zip(tensors, is_decayed, strict=True) if d == decayed],
            "weight_decay": 0.05 * decayed,
        }
        for decayed in (True, False)
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    epochs, steps = 8, 2
    ours = optim.optimiser(fields, epochs, steps)
    state = ours.init(params)
    start = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    for step in range(epochs * steps):
        grads = random_tree(step + 1)
        params, state = apply(ours, params, state, grads)
        for group in theirs.param_groups:
            group["lr"] = float(optim.learning_rates(fields, epochs)[step // steps])
        for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.tensor(grad)
        theirs.step()
        for name, got, want in zip(names, jax.tree.leaves(params), tensors, strict=True):
            # Both round each step in float32; weights are of size 1.
            np.testing.assert_allclose(got, want.detach().numpy(), atol=2e-6, err_msg=name)
    for got, first in zip(jax.tree.leaves(params), start, strict=True):
        assert np.abs(np.asarray(got) - first).mean() > 5e-4  # far more than the tolerance
