"""Defects in some rows of a training batch, for any method whose plan has a `Recipe`.

The step calls `with_defects` after cropping and flipping. A method then trains on `batch["image"]`
and finds the picture without its defect in `batch["normal"]` and the defect in `batch["mask"]`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmrjax.data import geometry
from mmrjax.data.defects import labelled, synthesise

# Folded into an example's key, so that its mask and crop stay those of a batch without defects.
DEFECT, LABELLED = 0xDEF, 0x1AB


class Drawn(NamedTuple):
    """Rows with defects.

    Attributes:
      images: float32 [b, h, w, 3] in [0, 1], what the method sees.
      normal: float32 [b, h, w, 3] in [0, 1], the same without the defect.
      mask: bool [b, h, w], pixels of the defect.
      tiny: bool [b, h, w], those of defects under 10 px.
      kind: int32 [b], position in synthesise.KINDS; synthesise.NONE if nothing was drawn.
      ignored: bool [b, h, w], pixels whose normal look is not known; None if there are none.
    """

    images: jax.Array
    normal: jax.Array
    mask: jax.Array
    tiny: jax.Array
    kind: jax.Array
    ignored: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage wants its defects; a method with defects of another make overrides `draw`.

    Attributes:
      every: every so-many-th row of a batch, from the first, gets a defect. With 1 all rows do,
        and `draw` may leave some of them as they are.
      settings: which defects `draw` makes.
      second: whether each row comes with another picture of its category, batch["second"].
      labelled_target: treatment of real defects in extras["labelled"]: blend, inpaint or ignore
        (config.mmr_plus.labelled_target).
      labelled_share: share of the rows that take a real defect, if there are any.
      config: whose groups `data` and `train` say how training looks at labelled pictures.
    """

    every: int
    settings: synthesise.DefectSettings = dataclasses.field(
        default_factory=synthesise.DefectSettings
    )
    second: bool = False
    labelled_target: str = "blend"
    labelled_share: float = 0.5
    config: ConfigDict | None = dataclasses.field(default=None, hash=False)

    def draw(self, rows: dict, extras: dict) -> Drawn:
        """Draws a defect on each row.

        Args:
          rows: "image" float32 [b, h, w, 3] in [0, 1], "keys" [b], and what else the batch has:
            "foreground" bool [b, h, w], "domain" int32 [b], "second" [b, h, w, 3], and "defective"
            bool [b], which rows the plan wants to be defective.
          extras: from `Method.extras`; "labelled" holds real defects.
        """
        known = extras.get("labelled")
        if known is None:
            return self._synthetic(rows)
        domain = rows.get("domain", jnp.zeros(len(rows["image"]), jnp.int32))
        chances = known["chances"][domain]
        if self.labelled_target == "blend":
            return self._synthetic(rows, known, chances)
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows["keys"], LABELLED)
        shown = labelled.draw(keys, known, chances, self.labelled_share, self.config)
        return with_labelled(shown, self._synthetic(rows))

    def _synthetic(self, rows: dict, known: dict | None = None, chances=None) -> Drawn:
        """Synthetic defects, and with `known` real defects, blended into the pictures."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows["keys"], DEFECT)
        pixels = jnp.round(255 * rows["image"])
        foreground = rows.get("foreground")
        if known is None:
            defects = synthesise.synthesise(keys, pixels, foreground, self.settings)
        else:
            settings = dataclasses.replace(
                self.settings,
                kinds=(*self.settings.kinds, "real"),
                real_share=self.labelled_share,
            )
            bank = synthesise.Bank(known["images"], known["masks"])
            defects = synthesise.synthesise(keys, pixels, foreground, settings, bank, chances)
        # Added as a difference: pixels that are not blended stay the same bit for bit.
        images = rows["image"] + geometry.to_unit(defects.pixels - pixels)
        return Drawn(images, rows["image"], defects.mask, defects.tiny, defects.kind)


def with_labelled(shown: labelled.Rows, drawn: Drawn) -> Drawn:
    """Puts labelled pictures in the place of synthetic defects, in the rows that use them."""
    is_used = shown.is_used[:, None, None]
    images, normal = (
        jnp.where(is_used[..., None], geometry.to_unit(pixels), synthetic)
        for pixels, synthetic in (
            (shown.pixels, drawn.images),
            (shown.twin_pixels, drawn.normal),
        )
    )
    real = jnp.where(shown.mask.any((1, 2)), synthesise.KINDS.index("real"), synthesise.NONE)
    return Drawn(
        images,
        normal,
        jnp.where(is_used, shown.mask, drawn.mask),
        jnp.where(is_used, shown.tiny, drawn.tiny),
        jnp.where(shown.is_used, real, drawn.kind),
        is_used & shown.ignored,
    )


def chosen(x: jax.Array, every: int) -> jax.Array:
    """The rows of a batch that get a defect, [b, ...] -> [b / every, ...]."""
    return x.reshape(-1, every, *x.shape[1:])[:, 0]


def replaced(x: jax.Array, every: int, rows: jax.Array) -> jax.Array:
    """A batch [b, ...] with the `chosen` rows replaced by `rows` [b / every, ...]."""
    groups = x.reshape(-1, every, *x.shape[1:])
    return jnp.concatenate([rows[:, None], groups[:, 1:]], axis=1).reshape(x.shape)


def with_defects(recipe: Recipe, batch: dict, extras: dict) -> dict:
    """The batch with defects in its `chosen` rows.

    Returns:
      The batch with "image" changed and, new, "normal" float32 [b, h, w, 3], "mask" and "tiny" bool
      [b, h, w], "kind" int32 [b] and, if some pixels' normal look is not known, "ignored" bool
      [b, h, w].
    """
    every, image = recipe.every, batch["image"]
    rows = {name: chosen(x, every) for name, x in batch.items() if name != "weight"}
    drawn = recipe.draw(rows, extras)
    nowhere = jnp.zeros(image.shape[:3], bool)
    changed = {
        "image": replaced(image, every, drawn.images),
        "normal": replaced(image, every, drawn.normal),
        "mask": replaced(nowhere, every, drawn.mask),
        "tiny": replaced(nowhere, every, drawn.tiny),
        "kind": replaced(
            jnp.full(len(image), synthesise.NONE, jnp.int32), every, drawn.kind.astype(jnp.int32)
        ),
    }
    if drawn.ignored is not None:
        changed["ignored"] = replaced(nowhere, every, drawn.ignored)
    return {**batch, **changed}


def counts(batch: dict, names: set[str]) -> dict[str, jax.Array]:
    """How many defects of each named kind a batch shows, for the log; {} without a recipe."""
    if "kind" not in batch:
        return {}
    kinds = jnp.arange(len(synthesise.KINDS)) == batch["kind"][:, None]  # [b, kinds]
    each = zip(synthesise.KINDS, kinds.sum(0).astype(jnp.float32), strict=True)
    logs = {f"defects_{name}": count for name, count in each if name in names}
    return logs | {"defects": kinds.sum().astype(jnp.float32)}
