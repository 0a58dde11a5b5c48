"""The projection that contrasts are trained in; no score uses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import vit

EPSILON = 1e-8  # smallest length, as torch.nn.functional.cosine_similarity


class Projection(nn.Module):
    """Two dense layers, d-256-128, to unit length."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> float32 [..., 128]."""
        x = nn.Dense(256, dtype=self.dtype, kernel_init=vit.xavier, name="fc1")(x)  # [..., 256]
        x = nn.Dense(128, dtype=self.dtype, kernel_init=vit.xavier, name="fc2")(nn.relu(x))
        return unit(x.astype(jnp.float32))  # [..., 128]


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., c] divided by their length; a vector of zeros stays as it is."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, EPSILON**2))
