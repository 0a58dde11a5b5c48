"""Labelled defective pictures as they are, which have no normal twin (MMR+, spec section 2).

By default a labelled defect is cut out and blended into a good picture, its twin (defect_bank.py).
The two other ways show the student the labelled picture itself, also one whose defect is too large
to be cut out. "ignore" leaves the defect's cells out of the loss. "inpaint" has the student predict
the teacher's features of the same picture with the defect filled in from around; what lies too deep
in a defect to be known from around is left out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import augment, geometry
from mmrjax.data.defects import shapes, synthesise

MARGIN = 3  # px around a label that count as the defect: labels are tight, and a rim shows it
RADIUS = 5  # px from which a pixel is filled in
DEPTH = 10  # px from what is known, beyond which a filling is a smear without the part's texture
MARKED = 63  # of 255, after a crop's resizing, in which a label of 1 px does not vanish


class Rows(NamedTuple):
    """Rows of a batch that labelled pictures take; sizes as training sees them.

    Attributes:
      is_used: bool [b]; the other rows hold something, too.
      images: float32 [b, h, w, 3], whole grey levels in [0, 255].
      twins: the same, what the teacher sees.
      mask: bool [b, h, w], the labelled defect, as far as it is in view.
      tiny: bool [b, h, w], the part of it in components that are under 10 px in the whole picture.
      ignored: bool [b, h, w], what is not to be predicted.
    """

    is_used: jax.Array
    images: jax.Array
    twins: jax.Array
    mask: jax.Array
    tiny: jax.Array
    ignored: jax.Array


def targets(
    target: str, images: np.ndarray, masks: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What is to be predicted of labelled pictures.

    Args:
      target: "inpaint" or "ignore".
      images: uint8 [n, h, w, 3].
      masks: bool [n, h, w], their defects.

    Returns:
      (bool [n], of which pictures anything is to be predicted; of these m {"ignored": bool
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
    """A picture whose `region` is filled in from around it (Telea 2004).

    Args:
      image: uint8 [h, w, 3].
      region: uint8 [h, w], not 0 in what is to go.

    Returns:
      (uint8 [h, w, 3], the same outside `region`; bool [h, w], the part of `region` more than
      `DEPTH` px from what is known; all of it where nothing is).
    """
    if region.all():
        return image, region > 0
    depth = cv2.distanceTransform((region > 0).astype(np.uint8), cv2.DIST_L2, 5)
    filled = cv2.inpaint(np.ascontiguousarray(image), region, RADIUS, cv2.INPAINT_TELEA)
    return filled, depth > DEPTH


def draw(
    keys: jax.Array, pictures: Mapping, chances: jax.Array, share: float, config: ConfigDict
) -> Rows:
    """Which rows a labelled picture takes, and which one; cropped and flipped as others are.

    Crops are taken from the picture as evaluation sees it, those of good pictures from all of it at
    native size: where evaluation crops the middle these are enlarged more, and else a little
    softer. A crop may leave the defect outside.

    Args:
      keys: one PRNG key per row, [b].
      pictures: "images" uint8 [n, *view.frame, 3], "masks" bool [n, *view.frame], and their
        `targets`.
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
        image = pictures["images"][which]
        marks = [pictures[name][which] for name in ("masks", "tiny", "ignored")]
        marks = [jnp.where(mark, 255, 0).astype(jnp.uint8)[..., None] for mark in marks]
        layers = [image, pictures["twins"][which] if "twins" in pictures else image, *marks]
        seen = _crop(key_crop, jnp.concatenate(layers, axis=-1), view, train)
        is_used = (jax.random.uniform(key_use) < share) & (chance > 0).any()
        marked = seen[..., 6:] > MARKED
        return Rows(is_used, seen[..., :3], seen[..., 3:6], *jnp.moveaxis(marked, -1, 0))

    return jax.vmap(one)(keys, chances)


def show(
    rows: Rows, normal: jax.Array, found: synthesise.Defects
) -> tuple[synthesise.Defects, jax.Array, jax.Array]:
    """Puts labelled pictures in the place of synthetic ones.

    Args:
      rows: of b synthetic rows.
      normal: float32 [b, h, w, 3] in [0, 1], the good pictures of these rows.
      found: what was made of them; its images are in [0, 1] here.

    Returns:
      (the rows' pictures and defects now; the twins whose features are to be predicted; pixels
      that are not, bool [b, h, w]).
    """
    is_used = rows.is_used[:, None, None]
    images, twins = (
        jnp.where(is_used[..., None], shown / 255, before)
        for shown, before in ((rows.images, found.images), (rows.twins, normal))
    )
    real = jnp.where(rows.mask.any((1, 2)), synthesise.KINDS.index("real"), synthesise.NONE)
    now = synthesise.Defects(
        images,
        jnp.where(is_used, rows.mask, found.mask),
        jnp.where(is_used, rows.tiny, found.tiny),
        jnp.where(rows.is_used, real, found.kind),
    )
    return now, twins, is_used & rows.ignored


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
