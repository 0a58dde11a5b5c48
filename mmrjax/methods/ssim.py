"""Structural similarity of images (Wang et al. 2004), as DRAEM and its followers use it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, SIGMA = 11, 1.5  # px
C1, C2 = 0.01**2, 0.03**2  # for images in [0, 1]


@functools.lru_cache(maxsize=64)
def blur_matrix(n: int) -> np.ndarray:
    """The Gaussian window along one axis with zeros beyond the border, float32 [n, n]."""
    offset = np.subtract.outer(np.arange(n), np.arange(n))
    taps = np.exp(-(np.arange(-(WINDOW // 2), WINDOW // 2 + 1) ** 2) / (2 * SIGMA**2))
    near = np.abs(offset) <= WINDOW // 2
    return np.where(near, np.exp(-(offset**2) / (2 * SIGMA**2)) / taps.sum(), 0).astype(np.float32)


def ssim_map(a: jax.Array, b: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """SSIM of every pixel and channel; 1 if both are equal.

    An 11 x 11 Gaussian of deviation 1.5 px with zeros beyond the border, constants of images in
    [0, 1]. `1 - ssim_map(a, b).mean()` is the usual loss.

    Args:
      a: float [..., h, w, c], in [0, 1]; values beyond are taken as they are.
      b: the same shape.
      epsilon: added to the denominator (InTra's unofficial code: 1e-12).

    Returns:
      The shape and type of `a`, in [-1, 1].
    """
    rows, columns = (jnp.asarray(blur_matrix(n), a.dtype) for n in a.shape[-3:-1])

    def blur(x: jax.Array) -> jax.Array:
        x = jnp.einsum("yr,...rxc->...yxc", rows, x, precision=jax.lax.Precision.HIGHEST)
        return jnp.einsum("xr,...yrc->...yxc", columns, x, precision=jax.lax.Precision.HIGHEST)

    mean_a, mean_b = blur(a), blur(b)
    squares, product = blur(a * a + b * b), blur(a * b)
    both, of_means = mean_a * mean_b, mean_a**2 + mean_b**2
    above = (2 * both + C1) * (2 * (product - both) + C2)
    return above / ((of_means + C1) * (squares - of_means + C2) + epsilon)
