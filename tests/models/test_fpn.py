"""The pyramid's own convolutions; the pyramid as a whole is in test_student.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import fpn


@pytest.mark.parametrize("shape", [(3, 6, 9, 4), (16, 4, 5, 2), (1, 1, 1, 2), (2, 5, 1, 3)])
def test_a_3x3_convolution_has_the_gradients_of_xla(shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, shape[-1], 5)), jnp.float32)
    gradient = jnp.asarray(rng.normal(size=(*shape[:3], 5)), jnp.float32)
    results = {}
    for convolve in (fpn.convolve_3x3, fpn._convolve):
        y, pull = jax.vjp(convolve, x, kernel)
        results[convolve] = (y, *pull(gradient))
    for ours, xla in zip(*results.values(), strict=True):
        np.testing.assert_allclose(ours, xla, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_sum_over_images_is_rounded_once():
    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.normal(size=(64, 6, 6, 4)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.zeros((3, 3, 4, 4), jnp.bfloat16)
    exact = jax.vjp(fpn._convolve, *(a.astype(jnp.float32) for a in (x, kernel)))[1]
    _, expected = exact(gradient.astype(jnp.float32))
    _, found = jax.vjp(fpn.convolve_3x3, x, kernel)[1](gradient)
    assert found.dtype == jnp.bfloat16
    error = jnp.abs(found.astype(jnp.float32) - expected)
    assert float((error - 0.004 * jnp.abs(expected)).max()) < 1e-3  # half a unit of 8 bits


@pytest.mark.parametrize(("platform", "ours"), [("cpu", True), ("gpu", False), ("tpu", False)])
def test_the_loop_over_images_is_for_cpus(platform, ours, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.ones((1, 4, 4, 2))
    module = fpn.ConvNorm(3, 3, jnp.float32)
    variables = module.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(lambda v: module.apply(v, x))(variables))
    assert ("custom_vjp" in text) == ours
