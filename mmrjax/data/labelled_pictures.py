"""Labelled defective pictures as they are, which have no normal twin (MMR+, spec section 2).

By default a labelled defect is cut out and blended into a good picture, its twin (defect_bank.py).
The two other ways show the student the labelled picture itself, also one whose defect is too large
to be cut out: "inpaint" has it predict the teacher's features of the same picture with the defect
filled in from around, "ignore" leaves the defect's cells out of the loss.
"""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import augment, geometry

MARGIN = 3  # px around a mask that are filled in, too: a defect's rim would show what is gone
RADIUS = 5  # px from which a pixel is filled in


class Rows(NamedTuple):
    """Rows of a batch that labelled pictures take; sizes as training sees them.

    Attributes:
      is_used: bool [b]; the other rows hold something, too.
      images: float32 [b, h, w, 3], whole grey levels in [0, 255].
      twins: the same, what the teacher sees.
      mask: bool [b, h, w], the labelled defect, as far as it is in view.
    """

    is_used: jax.Array
    images: jax.Array
    twins: jax.Array
    mask: jax.Array


def fill_in(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture without its defect, which is filled in from around it (Telea 2004).

    Args:
      image: uint8 [h, w, 3].
      mask: bool [h, w], the defect.

    Returns:
      uint8 [h, w, 3], the same but for the defect and `MARGIN` px around it.
    """
    side = 2 * MARGIN + 1
    region = cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8))
    return cv2.inpaint(np.ascontiguousarray(image), region, RADIUS, cv2.INPAINT_TELEA)


def draw(keys: jax.Array, pictures: Mapping, chances: jax.Array, share: float, config: ConfigDict):
    """Which rows a labelled picture takes, and which one; cropped and flipped as others are.

    Crops are taken from the picture as evaluation sees it, so they are a little softer than those
    of good pictures, which are taken at native size.

    Args:
      keys: one PRNG key per row, [b].
      pictures: "images" and "twins" uint8 [n, *view.frame, 3], "masks" bool [n, *view.frame].
      chances: float32 [b, n], how likely each picture is in each row, up to a factor. A row in
        which none is likely keeps what it has.
      share: of the rows that take one where they can.
      config: whose `data` and `train` say how training looks at pictures.

    Returns:
      `Rows`.
    """
    view, train = geometry.View.of(config), config.train

    def one(key, chance):
        key_use, key_which, key_crop = jax.random.split(key, 3)
        which = jax.random.categorical(key_which, jnp.log(chance))
        mask = jnp.where(pictures["masks"][which], 255, 0).astype(jnp.uint8)[..., None]
        layers = [pictures["images"][which], pictures["twins"][which], mask]
        seen = _crop(key_crop, jnp.concatenate(layers, axis=-1), view, train)
        is_used = (jax.random.uniform(key_use) < share) & (chance > 0).any()
        return Rows(is_used, seen[..., :3], seen[..., 3:6], seen[..., 6] > 127)

    return jax.vmap(one)(keys, chances)


def _crop(key: jax.Array, layers: jax.Array, view: geometry.View, train: ConfigDict) -> jax.Array:
    """The augmentation of `train`, of uint8 [*view.frame, c] to float32 [*view.size, c]."""
    size = jnp.asarray(view.frame, jnp.int32)
    key_window, key = jax.random.split(key)
    window = augment.random_window(key_window, size, view.size, view.frame)
    if train.augment == "none":
        return augment.crop_resize(layers, window, view.size)
    shape = tuple(train.crop_scale), tuple(train.crop_ratio)
    flip = train.augment == "rrc_flip"
    return 255 * augment.augment(key, layers, window, view.size, *shape, flip)
