"""The places of synthetic defects in a picture."""

import jax
import jax.numpy as jnp

from mmrjax.data.defects import shapes

DISTRIBUTIONS = ("uniform", "edge", "texture")
EDGE = 12  # px from the border of the part, for the distribution "edge"


def weights(pixels: jax.Array, foreground: jax.Array, distribution: str) -> jax.Array:
    """How likely each pixel is the middle of a defect.

    Args:
      pixels: float32 [h, w, 3], one picture.
      foreground: bool [h, w], the part.
      distribution: one of DISTRIBUTIONS; "texture" prefers busy regions.

    Returns:
      float32 [h, w], not normalised.
    """
    if distribution == "edge":
        return border(foreground, EDGE).astype(jnp.float32)
    if distribution == "texture":
        dy, dx = jnp.gradient(pixels.mean(-1))
        return foreground * (shapes.blur(jnp.hypot(dy, dx), 4.0) + 1e-3)
    return foreground.astype(jnp.float32)


def border(foreground: jax.Array, width: int) -> jax.Array:
    """Pixels of the part less than `width` px from its border, bool [h, w].

    The border of the picture counts as a border of the part.
    """
    outside = jnp.pad(~foreground, width, constant_values=True)
    return foreground & shapes.dilate(outside, width)[width:-width, width:-width]


def choose(uniforms: jax.Array, weights: jax.Array) -> jax.Array:
    """Chooses pixels by weight.

    Args:
      uniforms: float32 [count], numbers in [0, 1).
      weights: float32 [h, w].

    Returns:
      int32 [count, 2], (y, x) of each chosen pixel.
    """
    rows = jnp.cumsum(weights.sum(1))
    wanted = uniforms * rows[-1]
    y = jnp.minimum(jnp.sum(rows <= wanted[:, None], axis=1), len(weights) - 1)
    columns = jnp.cumsum(weights[y], axis=1)  # [count, w]
    wanted = wanted - (rows[y] - columns[:, -1])  # the rest of it within that row
    x = jnp.minimum(jnp.sum(columns <= wanted[:, None], axis=1), weights.shape[1] - 1)
    return jnp.stack([y, x], axis=-1)
