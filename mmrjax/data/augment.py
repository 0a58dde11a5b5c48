"""Training augmentation on device, from uint8: RandomResizedCrop of the original image, and flip.

The crop box is drawn as torchvision draws it, and pixels are within one grey level of Pillow's
antialiased bicubic resize: two small matrix products per image whose weights are clipped to the
crop box. Spec: arXiv 2304.02216's official code; torchvision's RandomResizedCrop. For methods that
train without augmentation, `evaluation_view` gives the pixels that evaluation sees.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmrjax.data import geometry

# (key, uint8 [h, w, c] on the canvas, int [2] size of the image) -> float32 [*size_hw, c] in [0, 1]
Augment = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

TRIES = 10  # torchvision draws at most ten boxes before it falls back to a centred one
BICUBIC_A = -0.5  # Pillow's kernel


def _bicubic(x: jax.Array) -> jax.Array:
    a = BICUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


# Pillow's kernels at distance x >= 0, in pixels of the coarser of the two grids.
KERNELS = {
    "bilinear": lambda x: jnp.maximum(1 - x, 0.0),
    "bicubic": _bicubic,
    "lanczos": lambda x: jnp.where(x < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0.0),
}
SUPPORT = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # where they end


def random_box(
    key: jax.Array, size: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    """Draws one crop box inside an image.

    Args:
      key: PRNG key.
      size: int [2], (height, width) of the image.
      scale: range of the share of the area.
      ratio: range of width / height, sampled log-uniformly.

    Returns:
      int32 [4]: top, left, height, width. The first of ten candidates that fits, else the largest
      centred box whose aspect ratio is in range.
    """
    key_area, key_ratio, key_top, key_left = jax.random.split(key, 4)
    h, w = size[0], size[1]
    area = jax.random.uniform(key_area, (TRIES,), minval=scale[0], maxval=scale[1]) * h * w
    log_ratio = jnp.log(jnp.asarray(ratio))
    aspect = jnp.exp(
        jax.random.uniform(key_ratio, (TRIES,), minval=log_ratio[0], maxval=log_ratio[1])
    )
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    first = jnp.argmax(fits)

    whole = w / h
    too_tall, too_wide = whole < ratio[0], whole > ratio[1]
    centred_h = jnp.where(too_tall, jnp.round(w / ratio[0]).astype(jnp.int32), h)
    centred_w = jnp.where(too_wide, jnp.round(h * ratio[1]).astype(jnp.int32), w)
    box_h = jnp.where(fits.any(), heights[first], centred_h)
    box_w = jnp.where(fits.any(), widths[first], centred_w)

    def offset(key: jax.Array, free: jax.Array) -> jax.Array:
        drawn = jax.random.randint(key, (), 0, free + 1)
        return jnp.where(fits.any(), drawn, free // 2)

    return jnp.stack([offset(key_top, h - box_h), offset(key_left, w - box_w), box_h, box_w])


def _resample(
    pixels: jax.Array,
    axis: int,
    start: jax.Array | int,
    length: jax.Array,
    n: int,
    outputs: range,
    kernel: str,
) -> jax.Array:
    """Pillow's antialiased resize of one axis of [h, w, 3], in whole grey levels.

    [start, start + length) becomes `n` pixels, of which `outputs` are computed.
    """
    canvas = pixels.shape[axis]
    size, span = _bands(canvas, n, len(outputs), SUPPORT[kernel])
    length = length.astype(jnp.float32)
    scale = length / n
    stretch = jnp.maximum(scale, 1.0)
    centre = (jnp.asarray(outputs).reshape(-1, size) + 0.5) * scale
    first = jnp.floor(start + centre[:, 0] - SUPPORT[kernel] * stretch).astype(jnp.int32)
    first = jnp.clip(first, 0, canvas - span)
    pixel = first[:, None] + jnp.arange(span) - start
    x = jnp.abs(pixel[:, None] + 0.5 - centre[..., None]) / stretch
    inside = (pixel >= 0) & (pixel < length)
    weight = jnp.where(inside[:, None], KERNELS[kernel](x), 0.0)
    taps = weight / weight.sum(axis=-1, keepdims=True)
    if span == canvas:
        bands = jnp.broadcast_to(pixels, (len(first), *pixels.shape))
    else:
        bands = jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(pixels, i, span, axis))(first)
    out = apply_taps(("byh,bhwc->bywc", "bxw,bhwc->hbxc")[axis], taps, bands)
    shape = list(pixels.shape)
    shape[axis] = len(outputs)
    return jnp.clip(jnp.floor(out.reshape(shape) + 0.5), 0, 255)  # Pillow rounds after each pass


def _bands(canvas: int, n: int, kept: int, support: int) -> tuple[int, int]:
    """(outputs of a band, pixels that they read): a few dozen on a CPU, else all in one.

    A product with all taps is mostly one with zeros; an accelerator computes it anyway.
    """
    if jax.default_backend() != "cpu":
        return kept, canvas
    size = max(d for d in range(1, 33) if kept % d == 0)
    return size, min(canvas, math.ceil((size - 1 + 2 * support) * max(1.0, canvas / n)) + 2)


def crop_resize(image: jax.Array, box: jax.Array, size_hw: tuple[int, int]) -> jax.Array:
    """Crops `box` from an image and resizes it as Pillow does, horizontal pass first.

    Args:
      image: uint8 [h, w, 3], padded to a fixed canvas on the bottom and right.
      box: int [4]: top, left, height, width.
      size_hw: output size in px.

    Returns:
      float32 [*size_hw, 3], whole numbers in [0, 255].
    """
    for axis in (1, 0):
        n = size_hw[axis]
        image = _resample(image, axis, box[axis], box[2 + axis], n, range(n), "bicubic")
    return image


def evaluation_view(
    image: jax.Array,
    size: jax.Array,
    resize: tuple[int, int],
    size_hw: tuple[int, int],
    interpolation: str,
) -> jax.Array:
    """The evaluation view of an image (`geometry.view_image`), within one grey level.

    Args:
      image: uint8 [h, w, 3] on the canvas.
      size: int [2], the image's own (height, width).
      resize: the whole image is resized to this, (height, width) in px.
      size_hw: size of the centre crop, at most `resize`.
      interpolation: a key of KERNELS.

    Returns:
      float32 [*size_hw, 3], whole numbers in [0, 255].
    """
    for axis in (1, 0):
        n, kept = resize[axis], size_hw[axis]
        first = round((n - kept) / 2)  # Python's round, as torchvision's centre crop
        outputs = range(first, first + kept)
        image = _resample(image, axis, 0, size[axis], n, outputs, interpolation)
    return image


def apply_taps(
    equation: str, taps: jax.Array, pixels: jax.Array, split: bool | None = None
) -> jax.Array:
    """A product of taps and whole grey levels, as exact as in float32.

    Args:
      equation: as einsum takes it.
      taps: float32.
      pixels: whole numbers 0 to 255 of any dtype, which bfloat16 holds exactly.
      split: as three products in bfloat16, each of eight more bits of the taps; None: on
        accelerators, which multiply bfloat16 ten times faster than float32.

    Returns:
      float32.
    """
    if split is None:
        split = jax.default_backend() != "cpu"
    if not split:
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum(equation, taps, pixels.astype(jnp.float32), precision=exact)
    pixels, total = pixels.astype(jnp.bfloat16), 0.0
    for _ in range(3):
        part = jax.lax.reduce_precision(taps, exponent_bits=8, mantissa_bits=7)
        total += jnp.einsum(
            equation, part.astype(jnp.bfloat16), pixels, preferred_element_type=jnp.float32
        )
        taps = taps - part
    return total


def random_window(
    key: jax.Array, size: jax.Array, window_hw: tuple[int, int], resize_hw: tuple[int, int]
) -> jax.Array:
    """A window anywhere in an image, of the scale at which tiles see it.

    Args:
      key: PRNG key.
      size: int [2], (height, width) of the image.
      window_hw: (height, width) of a tile.
      resize_hw: size of the whole image when it is tiled.

    Returns:
      int32 [4]: top, left, height, width in pixels of the image.
    """
    share = jnp.asarray(window_hw, jnp.float32) / jnp.asarray(resize_hw, jnp.float32)
    window = jnp.clip(jnp.round(size * share).astype(jnp.int32), 1, size)
    corner = jax.random.randint(key, (2,), 0, size - window + 1)
    return jnp.concatenate([corner, window])


def augment(
    key: jax.Array,
    image: jax.Array,
    window: jax.Array,
    size_hw: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> jax.Array:
    """One training image: random crop, resize, and a horizontal flip with probability 1/2.

    Args:
      key: the example's key for this step.
      image: uint8 [h, w, 3] on the canvas.
      window: int [4], top, left, height, width of what is seen; normally the whole image.
      size_hw: output size.
      scale: see `random_box`.
      ratio: see `random_box`.
      flip: whether to flip at random.

    Returns:
      float32 [*size_hw, 3] in [0, 1].
    """
    key_box, key_flip = jax.random.split(key)
    box = random_box(key_box, window[2:], scale, ratio)
    box = box + jnp.concatenate([window[:2], jnp.zeros(2, jnp.int32)])
    out = crop_resize(image, box, size_hw)
    if flip:
        out = jnp.where(jax.random.bernoulli(key_flip), out[:, ::-1], out)
    return geometry.to_unit(out)


def make_augment(config: ConfigDict, kind: str) -> Augment:
    """The training view of an image: a crop, flipped or not, or what evaluation sees.

    Args:
      config: whose `data` and `train` give sizes and ranges.
      kind: rrc_flip, rrc or none (the evaluation's view; of tiled images, a window anywhere).
    """
    view = geometry.View.of(config)
    scale, ratio = tuple(config.train.crop_scale), tuple(config.train.crop_ratio)
    resize = tuple(config.data.resize) if config.data.tiling else None

    def apply(key: jax.Array, image: jax.Array, size: jax.Array) -> jax.Array:
        window = jnp.concatenate([jnp.zeros(2, jnp.int32), size])
        if resize:  # a window as large as those of the evaluation, anywhere
            key, key_window = jax.random.split(key)
            window = random_window(key_window, size, view.size, resize)
        if kind == "none":
            if resize:
                return geometry.to_unit(crop_resize(image, window, view.size))
            return geometry.to_unit(
                evaluation_view(image, size, view.resize, view.size, view.interpolation)
            )
        return augment(key, image, window, view.size, scale, ratio, kind == "rrc_flip")

    return apply
