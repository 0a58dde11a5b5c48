"""Weights laid out for scoring: the same results, nothing left for a program to copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import methods
from mmrjax.evaluate import scoring
from mmrjax.methods import base
from mmrjax.runtime import placement


def networks(config, name, dtype):
    config = config.copy_and_resolve_references()
    config.train.compute_dtype = dtype
    config.student.unroll = 8  # as on a GPU: all of its blocks
    method = methods.create(name, config)
    frozen = method.load_frozen()[0]
    return method, (method.init(jax.random.key(0), frozen)[0], frozen)


def program(method):
    def predict(weights, images):
        return method.predict(*placement.restore(weights), images)["map"]

    return jax.jit(predict)


@pytest.mark.parametrize("name", ["mmr", "aminet"])
def test_weights_laid_out_predict_the_same(tiny_config, name):
    method, weights = networks(tiny_config, name, "bfloat16")
    images = jax.random.uniform(jax.random.key(1), (2, *tiny_config.data.image_size, 3))
    predict = program(method)
    expected = predict(weights, images)
    for on_gpu in (False, True):
        placed = placement.lay_out(weights, method.dtype, on_gpu, method.unroll)
        np.testing.assert_array_equal(predict(placed, images), expected)


def test_weights_lie_as_a_gpu_reads_them(tiny_config):
    method, weights = networks(tiny_config, "mmr", "bfloat16")
    variables, frozen = placement.lay_out(weights, method.dtype, True, method.unroll)
    blocks = variables["params"]["encoder"]["blocks"]
    depth = len(blocks["fc1"]["kernel"].parts)
    assert depth == len(weights[0]["params"]["encoder"]["blocks"]["fc1"]["kernel"])
    dtypes = {str(x.dtype) for x in blocks["fc1"]["kernel"].parts + blocks["fc1"]["bias"].parts}
    assert dtypes == {"bfloat16"}
    assert blocks["norm1"]["bias"].dtype == jnp.float32  # computed with in float32
    conv = frozen["teacher"]["params"]["layer2_0"]["conv1"]
    before = weights[1]["teacher"]["params"]["layer2_0"]["conv1"]["kernel"]
    h, w, inputs, outputs = before.shape
    assert conv["kernel"].kernel.shape == (outputs, h, w, inputs)
    assert conv["bias"].dtype == jnp.bfloat16


def test_what_is_in_place_is_not_copied(tiny_config):
    _, weights = networks(tiny_config, "mmr", "float32")
    placed = placement.lay_out(weights, jnp.float32, on_gpu=False)
    for before, after in zip(jax.tree.leaves(weights), jax.tree.leaves(placed), strict=True):
        assert after is before


def test_a_stack_that_a_loop_reads_stays_whole(tiny_config):
    _, weights = networks(tiny_config, "mmr", "bfloat16")
    depth = len(weights[0]["params"]["encoder"]["blocks"]["fc1"]["kernel"])
    variables, _ = placement.lay_out(weights, jnp.bfloat16, True, unroll=depth - 1)
    assert variables["params"]["encoder"]["blocks"]["fc1"]["kernel"].shape[0] == depth


def test_kernels_of_matrix_products_are_not_turned(tiny_config):
    _, weights = networks(tiny_config, "mmr", "bfloat16")
    variables, _ = placement.lay_out(weights, jnp.bfloat16, on_gpu=True)
    kernel = variables["params"]["fpn"]["layer2_up1"]["kernel"]
    assert kernel.shape == weights[0]["params"]["fpn"]["layer2_up1"]["kernel"].shape


def test_a_finished_run_gives_its_weights_in_the_compute_dtype(tiny_config):
    method, weights = networks(tiny_config, "mmr", "bfloat16")
    variables, frozen = base.Trained(method, *weights, {}, None).ready
    for network in (
        variables["params"]["encoder"]["blocks"]["fc1"],
        frozen["teacher"]["params"]["conv1"],
    ):
        assert {str(x.dtype) for x in jax.tree.leaves(network)} == {"bfloat16"}


def test_options_of_scoring_are_known_to_the_compiler():
    jax.jit(lambda x: x @ x, compiler_options=scoring.SCORED_BY)(jnp.ones((2, 2)))


def test_nothing_of_the_blocks_is_copied_in_the_program(tiny_config):
    method, weights = networks(tiny_config, "mmr", "float32")
    placed = placement.lay_out(weights, method.dtype, True, method.unroll)
    images = jnp.zeros((1, *tiny_config.data.image_size, 3))
    blocks = weights[0]["params"]["encoder"]["blocks"]
    stacked = {blocks[name]["kernel"].shape for name in ("fc1", "fc2")}

    def found(weights):
        text = program(method).lower(weights, images).compile().as_text()
        shapes = ["[" + ",".join(map(str, shape)) + "]" for shape in stacked]
        return sum(len(re.findall(re.escape(shape), text)) for shape in shapes)

    assert found(weights) > 0
    assert found(placed) == 0
