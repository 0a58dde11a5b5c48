"""GELU and LayerNorm in bfloat16: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from mmrjax.models import norm


def every_bfloat16():
    """All finite numbers of the type up to 50 in size."""
    values = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    values = values[np.isfinite(values.astype(np.float32))]
    return values[np.abs(values.astype(np.float32)) <= 50]


def exact(x):
    x = x.astype(np.float64)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return x * special.ndtr(x), special.ndtr(x) + x * density


def rounded_within(found, expected, extra):
    """Half a step of bfloat16, which has eight significant bits, and `extra`."""
    off = np.abs(np.asarray(found, np.float64) - expected)
    return (off <= 2.0**-8 * np.abs(expected) + extra).all()


def test_in_bfloat16_every_number_gets_its_gelu():
    x = every_bfloat16()
    assert len(x) > 30_000
    assert rounded_within(jax.jit(norm.gelu)(x), exact(x)[0], 7e-5)


def test_in_bfloat16_every_number_gets_the_slope_of_gelu():
    x = every_bfloat16()
    slope = jax.jit(jax.vmap(jax.grad(lambda x: norm.gelu(x).astype(jnp.float32))))(x)
    assert rounded_within(slope, exact(x)[1], 7e-5)


def test_in_float32_gelu_is_exact():
    x = np.linspace(-10, 10, 10_001, dtype=np.float32)
    np.testing.assert_allclose(norm.gelu(jnp.asarray(x)), exact(x)[0], atol=2e-6)


def norms(dtype, shape, mean=0.0, deviation=2.0):
    """Input, parameters and slope of a norm over 32 channels; all that bfloat16 can hold."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(mean, deviation, (*shape, 32)), jnp.bfloat16)
    parameters = {"scale": rng.normal(1, 0.2, 32), "bias": rng.normal(0, 0.2, 32)}
    parameters = {"params": {k: jnp.asarray(v, jnp.float32) for k, v in parameters.items()}}
    slope = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
    return x.astype(dtype), parameters, slope.astype(dtype)


def norm_and_gradient(dtype, shape, mean=0.0, deviation=2.0, epsilon=1e-6):
    x, parameters, slope = norms(dtype, shape, mean, deviation)
    layer = norm.layer_norm(dtype, None, epsilon)
    y, backward = jax.vjp(layer.apply, parameters, x)
    to_parameters, to_x = jax.jit(backward)(slope)
    return {"y": y, "x": to_x, **to_parameters["params"]}


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 4)])
@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_in_bfloat16_the_norm_and_its_gradient_are_those_of_flax(shape, mean):
    same_norm(shape, mean)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
@pytest.mark.parametrize("deviation", [0.0, 2e-3])
def test_in_bfloat16_the_norm_has_its_own_epsilon(deviation, epsilon):
    same_norm((3, 5), 0.0 if deviation else 3.0, deviation, epsilon)


def same_norm(*case):
    found = norm_and_gradient(jnp.bfloat16, *case)
    expected = norm_and_gradient(jnp.float32, *case)  # nn.LayerNorm
    for name, value in expected.items():
        largest = np.abs(value).max() + 1e-6
        off = np.abs(found[name].astype(jnp.float32) - value).max() / largest
        # The norm and the slope are rounded to bfloat16; the parameters' sums are not.
        assert off < (2**-8 if name in "yx" else 1e-3), name
    assert found["y"].dtype == found["x"].dtype == jnp.bfloat16
    assert found["scale"].dtype == found["bias"].dtype == jnp.float32


def test_a_large_norm_is_that_of_its_parts(monkeypatch):
    x, parameters, _ = norms(jnp.bfloat16, (6, 5))
    layer = norm.layer_norm(jnp.bfloat16, None)

    def result():
        program = jax.jit(lambda *a: layer.apply(*a)).lower(parameters, x)
        return program.as_text(), program.compile()(parameters, x)

    at_once, expected = result()
    monkeypatch.setattr(norm, "SEPARATE_STATISTICS_FROM", 1)
    apart, found = result()
    assert "optimization_barrier" not in at_once
    assert "optimization_barrier" in apart
    np.testing.assert_array_equal(found, expected)
