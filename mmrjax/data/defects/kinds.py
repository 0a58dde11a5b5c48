"""The painters of large synthetic defects, one for each kind.

A painter is a function (draws, place, settings) -> Painted that draws one defect on a window of the
picture. Its paint fades out around the core, or is blended there (poisson.py). The kinds of
HELD_OUT have other shapes than the kinds of TRAINING, so that settings are not judged by the
defects that training shows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.data.defects import shapes

PI = float(np.pi)
UNIFORMS, NORMALS = 272, 256  # random numbers that a painter may take
FIELDS = 9  # further blocks of n x n normal numbers, for its textures


class Place(NamedTuple):
    """A window of n px around the middle of a defect.

    Attributes:
      pixels: float32 [n, n, 3], grey levels in [0, 255].
      foreground: bool [n, n], the part.
      y, x: float32 [n, n], px from the defect's middle.
    """

    pixels: jax.Array
    foreground: jax.Array
    y: jax.Array
    x: jax.Array


class Painted(NamedTuple):
    """A defect on a window of n px.

    Attributes:
      source: float32 [n, n, 3], grey levels, the window with the defect.
      core: bool [n, n], the pixels of the defect.
      mixed: bool [], whether blending keeps the texture of the picture.
    """

    source: jax.Array
    core: jax.Array
    mixed: jax.Array


def real(
    draws: shapes.Draws,
    place: Place,
    images: jax.Array,
    masks: jax.Array,
    chances: jax.Array | None = None,
) -> Painted:
    """A labelled defect cut out of another picture, mirrored at random.

    The defect is not turned, since the grain of a brushed or rolled surface comes with it and would
    run across the picture's own grain.

    Args:
      draws: random numbers for the choice.
      place: the window that gets the defect.
      images: uint8 [m, s, s, 3], the pictures of the defects.
      masks: bool [m, s, s].
      chances: float32 [m], how likely each defect is, up to a factor; None: all alike.
    """
    likely = jnp.cumsum(jnp.ones(len(images)) if chances is None else chances)
    which = jnp.sum(likely <= draws.uniform(0, 1) * likely[-1])
    which = jnp.minimum(which, len(images) - 1)  # without a likely defect another kind is drawn
    flip_y, flip_x = draws.uniform(0, 1, 2) < 0.5
    side, y, x = images.shape[1], place.y, place.x
    row = jnp.where(flip_y, -y, y).astype(jnp.int32) + side // 2
    column = jnp.where(flip_x, -x, x).astype(jnp.int32) + side // 2
    known = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    at = (which, jnp.clip(row, 0, side - 1), jnp.clip(column, 0, side - 1))
    return Painted(images[at].astype(jnp.float32), masks[at] & known, jnp.array(False))


def _tint(place: Place, factor: jax.Array, core: jax.Array, mixed: bool = False) -> Painted:
    """The picture times a factor [n, n] inside the core."""
    source = jnp.where(core[..., None], place.pixels * factor[..., None], place.pixels)
    return Painted(source, core, jnp.array(mixed))


def reach(n: int) -> float:
    """Largest distance of a core from its middle, px: its dilation and a border pixel fit, too."""
    return n / 2 - 5.0


def _blob(
    draws: shapes.Draws, place: Place, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """(depth in px, size in px) of a ragged, somewhat stretched blob."""
    n = place.y.shape[0]
    limit = reach(n)
    size = jnp.minimum(draws.uniform(low, high), limit)
    stretch = jnp.exp(draws.uniform(0.0, 0.5))
    # The coordinates are bent: the jags of a break do not all point at its middle.
    bend_y, bend_x = (0.12 * size * shapes.smooth(draws.normal(n, n), 6.0) for _ in range(2))
    u, v = shapes.rotate(place.y + bend_y, place.x + bend_x, draws.uniform(0, PI))
    radius = shapes.outline(draws, limit / (size * stretch))
    return shapes.blob_depth(v * stretch, u / stretch, radius, size), size


def _broken_face(draws: shapes.Draws, place: Place, depth: jax.Array, size, grain) -> jax.Array:
    """Rough broken material lit from a side, [n, n, 3]: its relief replaces the surface's grain."""
    n = depth.shape[0]
    inside = shapes.blur(shapes.coverage(depth), 3.0)
    relief = shapes.fractal(draws.normal(4, n, n), 8.0)
    height = -draws.uniform(0.1, 0.4) * size * jnp.sqrt(inside) + 2.2 * relief
    lit = shapes.shade(height, draws.uniform(0, 2 * PI), draws.uniform(PI / 6, PI / 3))
    ground = shapes.blur(place.pixels, 5.0)
    speckle = grain * 255 * shapes.smooth(draws.normal(n, n), 0.7)
    return ground * (draws.uniform(0.15, 0.45) + 1.1 * lit)[..., None] + speckle[..., None]


def chip(draws, place, settings) -> Painted:
    """A piece broken out of the surface: a hollow with irregular edges, relief and shadow."""
    depth, size = _blob(draws, place, 9.0, 34.0)
    face = _broken_face(draws, place, depth, size, settings.noise_intensity)
    share = shapes.coverage(depth, 0.8)[..., None]
    return Painted(place.pixels + share * (face - place.pixels), depth > -0.8, jnp.array(False))


def fracture(draws, place, settings) -> Painted:
    """A piece missing at the border of the part: background shows, beyond a broken face."""
    n = place.y.shape[0]
    depth, size = _blob(draws, place, 12.0, 38.0)
    face = _broken_face(draws, place, depth, size, settings.noise_intensity)
    out = (~place.foreground).astype(jnp.float32)[..., None]
    near = shapes.blur(out, 9.0)
    shown = shapes.blur(place.pixels * out, 9.0) / jnp.maximum(near, 1e-6)
    # A part that fills the picture has no background to show: a dark hollow stands for it.
    dark = draws.uniform(0.12, 0.45) * shapes.blur(place.pixels, 9.0)
    behind = jnp.where(near > 1e-3, shown, dark)
    grain = settings.noise_intensity * 255 * shapes.smooth(draws.normal(n, n), 0.7)
    ragged = 0.12 * shapes.smooth(draws.normal(n, n), 2.5)
    deep = shapes.blur(shapes.coverage(depth), 2.5) + ragged
    gone = jnp.clip((deep - draws.uniform(0.6, 0.95)) / 0.15 + 0.5, 0.0, 1.0)[..., None]
    painted = face + gone * (behind + 0.6 * grain[..., None] - face)
    share = shapes.coverage(depth, 0.7)[..., None]
    return Painted(place.pixels + share * (painted - place.pixels), depth > -0.7, jnp.array(False))


def stain(draws, place, settings) -> Painted:
    """A soft discoloration of low contrast, below which the surface's own texture goes on."""
    n = place.y.shape[0]
    depth, size = _blob(draws, place, 12.0, 40.0)
    depth = depth + 0.12 * size * shapes.fractal(draws.normal(4, n, n), 9.0)
    soft = draws.uniform(0.1, 0.5) * size
    share = jnp.clip(depth / soft, 0.0, 1.0)
    share = share * share * (3 - 2 * share)
    tint = 1 + 0.15 * draws.normal(3) * (jnp.ptp(place.pixels, axis=-1).max() > 0)
    strength = draws.sign(0.7) * draws.uniform(0.15, 0.45) * tint
    source = shapes.blur(place.pixels, 2.0) * (1 + strength * share[..., None])
    return Painted(source, depth > 0, jnp.array(True))


def scratch(draws, place, settings) -> Painted:
    """A long, nearly straight furrow with a lit and a shadowed flank."""
    n = place.y.shape[0]
    length = draws.uniform(0.2, 0.85) * 2 * reach(n)
    points = shapes.walk(0.03 * draws.normal(64), length, draws.uniform(0, 2 * PI))
    t = jnp.linspace(0, 1, 64)
    taper = jnp.minimum(1.0, 6 * jnp.minimum(t, 1 - t)) ** 0.5
    pressed = 1 + 0.35 * jnp.cumsum(draws.normal(64)) / 8
    radius = draws.uniform(0.35, 1.1) * taper * jnp.clip(pressed, 0.5, 1.5)
    furrow = shapes.coverage(shapes.line_depth(place.y, place.x, points, radius), 0.6)
    flank = jnp.roll(furrow, (1, 1), (0, 1))
    strength = draws.sign(0.5) * draws.uniform(0.25, 0.6)
    factor = 1 + strength * (furrow - 0.55 * flank * (1 - furrow))
    return _tint(place, factor, (furrow > 0) | (flank > 0))


def crack(draws, place, settings) -> Painted:
    """Held out: a dark, jagged line of changing width that forks, its lips a little bright."""
    n = place.y.shape[0]
    angle = draws.uniform(0, 2 * PI)
    length = draws.uniform(0.25, 0.9) * 1.8 * reach(n)
    trunk = shapes.walk(0.28 * draws.normal(48), length, angle)
    width = draws.uniform(0.6, 2.2)
    uneven = jnp.abs(1 + 0.8 * jnp.cumsum(draws.normal(48)) / 7)
    t = jnp.linspace(0, 1, 48)
    radius = width * jnp.clip(uneven, 0.25, 1.6) * jnp.minimum(1.0, 4 * jnp.minimum(t, 1 - t) + 0.2)
    depth = shapes.line_depth(place.y, place.x, trunk, radius)
    for _ in range(2):
        start = trunk[draws.integer(8, 40)]
        fork_angle = angle + draws.uniform(-1.2, 1.2)
        fork = shapes.walk(0.3 * draws.normal(24), 0.3 * length, fork_angle)
        thin = 0.5 * width * jnp.linspace(1, 0.3, 24)
        branch = shapes.line_depth(place.y, place.x, fork - fork[0] + start, thin)
        depth = jnp.where(draws.uniform(0, 1) < 0.5, jnp.maximum(depth, branch), depth)
    lips = shapes.coverage(depth + 1.2, 0.8) - shapes.coverage(depth, 0.5)
    factor = 1 - draws.uniform(0.45, 0.85) * shapes.coverage(depth, 0.5) + 0.12 * lips
    factor += 0.1 * shapes.coverage(depth, 0.5) * shapes.smooth(draws.normal(n, n), 0.8)
    return _tint(place, factor, depth > -2.0)


def pits(draws, place, settings) -> Painted:
    """Held out: one to four oblong holes, dark, with a lit lip on the side of the light."""
    n = place.y.shape[0]
    count = draws.integer(1, 5)
    spread = draws.normal(4, 2) * jnp.array([6.0, 10.0])
    middles = jnp.clip(spread, -18, 18).at[0].set(0.0)
    axes = jnp.exp(draws.uniform(np.log(2.0), np.log(9.0), 4, 2))
    axes = axes * jnp.array([1.0, 0.6])  # most of the tiles' blowholes lie across the grain
    angles = 0.35 * draws.normal(4) + draws.uniform(0, PI)
    rough = 0.5 * shapes.smooth(draws.normal(n, n), 1.5)
    depth = jnp.full((n, n), -99.0)
    for i in range(4):
        y, x = place.y - middles[i, 0], place.x - middles[i, 1]
        hole = shapes.ellipse_depth(y, x, axes[i], angles[i]) + rough
        depth = jnp.where(i < count, jnp.maximum(depth, hole), depth)
    share = shapes.coverage(depth, 0.8)
    height = -2.2 * shapes.blur(share, 1.2)
    light = shapes.shade(height, draws.uniform(0, 2 * PI), jnp.float32(PI / 4))
    factor = (1 - draws.uniform(0.35, 0.7) * share) * (1 + 1.0 * (light - np.sin(PI / 4)))
    return _tint(place, factor, depth > -3.0)


def fibre(draws, place, settings) -> Painted:
    """Held out: a hair or thread lying on the part, a smooth even curve with a soft shadow."""
    n = place.y.shape[0]
    length = draws.uniform(0.4, 0.9) * 2 * reach(n)
    t = jnp.linspace(0, 1, 96)
    bend = draws.uniform(-2.5, 2.5) * t + draws.uniform(0.2, 1.2) * jnp.sin(7 * t)
    heading = draws.uniform(0, 2 * PI) + bend
    points = jnp.cumsum(jnp.stack([jnp.sin(heading), jnp.cos(heading)], -1), 0) * length / 96
    points = points - (points.min(0) + points.max(0)) / 2
    depth = shapes.line_depth(place.y, place.x, points, jnp.full((96,), 0.55))
    thread = shapes.coverage(depth, 0.6)
    shadow = jnp.roll(shapes.coverage(depth + 1.0, 1.2), (2, 1), (0, 1)) * (1 - thread)
    strength = draws.sign(0.5) * draws.uniform(0.3, 0.6)
    return _tint(place, 1 + strength * thread - 0.12 * shadow, (thread > 0) | (shadow > 0))


def smear(draws, place, settings) -> Painted:
    """Held out: a broad band, brighter or darker, sharp on one side and fading on the other."""
    n = place.y.shape[0]
    limit = reach(n)
    along, across = shapes.rotate(place.y, place.x, draws.uniform(0, 2 * PI))
    across = across + 2.5 * shapes.smooth(draws.normal(n, n), 9.0)
    width = draws.uniform(0.25, 0.7) * limit
    band = shapes.coverage(across + width / 2, 1.0) * jnp.clip((width - across) / width, 0.0, 1.0)
    ends = shapes.coverage(limit * 0.6 - jnp.abs(along), 6.0)
    share = band * ends
    strength = draws.sign(0.6) * draws.uniform(0.15, 0.4)
    return _tint(place, 1 + strength * share, share > 0)


PAINTERS: dict[str, Callable[..., Painted]] = {
    "fracture": fracture,
    "chip": chip,
    "stain": stain,
    "scratch": scratch,
    "crack": crack,
    "pits": pits,
    "fibre": fibre,
    "smear": smear,
}
