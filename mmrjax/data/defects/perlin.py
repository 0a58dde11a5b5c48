"""Defects of DRAEM's make: a transparent foreign texture in the places that Perlin noise chooses.

Every row draws with its own key. One array of 33 x 33 gradients serves all lattices, so that one
program of fixed shapes draws them all. `pixels` are in [0, 1] here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.data.defects import retouch, rows, synthesise

OCTAVES = 6  # a lattice has 1, 2, 4, ... 32 cells along an axis
NODES = 2 ** (OCTAVES - 1) + 1
THRESHOLD = 0.5
TURN = 90.0  # degrees, the largest rotation of the noise
OPAQUE = 0.2  # least share of the texture in the blend: beta is drawn from [0, 0.8]
CANDIDATES = 8  # drawings of the noise of which the first is taken that shows in the picture
PROBES = 28  # points along a side at which a candidate is tried
KIND = len(synthesise.KINDS)  # none of those, but drawn


def fade(t: jax.Array) -> jax.Array:
    """The smooth step 6 t^5 - 15 t^4 + 10 t^3."""
    return t * t * t * (t * (6 * t - 15) + 10)


def noise(angles: jax.Array, cells: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Perlin noise with a factor of sqrt 2; 0 at the nodes of the lattice.

    Args:
      angles: float32 [33, 33], directions of the gradients, in radians.
      cells: int [2], cells per column and per row of the picture, 1 to 32.
      y: float [...], places in [0, 1), as shares of the height.
      x: float [...], shares of the width. Places outside the picture have noise 0.

    Returns:
      float [...], in [-1, 1].
    """
    inside = (y >= 0) & (y < 1) & (x >= 0) & (x < 1)
    y, x = (jnp.where(inside, place, 0) * n for place, n in zip((y, x), cells, strict=True))
    row, column = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    v, u = y - row, x - column
    flat = row * NODES + column
    gradients = jax.lax.complex(jnp.cos(angles), jnp.sin(angles)).ravel()  # one look-up, not two

    def slope(down: int, right: int) -> jax.Array:
        gradient = gradients[flat + down * NODES + right]
        return gradient.real * (v - down) + gradient.imag * (u - right)

    s, t = fade(v), fade(u)
    upper = slope(0, 0) + s * (slope(1, 0) - slope(0, 0))
    lower = slope(0, 1) + s * (slope(1, 1) - slope(0, 1))
    return jnp.where(inside, 2**0.5 * (upper + t * (lower - upper)), 0)


def turned_noise(drawn: dict, y: jax.Array, x: jax.Array, ratio: float) -> jax.Array:
    """Noise that is rotated around the picture's middle; 0 beyond its corners.

    The noise is computed at the places that the rotation brings here. DRAEM's code rotates the
    finished picture, which interpolates once more.

    Args:
      drawn: from `draw`.
      y: float [...], shares of the height.
      x: float [...], shares of the width.
      ratio: height / width of the picture.
    """
    sin, cos = jnp.sin(drawn["turn"]), jnp.cos(drawn["turn"])
    down, right = (y - 0.5) * ratio, x - 0.5
    return noise(
        drawn["angles"],
        drawn["cells"],
        0.5 + (cos * down - sin * right) / ratio,
        0.5 + sin * down + cos * right,
    )


def draw(key: jax.Array) -> dict:
    """Random gradients, lattice and rotation of one noise."""
    drawn = jax.random.uniform(key, (NODES**2 + 3,))  # one draw for all
    return {
        "angles": 2 * np.pi * drawn[3:].reshape(NODES, NODES),
        "cells": 1 << jnp.floor(OCTAVES * drawn[:2]).astype(jnp.int32),
        "turn": np.deg2rad(TURN) * (2 * drawn[2] - 1),
    }


def grid(h: int, w: int) -> tuple[jax.Array, jax.Array]:
    """Rows and columns of a picture's pixels as shares of its sides, float32 [h, 1] and [1, w]."""
    return jnp.arange(h)[:, None] / h, jnp.arange(w)[None] / w


def mask(key: jax.Array, where: jax.Array) -> jax.Array:
    """The pixels of a defect; never none if `where` has any.

    Eight noises are tried at a few hundred points; the first counts that exceeds the threshold in
    `where`. DRAEM's code keeps a picture whose noise nowhere exceeds it as one without a defect. If
    all eight fail, the peak of the last noise is the defect.

    Args:
      key: PRNG key of one picture.
      where: bool [h, w], pixels that may be defective.
    """
    h, w = where.shape
    candidates = jax.vmap(draw)(jax.random.split(key, CANDIDATES))
    y, x = grid(h, w)
    step = max(1, h // PROBES), max(1, w // PROBES)
    few = y[:: step[0]], x[:, :: step[1]]
    probed = jax.vmap(lambda drawn: turned_noise(drawn, *few, h / w))(candidates)
    shows = ((probed > THRESHOLD) & where[:: step[0], :: step[1]]).any((1, 2))
    taken = jnp.where(shows.any(), jnp.argmax(shows), CANDIDATES - 1)
    drawn = jax.tree.map(lambda leaf: leaf[taken], candidates)
    height = jnp.where(where, turned_noise(drawn, y, x, h / w), -jnp.inf)
    found = where & (height > jnp.minimum(THRESHOLD, height.max() - 1e-6))
    return jax.lax.optimization_barrier(found)


def blend(pixels: jax.Array, texture: jax.Array, beta: jax.Array, where: jax.Array) -> jax.Array:
    """The picture outside of `where`; inside (1 - beta) texture + beta picture.

    Args:
      pixels: float32 [h, w, 3] in [0, 1].
      texture: the same shape.
      beta: scalar in [0, 1]; 0 shows the texture, 1 leaves the picture.
      where: bool [h, w].
    """
    return jnp.where(where[..., None], (1 - beta) * texture + beta * pixels, pixels)


def is_grey(pixels: jax.Array) -> jax.Array:
    """Whether the channels of pictures [b, h, w, 3] in [0, 1] differ by 2 grey levels at most."""
    r, g, b = jnp.moveaxis(pixels, -1, 0)
    apart = jnp.maximum(jnp.maximum(jnp.abs(r - g), jnp.abs(g - b)), jnp.abs(r - b))
    return apart.max(axis=(1, 2)) <= 2 / 255


@dataclasses.dataclass(frozen=True)
class Recipe(rows.Recipe):
    """Foreign textures in the places of Perlin noise (DRAEM, section 3.2; MALA, section III-C).

    `extras["textures"]` is uint8 [n, h, w, 3], of the size of the pictures. A row that the plan
    does not count among the defective ones (batch["defective"]) stays as it is.

    Attributes:
      on_part: probability that a defect is confined to batch["foreground"].
    """

    every: int = 1
    on_part: float = 0.5

    def draw(self, rows_: dict, extras: dict) -> rows.Drawn:
        """See `rows.Recipe.draw`."""
        images = rows_["image"]
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows_["keys"], rows.DEFECT)
        key_mask, key_look, key_rest = jax.vmap(jax.random.split, (0, None), 1)(keys, 3)
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(key_rest)
        anywhere = jnp.ones(images.shape[:3], bool)
        confined = drawn[:, 0] < self.on_part
        part = rows_.get("foreground", anywhere) | ~confined[:, None, None]
        wanted = rows_.get("defective", anywhere[:, 0, 0])
        masks = jax.vmap(mask)(key_mask, part & wanted[:, None, None])
        known = jnp.asarray(extras["textures"])
        which = jnp.floor(drawn[:, 1] * len(known)).astype(jnp.int32)
        # The barrier keeps XLA from looking each pixel up where it is read.
        textures = jax.vmap(retouch.retouch)(key_look, jax.lax.optimization_barrier(known[which]))
        textures = jnp.where(
            is_grey(images)[:, None, None, None],
            textures.mean(axis=-1, keepdims=True),
            textures,
        )
        spoilt = jax.vmap(blend)(images, textures, (1 - OPAQUE) * drawn[:, 2], masks)
        kind = jnp.where(masks.any((1, 2)), KIND, synthesise.NONE)
        return rows.Drawn(spoilt, images, masks, jnp.zeros_like(masks), kind)
