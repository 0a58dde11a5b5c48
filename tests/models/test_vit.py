"""The GELU of bfloat16, and the kernel that attention runs on."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from mmrjax.models import vit


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
    assert rounded_within(jax.jit(vit.gelu)(x), exact(x)[0], 7e-5)


def test_in_bfloat16_every_number_gets_the_slope_of_gelu():
    x = every_bfloat16()
    slope = jax.jit(jax.vmap(jax.grad(lambda x: vit.gelu(x).astype(jnp.float32))))(x)
    assert rounded_within(slope, exact(x)[1], 7e-5)


def test_in_float32_gelu_is_exact():
    x = np.linspace(-10, 10, 10_001, dtype=np.float32)
    np.testing.assert_allclose(vit.gelu(jnp.asarray(x)), exact(x)[0], atol=2e-6)
