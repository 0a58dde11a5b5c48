"""3x3 convolutions of stride 1 with a quarter of the multiplications, for CPUs.

Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv 1509.09308): the image is cut
into tiles of 6 x 6 pixels that overlap by two; in the basis of polynomials' values at six points
the convolution of a tile is 36 products of single numbers, over all channels 36 matrix products.
A few images are computed at a time, so that they stay in a core's cache between these steps.
"""

import contextlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

TILE, WINDOW = 4, 6  # px: what a tile gives, and what it reads
# Where polynomials are evaluated, beside infinity. With the usual 0, 1, -1, 2, -2 the largest error
# is four times as large.
POINTS = (0, 0.75, -0.75, 1.5, -1.5)
MIN_CHANNELS = 32  # fewer: turning tiles costs more than it saves
MIN_PIXELS = 100  # of an image; fewer: too few tiles to be worth the longer compilation
ROWS = 32  # of a product at least, where there are so many tiles: fewer do not fill the processor
_enabled = True


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T [6, 6], G [6, 3] and A^T [4, 6] of Lavin & Gray by Cook and Toom, float64.

    A^T ((G g) * (B^T d)) = [sum_k g_k d_{i+k} for i < 4], for any d [6] and g [3].
    """
    points = np.array(POINTS, np.float64)
    others = [np.delete(points, i) for i in range(len(points))]
    scale = np.array([np.prod(p - rest) for p, rest in zip(points, others, strict=True)])
    b = np.zeros((WINDOW, WINDOW))
    for row, roots in enumerate(others):
        b[row, :-1] = np.poly(roots)[::-1]
    b[-1] = np.poly(points)[::-1]
    g = np.vander(points, 3, increasing=True) / scale[:, None]
    a = np.vander(points, TILE, increasing=True).T
    g, a = np.vstack([g, np.eye(3)[-1]]), np.hstack([a, np.eye(TILE)[:, -1:]])  # at infinity
    return b, g, a


BT, G, AT = _matrices()


def convolve(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """A zero-padded 3x3 convolution of stride 1, computed as suits size and platform.

    Args:
      x: [b, h, w, c].
      kernel: [3, 3, c, features]. What nn.Conv passes beyond it is not read: it has to say the same
        as the first line.

    Returns:
      [b, h, w, features]; by tiles on a CPU, for float32, MIN_CHANNELS on both sides
      and MIN_PIXELS.
    """
    known = all(isinstance(n, int) and n for n in x.shape)  # in an exported program b is a symbol
    wide = min(kernel.shape[2:]) >= MIN_CHANNELS
    if not (_enabled and known and wide and x.dtype == jnp.float32):
        return direct(x, kernel)
    if x.shape[1] * x.shape[2] >= MIN_PIXELS:
        return jax.lax.platform_dependent(x, kernel, cpu=by_tiles, default=direct)
    return direct(x, kernel)


@contextlib.contextmanager
def direct_alone():
    """What is traced inside has `convolve` as `direct`.

    To count operations, of which XLA sees those of a loop once, and where both sides of a
    comparison have to round alike. A jitted function that was traced before keeps its tiles.
    """
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by XLA's convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def by_tiles(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by tiles: float32, the gradients, too.

    In white noise of 28 x 28 x 128 the largest error is about 1e-5 of the result's standard
    deviation; XLA's own is 3e-6.
    """
    turned, shards = _turn(G, kernel), _shards(x)
    d, own, h, w, c = shards.shape
    features = kernel.shape[-1]
    # An image makes room for its result: no second array is filled with zeros first.
    images = shards if c == features else jnp.zeros((d, own, h, w, features), x.dtype)
    n = _at_once(shards, ROWS)

    def convolve_some(i, images):
        tiles = _tiles(_some(images if c == features else shards, i * n, n))
        products = jnp.einsum("jidtc,jicf->jidtf", tiles, turned)
        pixels = _untile(products, (d, n, h, w))
        return jax.lax.dynamic_update_slice_in_dim(images, pixels, i * n, 1)

    return jax.lax.fori_loop(0, own // n, convolve_some, images).reshape(*x.shape[:-1], features)


def _forward(x: jax.Array, kernel: jax.Array):
    return by_tiles(x, kernel), (x, kernel)


def _backward(saved, gradient: jax.Array):
    x, kernel = saved
    pixels, slopes = _shards(x), _shards(gradient)
    n = _at_once(pixels, x.shape[-1])  # products of about square matrices

    def add(i, total):
        tiles, spread = _tiles(_some(pixels, i * n, n)), _spread(_some(slopes, i * n, n))
        return total + jnp.einsum("jidtc,jidtf->jidcf", tiles, spread)

    # Of every device its own, and 3 x 3 before they are summed: no more is exchanged than needed.
    total = jnp.zeros((WINDOW, WINDOW, len(pixels), *kernel.shape[2:]), jnp.float32)
    total = jax.lax.fori_loop(0, pixels.shape[1] // n, add, total)
    of_kernel = _turn(G.T, total).sum(2)
    return by_tiles(gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3)), of_kernel


by_tiles.defvjp(_forward, _backward)


def _shards(x: jax.Array) -> jax.Array:
    """[b, ...] to [devices, images of each, ...].

    All devices are counted, as in training and evaluation; where a mesh has a part of them the
    result is the same, but images are exchanged.
    """
    devices = math.gcd(x.shape[0], jax.device_count())
    return x.reshape(devices, -1, *x.shape[1:])


def _at_once(shards: jax.Array, tiles: int) -> int:
    """How many images have `tiles` tiles, at most all of a device's, and a divisor of these."""
    own, h, w = shards.shape[1:4]
    n = min(own, math.ceil(tiles * TILE**2 / (h * w)))
    return max(k for k in range(1, n + 1) if own % k == 0)


def _some(shards: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(shards, first, count, 1)


def _turn(matrix: np.ndarray, kernel: jax.Array) -> jax.Array:
    """By `matrix` [p, q] on both sides: [q, q, ...] to [p, p, ...]."""
    p, q = matrix.shape
    both = jnp.asarray(np.kron(matrix, matrix), jnp.float32)
    return (both @ kernel.reshape(q * q, -1)).reshape(p, p, *kernel.shape[2:])


def _combine(matrix: np.ndarray, part: Callable[[int], jax.Array]) -> list[jax.Array]:
    """For each row of `matrix` the sum of its numbers times part(column), without its zeros."""

    def combined(row):
        first, *others = np.flatnonzero(row)
        result = np.float32(row[first]) * part(first)
        for k in others:
            result = result + np.float32(row[k]) * part(k)
        return result

    return [combined(row) for row in matrix]


def _every(x: jax.Array, start: int, axis: int, count: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, start + (count - 1) * TILE + 1, TILE, axis)


def _tiles(images: jax.Array) -> jax.Array:
    """[d, n, h, w, c] to its tiles in the basis, [6, 6, d, tiles, c]."""
    d, n, h, w, c = images.shape
    down, across = -(-h // TILE), -(-w // TILE)
    margin = ((1, down * TILE + 1 - h), (1, across * TILE + 1 - w))
    padded = jnp.pad(images.reshape(d * n, h, w, c), ((0, 0), *margin, (0, 0)))
    columns = jnp.stack(_combine(BT, lambda j: _every(padded, j, 2, across)))
    both = jnp.stack(_combine(BT, lambda i: _every(columns, i, 2, down)))
    return both.reshape(WINDOW, WINDOW, d, -1, c)


def _untile(products: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[6, 6, d, tiles, f] to pixels [d, n, h, w, f]; shape is (d, n, h, w)."""
    d, n, h, w = shape
    down, across = -(-h // TILE), -(-w // TILE)
    products = products.reshape(WINDOW, WINDOW, d * n, down, across, -1)
    columns = jnp.stack(_combine(AT, lambda j: products[:, j]), 4)  # [6, dn, down, across, 4, f]
    both = jnp.stack(_combine(AT, lambda i: columns[i]), 2)
    pixels = both.reshape(d * n, down * TILE, across * TILE, -1)[:, :h, :w]
    return pixels.reshape(d, n, h, w, -1)


def _spread(gradient: jax.Array) -> jax.Array:
    """The transpose of `_untile`: [d, n, h, w, f] to [6, 6, d, tiles, f]."""
    d, n, h, w, f = gradient.shape
    down, across = -(-h // TILE), -(-w // TILE)
    margin = ((0, down * TILE - h), (0, across * TILE - w))
    padded = jnp.pad(gradient.reshape(d * n, h, w, f), ((0, 0), *margin, (0, 0)))
    padded = padded.reshape(d * n, down, TILE, across, TILE, f)
    columns = jnp.stack(_combine(AT.T, lambda j: padded[:, :, :, :, j]))
    both = jnp.stack(_combine(AT.T, lambda i: columns[:, :, :, i]))
    return both.reshape(WINDOW, WINDOW, d, -1, f)
