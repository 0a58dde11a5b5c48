"""The defect in a mask of unknown making: decided by the mask's levels, and said.

Understood are 0 and 255, 0 and 1, label numbers, colours on black, palettes, soft edges, files of a
lossy format, a defect drawn in the alpha channel, and black on white. A mask that can be meant in
two ways is not guessed: `Mask.doubt` says why, and `sketch` shows what was understood.
"""

import dataclasses
import os
import pathlib

import cv2
import numpy as np

from data_builders import images

MOST_LABELS = 8  # a mask with more levels is soft, unless each level fills areas
NEAR = 24  # grey levels by which a lossy format moves black or white
FAINT = 64  # a lossy mask without a level this high is empty


@dataclasses.dataclass(frozen=True)
class Mask:
    """The marked pixels of a mask file.

    Attributes:
      marked: bool [h, w]; nothing is marked in a mask that is in doubt.
      note: how the mask was read, if otherwise than usual; "" for 0 and another level.
      doubt: why the mask cannot be believed, or "".
      understood: bool [h, w], what would be marked without the doubt.
    """

    marked: np.ndarray
    note: str
    doubt: str
    understood: np.ndarray


def read(path: os.PathLike) -> Mask:
    """Reads a mask file, upright.

    Raises:
      ValueError: the file is damaged; the message names it.
    """
    data = pathlib.Path(path).read_bytes()
    kind = images.format_of(data)
    is_lossy = kind in ("JPEG", "MPO") or (kind == "WEBP" and b"VP8L" not in data)
    return understand(images.decode_upright(data, str(path)), is_lossy, str(path))


def understand(pixels: np.ndarray, is_lossy: bool = False, where: str = "the mask") -> Mask:
    """Decides what a mask marks.

    Args:
      pixels: integer [h, w], or [h, w, 3 or 4] with alpha last.
      is_lossy: whether the file's format changes levels a little, as JPEG does.
      where: the mask's name in error messages.

    Raises:
      ValueError: the pixels are no integers.
    """
    if not np.issubdtype(pixels.dtype, np.integer):
        raise ValueError(f"{where}: expected integer grey levels, found {pixels.dtype}")
    grey = pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=-1)
    marked, note = _of_levels(grey, is_lossy)
    doubt = ""
    if pixels.ndim == 3 and pixels.shape[2] == 4 and np.ptp(pixels[..., 3]):
        marked, note, doubt = _with_alpha(marked, note, pixels[..., 3])
    elif pixels.ndim == 3 and marked.all():
        by_colour = _of_colours(pixels[..., :3], is_lossy)
        if by_colour.any():
            marked, note = by_colour, "the most frequent colour read as background"
    if not doubt and marked.mean() > 0.5:
        marked, note, doubt = _mostly_marked(marked, note)
    return Mask(np.zeros_like(marked) if doubt else marked, note, doubt, marked)


def sketch(marked: np.ndarray, width: int = 24) -> str:
    """A small picture of a mask [h, w] in lines of text: # is defect."""
    height = max(1, min(12, round(width * marked.shape[0] / marked.shape[1] / 2)))
    share = cv2.resize(np.float32(marked), (width, height), interpolation=cv2.INTER_AREA)
    return "\n".join("".join("#" if x > 0.5 else "+" if x else "." for x in row) for row in share)


def _of_levels(grey: np.ndarray, is_lossy: bool) -> tuple[np.ndarray, str]:
    """(what is marked, note) of grey levels."""
    levels, counts = np.unique(grey, return_counts=True)
    low, high = int(levels[0]), int(levels[-1])
    if is_lossy or (levels.size > 2 and _is_clustered(levels)):
        if high - low < FAINT:
            is_white = bool(np.median(grey) >= 128)
            return np.full(grey.shape, is_white), "lossy, of nearly one level"
        return grey > (low + high) // 2, "soft or lossy: cut at half of its range"
    is_soft = levels.size > 2 and high >= 2 * FAINT and not _fills_areas(grey)
    if not is_soft and (levels.size <= MOST_LABELS or high < FAINT or _fills_areas(grey)):
        if low and levels.size > 1 and counts[0] > grey.size / 2:
            return grey > low, f"level {low} read as background"
        return grey > 0, "numbers: all but 0 is defect" if levels.size > 2 else ""
    return grey > high // 2, "soft or lossy: cut at half of its range"


def _is_clustered(levels: np.ndarray) -> bool:
    """Whether all levels lie near the smallest or near a much larger largest one."""
    low, high = int(levels[0]), int(levels[-1])
    near = (levels <= low + NEAR) | (levels >= high - NEAR)
    return high - low > 4 * NEAR and bool(near.all())


def _fills_areas(grey: np.ndarray) -> bool:
    """Whether levels between the smallest and the largest fill areas, as numbered defects do.

    Soft edges are thin: their pixels have neighbours of other levels.
    """
    between = (grey > grey.min()) & (grey < grey.max())
    wide = grey.astype(np.float64)
    flat = cv2.dilate(wide, np.ones((3, 3))) == cv2.erode(wide, np.ones((3, 3)))
    return bool((flat & between).sum() > 0.3 * between.sum())


def _of_colours(colours: np.ndarray, is_lossy: bool) -> np.ndarray:
    """Pixels that differ from the most frequent colour, as red on white."""
    found, counts = np.unique(colours.reshape(-1, 3), axis=0, return_counts=True)
    common = found[counts.argmax()].astype(int)
    distance = np.abs(colours.astype(int) - common).max(axis=-1)
    return distance > (FAINT if is_lossy else 0)


def _with_alpha(marked: np.ndarray, note: str, alpha: np.ndarray) -> tuple[np.ndarray, str, str]:
    """A mask whose alpha varies: alpha is the mask, unless the colours say otherwise."""
    own = alpha > int(alpha.max()) // 2
    if marked.all() or not marked.any():
        return own, "drawn in the alpha channel", ""
    both = (marked & own).sum()
    if both >= 0.9 * max(marked.sum(), own.sum()) or not own.any():
        return marked, note, ""
    if own.mean() < 0.5 and (marked & own).sum() >= 0.9 * own.sum():
        return own, "drawn in the alpha channel", ""
    if (marked & ~own).sum() == 0:
        return marked, note, ""  # an opaque part of the picture, with the defect inside
    return marked, note, "its colours and its alpha channel mark different pixels"


def _mostly_marked(marked: np.ndarray, note: str) -> tuple[np.ndarray, str, str]:
    """A mask that marks most of its picture: its negative, if the rest is an island inside."""
    border = np.concatenate([marked[0], marked[-1], marked[:, 0], marked[:, -1]])
    if border.all() and not marked.all():
        return ~marked, "mostly white, read as its negative", ""
    share = f"{100 * marked.mean():.0f} %"
    return marked, note, f"it marks {share} of its picture; draw the defect in white on black"
