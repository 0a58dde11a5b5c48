"""DRAEM's retouching of a texture: three different random operations, on device.

The ten operations and their ranges are those of DRAEM's code, which takes them from imgaug. Seven
of them map grey levels to grey levels. Such tables are put together before they touch a pixel.
`pixels` are in [0, 255] here.
"""

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = (
    *("gamma", "brightness", "solarize", "posterize", "invert", "autocontrast", "equalize"),
    *("sharpen", "hue", "rotate"),
)
TABLES = 7  # the first so many of OPERATIONS map grey levels to grey levels
AT_ONCE = 3
AMOUNTS = 9  # random numbers of a table
SAMPLE = 4  # px; histograms count every so-many-th row and column


def retouch(key: jax.Array, texture: jax.Array) -> jax.Array:
    """Applies three different operations.

    Tables follow each other in the order drawn. Sharpening, a shift of hue and saturation, and a
    rotation come behind the tables, in this order; in DRAEM's code they keep the order drawn.

    Args:
      key: PRNG key.
      texture: uint8 [h, w, 3].

    Returns:
      float32 [h, w, 3] in [0, 1].
    """
    drawn = jax.random.uniform(key, (len(OPERATIONS) + AT_ONCE * AMOUNTS + 4,))  # one draw for all
    order, amounts, rest = jnp.split(drawn, (len(OPERATIONS), len(drawn) - 4))
    which = jnp.argsort(order)[:AT_ONCE]
    level = jnp.moveaxis(texture, -1, 0).astype(jnp.int32)  # [3, h, w]
    table = joined_table(amounts.reshape(AT_ONCE, AMOUNTS), which, level)
    # The barriers keep XLA from computing a step again for each pixel that reads it.
    pixels = jax.lax.optimization_barrier(jax.vmap(lambda row, at: row[at])(table, level))

    def is_drawn(name: str) -> jax.Array:
        return (which == OPERATIONS.index(name)).any()

    pixels = sharpen(pixels, jnp.where(is_drawn("sharpen"), 3 * rest[0], 1.0))
    shifted = shift_hue(pixels, (rest[1:3] - 0.5) * 100 / 255)
    pixels = jnp.where(is_drawn("hue"), shifted, pixels)
    pixels = jax.lax.optimization_barrier(jnp.moveaxis(pixels, 0, -1))
    turn = (rest[3] - 0.5) * np.pi / 2
    return rotate(pixels, jnp.where(is_drawn("rotate"), turn, 0.0)) / 255


def joined_table(amounts: jax.Array, which: jax.Array, level: jax.Array) -> jax.Array:
    """The table of all drawn operations that have one, in turn; float32 [3, 256].

    Args:
      amounts: [k, AMOUNTS], see `tables`.
      which: int [k], positions in OPERATIONS.
      level: int32 [3, h, w], grey levels; a part of them is counted.
    """
    count = counted(level[:, ::SAMPLE, ::SAMPLE])

    def follow(joined: jax.Array, own: tuple) -> tuple[jax.Array, None]:
        at = jnp.round(joined).astype(jnp.int32)  # [3, 256]
        now = jax.vmap(lambda n, to: jnp.zeros(256).at[to].add(n))(count, at)
        share = jnp.cumsum(now, axis=1) / count.sum(axis=1, keepdims=True)
        drawn, operation = own
        table = tables(drawn, share)[jnp.minimum(operation, TABLES - 1)]
        mapped = jnp.take_along_axis(table, at, axis=1)
        return jnp.where(operation < TABLES, mapped, joined), None

    unchanged = jnp.broadcast_to(jnp.arange(256.0), (3, 256))
    return jax.lax.scan(follow, unchanged, (amounts, which))[0]


def tables(drawn: jax.Array, share: jax.Array) -> jax.Array:
    """The random tables of the first seven operations, float32 [7, 3, 256].

    Gamma 0.5 to 2 for each channel; brightness times 0.8 to 1.2, plus up to 30; levels above 32 to
    128 inverted in half of the cases; 1 to 8 bits; inverted; the outer 0 to 20 % of levels clipped
    and the rest stretched; equalised.

    Args:
      drawn: float32 [AMOUNTS], uniform in [0, 1).
      share: float32 [3, 256], share of the pixels at or below each grey level.
    """
    x = jnp.broadcast_to(jnp.arange(256.0), (3, 256))
    above = jnp.where(drawn[5] < 0.5, 32 + 96 * drawn[6], 256.0)
    step = 2.0 ** jnp.floor(8 * drawn[7])  # 8 bits to 1 bit
    drawn_tables = (
        255 * (x / 255) ** (0.5 + 1.5 * drawn[:3, None]),
        x * (0.8 + 0.4 * drawn[3]) + 60 * (drawn[4] - 0.5),
        jnp.where(x >= above, 255 - x, x),
        jnp.floor(x / step) * step,
        255 - x,
        stretched(share, 0.2 * drawn[8]),
        255 * share,
    )
    return jnp.clip(jnp.stack(drawn_tables), 0, 255)


def counted(level: jax.Array) -> jax.Array:
    """Pixels of each grey level, int32 [3, m, n] -> float32 [3, 256]."""
    return jax.vmap(lambda row: jnp.zeros(256).at[row].add(1))(level.reshape(3, -1))


def stretched(share: jax.Array, cutoff: jax.Array) -> jax.Array:
    """A table that stretches what is left when the darkest and the brightest `cutoff` are cut off.

    Args:
      share: [3, 256], see `tables`.
      cutoff: share in [0, 0.5).

    Returns:
      float32 [3, 256]; a channel of one level stays as it is.
    """
    low = (share <= cutoff).sum(axis=1, keepdims=True)
    high = (share < 1 - cutoff).sum(axis=1, keepdims=True)
    x = jnp.arange(256.0)[None]
    return jnp.where(high > low, 255 * (x - low) / jnp.maximum(high - low, 1), x)


def sharpen(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's sharpness: 0 smooths, 1 changes nothing, 3 is sharp; the border stays.

    Args:
      pixels: float32 [3, h, w] in [0, 255].
      factor: scalar.
    """
    h, w = pixels.shape[1:]
    wide = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    rows = wide[:, :h] + wide[:, 1:-1] + wide[:, 2:]
    box = rows[:, :, :w] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = (box + 4 * pixels) / 13
    y, x = jnp.arange(h)[:, None], jnp.arange(w)[None]
    inner = (y > 0) & (y < h - 1) & (x > 0) & (x < w - 1)
    return jnp.where(inner, jnp.clip(smooth + factor * (pixels - smooth), 0, 255), pixels)


def shift_hue(pixels: jax.Array, shift: jax.Array) -> jax.Array:
    """Adds to hue and saturation, each as a share of its range; float32 [3, h, w] in [0, 255]."""
    r, g, b = pixels
    high, low = jnp.maximum(jnp.maximum(r, g), b), jnp.minimum(jnp.minimum(r, g), b)
    width = high - low
    per = 1 / jnp.maximum(width, 1e-6)
    hue = jnp.where(high == r, (g - b) * per, 0)
    hue = jnp.where((high == g) & (high != r), (b - r) * per + 2, hue)
    hue = jnp.where((high == b) & (high != r) & (high != g), (r - g) * per + 4, hue)
    saturation = jnp.clip(width / jnp.maximum(high, 1e-6) + shift[1], 0, 1)
    sextant = hue + 6 * shift[0]

    def channel(first: float) -> jax.Array:
        k = first + sextant
        k = k - 6 * jnp.floor(k / 6)
        return high * (1 - saturation * jnp.clip(jnp.minimum(k, 4 - k), 0, 1))

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)])


def rotate(pixels: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotates around the middle; bilinear, black beyond the corners; an angle of 0 is exact.

    Args:
      pixels: float32 [h, w, c].
      angle: radians, scalar.
    """
    h, w, c = pixels.shape
    y, x = jnp.arange(h)[:, None] - (h - 1) / 2, jnp.arange(w)[None] - (w - 1) / 2
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    row, column = cos * y - sin * x + (h - 1) / 2, sin * y + cos * x + (w - 1) / 2
    padded = jnp.pad(pixels, ((1, 2), (1, 2), (0, 0))).reshape(-1, c)  # [(h + 3) (w + 3), c]
    row, column = jnp.clip(row, -1, h), jnp.clip(column, -1, w)
    top, left = jnp.floor(row), jnp.floor(column)
    v, u = (row - top)[..., None], (column - left)[..., None]
    at = (top.astype(jnp.int32) + 1) * (w + 3) + left.astype(jnp.int32) + 1
    corners = [[padded[at + i * (w + 3) + j] for j in range(2)] for i in range(2)]
    upper, lower = ((1 - u) * left_ + u * right for left_, right in corners)
    return (1 - v) * upper + v * lower
