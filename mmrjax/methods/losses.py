"""Feature losses between student and teacher maps; always in float32."""

import jax
import jax.numpy as jnp

EPSILON = 1e-8  # torch.nn.CosineSimilarity's, on the product of the norms


def cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cosine similarity over the last axis.

    Distances computed in bfloat16 are unusable (5 distinct values over 1000 vectors), so both
    inputs are cast to float32 first. Gradients are finite at zero vectors.

    Args:
      student: features [..., c], any float dtype.
      teacher: features [..., c], any float dtype.

    Returns:
      float32 [...], in [0, 2].
    """
    z, f = student.astype(jnp.float32), teacher.astype(jnp.float32)
    dot, zz, ff = (jnp.sum(a * b, axis=-1) for a, b in ((z, f), (z, z), (f, f)))
    # The square root of a clamped product: no 0/0 and no infinite slope at a zero vector.
    return 1.0 - dot / jnp.sqrt(jnp.maximum(zz * ff, EPSILON**2))


def multi_scale_cosine(
    student: dict[int, jax.Array], teacher: dict[int, jax.Array], weight: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The MMR loss: the sum over scales of the mean cosine distance (arXiv 2304.02216, Eq. 1).

    All locations count, masked or visible, and every scale weighs the same. Range [0, 2 s].

    Args:
      student: {layer: [b, h_l, w_l, c_l]}.
      teacher: the same layers.
      weight: [b], 0 for padding rows; the mean runs over rows of weight 1.

    Returns:
      (scalar float32, {"loss_layer<l>": scalar}).
    """
    total = jnp.maximum(weight.sum(), 1e-9)
    logs = {}
    for layer, target in teacher.items():
        per_image = cosine_distance(student[layer], target).mean(axis=(1, 2))  # [b]
        logs[f"loss_layer{layer}"] = jnp.sum(per_image * weight) / total
    return sum(logs.values()), logs


SMOOTH = 1e-5  # of the focal loss, on the labels and on the probability


def focal(anomaly: jax.Array, target: jax.Array, gamma: float = 2.0) -> jax.Array:
    """Focal loss of a two-class map as DRAEM's code computes it, without class weights.

    The one-hot label is clamped to [1e-5, 1 - 1e-5], and 1e-5 is added to the probability.

    Args:
      anomaly: float [...], the probability of "defective" in [0, 1].
      target: bool [...], where a defect is.
      gamma: exponent; 0 gives the cross-entropy.

    Returns:
      float [...], -(1 - p_t)^gamma log p_t of each pixel.
    """
    own, other = jnp.where(target, anomaly, 1 - anomaly), jnp.where(target, 1 - anomaly, anomaly)
    p = (1 - SMOOTH) * own + SMOOTH * other + SMOOTH
    return -((1 - p) ** gamma) * jnp.log(p)


def binary_cross_entropy(logits: jax.Array, label: float) -> jax.Array:
    """-log of the probability that a sigmoid gives to a label of 0 or 1; ln 2 at logit 0."""
    return jax.nn.softplus(logits) - label * logits


def of_map(anomaly: jax.Array, mask: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """{"l1", "focal"} between a map and the true defects: mean |difference| and focal loss.

    Args:
      anomaly: float32 [b, h, w], the probability of "defective".
      mask: bool [b, h, w].
      weight: float32 [b], 0 for padding rows.
    """
    each = {"l1": jnp.abs(mask - anomaly), "focal": focal(anomaly, mask)}
    total = jnp.maximum(weight.sum(), 1e-9)
    return {name: jnp.sum(x.mean(axis=(1, 2)) * weight) / total for name, x in each.items()}
