"""Random patch dropping (MAE-style masking): dropped tokens never enter the encoder."""

import jax
import jax.numpy as jnp


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """Number of visible tokens, int(n * (1 - ratio)) in floating point as the official code."""
    return int(tokens * (1 - mask_ratio))


def random_noise(keys: jax.Array, tokens: int) -> jax.Array:
    """One uniform draw per token and example, float32 [b, n]; `keys` has one key per example."""
    return jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys)


def shuffle(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns noise [b, n] into (ids_shuffle, ids_restore), both int [b, n]; lowest noise is kept."""
    ids_shuffle = jnp.argsort(noise, axis=1)
    return ids_shuffle, jnp.argsort(ids_shuffle, axis=1)


def take_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Gathers tokens [b, n, d] by ids [b, k] to [b, k, d]."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)
