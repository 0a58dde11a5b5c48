"""AdamW, and the learning-rate schedule of the official MMR code."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

# Everything of two or more dimensions in the official code: weights, but also the class and mask
# tokens. LayerNorm scales and all biases are not decayed; position tables are not parameters.
DECAYED = ("kernel", "patch_kernel", "cls_token", "mask_token")


def learning_rates(optim: ConfigDict, epochs: int) -> np.ndarray:
    """The learning rate of every epoch, float32 [epochs].

    Linear warm-up from exactly 0 (epoch 0 only fills Adam's moments), then constant, divided by
    ten at each drop. Official epochs 50, 119 and 159 of 200, scaled to `epochs` and floored.
    """
    epoch = np.arange(epochs)
    warmup = int(optim.warmup * epochs + 1e-9)
    rates = np.full(epochs, float(optim.learning_rate))
    for drop in optim.drops:
        rates[epoch >= int(drop * epochs + 1e-9)] /= 10
    ramp = optim.learning_rate * epoch / max(warmup, 1)
    return np.where(epoch < warmup, ramp, rates).astype(np.float32)


def decay_mask(params: dict) -> dict:
    """True for every parameter that weight decay applies to; same structure as `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def optimiser(
    optim: ConfigDict,
    epochs: int,
    steps_per_epoch: int,
    decayed: Callable[[dict], dict] | None = decay_mask,
) -> optax.GradientTransformation:
    """AdamW whose learning rate is constant within an epoch; step 0 is the first update.

    Args:
      optim: config.optim.
      epochs: of the whole run.
      steps_per_epoch: updates with one learning rate.
      decayed: parameters -> which of them weight decay applies to; None: to all.
    """
    rates = jnp.asarray(learning_rates(optim, epochs))

    def schedule(step: jax.Array) -> jax.Array:
        return rates[jnp.minimum(step // steps_per_epoch, epochs - 1)]

    return optax.adamw(
        schedule,
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
        mask=decayed,
    )
