"""Evaluation geometry on the host: Pillow's resize (as torchvision's), then a centre crop."""

import dataclasses
from collections.abc import Iterator

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


@dataclasses.dataclass(frozen=True)
class View:
    """How evaluation looks at an image: `resize` and centre crop to `size`, both (h, w) in px."""

    resize: Size
    size: Size
    interpolation: str = "bilinear"
    mask_mode: str = "standard"

    @classmethod
    def of(cls, config: ConfigDict, evaluation: bool = False) -> "View":
        """The view of `config.data`; with `evaluation`, `config.eval.resize` takes precedence."""
        resize = (evaluation and config.eval.resize) or config.data.resize
        return cls(
            tuple(resize),
            tuple(config.data.image_size),
            config.data.interpolation,
            config.eval.metrics_mode,
        )


def batches(
    records: Records,
    indices: np.ndarray,
    view: View,
    batch_size: int,
    own: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields (images uint8 [b, h, w, 3], masks bool [b, h, w], real rows), one shape throughout.

    The last batch is filled with zeros; so are, with `own` bool [b], the rows where it is false.
    """
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        images = np.zeros((batch_size, *view.size, 3), np.uint8)
        masks = np.zeros((batch_size, *view.size), bool)
        for row, i in enumerate(rows):
            if own is not None and not own[row]:
                continue
            images[row] = view_image(records.image(i), view.resize, view.size, view.interpolation)
            masks[row] = view_mask(records.mask(i), view.resize, view.size, view.mask_mode)
        yield images, masks, len(rows)


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

    "standard": nearest neighbour, then > 127. "mmr": as the official code, bilinear, divided by its
    own maximum and truncated to integers, which erodes every border (quirk 16).

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


def _centre_crop(array: np.ndarray, size: Size) -> np.ndarray:
    # Python's round, as torchvision: 256 -> 224 starts at 16.
    top, left = (round((n - s) / 2) for n, s in zip(array.shape, size, strict=False))
    return array[top : top + size[0], left : left + size[1]]
