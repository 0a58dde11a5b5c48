"""Shapes and textures of synthetic defects: noise, blobs, lines, masks.

Pure functions on square windows of n px, in pixels. Their random numbers come from `Draws`.
"""

import jax
import jax.numpy as jnp
import numpy as np

ANGLES = 256  # samples of a blob's outline
ROUGHNESS = (1.6, 4.0)  # of Q = perimeter^2 / (4 pi area); a circle has 1 (MMR+ spec, section 7)


def draw_blocks(key: jax.Array, uniforms: int, normals: int) -> tuple[jax.Array, jax.Array]:
    """Draws the numbers of a `Draws`: `uniforms` in (0, 1) and `normals` standard normal."""
    drawn = jax.random.uniform(key, (uniforms + normals,), minval=1e-7)  # 0 would give -inf
    return drawn[:uniforms], np.sqrt(2) * jax.lax.erf_inv(2 * drawn[uniforms:] - 1)


class Draws:
    """The random numbers of one defect, drawn in a block beforehand and handed out in turn.

    The methods are those of a NumPy generator. Each call of jax.random compiles on its own; 75
    calls took more than half of the time to compile the synthesis of defects.

    Args:
      uniforms: float32 [m] in (0, 1).
      normals: float32 [m], standard normal.
    """

    def __init__(self, uniforms: jax.Array, normals: jax.Array):
        self._uniforms, self._normals = uniforms, normals

    def uniform(self, low: float, high: float, *shape: int) -> jax.Array:
        """Numbers in [low, high) of a shape; a scalar without a shape."""
        taken, self._uniforms = _take(self._uniforms, shape, "uniforms")
        return low + (high - low) * taken

    def normal(self, *shape: int) -> jax.Array:
        """Standard normal numbers of a shape; a scalar without a shape."""
        taken, self._normals = _take(self._normals, shape, "normals")
        return taken

    def integer(self, low: int, high: int) -> jax.Array:
        """An int32 of low, ..., high - 1."""
        return low + self.uniform(0, high - low).astype(jnp.int32)

    def sign(self, dark: float) -> jax.Array:
        """-1 with probability `dark`, else 1."""
        return jnp.where(self.uniform(0, 1) < dark, -1.0, 1.0)


def _take(block: jax.Array, shape: tuple[int, ...], name: str) -> tuple[jax.Array, jax.Array]:
    count = int(np.prod(shape))
    if count > len(block):
        raise ValueError(f"Draws: {count} {name} are asked for, {len(block)} are left: draw more")
    return block[:count].reshape(shape), block[count:]


def grid(n: int) -> tuple[jax.Array, jax.Array]:
    """(y, x) of each pixel from the window's middle pixel n // 2, float32 [n, n]."""
    along = jnp.arange(n, dtype=jnp.float32) - n // 2
    return jnp.broadcast_to(along[:, None], (n, n)), jnp.broadcast_to(along[None], (n, n))


def _gaussian_matrix(n: int, sigma: float) -> np.ndarray:
    """[n, n]; each row sums to one, also at the borders."""
    distance = np.arange(n)[:, None] - np.arange(n)[None]
    weight = np.exp(-0.5 * (distance / sigma) ** 2)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def blur(x: jax.Array, sigma: float) -> jax.Array:
    """Gaussian blur of the first two axes of [h, w, ...], as two small matrix products."""
    rows, columns = (jnp.asarray(_gaussian_matrix(n, sigma)) for n in x.shape[:2])
    x = jnp.einsum("ih,hw...->iw...", rows, x)
    return jnp.einsum("jw,iw...->ij...", columns, x)


def smooth(noise: jax.Array, sigma: float) -> jax.Array:
    """White noise [n, n] smoothed by `sigma` px and scaled to about unit variance."""
    return blur(noise, sigma) * float(2 * np.sqrt(np.pi) * sigma)


def fractal(noise: jax.Array, sigma: float) -> jax.Array:
    """Octaves of white noise [4, n, n], about unit variance, [n, n]; `sigma` px is the coarsest."""
    octaves = [smooth(octave, sigma / 2**i) * 0.6**i for i, octave in enumerate(noise)]
    return sum(octaves) / float(np.sqrt(sum(0.36**i for i in range(4))))


def outline(draws: Draws, reach: float) -> jax.Array:
    """Radius of a ragged blob by angle, relative to its size: float32 [ANGLES], at most `reach`.

    r = clip(1 + sum_k .35 / k N(0,1) cos(k angle + phase), .2, 2), k = 2 .. 32. Eight outlines are
    drawn; the first whose roughness is in ROUGHNESS is taken.
    """
    k = np.arange(2, 33)
    size = (0.35 / k).astype(np.float32) * draws.normal(8, 31)
    phase = draws.uniform(0, 2 * np.pi, 8, 31)
    angles = jnp.asarray(k[:, None] * np.arange(ANGLES) * (2 * np.pi / ANGLES), jnp.float32)
    # cos(a + b) = cos a cos b - sin a sin b: two products instead of a cosine per angle.
    waves = (size * jnp.cos(phase)) @ jnp.cos(angles) - (size * jnp.sin(phase)) @ jnp.sin(angles)
    radius = jnp.clip(1 + waves, 0.2, jnp.minimum(2.0, reach))  # [8, ANGLES]
    rough = roughness(radius)
    fits = (rough >= ROUGHNESS[0]) & (rough <= ROUGHNESS[1])
    return radius[jnp.argmax(fits)]


def roughness(radius: jax.Array) -> jax.Array:
    """Q = perimeter^2 / (4 pi area) of outlines [..., ANGLES]."""
    angle = jnp.arange(ANGLES) * (2 * np.pi / ANGLES)
    y, x = radius * jnp.sin(angle), radius * jnp.cos(angle)
    dy, dx = jnp.roll(y, -1, -1) - y, jnp.roll(x, -1, -1) - x
    area = 0.5 * jnp.sum(x * dy - y * dx, -1)
    return jnp.sum(jnp.hypot(dx, dy), -1) ** 2 / (4 * np.pi * area)


def blob_depth(y: jax.Array, x: jax.Array, radius: jax.Array, size: jax.Array) -> jax.Array:
    """Depth of each pixel inside a blob along its ray, px, [n, n]; negative outside."""
    place = jnp.arctan2(y, x) * (ANGLES / (2 * np.pi)) % ANGLES
    low = jnp.floor(place).astype(jnp.int32)
    share = place - low
    around = (1 - share) * radius[low % ANGLES] + share * radius[(low + 1) % ANGLES]
    return around * size - jnp.hypot(y, x)


def ellipse_depth(y, x, axes: jax.Array, angle: jax.Array) -> jax.Array:
    """Approximate depth of each pixel inside an ellipse with two semi-axes, px, [n, n]."""
    u, v = rotate(y, x, angle)
    return (1 - jnp.hypot(u / axes[0], v / axes[1])) * jnp.minimum(axes[0], axes[1])


def rotate(y, x, angle) -> tuple[jax.Array, jax.Array]:
    """Coordinates (along, across) the direction `angle`."""
    return x * jnp.cos(angle) + y * jnp.sin(angle), y * jnp.cos(angle) - x * jnp.sin(angle)


def walk(turns: jax.Array, length: jax.Array, angle: jax.Array) -> jax.Array:
    """A walk's points (y, x), px, centred on their bounding box: [steps, 2].

    Args:
      turns: [steps], change of direction before each step, radians.
      length: length of the walk, px.
      angle: direction at the start, radians.
    """
    heading = angle + jnp.cumsum(turns)
    step = jnp.stack([jnp.sin(heading), jnp.cos(heading)], -1) * length / len(turns)
    points = jnp.cumsum(step, 0)
    return points - (points.min(0) + points.max(0)) / 2


def line_depth(y, x, points: jax.Array, radius: jax.Array) -> jax.Array:
    """Depth of each pixel inside a line of varying radius [steps], px, [n, n]."""
    dy, dx = y[..., None] - points[:, 0], x[..., None] - points[:, 1]
    return jnp.max(radius - jnp.sqrt(dy * dy + dx * dx + 1e-12), axis=-1)


def coverage(depth: jax.Array, soft: float = 0.5) -> jax.Array:
    """Share of a pixel that a shape covers, from its depth in px; `soft` px is half the ramp."""
    return jnp.clip(depth / (2 * soft) + 0.5, 0.0, 1.0)


def shade(height: jax.Array, azimuth: jax.Array, elevation: jax.Array) -> jax.Array:
    """Lambert's cosine of a height field [n, n] px, in [0, 1]; flat ground gives sin(elevation)."""
    dy, dx = jnp.gradient(height)
    light = (jnp.cos(azimuth) * dx + jnp.sin(azimuth) * dy) * jnp.cos(elevation)
    return jnp.clip((jnp.sin(elevation) - light) / jnp.sqrt(1 + dx * dx + dy * dy), 0.0, 1.0)


def _reduce_around(x: jax.Array, by: int, start, reduce) -> jax.Array:
    """Reduces the square of `by` px around each pixel of [..., h, w], first along columns."""
    for axis in (-2, -1):
        window = np.ones(x.ndim, int)
        window[axis] = 2 * by + 1
        x = jax.lax.reduce_window(x, start, reduce, tuple(window), (1,) * x.ndim, "SAME")
    return x


def dilate(mask: jax.Array, by: int) -> jax.Array:
    """Square dilation of bool [..., h, w] by `by` px."""
    return _reduce_around(mask, by, False, jax.lax.bitwise_or)


def close(mask: jax.Array) -> jax.Array:
    """3 x 3 closing of bool [h, w] as part of an empty plane.

    The padding stands for that plane. Without it a region 1 px from the border would grow to the
    border, because the erosion would take the outside for a part of the region.
    """
    plane = jnp.pad(mask, 1)
    return ~dilate(~dilate(plane, 1), 1)[1:-1, 1:-1]


def small_components(mask: jax.Array, below: int = 10, rounds: int = 50) -> jax.Array:
    """The 8-connected components whose larger bounding-box side is less than `below` px.

    Args:
      mask: bool [..., h, w]; h, w < 2**15.
      below: px.
      rounds: reach in px of the spread of extents; a path within a box of `below` px is shorter.

    Returns:
      bool [..., h, w].
    """
    h, w = mask.shape[-2:]
    far = np.int16(max(h, w))
    y = jnp.broadcast_to(jnp.arange(h, dtype=jnp.int16)[:, None], mask.shape)
    x = jnp.broadcast_to(jnp.arange(w, dtype=jnp.int16), mask.shape)
    start = jnp.where(mask, jnp.stack([y, -y, x, -x]), far)  # their minima are the box's edges

    def is_small(extent):
        sides = 1 - (extent[0::2] + extent[1::2])  # [2, ..., h, w]
        return mask & (sides < below).all(0)

    # A small box that stops growing stays small, as its neighbours do. Large boxes may still grow.
    def spread(state):
        extent, _, i = state
        least = _reduce_around(extent, 1, far, jax.lax.min)
        least = jnp.where(mask, least, far)
        return least, (is_small(extent) & (least != extent).any(0)).any(), i + 1

    def spreading(state):
        return state[1] & (state[2] < rounds)

    return is_small(jax.lax.while_loop(spreading, spread, (start, jnp.array(True), 0))[0])
