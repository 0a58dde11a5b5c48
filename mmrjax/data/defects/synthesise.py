"""Synthetic defects on pictures of good parts, drawn and blended on device inside the step.

Spec: MMR+, section 7. A defect is a shape, a source texture and a Poisson blend (poisson.py); what
changed is its label. Everything is a jittable function of fixed shapes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.data.defects import kinds as kinds_lib
from mmrjax.data.defects import poisson, shapes

# Every kind that can be drawn; `Defects.kind` holds positions in this tuple.
TRAINING = ("spot", "groove", "fracture", "chip", "stain", "scratch")
HELD_OUT = ("crack", "pits", "fibre", "smear")
KINDS = (*TRAINING, *HELD_OUT, "real")
TINY = ("spot", "groove")  # bounding box of at most 9 px, one to three in an image
DISTRIBUTIONS = ("uniform", "edge", "texture")
NONE = -1  # no place was found: the image is as it was, the mask empty

CHANGED = 2.0  # grey levels (mean of channels) from which a pixel belongs to the mask
VISIBLE = 8.0  # mean change of a tiny defect's core, grey levels; a large one needs half of it
BOX = 9  # px, largest side of a tiny defect
TINY_WINDOW, LARGE_WINDOW = 24, 128  # px
POOL = 12  # tiny defects drawn, of which up to three are placed
APART = 17  # px between the middles of tiny defects: blended regions do not meet
TRIES = 8  # of placing a large defect
EDGE = 12  # px from the border of the part, for spatial_distribution "edge"


@dataclasses.dataclass(frozen=True)
class DefectSettings:
    """What `synthesise` draws; hashable, so that it can be a static argument of jit.

    Attributes:
      kinds: names out of KINDS, drawn equally often among the tiny and among the large ones.
      tiny_share: probability of a tiny kind where `kinds` has both, in [0, 1].
      noise_intensity: standard deviation of the grain inside a spot, groove, chip, fracture, as a
        share of 255; the other kinds keep the grain of what they lie on.
      spatial_distribution: where defects lie: "uniform" over the foreground, "edge" within 12 px
        of its border, or "texture" (where the picture is busiest). Fractures: at the border.
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
        """Refuses what cannot be drawn."""
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise ValueError(f"unknown kinds of defects {unknown}; choose some of {list(KINDS)}")
        if self.spatial_distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"unknown spatial_distribution={self.spatial_distribution!r}; "
                f"choose one of {list(DISTRIBUTIONS)}"
            )
        for name in ("tiny_share", "noise_intensity", "real_share"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if not 0 < self.contrast[0] <= self.contrast[1] <= 1:
            raise ValueError(f"contrast={self.contrast} must be two rising shares in (0, 1]")

    @property
    def probabilities(self) -> dict[str, float]:
        """How likely each kind is."""
        apart = "real" in self.kinds and self.real_share is not None
        kinds = [k for k in self.kinds if not (apart and k == "real")]
        groups = [[k for k in kinds if (k in TINY) == tiny] for tiny in (True, False)]
        shares = (self.tiny_share, 1 - self.tiny_share) if all(groups) else (1.0, 1.0)
        drawn = {k: share / len(g) for g, share in zip(groups, shares, strict=True) for k in g}
        if not apart:
            return drawn
        real = self.real_share if kinds else 1.0
        return {k: (1 - real) * share for k, share in drawn.items()} | {"real": real}


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
    chances: jax.Array | None = None,
) -> Defects:
    """Puts defects of one random kind into each picture.

    A large one that finds no place in eight tries is replaced by tiny ones, if `settings` has any.

    Args:
      key: one PRNG key, folded with the position in the batch, or one key per picture [b]. What a
        picture gets depends on its own key and pixels alone.
      images: uint8 or float32 [b, h, w, 3] in [0, 255], pictures of good parts; h, w >= 64.
      foreground: bool [b, h, w], where the part is (see foreground.py), or None: everywhere.
      settings: what to draw; static under jit.
      bank: real defects, needed when `settings.kinds` has "real".
      chances: float32 [b, n], how likely each of the bank's n defects is on each picture, up to a
        factor; None: all alike. A picture on which none is likely gets a kind other than "real".

    Returns:
      The defective pictures and their labels.

    Raises:
      ValueError: a setting is unknown or out of range, or an array has the wrong shape.
    """
    bank = _checked(key, images, foreground, settings, bank)
    pixels = jnp.asarray(images, jnp.float32)
    b, h, w, _ = pixels.shape
    if foreground is None:
        # Hidden from the compiler, whose interpreter would sum over it: 17 s each time.
        foreground = jax.lax.optimization_barrier(jnp.ones((b, h, w), bool))
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
    key_plan, key_tiny, key_large = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    # Which kind, how many tiny ones, and where.
    drawn = jax.vmap(lambda k: jax.random.uniform(k, (2 + POOL + TRIES,)))(key_plan)
    drawn_kind, drawn_tiny, drawn_large = jnp.split(drawn, (1, 2 + POOL), axis=1)
    names = tuple(settings.probabilities)
    choice = _draw_kinds(drawn_kind[:, 0], settings, chances)
    small = [name for name in names if name in TINY]  # the first of `names`
    drawings = []
    if len(small) < len(names):
        which, real = jnp.clip(choice - len(small), 0), None if bank is None else (*bank, chances)
        large = _large_windows(
            *(key_large, drawn_large, pixels, foreground, which, choice >= len(small)),
            *(settings, real),
        )
        drawings.append(large)
        if small:  # where a large one finds no place, a tiny one may
            failed = (choice >= len(small)) & ~large.region.any((1, 2, 3))
            again = (3 * drawn_tiny[:, 0] % 1 * len(small)).astype(jnp.int32)  # see _tiny_windows
            choice = jnp.where(failed, again, choice)
    if small:
        is_groove = jnp.asarray([name == "groove" for name in names])[choice]
        is_used = choice < len(small)
        drawings.append(
            _tiny_windows(key_tiny, drawn_tiny, pixels, foreground, is_groove, is_used, settings)
        )
    painted, region = pixels, jnp.zeros((b, h, w), bool)
    for windows in drawings:
        painted, region = _blend_into(painted, region, windows)
    change = jnp.abs(painted - pixels).mean(-1)
    mask = jax.vmap(shapes.close)(change > CHANGED) & region
    tiny = shapes.small_components(mask)
    found = mask.any((1, 2))
    painted = jnp.where(found[:, None, None, None], painted, pixels)
    position = jnp.asarray([KINDS.index(name) for name in names], jnp.int32)[choice]
    return Defects(painted, mask, tiny, jnp.where(found, position, NONE))


def _draw_kinds(drawn, settings, chances) -> jax.Array:
    """The kind of each picture, int32 [b] into `settings.probabilities`; `drawn` [b] in [0, 1)."""
    shares = settings.probabilities
    if chances is None or "real" not in shares:
        cumulated = jnp.asarray(np.cumsum(list(shares.values())))
        return jnp.minimum(jnp.searchsorted(cumulated, drawn), len(shares) - 1)
    is_real = np.array([name == "real" for name in shares])
    possible = (chances > 0).any(-1, keepdims=True) | ~is_real  # [b, kinds]
    others = tuple(name for name in shares if name != "real")
    without = {"real": 0.0}  # the shares where no real one can come, also if none else was to come
    if others:
        without |= dataclasses.replace(settings, kinds=others, real_share=None).probabilities
    columns = (list(shares.values()), [without[name] for name in shares])
    share = jnp.where(possible.all(-1, keepdims=True), *map(jnp.asarray, columns))
    cumulated = jnp.cumsum(share, axis=-1)
    drawn = drawn[:, None] * cumulated[:, -1:]
    last = possible.shape[1] - 1 - jnp.argmax(possible[:, ::-1], axis=1)
    return jnp.minimum((drawn > cumulated).sum(-1), last)


class _Windows(NamedTuple):
    """Places to blend, up to s in each of b pictures; all but `corner` [b, s, n, n, ...].

    Attributes:
      corner: int32 [b, s, 2], of the window in the picture.
      source: float32, what is cloned.
      region: bool, where; empty if nothing is to be done.
      mixed: bool [b, s]; None: nowhere, which takes a third less time.
    """

    corner: jax.Array
    source: jax.Array
    region: jax.Array
    mixed: jax.Array | None


def _blend_into(pixels, region, windows: _Windows) -> tuple[jax.Array, jax.Array]:
    """The pictures with all windows blended, and `region` [b, h, w] with theirs added."""
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


def _tiny_windows(keys, drawn, pixels, foreground, is_groove, is_used, settings) -> _Windows:
    """One to three spots or grooves in each picture where `is_used`."""

    def one(key, drawn, picture, part, is_groove, is_used):
        count = 1 + (3 * drawn[0]).astype(jnp.int32)
        weights = _weights(picture, part, settings.spatial_distribution)
        middles = _places(drawn[1:], weights)
        blocks = shapes.draw_blocks(key, POOL * 8, POOL * (10 + TINY_WINDOW**2))
        blocks = [block.reshape(POOL, -1) for block in blocks]
        draw = jax.vmap(lambda m, *b: _draw_tiny(b, m, picture, part, is_groove, settings))
        corner, source, region, fits = draw(middles, *blocks)
        taken, used = [], []
        for i in range(3):
            for j in taken:
                fits &= jnp.abs(middles - middles[j]).max(-1) >= APART
            taken.append(jnp.argmax(fits))
            used.append(fits.any() & is_used & (i < count))
        taken, used = jnp.stack(taken), jnp.stack(used)
        region = region[taken] & used[:, None, None]
        return _Windows(corner[taken], source[taken], region, None)

    return jax.vmap(one)(keys, drawn, pixels, foreground, is_groove, is_used)


def _draw_tiny(blocks, middle, picture, part, is_groove, settings):
    """One candidate: (corner, source, region, whether it may be used)."""
    n = TINY_WINDOW
    draws = shapes.Draws(*blocks)
    corner, place = _window(picture, part, middle, n)
    spot, groove = _spot(draws, place), _groove(draws, place)
    profile = shapes.blur(jnp.where(is_groove, groove, spot), 0.6)
    profile = profile / profile.max()
    box = jnp.maximum(jnp.abs(place.y), jnp.abs(place.x)) <= BOX // 2
    support = (profile > 0.03) & box
    profile = jnp.where(support, profile, 0.0)
    level = jnp.sum(place.pixels.mean(-1) * profile) / profile.sum()
    low, high = settings.contrast
    # Less depth in the dark, as light would have it; 0.4 of 0.1 is still a visible step.
    depth = draws.uniform(low, high) * 255
    depth = depth * jnp.clip(level / 110.0, 0.4, 1.0)
    sign = jnp.where(level + depth > 250, -1.0, jnp.where(level < 1.2 * depth, 1.0, 0.0))
    sign = jnp.where(sign == 0, draws.sign(0.7), sign)
    grain = settings.noise_intensity * 255 * shapes.smooth(draws.normal(n, n), 0.7)
    source = place.pixels + (profile * (sign * depth + grain))[..., None]
    core = profile >= 0.5
    change = jnp.abs(jnp.clip(jnp.round(source), 0, 255) - place.pixels).mean(-1)
    is_visible = jnp.sum(change * core) >= (VISIBLE + 0.5) * core.sum()
    on_part = jnp.sum(support & place.foreground) >= 0.7 * support.sum()
    return corner, source, shapes.dilate(support, 3), is_visible & on_part


def _spot(draws, place) -> jax.Array:
    """A turned ellipse with semi-axes of 1 to 3.5 px, as coverage."""
    axes, angle = draws.uniform(1.0, 3.5, 2), draws.uniform(0, np.pi)
    return shapes.coverage(shapes.ellipse_depth(place.y, place.x, axes, angle))


def _groove(draws, place) -> jax.Array:
    """A random walk of 4 to 9 px, 1 to 2 px wide, as coverage."""
    length, radius = draws.uniform(4.0, 9.0), draws.uniform(0.5, 1.0)
    turns = np.deg2rad(25) * draws.normal(10)
    points = shapes.walk(turns, length, draws.uniform(0, 2 * np.pi))
    # The ends and the blur add to the walk: shorten it so that the whole fits the box.
    side = jnp.ptp(points, axis=0).max()
    points = points * jnp.minimum(1.0, (BOX - 2 * radius - 1.4) / side)
    return shapes.coverage(shapes.line_depth(place.y, place.x, points, jnp.full(10, radius)))


def _large_windows(keys, drawn, pixels, foreground, which, is_used, settings, real) -> _Windows:
    """One large defect in each picture where `is_used`; `which` counts the large kinds.

    `real` is None, or the bank's images and masks and the pictures' chances (or None).
    """
    names = [name for name in settings.probabilities if name not in TINY]
    n = min(LARGE_WINDOW, *(side // 16 * 16 for side in pixels.shape[1:3]))
    normals = kinds_lib.NORMALS + kinds_lib.FIELDS * n * n
    is_fracture = jnp.asarray([name == "fracture" for name in names])[which]

    images, masks, chances = real or (None, None, None)

    def painter(name, chance):
        if name == "real":
            return lambda blocks, place: kinds_lib.real(
                shapes.Draws(*blocks), place, images, masks, chance
            )
        paint = kinds_lib.PAINTERS[name]
        return lambda blocks, place: paint(shapes.Draws(*blocks), place, settings)

    def one(key, drawn, picture, part, which, is_fracture, is_used, chance):
        anywhere = _weights(picture, part, settings.spatial_distribution)
        weights = jnp.where(is_fracture, _band(part, 4).astype(jnp.float32), anywhere)
        middles = _places(drawn, weights)

        def attempt(state):
            i = state[0]
            corner, place = _window(picture, part, middles[i], n)
            # One block for all kinds: under vmap each of them is painted, and one is taken.
            blocks = shapes.draw_blocks(jax.random.fold_in(key, i), kinds_lib.UNIFORMS, normals)
            paint = [painter(name, chance) for name in names]
            painted = jax.lax.switch(which, paint, blocks, place)
            near = jnp.maximum(jnp.abs(place.y), jnp.abs(place.x)) < kinds_lib.reach(n)
            core = painted.core & near
            fits = _fits(place, core, painted.source, is_fracture)
            region = shapes.dilate(core, 2)
            return i + 1, fits, corner, painted.source, region, painted.mixed

        def unplaced(state):
            return ~state[1] & (state[0] < TRIES)

        blank = (jnp.zeros((2,), jnp.int32), jnp.zeros((n, n, 3)), jnp.zeros((n, n), bool))
        start = (0, ~is_used, *blank, jnp.array(False))
        _, fits, corner, source, region, mixed = jax.lax.while_loop(unplaced, attempt, start)
        return _Windows(corner[None], source[None], (region & fits)[None], mixed[None])

    over = (0, 0, 0, 0, 0, 0, 0, None if chances is None else 0)
    return jax.vmap(one, over)(
        keys, drawn, pixels, foreground, which, is_fracture, is_used, chances
    )


def _fits(place, core, source, is_fracture) -> jax.Array:
    """Whether a large defect shows and lies on the part as its kind should."""
    change = jnp.abs(source - place.pixels).mean(-1)
    area = jnp.maximum(core.sum(), 1)
    share = jnp.sum(core & place.foreground) / area
    # Where no border of the part crosses the window, it is the picture's, and was sought there.
    crosses = (share >= 0.3) & (share <= 0.9) | place.foreground.all()
    lies_right = jnp.where(is_fracture, crosses, share >= 0.7)
    return lies_right & (core.sum() > 0) & (jnp.sum(change * core) >= VISIBLE / 2 * area)


def _window(picture, part, middle, n: int) -> tuple[jax.Array, kinds_lib.Place]:
    """(corner, what is seen) of the window of n px around a pixel, moved to lie in the picture."""
    free = jnp.asarray(picture.shape[:2]) - n
    corner = jnp.clip(middle - n // 2, 0, free)
    pixels = jax.lax.dynamic_slice(picture, (*corner, 0), (n, n, 3))
    foreground = jax.lax.dynamic_slice(part, corner, (n, n))
    y, x = shapes.grid(n)
    away = (corner + n // 2 - middle).astype(jnp.float32)
    return corner, kinds_lib.Place(pixels, foreground, y + away[0], x + away[1])


def _weights(picture, part, distribution: str) -> jax.Array:
    """How likely each pixel is the middle of a defect, float32 [h, w], not normalised."""
    if distribution == "edge":
        return _band(part, EDGE).astype(jnp.float32)
    if distribution == "texture":
        dy, dx = jnp.gradient(picture.mean(-1))
        return part * (shapes.blur(jnp.hypot(dy, dx), 4.0) + 1e-3)
    return part.astype(jnp.float32)


def _band(part, width: int) -> jax.Array:
    """Pixels of the part less than `width` px from its border; the picture's border is one."""
    outside = jnp.pad(~part, width, constant_values=True)
    return part & shapes.dilate(outside, width)[width:-width, width:-width]


def _places(drawn, weights) -> jax.Array:
    """int32 [count, 2] pixels, chosen by weight with `drawn` [count] in [0, 1)."""
    rows = jnp.cumsum(weights.sum(1))
    wanted = drawn * rows[-1]
    y = jnp.minimum(jnp.sum(rows <= wanted[:, None], axis=1), len(weights) - 1)
    columns = jnp.cumsum(weights[y], axis=1)  # [count, w]
    wanted = wanted - (rows[y] - columns[:, -1])  # what is left of it in that row
    x = jnp.minimum(jnp.sum(columns <= wanted[:, None], axis=1), weights.shape[1] - 1)
    return jnp.stack([y, x], axis=-1)


def _checked(key, images, foreground, settings, bank) -> Bank | None:
    """The bank, or a ValueError that says what is wrong."""
    shape = jnp.shape(images)
    if len(shape) != 4 or shape[-1] != 3 or min(shape[1:3]) < 64:
        raise ValueError(f"images have shape {shape}; expected [b, h, w, 3] with h, w >= 64")
    if foreground is not None and jnp.shape(foreground) != shape[:3]:
        raise ValueError(f"foreground has shape {jnp.shape(foreground)}; expected {shape[:3]}")
    if key.shape not in ((), shape[:1]):
        raise ValueError(f"key has shape {key.shape}; expected () or one per picture {shape[:1]}")
    if "real" in settings.kinds and bank is None:
        raise ValueError("kind 'real' needs a bank of labelled defects; see defect_bank.py")
    return bank
