"""AdamW, the learning-rate schedule of the official MMR code, and one or several optimisers."""

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
      epochs: epochs of the whole run.
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


def warm_cosine(
    peak: float, warmup: float, epochs: int, steps_per_epoch: int
) -> Callable[[jax.Array], jax.Array]:
    """MAE's schedule, step -> learning rate: linear from 0 in the warm-up, then half a cosine to 0.

    The epoch is fractional, so the rate changes with every step.

    Args:
      peak: the largest rate.
      warmup: share of the epochs in [0, 1).
      epochs: epochs of the whole run.
      steps_per_epoch: updates of an epoch.
    """
    warm = warmup * epochs

    def schedule(step: jax.Array) -> jax.Array:
        epoch = step / steps_per_epoch
        fall = jnp.clip((epoch - warm) / max(epochs - warm, 1e-9), 0, 1)
        ramp = peak * epoch / max(warm, 1e-9)
        return jnp.where(epoch < warm, ramp, peak * 0.5 * (1 + jnp.cos(jnp.pi * fall)))

    return schedule


Transformation = optax.GradientTransformation | dict[str, optax.GradientTransformation]


def start(tx: Transformation, params: dict) -> optax.OptState:
    """The state of an optimiser, or {name: state} of several, each over the sub-tree of its name.

    Raises:
      ValueError: an optimiser has no parameters of its name, or parameters have no optimiser.
    """
    if not isinstance(tx, dict):
        return tx.init(params)
    if lacking := sorted(tx.keys() - params.keys()):
        raise ValueError(f"optimisers {lacking} have no parameters; there are {sorted(params)}")
    if idle := sorted(params.keys() - tx.keys()):
        raise ValueError(f"parameters {idle} have no optimiser; leave them out of the stage")
    return {name: own.init(params[name]) for name, own in tx.items()}


def descend(
    tx: Transformation, gradients: dict, opt_state: optax.OptState, params: dict
) -> tuple[dict, optax.OptState]:
    """One update: (parameters, optimiser state).

    Among several optimisers, those step whose name is in `gradients`. The others keep their states
    and the counts of their updates.
    """
    if not isinstance(tx, dict):
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state
    params, opt_state = dict(params), dict(opt_state)
    for name in (name for name in tx if name in gradients):
        updates, opt_state[name] = tx[name].update(gradients[name], opt_state[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
    return params, opt_state
