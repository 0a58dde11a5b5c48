"""PLPM and TBM: sizes, channels, and what each of them sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import mala


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("base", "parameters"), [(64, 2_765_633), (16, 175_313)])
def test_plpm_has_as_many_parameters_as_specified(base, parameters):
    images = jnp.zeros((2, 224, 224, 3))
    shapes = jax.eval_shape(mala.PseudoLabels(base).init, jax.random.key(0), images)
    assert count(shapes["params"]) == parameters


def balance(form, d, e, width, grid=(14, 14)):
    module, n = mala.TokenBalance(width, form), grid[0] * grid[1]
    tokens = (jnp.zeros((1, n, d)), jnp.zeros((1, n, d)), jnp.zeros((1, n, e)))
    return module, jax.eval_shape(lambda key: module.init(key, *tokens, grid), jax.random.key(0))


@pytest.mark.parametrize(
    ("form", "sizes", "parameters"),
    [
        ("linear", (1024, 512, 512), 1_573_888),
        ("none", (1024, 512, 512), 262_656),
        ("gelu", (1024, 512, 512), 1_573_888 + 1024),
        ("linear", (192, 128, 128), 180_864),
    ],
)
def test_tbm_has_as_many_parameters_as_specified(form, sizes, parameters):
    assert count(balance(form, *sizes)[1]) == parameters


@pytest.fixture(scope="module")
def tokens():
    keys = jax.random.split(jax.random.key(1), 3)
    return [jax.random.normal(k, (2, 4, d)) for k, d in zip(keys, (6, 6, 8), strict=True)]


def test_tbm_sees_both_ends_of_the_encoder_and_the_decoder(tokens):
    module = mala.TokenBalance(8)
    variables = module.init(jax.random.key(0), *tokens, (2, 2))
    before = module.apply(variables, *tokens, (2, 2))
    assert before.shape == (2, 32, 32, 2)
    for i in range(3):
        changed = [x + (j == i) for j, x in enumerate(tokens)]
        assert not np.allclose(module.apply(variables, *changed, (2, 2)), before)
    kernel = variables["params"]["map"]["kernel"].at[8:].set(0)  # the decoder's half
    blind = {"params": {**variables["params"], "map": {**variables["params"]["map"]}}}
    blind["params"]["map"]["kernel"] = kernel
    changed = [tokens[0], tokens[1], tokens[2] + 1]
    np.testing.assert_array_equal(
        module.apply(blind, *tokens, (2, 2)), module.apply(blind, *changed, (2, 2))
    )


def test_without_tbm_the_decoder_alone_is_seen(tokens):
    module = mala.TokenBalance(8, "none")
    variables = module.init(jax.random.key(0), *tokens, (2, 2))
    changed = [tokens[0] + 1, tokens[1] - 1, tokens[2]]
    np.testing.assert_array_equal(
        module.apply(variables, *tokens, (2, 2)), module.apply(variables, *changed, (2, 2))
    )


def test_channels_and_pixels_of_a_patch_are_in_the_order_of_unpatchify(tokens):
    """Entry (p * side + q) * 2 + c of a patch is channel c of its pixel in row p, column q."""
    module = mala.TokenBalance(8, "none")
    variables = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), *tokens, (2, 2)))
    variables["params"]["map"]["bias"] = jnp.arange(512.0)
    out = module.apply(variables, *tokens, (2, 2))
    assert out[0, 3, 5, 0] == (3 * 16 + 5) * 2
    assert out[0, 16 + 3, 16 + 5, 1] == (3 * 16 + 5) * 2 + 1


def test_plpm_uses_the_statistics_of_its_own_batch_and_keeps_running_ones():
    module = mala.PseudoLabels(4)
    images = jax.random.uniform(jax.random.key(0), (3, 64, 64, 3))
    variables = module.init(jax.random.key(1), images)
    logits, changed = module.apply(variables, images, mutable=["batch_stats"])
    assert logits.shape == (3,)
    assert changed["batch_stats"].keys() == {"norm1", "norm2", "norm3"}
    other = jax.tree.map(lambda x: x + 1, variables["batch_stats"])
    again, _ = module.apply({**variables, "batch_stats": other}, images, mutable=["batch_stats"])
    np.testing.assert_array_equal(logits, again)
