"""Clusters of an image's own patches, for AMI-Net: distances, losses, and which patches are hidden.

Sections and equations are those of the paper (IEEE TASE 2024); where the official code differs, the
code is followed.
"""

import jax
import jax.numpy as jnp

from mmrjax.methods import losses
from mmrjax.models import aminet, masking

# Eqs. 9 and 15: cosine and squared error (the code's 5 and 1), and the spread of the centres.
WEIGHT_COSINE, WEIGHT_SQUARED, WEIGHT_SPREAD = 5.0, 1.0, 0.1


def distances(tokens: jax.Array, centres: jax.Array, squared: bool) -> jax.Array:
    """Length times cosine distance between all pairs (Eq. 12); float32 [b, n, p].

    Args:
      tokens: float32 [b, n, d].
      centres: float32 [b, p, d].
      squared: square the length, as the paper prints; the official code does not.
    """
    u, v = tokens[:, :, None], centres[:, None]
    length = aminet.safe_norm(u - v)  # of differences: |u|^2 - 2 u v + |v|^2 would cancel
    return (length**2 if squared else length) * losses.cosine_distance(u, v)


def cluster_loss(tokens: jax.Array, centres: jax.Array, squared: bool) -> jax.Array:
    """Tokens close to their centres, centres far from each other (Eqs. 13 to 15); float32 [b].

    Means, as in the official code, where the paper prints sums. Arguments as in `distances`.
    """
    p = centres.shape[1]
    within = distances(tokens, centres, squared).min(axis=2).mean(axis=1)
    between = distances(centres, centres, squared).sum(axis=(1, 2)) / (p * p - p)
    return within - WEIGHT_SPREAD * between


def total_loss(
    patches: jax.Array,
    tokens: jax.Array,
    centres: jax.Array,
    predicted: jax.Array,
    weight: jax.Array,
    squared: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss (Eqs. 7 to 9, 15 and 17).

    Args:
      patches: float32 [b, n, k], what is to be predicted.
      tokens: float32 [b, n, d], as in `distances`.
      centres: float32 [b, p, d].
      predicted: float32 [b, n, k].
      weight: [b], 0 for padding rows; means run over rows of weight 1.
      squared: as in `distances`.

    Returns:
      (scalar float32, {"loss_cosine", of whole patches; "loss_squared"; "loss_cluster"}).
    """
    parts = {  # [b]
        "cosine": losses.cosine_distance(predicted, patches).mean(axis=1),
        "squared": jnp.mean((predicted - patches) ** 2, axis=(1, 2)),
        "cluster": cluster_loss(tokens, centres, squared),
    }
    total = jnp.maximum(weight.sum(), 1e-9)
    logs = {f"loss_{name}": jnp.sum(x * weight) / total for name, x in parts.items()}
    reconstruction = WEIGHT_COSINE * logs["loss_cosine"] + WEIGHT_SQUARED * logs["loss_squared"]
    return reconstruction + logs["loss_cluster"], logs


def random_visible(share: jax.Array, noise: jax.Array) -> jax.Array:
    """Hides int(n * share) tokens, those of the lowest noise (section III-C); bool [b, n].

    Args:
      share: [b], drawn uniformly from [0, 1) in training: how many is random as well as which.
      noise: [b, n], uniform draws.
    """
    hidden = (noise.shape[1] * share).astype(jnp.int32)
    _, rank = masking.shuffle(noise)
    return rank >= hidden[:, None]


def adaptive_visible(distance: jax.Array, scale: float) -> jax.Array:
    """Hides the tokens that lie on or beyond the boundary of their cluster (Eq. 16); bool [b, n].

    The boundary is the mean of a cluster's distances plus `scale` times their standard deviation
    (divided by count - 1). A cluster of one member hides nothing; one whose members are all equally
    far is hidden whole.

    Args:
      distance: [b, n, p] to every centre; a token belongs to the nearest.
      scale: the paper's lambda.
    """
    cluster, nearest = distance.argmin(axis=2), distance.min(axis=2)  # [b, n]
    member = jax.nn.one_hot(cluster, distance.shape[2])  # [b, n, p]
    count = member.sum(axis=1)  # [b, p]
    mean = jnp.sum(member * nearest[..., None], axis=1) / jnp.maximum(count, 1)
    apart = member * (nearest[..., None] - mean[:, None])
    variance = jnp.sum(apart**2, axis=1) / jnp.maximum(count - 1, 1)
    boundary = jnp.where(count > 1, mean + scale * jnp.sqrt(variance), jnp.inf)  # [b, p]
    return ~(nearest >= jnp.take_along_axis(boundary, cluster, axis=1))
