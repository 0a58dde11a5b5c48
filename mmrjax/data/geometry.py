"""How evaluation looks at a picture, on the host, and where a map's values lie in the picture.

Pillow resizes the picture, as torchvision does, and the centre is cropped. A tiled view has
overlapping windows that cover the whole resized picture instead. A stress changes test pictures,
never labels (MMR+ spec, section 8).
"""

import dataclasses
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mmrjax.data.records import Records

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Size = tuple[int, int]

# Dim light: scaled by a gain, in the linear scale of the gamma, and counted as photons.
GAMMA = 2.2  # grey level = light ** (1 / GAMMA)
GAIN = 0.4  # share of the light that is left
PEAK = 60  # photons per pixel and channel of the brightest white before the gain


@dataclasses.dataclass(frozen=True)
class View:
    """How evaluation looks at an image: `resize` and centre crop to `size`, both (h, w) in px.

    With an `overlap` in px the view is tiled: windows of `size` cover the resized image. The
    `mask_mode` is that of `view_mask`. With `stress` "dark" the image is darkened first.
    """

    resize: Size
    size: Size
    interpolation: str = "bilinear"
    mask_mode: str = "standard"
    overlap: int | None = None
    stress: str = "none"

    @property
    def frame(self) -> Size:
        """(h, w) of an image and a map: the crop, or all that the windows cover."""
        return self.size if self.overlap is None else self.resize

    def corners(self) -> list[tuple[int, int]]:
        """(top, left) of each window in the frame; the last ones end at its border."""
        axes = [
            _starts(whole, size, self.overlap or 0)
            for whole, size in zip(self.frame, self.size, strict=True)
        ]
        return [(top, left) for top in axes[0] for left in axes[1]]

    def to_image(self, point: tuple[float, float], size: Size) -> tuple[float, float]:
        """A point (y, x) of the frame in an image of `size`; pixels are squares of side 1."""
        offsets = _crop_corner(self.resize, self.frame)
        return tuple(
            (at + offset) * whole / resized
            for at, offset, whole, resized in zip(point, offsets, size, self.resize, strict=True)
        )

    @classmethod
    def of(cls, config: ConfigDict, evaluation: bool = False) -> "View":
        """The view of `config.data`; with `evaluation`, `config.eval.resize` takes precedence."""
        resize = (evaluation and config.eval.resize) or config.data.resize
        return cls(
            tuple(resize),
            tuple(config.data.image_size),
            config.data.interpolation,
            config.eval.metrics_mode,
            config.data.tile_overlap if config.data.tiling else None,
            config.eval.stress if evaluation else "none",
        )


def batches(
    records: Records,
    view: View,
    batch_size: int,
    own: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields (images uint8 [b, h, w, 3], masks bool [b, h, w], number of real rows).

    All batches have one shape. The last batch is filled up with zeros. Rows in which `own`, bool
    [b], is false are zeros, too: another process reads those images.
    """
    for start in range(0, len(records), batch_size):
        rows = range(start, min(start + batch_size, len(records)))
        images = np.zeros((batch_size, *view.frame, 3), np.uint8)
        masks = np.zeros((batch_size, *view.frame), bool)
        for row, i in enumerate(rows):
            if own is not None and not own[row]:
                continue
            image = records.image(i)
            if view.stress == "dark":
                image = darken(image, str(records.table["id"][i]))
            images[row] = view_image(image, view.resize, view.frame, view.interpolation)
            masks[row] = view_mask(records.mask(i), view.resize, view.frame, view.mask_mode)
        yield images, masks, len(rows)


def to_unit(pixels: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Grey levels as the networks take them: the same numbers in [0, 1].

    Args:
      pixels: uint8 or float of any shape, in [0, 255]; NumPy's or, also inside jit, JAX's.

    Returns:
      float32 of the same shape and library. XLA multiplies by 1 / 255, so that its result differs
      from NumPy's in the last bit.
    """
    return pixels.astype(np.float32) / np.float32(255)


def darken(image: np.ndarray, name: str) -> np.ndarray:
    """Shows a picture in 40 % of the light, with its photon noise.

    The noise follows from the record's id, so that every method and every call sees the same
    picture.

    Args:
      image: uint8 [h, w, 3].
      name: id of the record.

    Returns:
      uint8 [h, w, 3].
    """
    light = (np.arange(256) / 255) ** GAMMA * GAIN * PEAK
    photons = np.random.default_rng(zlib.crc32(name.encode())).poisson(light[image])
    return np.round(255 * np.minimum(photons / PEAK, 1.0) ** (1 / GAMMA)).astype(np.uint8)


def view_image(image: np.ndarray, resize: Size, size: Size, interpolation: str) -> np.ndarray:
    """Resizes to `resize` (both sides, antialiased, aspect not kept) and crops the centre.

    Args:
      image: uint8 [h, w, 3].
      resize: (height, width) in px.
      size: (height, width) of the centre crop, at most `resize`.
      interpolation: bilinear, bicubic or lanczos.

    Returns:
      uint8 [*size, 3].
    """
    pil = Image.fromarray(image).resize(resize[::-1], _FILTERS[interpolation])
    return _centre_crop(np.asarray(pil), size)


def view_mask(mask: np.ndarray, resize: Size, size: Size, mode: str) -> np.ndarray:
    """The ground truth in the same view.

    Mode "standard" takes the nearest neighbour, then values above 127. Mode "mmr" does as the
    official MMR code: bilinear, divided by the maximum and truncated to integers, which erodes
    every border (quirk 16).

    Args:
      mask: uint8 [h, w], 0 or 255.
      resize: (height, width) in px.
      size: (height, width) of the centre crop.
      mode: config.eval.metrics_mode.

    Returns:
      bool [*size].
    """
    how = Image.Resampling.BILINEAR if mode == "mmr" else Image.Resampling.NEAREST
    view = _centre_crop(np.asarray(Image.fromarray(mask).resize(resize[::-1], how)), size)
    if mode == "mmr":
        return (view == view.max()) & (view > 0)
    return view > 127


def unview_map(view_map: np.ndarray, view: View, size: Size) -> np.ndarray:
    """Resamples a map to the pixels of its image, bilinearly.

    Args:
      view_map: float32 [*view.frame].
      view: in which the image was scored.
      size: (height, width) of the image.

    Returns:
      float32 [*size]; NaN where the view's crop left the image out.
    """
    out = view_map
    corner = _crop_corner(view.resize, view.frame)
    for axis, (n, whole, resized, first) in enumerate(
        zip(view.frame, size, view.resize, corner, strict=True)
    ):
        at = (np.arange(whole) + 0.5) * resized / whole - 0.5 - first  # in pixels of the frame
        inside = (at >= -0.5) & (at <= n - 0.5)
        at = np.clip(at, 0, n - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, n - 1)
        shape = (-1, 1) if axis == 0 else (1, -1)
        share = np.where(inside, at - low, np.nan).astype(np.float32).reshape(shape)
        out = np.take(out, low, axis) * (1 - share) + np.take(out, high, axis) * share
    return out


def _starts(whole: int, size: int, overlap: int) -> list[int]:
    """The starts of windows of `size` that cover `whole` and overlap by `overlap` or more."""
    return [*range(0, whole - size, size - overlap), whole - size]


def _centre_crop(array: np.ndarray, size: Size) -> np.ndarray:
    top, left = _crop_corner(array.shape[:2], size)
    return array[top : top + size[0], left : left + size[1]]


def _crop_corner(whole: Size, size: Size) -> tuple[int, int]:
    # Python's round, as torchvision: 256 -> 224 starts at 16.
    return tuple(round((n - s) / 2) for n, s in zip(whole, size, strict=True))
