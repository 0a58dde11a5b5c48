"""The feature loss: golden values, closed forms, padding rows, safe gradients, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import losses


@pytest.fixture(scope="module")
def maps(golden_dir):
    inputs = np.load(golden_dir / "maps" / "inputs.npz")
    nhwc = {k: jnp.asarray(v.transpose(0, 2, 3, 1)) for k, v in inputs.items()}
    student = {i + 1: nhwc[f"small__student{i}"] for i in range(3)}
    teacher = {i + 1: nhwc[f"small__teacher{i}"] for i in range(3)}
    return student, teacher, np.load(golden_dir / "maps" / "outputs.npz")


def test_loss_and_gradients_equal_the_official_code(maps):
    student, teacher, want = maps
    loss = lambda z: losses.multi_scale_cosine(z, teacher, jnp.ones(2))[0]  # noqa: E731
    value, gradients = jax.value_and_grad(loss)(student)
    assert float(value) == pytest.approx(float(want["small__loss"]), abs=1e-6)
    for i in range(3):
        golden = want[f"small__grad_student{i}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(gradients[i + 1], golden, atol=1e-5 * np.abs(golden).max())


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-1.0, 6.0)])
def test_parallel_and_opposite_features_have_closed_forms(maps, factor, expected):
    teacher = jax.tree.map(lambda x: x + 0.1, maps[1])
    student = jax.tree.map(lambda x: factor * x, teacher)
    loss, _ = losses.multi_scale_cosine(student, teacher, jnp.ones(2))
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_padding_rows_do_not_count(maps):
    student, teacher, _ = maps
    one = jax.tree.map(lambda x: x[:1], (student, teacher))
    padded, _ = losses.multi_scale_cosine(student, teacher, jnp.array([1.0, 0.0]))
    alone, _ = losses.multi_scale_cosine(*one, jnp.ones(1))
    assert float(padded) == pytest.approx(float(alone), abs=1e-6)


def test_gradients_are_finite_at_zero_vectors(golden_dir):
    zero = jnp.zeros((1, 2, 4, 8))
    gradient = jax.grad(lambda z: losses.cosine_distance(z, zero + 1.0).sum())(zero)
    assert np.isfinite(gradient).all()
    gradient = jax.grad(lambda z: losses.cosine_distance(z, zero).sum())(zero)
    assert np.isfinite(gradient).all()


def test_bfloat16_features_keep_float32_distances():
    """A distance computed in bfloat16 has an error of 1e-2 at a mean distance of 1e-3."""
    rng = np.random.default_rng(0)
    f = rng.standard_normal((1000, 64)).astype(np.float32)
    z = f + 0.05 * rng.standard_normal(f.shape).astype(np.float32)
    exact = losses.cosine_distance(jnp.asarray(z), jnp.asarray(f))
    rounded = losses.cosine_distance(jnp.asarray(z, jnp.bfloat16), jnp.asarray(f, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(exact - rounded).max()) < 2e-4
    assert len(np.unique(rounded)) > 900
