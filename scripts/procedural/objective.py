"""The objective of the embedded teacher: damage stands out among the views of a design.

PatchCore calls a patch defective when it is far from every patch of good parts. The objective is
that rule itself: a cell of a feature map is compared with the clean cells of the other views of its
design, and the distance to the nearest must tell whether the cell is damaged. Light, position, blur
and new samples of the same texture differ between views and are learned not to matter.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

MOST_CELLS = 144  # of a view that take part; more are sampled anew in every step
DAMAGED_WEIGHT = 4.0  # damaged cells are rare
LAYER_STRIDE = {1: 4, 2: 8, 3: 16}
# Pixels of damage from which a cell counts as damaged, per layer.
_LEAST_PIXELS = {1: 1, 2: 2, 3: 4}
# {name: weight}: layers 1 to 3 alone, and layers 2 and 3 together as PatchCore joins them.
TERMS = {"layer1": 0.5, "layer2": 1.0, "layer3": 1.0, "joined": 1.0}
FIRST_SCALE = (2.0, -2.0)  # slope before softplus, offset: one pair for each of TERMS


def loss(features: dict, scales: dict, damage: jax.Array, key: jax.Array):
    """Cross-entropy of "this cell is damaged", from distances alone.

    Args:
      features: {layer: float32 [e * v, h, w, c]} of layers 1 to 3.
      scales: {term: float32 [2]}, learned; FIRST_SCALE at the start.
      damage: uint8 [e, v, height, width], 0 where clean.
      key: for the sample of cells.

    Returns:
      (scalar, {term: scalar}).
    """
    maps = {n: nn.avg_pool(x, (3, 3), padding="SAME") for n, x in features.items()}
    b, h, w, c = maps[2].shape
    deep = jax.image.resize(maps[3], (b, h, w, maps[3].shape[-1]), "bilinear")
    total = c + deep.shape[-1]
    joined = [maps[2] * (total / c / 2) ** 0.5, deep * (total / deep.shape[-1] / 2) ** 0.5]
    terms = {
        "layer1": (maps[1], 1),
        "layer2": (maps[2], 2),
        "layer3": (maps[3], 3),
        "joined": (jnp.concatenate(joined, -1), 2),
    }
    logs = {}
    for (name, (x, layer)), key_cells in zip(terms.items(), jax.random.split(key, 4), strict=True):
        labels = cell_labels(damage, layer)
        cells = x.reshape(*labels.shape, x.shape[-1])
        if labels.shape[-1] > MOST_CELLS:
            kept = jax.random.permutation(key_cells, labels.shape[-1])[:MOST_CELLS]
            cells, labels = cells[:, :, kept], labels[:, :, kept]
        logs[name] = _cross_entropy(nearest_distance(cells, labels), labels, scales[name])
    return sum(TERMS[name] * value for name, value in logs.items()), logs


def cell_labels(damage: jax.Array, layer: int) -> jax.Array:
    """1 damaged, 0 clean, -1 beside damage (left out); int32 [e, v, cells of `layer`]."""
    stride = LAYER_STRIDE[layer]
    e, v, h, w = damage.shape
    pixels = (
        (damage > 0).astype(jnp.float32).reshape(e * v, h // stride, stride, w // stride, stride)
    )
    pixels = pixels.sum((2, 4))
    around = nn.max_pool(pixels[..., None], (3, 3), padding="SAME")[..., 0]
    labels = jnp.where(pixels >= _LEAST_PIXELS[layer], 1, jnp.where(around > 0, -1, 0))
    return labels.reshape(e, v, -1)


def nearest_distance(cells: jax.Array, labels: jax.Array) -> jax.Array:
    """Distance to the nearest clean cell of another view of the same design.

    Args:
      cells: float32 [e, v, n, c].
      labels: int [e, v, n]; 0 is clean. If no other view has a clean cell, any cell is taken.

    Returns:
      float32 [e, v, n], the root of the mean square over channels.
    """
    e, v, n, c = cells.shape
    x = cells.reshape(e, v * n, c)
    found = jax.lax.stop_gradient(x)  # the search needs no gradient, the distance found does
    squares = jnp.sum(found**2, -1)
    # |a - b|^2 without |a|^2, which is the same for all b.
    distance = squares[:, None, :] - 2 * jnp.einsum("eic,ejc->eij", found, found)
    view = jnp.repeat(jnp.arange(v), n)
    comparable = (view[:, None] != view) & (labels.reshape(e, 1, v * n) == 0)
    nearest = jnp.argmin(jnp.where(comparable, distance, jnp.inf), -1)
    difference = x - jnp.take_along_axis(x, nearest[..., None], 1)
    return jnp.sqrt(jnp.mean(difference**2, -1) + 1e-4).reshape(e, v, n)


def _cross_entropy(distance: jax.Array, labels: jax.Array, scale: jax.Array) -> jax.Array:
    logits = jax.nn.softplus(scale[0]) * distance + scale[1]
    weight = jnp.where(labels == 1, DAMAGED_WEIGHT, 1.0) * (labels >= 0)
    entropy = optax.sigmoid_binary_cross_entropy(logits, (labels == 1).astype(jnp.float32))
    return jnp.sum(weight * entropy) / jnp.maximum(jnp.sum(weight), 1.0)
