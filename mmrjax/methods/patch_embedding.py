"""Patch embeddings of a frozen network, as PatchCore's official code makes them.

Source: arXiv 2106.08265, section 3.1.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.methods import anomaly_map

STEADY = 1e-3  # of the mean variance of all channels, added to that of each
TINY = 1e-12  # an image of one colour has no variance
EXACT = jax.lax.Precision.HIGHEST  # TF32 would change which patches are nearest


def embed(features: dict, patch: int, width: int, per_image: bool = False) -> jax.Array:
    """One embedding per cell of the shallowest layer, float32 [b, h, w, d].

    Args:
      features: {layer: [b, h, w, c]} of the network.
      patch: side of the neighbourhood, in cells, that an embedding sees.
      width: length d of an embedding, to which the official code pools channels and
        neighbourhoods; 0: the channels of all layers, each the mean of its neighbourhood.
      per_image: standardise the features of each image first, see `standardise`.
    """
    grid, pooled = None, []
    for layer in sorted(features):
        x = features[layer].astype(jnp.float32)
        x = standardise(x) if per_image else x
        grid = grid or x.shape[1:3]
        if not width:
            pooled.append(resize(_mean(x, patch), grid))
            continue
        x = _neighbourhoods(x, patch)
        # Pooling and resizing are both linear and act on different axes: pooling first is cheaper.
        x = jnp.matmul(x, adaptive_pool_matrix(x.shape[-1], width), precision=EXACT)
        pooled.append(resize(x, grid))
    if not width:
        return jnp.concatenate(pooled, axis=-1)
    x = jnp.stack(pooled, axis=-2)  # [b, h, w, layers, width]
    # Adaptive pooling of the concatenation to `width`: the mean over runs of `layers` entries.
    return x.reshape(*x.shape[:3], width, len(pooled)).mean(axis=-1)


def standardise(x: jax.Array) -> jax.Array:
    """Each channel of each image less its mean over the places, over its deviation.

    A change that light, colour cast or another background brings to all places alike goes; so does
    one that a defect brings everywhere. Float32 [b, h, w, c]; not in the paper of PatchCore.
    """
    x = x - x.mean(axis=(1, 2), keepdims=True)
    variance = (x**2).mean(axis=(1, 2), keepdims=True)
    # A channel that hardly varies in this image must not outweigh the others.
    return x * jax.lax.rsqrt(variance + STEADY * variance.mean(axis=3, keepdims=True) + TINY)


def in_torch(teacher, options, size_hw: tuple[int, int], scale: float):
    """`embed` and the resizing before it as a PyTorch module; needs the torch extra.

    Args:
      teacher: the `backbones.Backbone`.
      options: with `layers`, `patch` and `width`.
      size_hw: size of the images, px.
      scale: size of what the teacher sees, relative to the image.

    Returns:
      `weights.torch_scorers.Embedding`.
    """
    from mmrjax.weights import torch_scorers

    maps = {layer: (teacher.channels[layer], teacher.strides[layer]) for layer in teacher.layers}
    seen = scaled(size_hw, scale, teacher)
    matrices = anomaly_map.resize_matrix, adaptive_pool_matrix
    sizes = options.patch, options.width, options.per_image and (STEADY, TINY)
    return torch_scorers.Embedding(maps, size_hw, seen, *sizes, *matrices)


def scaled(size_hw: tuple[int, int], scale: float, teacher) -> tuple[int, int]:
    """Sides of what the teacher sees, multiples of what it asks for.

    Smaller ones are whole cells of the deepest layer in use: a part of a cell would move the map by
    as much, and a cell of a small scale is many pixels wide.
    """
    stride = teacher.arch.multiple if scale >= 1 else max(teacher.strides.values())
    return tuple(max(1, round(side * scale / stride)) * stride for side in size_hw)


def _neighbourhoods(x: jax.Array, size: int) -> jax.Array:
    """Zero-padded s x s neighbourhoods, channel-major: [b, h, w, c] -> [b, h, w, c * s * s]."""
    b, h, w, c = x.shape
    pad = size // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifts = [x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.stack(shifts, axis=-1).reshape(b, h, w, c * size * size)


def _mean(x: jax.Array, size: int) -> jax.Array:
    """The mean of zero-padded s x s neighbourhoods, [b, h, w, c]; zeros beyond the border count."""
    side = size // 2, size - 1 - size // 2
    window, pad = (1, size, size, 1), ((0, 0), side, side, (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), pad) / size**2


def embedded_width(channels: Mapping[int, int], width: int) -> int:
    """The length of an embedding, from the channels of the layers and the wanted width."""
    return width or sum(channels.values())


@functools.lru_cache(maxsize=16)
def adaptive_pool_matrix(n: int, m: int) -> np.ndarray:
    """Adaptive average pooling n -> m as a matrix, float32 [n, m]; columns sum to 1.

    Bin i averages entries floor(i n / m) .. ceil((i + 1) n / m) - 1, as torch does.
    """
    matrix = np.zeros((n, m), np.float32)
    for i in range(m):
        low, high = i * n // m, -(-(i + 1) * n // m)
        matrix[low:high, i] = 1 / (high - low)
    return matrix


def resize(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Bilinear, averaging where it shrinks: [b, h, w, d] -> [b, *grid, d]."""
    if x.shape[1:3] == grid:
        return x
    rows, columns = (
        anomaly_map.resize_matrix(n_in, n_out).astype(np.float32)
        for n_in, n_out in zip(x.shape[1:3], grid, strict=True)
    )
    return jnp.einsum("yh,xw,bhwd->byxd", rows, columns, x, precision=EXACT)
