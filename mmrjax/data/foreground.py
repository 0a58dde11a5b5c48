"""The region of the part in a picture: on the host, once per training picture (MMR+, section 7).

Synthetic defects must not land on the background. A texture or a surface fills the picture and
needs no such region: pass None to `synthesise`.
"""

import cv2
import numpy as np

BORDER = 8  # px, width of the frame whose median colour stands for the background
PLAUSIBLE = (0.10, 0.95)  # share of the picture that a part covers; otherwise the rule has failed


def foreground(image: np.ndarray) -> np.ndarray:
    """Finds the part by its colour distance to the picture's border.

    Otsu's threshold on the distance to the border's median, largest component, holes filled,
    median filter of 7 px.

    Args:
      image: uint8 [h, w, 3], RGB.

    Returns:
      bool [h, w]; all True if the part would cover less than 10 % or more than 95 % of the picture.

    Raises:
      ValueError: not a uint8 colour picture.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [h, w, 3], got {image.dtype} {list(image.shape)}")
    inner = np.zeros(image.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    background = np.median(image[~inner], axis=0)
    distance = np.linalg.norm(image - background, axis=-1)
    grey = np.clip(np.round(distance * (255 / max(distance.max(), 1e-6))), 0, 255).astype(np.uint8)
    _, mask = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    mask = cv2.medianBlur(_filled(_largest(mask)), 7) > 0
    low, high = PLAUSIBLE
    return mask if low <= mask.mean() <= high else np.ones_like(mask)


def _largest(mask: np.ndarray) -> np.ndarray:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count < 2:
        return mask
    return (labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])).astype(np.uint8)


def _filled(mask: np.ndarray) -> np.ndarray:
    """Fills the holes: regions that are not joined to the outside of the picture."""
    outside = cv2.copyMakeBorder(1 - mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    cv2.floodFill(outside, None, (0, 0), 2)
    return (outside[1:-1, 1:-1] != 2).astype(np.uint8)
