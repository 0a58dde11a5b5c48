"""Synthetic defects on pictures of good parts, drawn and blended on device inside the step.

Spec: MMR+, section 7. A defect is a shape, a source texture and a Poisson blend (poisson.py). Its
label is the set of pixels that changed. Everything is a jittable function of fixed shapes.

`pixels` are grey levels in [0, 255] throughout data/defects; `images` are uint8 pictures, or in
rows.py the pictures in [0, 1] that a method trains on.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.data.defects import places, poisson, shapes
from mmrjax.data.defects import windows as windows_lib

# Every kind that can be drawn; `Defects.kind` holds positions in this tuple.
TRAINING = ("spot", "groove", "fracture", "chip", "stain", "scratch")
HELD_OUT = ("crack", "pits", "fibre", "smear")
KINDS = (*TRAINING, *HELD_OUT, "real")
NONE = -1  # no defect found a place: the picture is unchanged, the mask empty

CHANGED = 2.0  # grey levels (mean of channels) from which a pixel belongs to the mask


@dataclasses.dataclass(frozen=True)
class DefectSettings:
    """The choice of defects to draw; hashable, so that it can be a static argument of jit.

    Attributes:
      kinds: names out of KINDS, drawn equally often among the tiny and among the large ones.
      tiny_share: probability of a tiny kind if `kinds` has tiny and large ones, in [0, 1].
      noise_intensity: standard deviation of the grain inside a spot, groove, chip, fracture, as a
        share of 255; the other kinds keep the grain of the surface.
      spatial_distribution: "uniform" over the foreground, "edge" within 12 px of its border, or
        "texture", more often in busy regions. Fractures always lie at the border.
      contrast: range of the depth of a tiny defect, as a share of 255.
      real_share: probability of the kind "real"; None: that of any other large kind.
    """

    kinds: tuple[str, ...] = TRAINING
    tiny_share: float = 0.6
    noise_intensity: float = 0.02
    spatial_distribution: str = "uniform"
    contrast: tuple[float, float] = (0.10, 0.35)
    real_share: float | None = None

    def __post_init__(self):
        """Raises ValueError for settings that cannot be drawn."""
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise ValueError(f"unknown kinds of defects {unknown}; choose some of {list(KINDS)}")
        if self.spatial_distribution not in places.DISTRIBUTIONS:
            raise ValueError(
                f"unknown spatial_distribution={self.spatial_distribution!r}; "
                f"choose one of {list(places.DISTRIBUTIONS)}"
            )
        for name in ("tiny_share", "noise_intensity", "real_share"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if not 0 < self.contrast[0] <= self.contrast[1] <= 1:
            raise ValueError(f"contrast={self.contrast} must be two rising shares in (0, 1]")

    @property
    def probabilities(self) -> dict[str, float]:
        """The probability of each kind; tiny kinds come first."""
        apart = "real" in self.kinds and self.real_share is not None
        kinds = [k for k in self.kinds if not (apart and k == "real")]
        groups = [[k for k in kinds if (k in windows_lib.TINY) == tiny] for tiny in (True, False)]
        shares = (self.tiny_share, 1 - self.tiny_share) if all(groups) else (1.0, 1.0)
        drawn = {k: share / len(g) for g, share in zip(groups, shares, strict=True) for k in g}
        if not apart:
            return drawn
        real = self.real_share if kinds else 1.0
        return {k: (1 - real) * share for k, share in drawn.items()} | {"real": real}


class Defects(NamedTuple):
    """A batch of defective pictures, of the size of the good ones.

    Attributes:
      pixels: float32 [b, h, w, 3], whole grey levels in [0, 255]; outside the blended region
        bit-identical to the good pictures.
      mask: bool [b, h, w], the pixels that changed by more than 2 grey levels.
      tiny: bool [b, h, w], the part of `mask` in components of less than 10 px.
      kind: int32 [b], position in KINDS, or NONE.
    """

    pixels: jax.Array
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
    pixels: jax.Array,
    foreground: jax.Array | None,
    settings: DefectSettings,
    bank: Bank | None = None,
    chances: jax.Array | None = None,
) -> Defects:
    """Puts defects of one random kind into each picture.

    A large defect that finds no place in eight tries is replaced by tiny ones, if `settings` has
    tiny kinds.

    Args:
      key: one PRNG key, folded with the position in the batch, or one key per picture [b]. The
        defects of a picture depend on its own key and pixels alone.
      pixels: uint8 or float32 [b, h, w, 3] in [0, 255], pictures of good parts; h, w >= 64.
      foreground: bool [b, h, w], the part (see data/foreground.py), or None: everywhere.
      settings: kinds, places and sizes; static under jit.
      bank: real defects, needed if `settings.kinds` has "real".
      chances: float32 [b, n], how likely each of the bank's n defects is on each picture, up to a
        factor; None: all alike. A picture on which none is likely gets a kind other than "real".

    Returns:
      The defective pictures and their labels.

    Raises:
      ValueError: a setting is unknown or out of range, or an array has the wrong shape.
    """
    _check(key, pixels, foreground, settings, bank)
    before = jnp.asarray(pixels, jnp.float32)
    if foreground is None:
        # The barrier hides the constant: XLA would evaluate sums over it while it compiles, 17 s.
        foreground = jax.lax.optimization_barrier(jnp.ones(before.shape[:3], bool))
    keys = (
        key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(before)))
    )
    drawings, choice = _drawings(keys, before, foreground, settings, bank, chances)
    painted, region = before, jnp.zeros(before.shape[:3], bool)
    for windows in drawings:
        painted, region = _blend_into(painted, region, windows)
    change = jnp.abs(painted - before).mean(-1)
    mask = jax.vmap(shapes.close)(change > CHANGED) & region
    tiny = shapes.small_components(mask)
    is_drawn = mask.any((1, 2))
    painted = jnp.where(is_drawn[:, None, None, None], painted, before)
    position = jnp.asarray([KINDS.index(name) for name in settings.probabilities], jnp.int32)
    return Defects(painted, mask, tiny, jnp.where(is_drawn, position[choice], NONE))


def _drawings(
    keys: jax.Array,
    pixels: jax.Array,
    foreground: jax.Array,
    settings: DefectSettings,
    bank: Bank | None,
    chances: jax.Array | None,
) -> tuple[list[windows_lib.Windows], jax.Array]:
    """The large and the tiny defects, not blended yet.

    Returns:
      (one `Windows` for the large kinds and one for the tiny kinds, if `settings` has them; the
      kind of each picture, int32 [b] into `settings.probabilities`).
    """
    key_plan, key_tiny, key_large = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    # One block of uniform numbers: the kind; the number of tiny defects and their places; the
    # places that a large defect tries.
    drawn = jax.vmap(lambda k: jax.random.uniform(k, (2 + windows_lib.POOL + windows_lib.TRIES,)))(
        key_plan
    )
    drawn_kind, drawn_tiny, drawn_large = jnp.split(drawn, (1, 2 + windows_lib.POOL), axis=1)
    names = tuple(settings.probabilities)
    choice = _draw_kinds(drawn_kind[:, 0], settings, chances)
    tiny = [name for name in names if name in windows_lib.TINY]  # the first of `names`
    drawings = []
    if len(tiny) < len(names):
        is_large = choice >= len(tiny)
        which, real = jnp.clip(choice - len(tiny), 0), None if bank is None else (*bank, chances)
        large = windows_lib.draw_large(
            key_large, drawn_large, pixels, foreground, which, is_large, settings, real
        )
        drawings.append(large)
        if tiny:  # a tiny defect may find a place where a large one found none
            failed = is_large & ~large.region.any((1, 2, 3))
            # The digits of the number that `draw_tiny` takes for its count are free to use.
            instead = (3 * drawn_tiny[:, 0] % 1 * len(tiny)).astype(jnp.int32)
            choice = jnp.where(failed, instead, choice)
    if tiny:
        is_groove = jnp.asarray([name == "groove" for name in names])[choice]
        is_tiny = choice < len(tiny)
        drawings.append(
            windows_lib.draw_tiny(
                key_tiny, drawn_tiny, pixels, foreground, is_groove, is_tiny, settings
            )
        )
    return drawings, choice


def _draw_kinds(drawn, settings, chances) -> jax.Array:
    """Draws the kind of each picture, int32 [b] into `settings.probabilities`.

    `drawn` are float32 [b] in [0, 1), `chances` those of `synthesise`.
    """
    shares = settings.probabilities
    if chances is None or "real" not in shares:
        cumulated = jnp.asarray(np.cumsum(list(shares.values())))
        return jnp.minimum(jnp.searchsorted(cumulated, drawn), len(shares) - 1)
    is_real = np.array([name == "real" for name in shares])
    possible = (chances > 0).any(-1, keepdims=True) | ~is_real  # [b, kinds]
    others = tuple(name for name in shares if name != "real")
    without = {"real": 0.0}  # the shares on a picture without a likely real defect
    if others:
        without |= dataclasses.replace(settings, kinds=others, real_share=None).probabilities
    columns = (list(shares.values()), [without[name] for name in shares])
    share = jnp.where(possible.all(-1, keepdims=True), *map(jnp.asarray, columns))
    cumulated = jnp.cumsum(share, axis=-1)
    drawn = drawn[:, None] * cumulated[:, -1:]
    last = possible.shape[1] - 1 - jnp.argmax(possible[:, ::-1], axis=1)
    return jnp.minimum((drawn > cumulated).sum(-1), last)


def _blend_into(pixels, region, windows: windows_lib.Windows) -> tuple[jax.Array, jax.Array]:
    """Blends windows: (the pictures, `region` [b, h, w] with the windows' regions added)."""
    b, s, n = windows.region.shape[:3]

    def cut(picture, corner):
        return jax.lax.dynamic_slice(picture, (*corner, 0), (n, n, 3))

    targets = jax.vmap(jax.vmap(cut, (None, 0)))(pixels, windows.corner)

    def flat(x):
        return x.reshape(b * s, *x.shape[2:])

    mixed = False if windows.mixed is None else flat(windows.mixed)
    blended = poisson.blend(flat(windows.source), flat(targets), flat(windows.region), mixed)
    blended = jnp.clip(jnp.round(blended), 0.0, 255.0).reshape(targets.shape)

    def write(picture, region, corner, new, where):
        for i in range(s):  # regions of one picture do not meet
            old = cut(picture, corner[i])
            new_window = jnp.where(where[i][..., None], new[i], old)
            picture = jax.lax.dynamic_update_slice(picture, new_window, (*corner[i], 0))
            old = jax.lax.dynamic_slice(region, corner[i], (n, n))
            region = jax.lax.dynamic_update_slice(region, old | where[i], corner[i])
        return picture, region

    return jax.vmap(write)(pixels, region, windows.corner, blended, windows.region)


def _check(key, pixels, foreground, settings, bank) -> None:
    """Raises ValueError for arrays of a wrong shape and for a missing bank."""
    shape = jnp.shape(pixels)
    if len(shape) != 4 or shape[-1] != 3 or min(shape[1:3]) < 64:
        raise ValueError(f"pixels have shape {shape}; expected [b, h, w, 3] with h, w >= 64")
    if foreground is not None and jnp.shape(foreground) != shape[:3]:
        raise ValueError(f"foreground has shape {jnp.shape(foreground)}; expected {shape[:3]}")
    if key.shape not in ((), shape[:1]):
        raise ValueError(f"key has shape {key.shape}; expected () or one per picture {shape[:1]}")
    if "real" in settings.kinds and bank is None:
        raise ValueError("kind 'real' needs a bank of labelled defects; see bank.py")
