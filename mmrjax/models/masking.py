"""The two forms of masking: dropping tokens, and hiding pixels.

Dropped tokens (MAE) never enter the encoder. Hidden pixels enter it as units of the mean colour;
this is the ablation of arXiv 2304.02216, section 6.1, which the official code does not have.
"""

import math

import jax
import jax.numpy as jnp


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """Number of visible tokens or units, int(n * (1 - ratio)) in floats as the official code."""
    return int(tokens * (1 - mask_ratio))


def random_noise(keys: jax.Array, tokens: int) -> jax.Array:
    """One uniform draw per token and example, float32 [b, n]; `keys` has one key per example."""
    return jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys)


def shuffle(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ranks of noise, float [b, n] -> (ids_shuffle, ids_restore), both int [b, n].

    The tokens of the lowest noise come first in ids_shuffle; ids_restore is its inverse.
    """
    ids_shuffle = jnp.argsort(noise, axis=1)
    return ids_shuffle, jnp.argsort(ids_shuffle, axis=1)


def take_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Gathers tokens: [b, n, d] and int ids [b or 1, k] -> [b, k, d]."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)


def unit_grid(image_size: tuple[int, int], unit: int) -> tuple[int, int]:
    """Units of `unit` x `unit` px per column and per row of an image (height, width).

    Raises:
      ValueError: the unit does not divide both sides.
    """
    h, w = image_size
    if h % unit or w % unit:
        common = math.gcd(h, w)
        known = ", ".join(str(q) for q in range(1, common + 1) if common % q == 0)
        raise ValueError(
            f"student.mask_unit={unit} must divide the image sides {(h, w)}; choose one of {known}"
        )
    return h // unit, w // unit


def hide_units(images: jax.Array, noise: jax.Array, unit: int, mask_ratio: float) -> jax.Array:
    """Sets random units of `unit` x `unit` px to 0, the mean colour of a normalised image.

    Args:
      images: normalised RGB [b, h, w, 3].
      noise: float [b, n], n units in row-major order; the lowest `kept_tokens` of each row stay.
      unit: side q of a unit in px; must divide h and w.
      mask_ratio: share of units to hide.

    Returns:
      [b, h, w, 3].
    """
    grid = unit_grid(images.shape[1:3], unit)
    _, rank = shuffle(noise)  # not a threshold: equal draws would hide too few
    visible = rank < kept_tokens(noise.shape[1], mask_ratio)
    visible = visible.reshape(-1, *grid).repeat(unit, axis=1).repeat(unit, axis=2)  # [b, h, w]
    return jnp.where(visible[..., None], images, 0)
