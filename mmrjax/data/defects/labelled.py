"""Labelled defective pictures that training shows as they are (MMR+, spec section 2).

By default a labelled defect is cut out and blended into a good picture, its twin (bank.py). The two
other targets show the student the labelled picture itself, even if its defect is too large to be
cut out. "ignore" leaves the defect's cells out of the loss. "inpaint" has the student predict the
teacher's features of the same picture with the defect filled in from its surroundings; pixels too
deep in a defect to be filled in are left out of the loss.
"""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import augment, geometry
from mmrjax.data.defects import shapes

MARGIN = 3  # px around a label that count as the defect: labels are tight, and its rim shows
RADIUS = 5  # px from which a pixel is filled in
DEPTH = 10  # px from the defect's border, beyond which a filling is a smear without texture
MARKED = 63  # of 255: a label of 1 px is above it after the resizing of a crop


class Rows(NamedTuple):
    """Rows of a batch that labelled pictures take, at the size that training sees.

    Attributes:
      is_used: bool [b], whether the row takes its labelled picture; every row holds a picture.
      pixels: float32 [b, h, w, 3], whole grey levels in [0, 255], for the student.
      twin_pixels: float32 [b, h, w, 3] in [0, 255], for the teacher.
      mask: bool [b, h, w], the labelled defect, as far as it is in view.
      tiny: bool [b, h, w], the part of it in components that are under 10 px in the whole picture.
      ignored: bool [b, h, w], the pixels that are not to be predicted.
    """

    is_used: jax.Array
    pixels: jax.Array
    twin_pixels: jax.Array
    mask: jax.Array
    tiny: jax.Array
    ignored: jax.Array


def targets(
    target: str, images: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Prepares what the student is to predict of labelled pictures.

    Args:
      target: "inpaint" or "ignore".
      images: uint8 [n, h, w, 3].
      masks: bool [n, h, w], their defects.

    Returns:
      (bool [n], the m pictures of which something is left to predict; for these {"ignored": bool
      [m, h, w], pixels whose cells do not count; "tiny": bool [m, h, w], defects under 10 px; with
      "inpaint" also "twins": uint8 [m, h, w, 3], without the defects}).
    """
    side = 2 * MARGIN + 1
    around = [cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)) for mask in masks]
    tiny = jax.jit(shapes.small_components)
    made = {"ignored": np.stack(around) > 0, "tiny": np.stack([np.asarray(tiny(m)) for m in masks])}
    if target == "inpaint":
        filled, unknown = zip(*map(fill_in, images, around), strict=True)
        made |= {"ignored": np.stack(unknown), "twins": np.stack(filled)}
    known = ~made["ignored"].all(axis=(1, 2))
    return known, {name: array[known] for name, array in made.items()}


def fill_in(image: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fills in a region of a picture from its surroundings (Telea 2004).

    Args:
      image: uint8 [h, w, 3].
      region: uint8 [h, w], not 0 in the pixels to replace.

    Returns:
      (uint8 [h, w, 3], the same outside `region`; bool [h, w], the part of `region` more than
      `DEPTH` px from its border, or all of a region that fills the picture).
    """
    if region.all():
        return image, region > 0
    depth = cv2.distanceTransform((region > 0).astype(np.uint8), cv2.DIST_L2, 5)
    filled = cv2.inpaint(np.ascontiguousarray(image), region, RADIUS, cv2.INPAINT_TELEA)
    return filled, depth > DEPTH


def draw(
    keys: jax.Array, pictures: Mapping, chances: jax.Array, share: float, config: ConfigDict
) -> Rows:
    """Draws a labelled picture for each row, cropped and flipped as good pictures are.

    Crops are taken from the picture as evaluation sees it. Crops of good pictures are taken from
    the whole picture at native size, so that a labelled crop is a little softer, and enlarged more
    if evaluation crops the middle. A crop may leave the defect outside.

    Args:
      keys: one PRNG key per row, [b].
      pictures: "images" uint8 [n, *view.frame, 3], "masks" bool [n, *view.frame], and their
        `targets`.
      chances: float32 [b, n], how likely each picture is in each row, up to a factor. A row
        without a likely picture is not used.
      share: the part of the rows with a likely picture that take it.
      config: its groups `data` and `train` say how training looks at pictures.
    """
    view, train = geometry.View.of(config), config.train

    def draw_row(key, chance):
        key_use, key_which, key_crop = jax.random.split(key, 3)
        which = jax.random.categorical(key_which, jnp.log(chance))
        image = pictures["images"][which]
        marks = [pictures[name][which] for name in ("masks", "tiny", "ignored")]
        marks = [jnp.where(mark, 255, 0).astype(jnp.uint8)[..., None] for mark in marks]
        layers = [image, pictures["twins"][which] if "twins" in pictures else image, *marks]
        seen = _crop(key_crop, jnp.concatenate(layers, axis=-1), view, train)
        is_used = (jax.random.uniform(key_use) < share) & (chance > 0).any()
        marked = seen[..., 6:] > MARKED
        return Rows(is_used, seen[..., :3], seen[..., 3:6], *jnp.moveaxis(marked, -1, 0))

    return jax.vmap(draw_row)(keys, chances)


def _crop(key: jax.Array, layers: jax.Array, view: geometry.View, train: ConfigDict) -> jax.Array:
    """Augments as `train` says: uint8 [*view.frame, c] to float32 [*view.size, c] in [0, 255]."""
    size = jnp.asarray(view.frame, jnp.int32)
    key_window, key = jax.random.split(key)
    window = augment.random_window(key_window, size, view.size, view.frame)
    if train.augment == "none":
        return augment.crop_resize(layers, window, view.size)
    shape = tuple(train.crop_scale), tuple(train.crop_ratio)
    flip = train.augment == "rrc_flip"
    return 255 * augment.augment(key, layers, window, view.size, *shape, flip)
