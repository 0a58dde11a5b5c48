"""Windows of a picture in which defects are drawn, before they are blended (synthesise.py).

Tiny defects are drawn here, large ones by the painters of kinds.py. A window that finds no place
for its defect has an empty region.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.data.defects import kinds, places, shapes

TINY = ("spot", "groove")  # bounding box of at most 9 px, one to three in an image
VISIBLE = 8.0  # mean change of a tiny defect's core, grey levels; a large one needs half of it
BOX = 9  # px, largest side of a tiny defect
TINY_SIDE, LARGE_SIDE = 24, 128  # px of a window
POOL = 12  # tiny defects drawn, of which up to three are placed
APART = 17  # px between the middles of tiny defects: blended regions do not meet
TRIES = 8  # of placing a large defect


class Windows(NamedTuple):
    """Up to s windows of n px in each of b pictures.

    Attributes:
      corner: int32 [b, s, 2], (top, left) of the window in the picture.
      source: float32 [b, s, n, n, 3], grey levels whose gradients are cloned.
      region: bool [b, s, n, n], the pixels to clone; empty if the window has no defect.
      mixed: bool [b, s], whether the picture's own texture stays; None: in no window, which takes a
        third less time.
    """

    corner: jax.Array
    source: jax.Array
    region: jax.Array
    mixed: jax.Array | None


def draw_tiny(keys, drawn, pixels, foreground, is_groove, is_used, settings) -> Windows:
    """Draws one to three spots or grooves in each picture that `is_used` names.

    Args:
      keys: [b], one for each picture.
      drawn: float32 [b, 1 + POOL] in [0, 1): the number of defects and their places.
      pixels: float32 [b, h, w, 3] in [0, 255].
      foreground: bool [b, h, w].
      is_groove: bool [b], a groove or else a spot.
      is_used: bool [b].
      settings: as of `synthesise`.
    """

    def draw_in(key, drawn, picture, part, is_groove, is_used):
        count = 1 + (3 * drawn[0]).astype(jnp.int32)
        weights = places.weights(picture, part, settings.spatial_distribution)
        middles = places.choose(drawn[1:], weights)
        blocks = shapes.draw_blocks(key, POOL * 8, POOL * (10 + TINY_SIDE**2))
        blocks = [block.reshape(POOL, -1) for block in blocks]
        draw = jax.vmap(lambda m, *b: _tiny_candidate(b, m, picture, part, is_groove, settings))
        corner, source, region, fits = draw(middles, *blocks)
        taken, used = [], []
        for i in range(3):
            for j in taken:
                fits &= jnp.abs(middles - middles[j]).max(-1) >= APART
            taken.append(jnp.argmax(fits))
            used.append(fits.any() & is_used & (i < count))
        taken, used = jnp.stack(taken), jnp.stack(used)
        region = region[taken] & used[:, None, None]
        return Windows(corner[taken], source[taken], region, None)

    return jax.vmap(draw_in)(keys, drawn, pixels, foreground, is_groove, is_used)


def _tiny_candidate(blocks, middle, picture, part, is_groove, settings):
    """One tiny defect around a pixel: (corner, source, region, whether it fits and shows)."""
    n = TINY_SIDE
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


def draw_large(keys, drawn, pixels, foreground, which, is_used, settings, real) -> Windows:
    """Draws one large defect in each picture that `is_used` names.

    Args:
      keys: [b], one for each picture.
      drawn: float32 [b, TRIES] in [0, 1), the places that a defect tries.
      pixels: float32 [b, h, w, 3] in [0, 255].
      foreground: bool [b, h, w].
      which: int32 [b], the kind, as a position among the large kinds of `settings`.
      is_used: bool [b].
      settings: as of `synthesise`.
      real: None, or the images and masks of a bank and the chances of `synthesise`.
    """
    names = [name for name in settings.probabilities if name not in TINY]
    n = min(LARGE_SIDE, *(side // 16 * 16 for side in pixels.shape[1:3]))
    normals = kinds.NORMALS + kinds.FIELDS * n * n
    is_fracture = jnp.asarray([name == "fracture" for name in names])[which]
    images, masks, chances = real or (None, None, None)

    def painter(name, chance):
        if name == "real":
            paint, bank = kinds.real, (images, masks, chance)
        else:
            paint, bank = kinds.PAINTERS[name], (settings,)
        return lambda blocks, place: paint(shapes.Draws(*blocks), place, *bank)

    def draw_in(key, drawn, picture, part, which, is_fracture, is_used, chance):
        anywhere = places.weights(picture, part, settings.spatial_distribution)
        weights = jnp.where(is_fracture, places.border(part, 4).astype(jnp.float32), anywhere)
        middles = places.choose(drawn, weights)

        def attempt(state):
            i = state[0]
            corner, place = _window(picture, part, middles[i], n)
            # One block for all kinds: under vmap each of them is painted, and one is taken.
            blocks = shapes.draw_blocks(jax.random.fold_in(key, i), kinds.UNIFORMS, normals)
            paint = [painter(name, chance) for name in names]
            painted = jax.lax.switch(which, paint, blocks, place)
            near = jnp.maximum(jnp.abs(place.y), jnp.abs(place.x)) < kinds.reach(n)
            core = painted.core & near
            fits = _fits(place, core, painted.source, is_fracture)
            region = shapes.dilate(core, 2)
            return i + 1, fits, corner, painted.source, region, painted.mixed

        def unplaced(state):
            return ~state[1] & (state[0] < TRIES)

        blank = (jnp.zeros((2,), jnp.int32), jnp.zeros((n, n, 3)), jnp.zeros((n, n), bool))
        start = (0, ~is_used, *blank, jnp.array(False))
        _, fits, corner, source, region, mixed = jax.lax.while_loop(unplaced, attempt, start)
        return Windows(corner[None], source[None], (region & fits)[None], mixed[None])

    over = (0, 0, 0, 0, 0, 0, 0, None if chances is None else 0)
    return jax.vmap(draw_in, over)(
        keys, drawn, pixels, foreground, which, is_fracture, is_used, chances
    )


def _fits(place, core, source, is_fracture) -> jax.Array:
    """Whether a large defect shows and lies on the part as its kind should."""
    change = jnp.abs(source - place.pixels).mean(-1)
    area = jnp.maximum(core.sum(), 1)
    share = jnp.sum(core & place.foreground) / area
    # A part that fills the window has no border here but the picture's, where places.border put it.
    crosses = (share >= 0.3) & (share <= 0.9) | place.foreground.all()
    lies_right = jnp.where(is_fracture, crosses, share >= 0.7)
    return lies_right & (core.sum() > 0) & (jnp.sum(change * core) >= VISIBLE / 2 * area)


def _window(picture, part, middle, n: int) -> tuple[jax.Array, kinds.Place]:
    """(corner, content) of the window of n px around a pixel, moved to lie in the picture."""
    free = jnp.asarray(picture.shape[:2]) - n
    corner = jnp.clip(middle - n // 2, 0, free)
    pixels = jax.lax.dynamic_slice(picture, (*corner, 0), (n, n, 3))
    foreground = jax.lax.dynamic_slice(part, corner, (n, n))
    y, x = shapes.grid(n)
    away = (corner + n // 2 - middle).astype(jnp.float32)
    return corner, kinds.Place(pixels, foreground, y + away[0], x + away[1])
