"""Synthetic defects on pictures of good parts, drawn and blended on device inside the step.

Spec: MMR+, section 7. A defect is a shape, a source texture and a Poisson blend (poisson.py); what
changed is its label. Everything is a jittable function of fixed shapes.
"""

import dataclasses
from typing import NamedTuple

import jax

# Every kind that can be drawn; `Defects.kind` holds positions in this tuple.
TRAINING = ("spot", "groove", "fracture", "chip", "stain", "scratch")
HELD_OUT = ("crack", "pits", "fibre", "smear")
KINDS = (*TRAINING, *HELD_OUT, "real")
TINY = ("spot", "groove")  # bounding box of at most 9 px, one to three in an image
NONE = -1  # no place was found: the image is as it was, the mask empty


@dataclasses.dataclass(frozen=True)
class DefectSettings:
    """What `synthesise` draws; hashable, so that it can be a static argument of jit.

    Attributes:
      kinds: names out of KINDS, drawn equally often among the tiny and among the large ones.
      tiny_share: probability of a tiny kind where `kinds` has both, in [0, 1].
      noise_intensity: standard deviation of the grain inside a defect, as a share of 255.
      spatial_distribution: where defects lie: "uniform" over the foreground, "edge" within 12 px
        of its border, or "texture" (where the picture is busiest).
      contrast: range of the depth of a tiny defect, as a share of 255.
    """

    kinds: tuple[str, ...] = TRAINING
    tiny_share: float = 0.6
    noise_intensity: float = 0.02
    spatial_distribution: str = "uniform"
    contrast: tuple[float, float] = (0.10, 0.35)


class Defects(NamedTuple):
    """A batch of defective pictures; [b, h, w] is the size of what they were made from.

    Attributes:
      images: float32 [b, h, w, 3], whole grey levels in [0, 255]; outside the blended region
        bit-identical to the input.
      mask: bool [b, h, w], the pixels that changed by more than 2 grey levels.
      tiny: bool [b, h, w], the part of `mask` in components of less than 10 px.
      kind: int32 [b], position in KINDS, or NONE.
    """

    images: jax.Array
    mask: jax.Array
    tiny: jax.Array
    kind: jax.Array


class Bank(NamedTuple):
    """Labelled real defects to cut and blend (kind "real").

    Attributes:
      images: uint8 [n, s, s, 3], each with a defect in it.
      masks: bool [n, s, s], where the defect is.
    """

    images: jax.Array
    masks: jax.Array


def synthesise(
    key: jax.Array,
    images: jax.Array,
    foreground: jax.Array | None,
    settings: DefectSettings,
    bank: Bank | None = None,
) -> Defects:
    """Puts defects of one random kind into each picture.

    Args:
      key: one PRNG key, folded with the position in the batch, or one key per picture [b]. What a
        picture gets depends on its own key and pixels alone.
      images: uint8 or float32 [b, h, w, 3] in [0, 255], pictures of good parts; h, w >= 64.
      foreground: bool [b, h, w], where the part is (see foreground.py), or None: everywhere.
      settings: what to draw; static under jit.
      bank: real defects, needed when `settings.kinds` has "real".

    Returns:
      The defective pictures and their labels.

    Raises:
      ValueError: a setting is unknown or out of range, or an array has the wrong shape.
    """
    raise NotImplementedError
