"""3x3 convolutions of stride 1 with a quarter of the multiplications, for CPUs.

Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv 1509.09308): the image is cut
into tiles of 6 x 6 pixels that overlap by two. A change of basis, to the values of polynomials at
six points, turns the convolution of a tile into 36 products of single numbers, over all channels
into 36 matrix products. A few images are computed at a time, so that they stay in a core's cache.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

TILE, WINDOW = 4, 6  # px: sides of the outputs and of the inputs of a tile
# The points at which polynomials are evaluated, beside infinity. The usual 0, 1, -1, 2, -2 give an
# error four times as large.
POINTS = (0, 0.75, -0.75, 1.5, -1.5)
MIN_CHANNELS = 32  # with fewer channels the change of basis costs more than the products save
MIN_PIXELS = 100  # of an image; fewer tiles are not worth the longer compilation
ROWS = 32  # tiles in one matrix product, if there are as many: fewer do not fill the processor


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T [6, 6], G [6, 3] and A^T [4, 6] of Lavin & Gray, made as Cook and Toom do; float64.

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


def by_name(conv: str) -> Callable[..., jax.Array]:
    """The 3x3 convolution that the field `conv` of a module names.

    Args:
      conv: "auto", by tiles if that is faster; or "direct", always XLA's convolution, so that two
        programs round alike and XLA's count of operations sees all of them.

    Raises:
      ValueError: another name.
    """
    known = {"auto": convolve, "direct": direct}
    if conv not in known:
        raise ValueError(f"unknown conv={conv!r}; available: {', '.join(known)}")
    return known[conv]


def convolve(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """A zero-padded 3x3 convolution of stride 1, by tiles or direct.

    Tiles need a CPU, float32, known sizes, MIN_CHANNELS on both sides and MIN_PIXELS.

    Args:
      x: [b, h, w, c].
      kernel: [3, 3, c, features]. The further arguments of nn.Conv are not read: they must describe
        the convolution of the first line.

    Returns:
      [b, h, w, features].
    """
    known = all(isinstance(n, int) and n for n in x.shape)  # in an exported program b is a symbol
    wide = min(kernel.shape[2:]) >= MIN_CHANNELS
    large = known and x.shape[1] * x.shape[2] >= MIN_PIXELS
    if large and wide and x.dtype == jnp.float32:
        return jax.lax.platform_dependent(x, kernel, cpu=by_tiles, default=direct)
    return direct(x, kernel)


def direct(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """`convolve` by XLA's convolution on every platform."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def by_tiles(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` by tiles, the gradients too; float32 [b, h, w, c] -> [b, h, w, features].

    The largest error for white noise of 28 x 28 x 128 is about 1e-5 of the result's standard
    deviation; the error of XLA's convolution is 3e-6.
    """
    turned, shards = _turn(G, kernel), _shards(x)
    devices, per_device, h, w, c = shards.shape
    features = kernel.shape[-1]
    # A result overwrites its image if the channels agree: no array of zeros has to be filled.
    images = shards if c == features else jnp.zeros((devices, per_device, h, w, features), x.dtype)
    n = _images_at_once(shards, ROWS)

    def convolve_some(i, images):
        tiles = _tiles(_some(images if c == features else shards, i * n, n))
        products = jnp.einsum("jidtc,jicf->jidtf", tiles, turned)
        pixels = _untile(products, (devices, n, h, w))
        return jax.lax.dynamic_update_slice_in_dim(images, pixels, i * n, 1)

    return jax.lax.fori_loop(0, per_device // n, convolve_some, images).reshape(
        *x.shape[:-1], features
    )


def _forward(x: jax.Array, kernel: jax.Array):
    return by_tiles(x, kernel), (x, kernel)


def _backward(saved, gradient: jax.Array):
    x, kernel = saved
    pixels, slopes = _shards(x), _shards(gradient)
    n = _images_at_once(pixels, x.shape[-1])  # products of about square matrices

    def add(i, total):
        tiles, spread = _tiles(_some(pixels, i * n, n)), _spread(_some(slopes, i * n, n))
        return total + jnp.einsum("jidtc,jidtf->jidcf", tiles, spread)

    # Every device keeps a sum of its own and turns it to 3 x 3 first: devices exchange little.
    total = jnp.zeros((WINDOW, WINDOW, len(pixels), *kernel.shape[2:]), jnp.float32)
    total = jax.lax.fori_loop(0, pixels.shape[1] // n, add, total)
    to_kernel = _turn(G.T, total).sum(2)  # [3, 3, c, features]
    return by_tiles(gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3)), to_kernel


by_tiles.defvjp(_forward, _backward)


def _shards(x: jax.Array) -> jax.Array:
    """[b, ...] -> [devices, images per device, ...].

    All devices are counted, as in training and evaluation. With a mesh of fewer devices the result
    is the same, but the devices exchange images.
    """
    devices = math.gcd(x.shape[0], jax.device_count())
    return x.reshape(devices, -1, *x.shape[1:])


def _images_at_once(shards: jax.Array, tiles: int) -> int:
    """The number of images with about `tiles` tiles together, a divisor of a device's images."""
    per_device, h, w = shards.shape[1:4]
    n = min(per_device, math.ceil(tiles * TILE**2 / (h * w)))
    return max(k for k in range(1, n + 1) if per_device % k == 0)


def _some(shards: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(shards, first, count, 1)


def _turn(matrix: np.ndarray, kernel: jax.Array) -> jax.Array:
    """Changes the basis on both sides by a `matrix` [p, q]: [q, q, ...] -> [p, p, ...]."""
    p, q = matrix.shape
    both = jnp.asarray(np.kron(matrix, matrix), jnp.float32)
    return (both @ kernel.reshape(q * q, -1)).reshape(p, p, *kernel.shape[2:])


def _combine(matrix: np.ndarray, part: Callable[[int], jax.Array]) -> list[jax.Array]:
    """For each row of `matrix`, the sum of its numbers times part(column); zeros are left out."""

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
    """[d, n, h, w, c] -> tiles in the new basis [6, 6, d, tiles, c]; d devices, n images."""
    d, n, h, w, c = images.shape
    down, across = -(-h // TILE), -(-w // TILE)
    margin = ((1, down * TILE + 1 - h), (1, across * TILE + 1 - w))
    padded = jnp.pad(images.reshape(d * n, h, w, c), ((0, 0), *margin, (0, 0)))
    columns = jnp.stack(_combine(BT, lambda j: _every(padded, j, 2, across)))
    both = jnp.stack(_combine(BT, lambda i: _every(columns, i, 2, down)))
    return both.reshape(WINDOW, WINDOW, d, -1, c)


def _untile(products: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[6, 6, d, tiles, f] -> pixels [d, n, h, w, f]; shape is (d, n, h, w)."""
    d, n, h, w = shape
    down, across = -(-h // TILE), -(-w // TILE)
    products = products.reshape(WINDOW, WINDOW, d * n, down, across, -1)
    columns = jnp.stack(_combine(AT, lambda j: products[:, j]), 4)  # [6, dn, down, across, 4, f]
    both = jnp.stack(_combine(AT, lambda i: columns[i]), 2)
    pixels = both.reshape(d * n, down * TILE, across * TILE, -1)[:, :h, :w]
    return pixels.reshape(d, n, h, w, -1)


def _spread(gradient: jax.Array) -> jax.Array:
    """The transpose of `_untile`: [d, n, h, w, f] -> [6, 6, d, tiles, f]."""
    d, n, h, w, f = gradient.shape
    down, across = -(-h // TILE), -(-w // TILE)
    margin = ((0, down * TILE - h), (0, across * TILE - w))
    padded = jnp.pad(gradient.reshape(d * n, h, w, f), ((0, 0), *margin, (0, 0)))
    padded = padded.reshape(d * n, down, TILE, across, TILE, f)
    columns = jnp.stack(_combine(AT.T, lambda j: padded[:, :, :, :, j]))
    both = jnp.stack(_combine(AT.T, lambda i: columns[:, :, :, i]))
    return both.reshape(WINDOW, WINDOW, d, -1, f)
