"""Per-region overlap in its two definitions, and the connected regions both need.

`aupro` is the definition of MVTec AD: one ranking over the whole test set, every region with equal
weight, false-positive rate over all normal pixels, good images included. `pro_mmr` is the score in
the MMR and RD4AD tables: a curve of 200 thresholds per defective image, averaged over images. They
differ by several points on the same maps; report both, never one under the other's name.

What `pro_mmr` gives where the official code fails (and why) is decided in `pro_mmr_per_image`.
"""

from typing import NamedTuple

import cv2
import numpy as np

from mmrjax.metrics import ranking, threads

_STEPS = 200  # thresholds between an image's own minimum and maximum: official num_th
_LIMIT = 0.3  # largest false-positive rate, both definitions


class Regions(NamedTuple):
    """Connected defect regions of a stack of masks (8-connectivity), found once and shared.

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
        """[p] 1 / area of the pixel's region: every region weighs 1 in all."""
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

    def normal(self) -> np.ndarray:
        """[n * h * w] bool, true for the pixels outside every region."""
        mask = np.ones(np.prod(self.shape), bool)
        mask[self.pixel] = False
        return mask


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


def aupro(maps: np.ndarray, masks: np.ndarray | Regions, limit: float = _LIMIT) -> float:
    """AU-PRO of MVTec AD, exact: all thresholds, ties merged, linear interpolation at the limit.

    Only the normal pixels that can lie below `limit` are sorted; all pixels tied with the last of
    them are kept, so ties across the limit stay exact. A constant map gives limit / 2, which is
    chance; a perfect one gives 1.

    Args:
        maps: [n, h, w] float32 or float64, higher means more anomalous; good images belong in it.
        masks: [n, h, w] bool, all false for good images; or their `regions`, if already at hand.
        limit: largest false-positive rate, in (0, 1].

    Returns:
        0..1.

    Raises:
        ValueError: NaN or infinity in the maps, no defect pixel, no normal pixel, or unequal
            shapes.
    """
    return float(ranking.area(_ranked_head(maps, masks, limit), limit))


def pro_curve(
    maps: np.ndarray, masks: np.ndarray | Regions, limit: float = _LIMIT
) -> tuple[np.ndarray, np.ndarray]:
    """The curve whose area is `aupro`: false-positive rate 0..limit, region overlap 0..1."""
    return head(*ranking.polyline(_ranked_head(maps, masks, limit)), limit)


def head(x: np.ndarray, y: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The part of a rising polyline with x <= limit, ending exactly there."""
    inside = x <= limit
    end = max(np.interp(limit, x, y), y[inside][-1])  # a vertical step may lie at `limit`
    return np.append(x[inside], limit), np.append(y[inside], end)


def pro_mmr(maps: np.ndarray, masks: np.ndarray | Regions) -> float:
    """Mean over defective images of the official per-image PRO, see `pro_mmr_per_image`.

    Raises:
        ValueError: as there, or no image has both a defect pixel and a normal pixel.
    """
    values = pro_mmr_per_image(maps, masks)
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError(
            "pro_mmr needs an image with both defect pixels and normal pixels; got none"
        )
    return float(np.mean(values))


def pro_mmr_per_image(maps: np.ndarray, masks: np.ndarray | Regions) -> np.ndarray:
    """PRO of each image as `compute_pro` of zhangzilongc/MMR (utils/common.py @22d1b17) defines it.

    Per image: thresholds np.arange(min, max, (max - min) / 200) in float64 (200 or, by rounding,
    201), positive is strictly above, false-positive rate over this image's normal pixels, keep
    rates < 0.3, divide them by the largest kept one, trapezoid. Bit-equal to it where it returns a
    number. Where it does not, one rule decides, "what is found before the first false alarm":

      - largest kept rate 0 (perfect binary map; official 0/0 = NaN): the largest overlap kept, so 1
        for a perfect map;
      - no threshold kept (constant map, or 30 % of the normal pixels tied at the maximum; official
        code raises): 0, nothing is found;
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
    maps, found = checked(maps, masks)
    flat = maps.reshape(len(maps), -1)
    starts = np.concatenate([[0], np.cumsum(found.area)])

    def of_image(i: int) -> float:
        first, last = np.searchsorted(found.image, [i, i + 1])
        parts = [
            found.pixel[starts[r] : starts[r + 1]] - i * flat.shape[1] for r in range(first, last)
        ]
        return _pro_of_image(flat[i], parts)

    values, defective = np.full(len(maps), np.nan), np.unique(found.image)
    values[defective] = threads.each(of_image, defective)
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
    """Mean over rows rounded once, as statistics.mean; plain sums do so for one or two rows.

    Shares are 0 or at least 1 / area: times 2^120 they are whole, and Python divides whole numbers
    with one rounding.
    """
    if len(rows) <= 2:
        return sum(rows) / len(rows)
    whole = (map(int, np.ldexp(row, 120).tolist()) for row in rows)
    return np.array([sum(column) / (len(rows) << 120) for column in zip(*whole, strict=True)])


def checked(maps: np.ndarray, masks: np.ndarray | Regions) -> tuple[np.ndarray, Regions]:
    """Finite maps [n, h, w] as an array, and the regions of masks of the same shape.

    Raises:
        ValueError: NaN or infinity in the maps, or unequal shapes.
    """
    maps = np.asarray(maps)
    found = masks if isinstance(masks, Regions) else regions(masks)
    if maps.shape != tuple(found.shape):
        raise ValueError(f"maps {maps.shape} and masks {tuple(found.shape)} must have one shape")
    ranking.require_finite(maps, "anomaly maps")
    return maps, found


def require_both_classes(found: Regions) -> None:
    """Raises ValueError unless there are defect pixels and normal pixels."""
    size = int(np.prod(found.shape))
    if not 0 < len(found.pixel) < size:
        raise ValueError(
            f"defect and normal pixels are needed; {len(found.pixel)} of {size} are defects"
        )


def _ranked_head(maps: np.ndarray, masks: np.ndarray | Regions, limit: float) -> ranking.Ranked:
    """Ranking exact up to false-positive rate `limit`; groups beyond it only carry weight."""
    if not 0 < limit <= 1:
        raise ValueError(f"limit={limit} must lie in (0, 1]")
    maps, found = checked(maps, masks)
    require_both_classes(found)
    values = maps.ravel()
    normal = values[found.normal()]
    total = len(normal)
    keep = int(np.ceil(limit * total)) + 1
    if keep < total:
        normal.partition(total - keep)
        head = normal[total - keep :]
        cut = head[0]
        below = normal[: total - keep]
        normal = np.concatenate([below[below == cut], head])  # every tie of the cut, or b is wrong
    normal.sort()
    return ranking.rank(values[found.pixel], normal, found.weight, negatives=total)
