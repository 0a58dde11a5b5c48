"""All pixels of a set of maps, ranked exactly; the form of the pixel metrics that has no error.

Costs one sort of the normal pixels and holds one copy of them. streaming.py offers the same
interface from histograms, for sets that do not fit in memory. Called by evaluation.py.
"""

from typing import NamedTuple

import numpy as np

from mmrjax.metrics import bootstrap, pro, ranking, threads

_BINS = 4096  # of the histograms behind the intervals


class Pixels(NamedTuple):
    """The images that count for pixel metrics, with everything computed once.

    Attributes:
        maps: [n, h, w] finite anomaly maps.
        found: regions of their masks.
        sorted_normal: the scores of all normal pixels, in a few ascending arrays.
        defect: [p] scores of the defect pixels, in the order of `found.pixel`.
        pro_mmr: [n] per-image value, NaN where undefined.
        peaks: [n] the highest value of each map.
    """

    maps: np.ndarray
    found: pro.Regions
    sorted_normal: list[np.ndarray]
    defect: np.ndarray
    pro_mmr: np.ndarray
    peaks: np.ndarray

    def defects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each defect region the image [r], its longer side in px, and its highest value."""
        return self.found.image, self.found.sides(), self.found.highest(self.defect)

    def tables(self) -> tuple[ranking.Ranked, ranking.Ranked]:
        """Defect pixels against normal ones, each counting 1, then each weighing 1 / area."""
        return _tables(self.sorted_normal, self.defect, self.found.weight)

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Nothing: these values are exact."""
        return {}

    def group_histograms(self, group: np.ndarray, groups: int) -> bootstrap.GroupHistograms:
        """Histograms of every group over quantile bins; `group` [n] indexes range(groups)."""
        edges = _edges(self)
        k = len(edges) + 1
        normal = np.zeros((groups, k))
        counts = threads.each(lambda scores: _counts(scores, edges), self.maps)
        for g, count in zip(group, counts, strict=True):
            normal[g] += count
        owner, row = np.unique(group[self.found.pixel_image], return_inverse=True)
        slot = row * k + np.searchsorted(edges, self.defect, "right")
        defect = np.bincount(slot, minlength=len(owner) * k).reshape(-1, k)
        overlap = np.bincount(slot, self.found.weight, minlength=len(owner) * k).reshape(-1, k)
        normal[owner] -= defect
        tables = (np.ascontiguousarray(t[:, ::-1], np.float64) for t in (normal, defect, overlap))
        normal, defect, overlap = tables
        return bootstrap.GroupHistograms(normal, owner, defect, overlap)


def gather(maps: np.ndarray, found: pro.Regions) -> Pixels:
    """Sorts the normal pixels, and scores every image by `pro_mmr`."""
    normal, defect = _split(maps, found)
    peaks = maps.reshape(len(maps), -1).max(axis=1)
    return Pixels(maps, found, normal, defect, pro.pro_mmr_per_image(maps, found), peaks)


def pixel_auroc_and_aupro(
    maps: np.ndarray, masks: np.ndarray, limit: float = 0.3
) -> tuple[float, float]:
    """Both from one sort: the fastest exact way to the two most wanted pixel metrics.

    Arguments and errors as in `pro.aupro`.
    """
    maps, found = pro.checked(maps, masks)
    pro.require_both_classes(found)
    pixel, region = _tables(*_split(maps, found), found.weight)
    return float(ranking.area(pixel)), float(ranking.area(region, limit))


def _split(maps: np.ndarray, found: pro.Regions) -> tuple[list[np.ndarray], np.ndarray]:
    """Normal pixels in ascending parts, and defect pixels in the order of `found.pixel`."""
    values = maps.ravel()

    def ascending(part: slice) -> np.ndarray:
        inside = found.pixel[(found.pixel >= part.start) & (found.pixel < part.stop)]
        normal = values[part].copy()
        normal[inside - part.start] = np.inf  # sorts last: cheaper than selecting the others first
        normal.sort()
        return normal[: len(normal) - len(inside)]

    return threads.each(ascending, threads.slices(values.size)), values[found.pixel]


def _tables(
    sorted_normal: list[np.ndarray], defect: np.ndarray, weight: np.ndarray
) -> tuple[ranking.Ranked, ranking.Ranked]:
    """One search for both weightings of the defect pixels."""
    both = ranking.rank(defect, sorted_normal, np.stack([np.ones(len(defect)), weight]))
    return tuple(both._replace(positive=row) for row in both.positive)


def _counts(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[k] pixels of one map in every bin."""
    below = np.searchsorted(np.sort(scores, axis=None), edges, "left")
    return np.diff(below, prepend=0, append=scores.size)


def _edges(pixels: Pixels) -> np.ndarray:
    """Ascending bin edges, fewer than about `_BINS`, fine where the metrics look.

    A quarter each: quantiles of the normal pixels, of their highest third (the range of AU-PRO), of
    the defect pixels, and of the defect pixels by region weight (small regions count as much as
    large ones). Each part of the normal pixels gives its share of the quantiles.
    """
    quarter = np.linspace(0, 1, _BINS // 4, endpoint=False)
    order = np.argsort(pixels.defect)
    ordered, weight = pixels.defect[order], np.cumsum(pixels.found.weight[order])
    picks = [
        ordered[(quarter * len(ordered)).astype(np.int64)],
        ordered[np.searchsorted(weight, quarter * weight[-1])],
    ]
    share = quarter[:: len(pixels.sorted_normal)]
    for normal in (part for part in pixels.sorted_normal if len(part)):
        picks += [normal[(q * len(normal)).astype(np.int64)] for q in (share, (2 + share) / 3)]
    return np.unique(np.concatenate(picks))
