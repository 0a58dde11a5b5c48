"""A painter and a judge in one step: the autoencoder of MALA and its PLPM (sections III-B, Eq. 3).

The judge learns to tell painted images (label 1) from originals (label 0). Adversarial, the painter
wants its images called original; cooperative, it wants them told apart too, as the judge does.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmrjax.methods import losses, optim, ssim

PAINTER, JUDGE = "autoencoder", "plpm"  # names in the parameters


def update(
    judge: nn.Module | None,
    options: ConfigDict,
    paint: Callable[[dict], jax.Array],
    state,
    batch: dict,
    tx: dict,
) -> tuple:
    """One step of the judge, then one of the painter through the changed judge.

    The painter runs forward once. The judge sees originals and painted images in two passes: in one
    pass the statistics of the batch would tell them apart. Its second reading, by which the painter
    learns, leaves the running statistics alone.

    Args:
      judge: logits of images in [-1, 1], float32 [b]; None trains the painter alone.
      options: `plpm` (adversarial or cooperative) and `paint_weights`, of L1, 1 - SSIM, judgement.
      paint: parameters of the painter -> painted images, float32 [b, h, w, 3], in [0, 1] or beyond.
      state: as in `Stage.update`.
      batch: "image" float32 [b, h, w, 3] in [0, 1] and "weight" [b].
      tx: {"autoencoder", "plpm"}: optimisers.

    Returns:
      (state, logs).
    """
    images, collections = batch["image"], state.collections
    params, opt_state = state.params, state.opt_state
    painted, back = jax.vjp(paint, params[PAINTER])
    logs = {}
    if judge is not None:

        def judge_loss(own):
            original, stats = _judged(judge, own, collections["batch_stats"], images)
            fake, stats = _judged(judge, own, stats, jax.lax.stop_gradient(painted))
            told = {
                "plpm_original": _mean_label(original, 0.0),
                "plpm_painted": _mean_label(fake, 1.0),
            }
            return 0.5 * sum(told.values()), (stats, told)

        slope = jax.value_and_grad(judge_loss, has_aux=True)
        (logs["plpm"], (stats, told)), gradient = slope(params[JUDGE])
        params, opt_state = optim.descend(tx, {JUDGE: gradient}, opt_state, params)
        collections, logs = {**collections, "batch_stats": stats}, logs | told

    def painter_loss(painted):
        parts = paint_losses(painted, images, batch["weight"])
        if judge is not None:
            wanted = 0.0 if options.plpm == "adversarial" else 1.0
            logits, _ = _judged(judge, params[JUDGE], collections["batch_stats"], painted)
            parts["judged"] = _mean_label(logits, wanted)
        weights = options.paint_weights  # without a judge, the last has no part
        return sum(w * x for w, x in zip(weights, parts.values(), strict=False)), parts

    (loss, parts), gradient = jax.value_and_grad(painter_loss, has_aux=True)(painted)
    gradients = {PAINTER: back(gradient)[0]}
    params, opt_state = optim.descend(tx, gradients, opt_state, params)
    state = state.replace(params=params, collections=collections, opt_state=opt_state)
    return state, {"loss": loss, **parts, **logs}


def paint_losses(painted: jax.Array, images: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """{"l1", "ssim"} over all pixels, hidden or not: mean |difference| and 1 - SSIM.

    Args:
      painted: float32 [b, h, w, 3].
      images: float32 [b, h, w, 3] in [0, 1].
      weight: float32 [b], 0 for padding rows.
    """
    total = jnp.maximum(weight.sum(), 1e-9)
    each = {"l1": jnp.abs(painted - images), "ssim": 1 - ssim.ssim_map(painted, images)}
    return {name: jnp.sum(x.mean(axis=(1, 2, 3)) * weight) / total for name, x in each.items()}


def _judged(judge: nn.Module, own: dict, stats: dict, images: jax.Array) -> tuple:
    """(logits [b], new running statistics) of images in [0, 1]."""
    variables = {"params": own, "batch_stats": stats}
    logits, changed = judge.apply(variables, 2 * images - 1, mutable=["batch_stats"])
    return logits, changed["batch_stats"]


def _mean_label(logits: jax.Array, label: float) -> jax.Array:
    return losses.binary_cross_entropy(logits, label).mean()
