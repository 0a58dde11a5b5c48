"""What a begun run holds fast to. That it can be stopped and resumed: test_resume.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import methods, train

FIRST, OTHER = "1" * 64, "2" * 64


@pytest.mark.parametrize("stage", ["checkpoints", "fitted"])
@pytest.mark.parametrize("other", [OTHER, None])
def test_a_begun_run_refuses_another_teacher(tmp_path, stage, other):
    train._hold_teacher(tmp_path, FIRST)
    (tmp_path / stage / "6").mkdir(parents=True)
    train._hold_teacher(tmp_path, FIRST)
    with pytest.raises(ValueError, match=r"sha256 11111111…, the file has .* another --workdir"):
        train._hold_teacher(tmp_path, other)


def test_a_run_without_checkpoints_may_take_another_teacher(tmp_path):
    train._hold_teacher(tmp_path, FIRST)
    train._hold_teacher(tmp_path, OTHER)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    train._hold_teacher(tmp_path, OTHER)


def test_a_run_older_than_the_note_goes_on(tmp_path):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    train._hold_teacher(tmp_path, FIRST)


def test_kernels_cast_beforehand_predict_the_same(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.train.compute_dtype = "bfloat16"
    method = methods.create("mmr", config)
    frozen = method.load_frozen()[0]
    variables = method.init(jax.random.key(0), frozen)[0]
    trained = train.Trained(method, variables, frozen, {}, None)
    images = jax.random.uniform(jax.random.key(1), (2, *config.data.image_size, 3))
    predict = jax.jit(method.predict)
    before, after = predict(variables, frozen, images), predict(*trained.ready, images)
    np.testing.assert_array_equal(before["map"], after["map"])
    kernels = [x for x in jax.tree.leaves(trained.ready) if x.dtype == jnp.bfloat16]
    assert sum(x.size for x in kernels) > 0.9 * sum(x.size for x in jax.tree.leaves(variables))


@pytest.mark.parametrize(("name", "words"), [("flash", "available: auto"), ("cudnn", "NVIDIA GPU")])
def test_a_kernel_of_attention_that_cannot_run_is_refused(tiny_config, name, words):
    config = tiny_config.copy_and_resolve_references()
    config.student.attention = name
    with pytest.raises(ValueError, match=words):
        methods.create("mmr", config)
