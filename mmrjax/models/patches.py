"""Square patches of a map as token vectors, and back; pixels of a patch row by row, channels last.

The layout of MAE, MMR and AMI-Net: entry (p * side + q) * c + i of a vector is channel i of the
pixel in row p, column q of the patch.
"""

import jax


def patchify(maps: jax.Array, side: int) -> jax.Array:
    """Cuts [b, h, w, c] into row-major patches [b, n, side * side * c]."""
    b, h, w, c = maps.shape
    x = maps.reshape(b, h // side, side, w // side, side, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, side * side * c)


def unpatchify(patches: jax.Array, grid_hw: tuple[int, int], side: int) -> jax.Array:
    """The inverse of `patchify`; `grid_hw` are the patches per column and per row."""
    b, (h, w) = patches.shape[0], grid_hw
    x = patches.reshape(b, h, w, side, side, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * side, w * side, -1)
