"""Per-region overlap in its two definitions, and the connected regions that both need.

"aupro_0.3" has the definition of MVTec AD: one ranking over the test set, every region with equal
weight, false-positive rate over all normal pixels, good images included. "pro_mmr" is the score in
the MMR and RD4AD tables: a curve of 200 thresholds per defective image, averaged over images. The
two differ by several points on the same maps, so a report names which one it shows.

The official code of "pro_mmr" fails on some maps; `pro_mmr_per_image` defines a value for them.
"""

from typing import NamedTuple

import cv2
import numpy as np

from mmrjax.metrics import ranking

_STEPS = 200  # thresholds between an image's own minimum and maximum: official num_th
_LIMIT = 0.3  # largest false-positive rate, both definitions


class Regions(NamedTuple):
    """Connected defect regions of a stack of masks (8-connectivity).

    Attributes:
        shape: (n, h, w) of the masks.
        pixel: [p] flat indices into the stack, region after region.
        area: [r] pixels of each region.
        image: [r] index of the image that holds the region, ascending.
    """

    shape: tuple[int, int, int]
    pixel: np.ndarray
    area: np.ndarray
    image: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """[p] 1 / area of the pixel's region, so that the pixels of a region sum up to 1."""
        return np.repeat(1 / self.area, self.area)

    @property
    def pixel_image(self) -> np.ndarray:
        """[p] index of the image that holds the pixel."""
        return np.repeat(self.image, self.area)

    def sides(self) -> np.ndarray:
        """[r] the longer side of each region's bounding box, px."""
        if not len(self.area):
            return np.zeros(0, np.int64)
        starts = np.cumsum(self.area) - self.area
        _, height, width = self.shape
        lengths = []
        for at in (self.pixel // width % height, self.pixel % width):
            lengths.append(np.maximum.reduceat(at, starts) - np.minimum.reduceat(at, starts) + 1)
        return np.maximum(*lengths)

    def highest(self, values: np.ndarray) -> np.ndarray:
        """[r] the highest of each region's values; `values` [p] in the order of `pixel`."""
        if not len(self.area):
            return np.zeros(0, values.dtype)
        return np.maximum.reduceat(values, np.cumsum(self.area) - self.area)


def regions(masks: np.ndarray) -> Regions:
    """Finds the 8-connected regions of boolean masks [n, h, w]; empty masks are cheap.

    Raises:
        ValueError: masks that are not boolean or not a stack.
    """
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim != 3:
        raise ValueError(
            f"masks must be boolean [n, h, w], got {masks.dtype} {masks.shape}; threshold them"
        )
    size = masks.shape[1] * masks.shape[2]
    pixel, area, image = [], [], []
    for i in np.flatnonzero(masks.reshape(len(masks), -1).any(axis=1)):
        count, labels = cv2.connectedComponents(masks[i].astype(np.uint8), connectivity=8)
        labels = labels.ravel()
        inside = np.flatnonzero(labels)
        order = np.argsort(labels[inside], kind="stable")
        pixel.append(inside[order] + i * size)
        area.append(np.bincount(labels[inside], minlength=count)[1:])
        image.append(np.full(count - 1, i))
    none = np.zeros(0, np.int64)
    return Regions(
        masks.shape,
        np.concatenate(pixel) if pixel else none,
        np.concatenate(area) if area else none,
        np.concatenate(image) if image else none,
    )


def head(x: np.ndarray, y: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The part of a rising polyline with x <= limit, ending exactly there."""
    inside = x <= limit
    end = max(np.interp(limit, x, y), y[inside][-1])  # a vertical step may lie at `limit`
    return np.append(x[inside], limit), np.append(y[inside], end)


def pro_mmr_per_image(maps: np.ndarray, masks: np.ndarray | Regions) -> np.ndarray:
    """PRO of each image as `compute_pro` of zhangzilongc/MMR (utils/common.py @22d1b17) defines it.

    Per image: thresholds np.arange(min, max, (max - min) / 200) in float64 (200 or, by rounding,
    201), positive is strictly above, false-positive rate over this image's normal pixels, keep
    rates < 0.3, divide them by the largest kept one, trapezoid. The value is bit-equal to the
    official one if the official code returns a number. If not, the rule is "the overlap that is
    reached before the first false alarm":

      - largest kept rate 0 (perfect binary map; official 0/0 = NaN): the largest overlap kept, so 1
        for a perfect map;
      - no threshold kept (constant map, or 30 % of the normal pixels tied at the maximum; official
        code raises): 0;
      - one threshold kept (official code raises): its overlap if its rate is 0, else 0 (no width,
        as the official trapezoid gives for several thresholds at one rate);
      - no normal pixel (mask all ones; official code raises): NaN here, left out of the mean;
      - no defect pixel: NaN here, left out of the mean, as in the official code.

    Args:
        maps: [n, h, w] float32 or float64; float32 values are compared in float64.
        masks: [n, h, w] bool, or their `regions`.

    Returns:
        [n] float64, 0..1 or NaN.

    Raises:
        ValueError: NaN or infinity in the maps, or unequal shapes.
    """
    maps, defects = checked(maps, masks)
    flat = maps.reshape(len(maps), -1)
    starts = np.concatenate([[0], np.cumsum(defects.area)])

    def of_image(i: int) -> float:
        first, last = np.searchsorted(defects.image, [i, i + 1])
        parts = [
            defects.pixel[starts[r] : starts[r + 1]] - i * flat.shape[1] for r in range(first, last)
        ]
        return _pro_of_image(flat[i], parts)

    values, defective = np.full(len(maps), np.nan), np.unique(defects.image)
    values[defective] = ranking.map_threaded(of_image, defective)
    return values


def _pro_of_image(values: np.ndarray, parts: list[np.ndarray]) -> float:
    """Official PRO of one flattened map; `parts` are the pixel indices of its regions."""
    is_normal = np.ones(len(values), bool)
    is_normal[np.concatenate(parts)] = False
    normal = np.sort(values[is_normal])
    if not len(normal):
        return np.nan
    low, high = float(values.min()), float(values.max())
    step = (high - low) / _STEPS
    thresholds = np.arange(low, high, step) if step > 0 else np.zeros(0)
    rate = _share_above(normal, thresholds)
    thresholds, rate = thresholds[rate < _LIMIT], rate[rate < _LIMIT]
    if not len(rate):
        return 0.0
    overlap = _exact_mean([_share_above(np.sort(values[part]), thresholds) for part in parts])
    if rate.max() == 0:
        return float(overlap.max())
    return float(0.0 - np.trapezoid(overlap, rate / rate.max()))  # summed as sklearn.auc does


def _share_above(ordered: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of ascending values strictly above each threshold."""
    return (len(ordered) - np.searchsorted(ordered, thresholds, "right")) / len(ordered)


def _exact_mean(rows: list[np.ndarray]) -> np.ndarray:
    """Mean over rows with a single rounding, as statistics.mean has it.

    A plain sum of one or two rows rounds only once. More rows become integers: a share is 0 or at
    least 1 / area, so 2^120 times the share is an integer, and Python divides integers with a
    single rounding.
    """
    if len(rows) <= 2:
        return sum(rows) / len(rows)
    integers = (map(int, np.ldexp(row, 120).tolist()) for row in rows)
    return np.array([sum(column) / (len(rows) << 120) for column in zip(*integers, strict=True)])


def checked(maps: np.ndarray, masks: np.ndarray | Regions) -> tuple[np.ndarray, Regions]:
    """Finite maps [n, h, w] as an array, and the regions of masks of the same shape.

    Raises:
        ValueError: NaN or infinity in the maps, or unequal shapes.
    """
    maps = np.asarray(maps)
    defects = masks if isinstance(masks, Regions) else regions(masks)
    if maps.shape != tuple(defects.shape):
        raise ValueError(f"maps {maps.shape} and masks {tuple(defects.shape)} must have one shape")
    ranking.require_finite(maps, "anomaly maps")
    return maps, defects
