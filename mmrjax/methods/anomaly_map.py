"""From feature distances to anomaly maps: upsample, sum, Gaussian, and the score of an image.

Upsampling and Gaussian smoothing are linear and separable, so each scale needs one constant
matrix per axis, A = G U, and the whole map is sum_s A_s d_s A_s^T: a few small matrix products in
place of resizes and a 33-tap filter, equal to SciPy's to 4e-7.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.methods import losses

GAUSSIAN_SIGMA = 4.0  # px, MMR, RD4AD and PatchCore alike
GAUSSIAN_TRUNCATE = 4.0  # sigmas, scipy.ndimage.gaussian_filter's default


def upsample_matrix(n_in: int, n_out: int, align_corners: bool) -> np.ndarray:
    """Linear interpolation as a matrix, float64 [n_out, n_in], in both of torch's conventions."""
    out = np.arange(n_out)
    if align_corners:
        source = out * (n_in - 1) / max(n_out - 1, 1)
    else:
        source = np.maximum((out + 0.5) * n_in / n_out - 0.5, 0)
    low = np.minimum(np.floor(source).astype(int), n_in - 1)
    high = np.minimum(low + 1, n_in - 1)
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (out, low), 1 - (source - low))
    np.add.at(matrix, (out, high), source - low)
    return matrix


def resize_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Half-pixel linear interpolation that averages where it shrinks, float64 [n_out, n_in].

    As Pillow's BILINEAR: the triangle is as wide as the shrinking asks for.
    """
    if n_out >= n_in:
        return upsample_matrix(n_in, n_out, align_corners=False)
    step = n_in / n_out
    centres = (np.arange(n_out)[:, None] + 0.5) * step - 0.5
    weights = np.maximum(1 - np.abs(np.arange(n_in) - centres) / step, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def gaussian_matrix(n: int, sigma: float = GAUSSIAN_SIGMA) -> np.ndarray:
    """scipy.ndimage.gaussian_filter1d (mode "reflect") as a matrix, float64 [n, n]."""
    if sigma == 0:
        return np.eye(n)
    radius = int(GAUSSIAN_TRUNCATE * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    # Half-sample symmetric: ... 1 0 | 0 1 ... n-1 | n-1 n-2 ..., repeated for short signals.
    index = (np.arange(n)[:, None] + np.arange(-radius, radius + 1)) % (2 * n)
    index = np.minimum(index, 2 * n - 1 - index)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], index), taps[None])
    return matrix


@functools.lru_cache(maxsize=64)
def operator(
    n_in: int, n_out: int, align_corners: bool, sigma: float = GAUSSIAN_SIGMA
) -> np.ndarray:
    """Upsampling followed by the Gaussian as a matrix, float32 [n_out, n_in]."""
    smooth = gaussian_matrix(n_out, sigma) @ upsample_matrix(n_in, n_out, align_corners)
    return smooth.astype(np.float32)


def upsample_and_smooth(
    distance: jax.Array,
    size_hw: tuple[int, int],
    align_corners: bool,
    sigma: float = GAUSSIAN_SIGMA,
) -> jax.Array:
    """Bilinear upsampling to `size_hw` followed by a Gaussian, float32 [b, h, w].

    Args:
      distance: float32 [b, h_l, w_l].
      size_hw: image size in px.
      align_corners: torch's flag; True for MMR and RD4AD, False for PatchCore.
      sigma: standard deviation of the Gaussian in px of the output; 0 switches it off.
    """
    rows = operator(distance.shape[1], size_hw[0], align_corners, sigma)
    columns = operator(distance.shape[2], size_hw[1], align_corners, sigma)
    # HIGHEST: TF32 or bfloat16 passes would put an error of 1e-3 into every map.
    return jnp.einsum(
        "yr,brc,xc->byx", rows, distance, columns, precision=jax.lax.Precision.HIGHEST
    )


def cosine_maps(
    student: Mapping[int, jax.Array], teacher: Mapping[int, jax.Array], size_hw: tuple[int, int]
) -> dict[str, jax.Array]:
    """One smoothed 1 - cosine map per scale: {"layer<l>": float32 [b, h, w]} (2304.02216, Eq. 2).

    The paper's Eq. 2 prints the similarity itself; the official code and this use 1 - similarity.
    """
    return {
        f"layer{layer}": upsample_and_smooth(
            losses.cosine_distance(student[layer], target), size_hw, align_corners=True
        )
        for layer, target in teacher.items()
    }


def nearest(distance: jax.Array, size_hw: tuple[int, int]) -> jax.Array:
    """Nearest-neighbour upsampling, [b, h_l, w_l] -> [b, *size_hw]; every cell keeps a pixel."""
    rows, columns = (
        np.arange(n_out) * n_in // n_out
        for n_in, n_out in zip(distance.shape[1:], size_hw, strict=True)
    )
    return distance[:, rows][:, :, columns]


@functools.lru_cache(maxsize=64)
def mean_matrix(n: int, side: int) -> np.ndarray:
    """Sliding means of `side` values as a matrix, float32 [n', n]; zeros beyond the ends count.

    torch's average pooling with stride 1 and padding side // 2; n' is n, or n + 1 for an even side.
    """
    pad = side // 2
    first = np.arange(n + 2 * pad - side + 1)[:, None] - pad
    offset = np.arange(n) - first
    return ((offset >= 0) & (offset < side)).astype(np.float32) / np.float32(side)


def pooled(maps: jax.Array, side: int) -> jax.Array:
    """The mean of `side` x `side` px around each pixel, float32 [b, h, w] -> [b, h', w']."""
    rows, columns = (mean_matrix(n, side) for n in maps.shape[1:3])
    return jnp.einsum("yr,brc,xc->byx", rows, maps, columns, precision=jax.lax.Precision.HIGHEST)
