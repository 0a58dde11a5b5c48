"""The metrics of one domain from its scores, maps and truth; pixels are ranked without any error.

An undefined value becomes None with a reason; broken input (NaN, shapes that do not fit) raises
ValueError. Ranking the pixels takes one sort of the normal pixels and holds one copy of them.
streaming.py has the same interface for sets that do not fit in memory. Called for every domain of a
run by mmrjax/evaluate/scoring.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmrjax.metrics import bootstrap as bootstrap_lib
from mmrjax.metrics import misses, pro, ranking
from mmrjax.metrics.domain import (
    IMAGE_METRICS,
    Measured,
    assemble,
    checked_scores,
    pixel_reason,
)

_BINS = 4096  # bins of the histograms behind the intervals


def measure(
    scores: np.ndarray,
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    is_anomaly: np.ndarray,
    has_mask: np.ndarray | None,
    groups: Sequence | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    tiny_side: int = misses.TINY_SIDE,
) -> Measured:
    """Metrics of one domain.

    Pixel metrics use the good images (as all normal, whatever their mask) and those anomalous
    images that have pixel truth. An anomalous image whose mask is empty in view keeps its label;
    its pixels count as normal and it does not enter `pro_mmr`.

    Args:
        scores: [n] image scores, higher means more anomalous.
        maps: [n, h, w] anomaly maps, or None for a method without maps.
        masks: [n, h, w] bool; rows without pixel truth are not read. None only with `maps` None.
        is_anomaly: [n] bool.
        has_mask: [n] bool, false for images without pixel truth. None only with `maps` None.
        groups: [n] hashable; images of a group are resampled together. Default: each image alone.
        bootstrap: number of resamples for the 95 % intervals; 0 for none.
        seed: seeds the resampling.
        tiny_side: regions without a side of so many px are tiny (misses.py).

    Raises:
        ValueError: NaN or infinity in scores or maps, or arrays that do not fit together.
    """
    scores, maps, truth, is_anomaly, used = _checked(scores, maps, masks, is_anomaly, has_mask)
    empty = np.zeros(len(scores), bool) if truth is None else ~_any(truth)
    reason = pixel_reason(maps is not None, is_anomaly, used, empty)
    if reason is None and truth[used].all():
        reason = "no normal pixel"
    counted = reason
    if reason is None:
        counted = gather(_rows(maps, used), pro.regions(_rows(truth, used)))
    return assemble(scores, is_anomaly, used, empty, counted, groups, bootstrap, seed, tiny_side)


def paired_difference(
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    is_anomaly: np.ndarray,
    groups: Sequence | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Image metrics of method a, of method b, and a minus b; each resample of images serves both.

    The interval tells whether the difference would survive another sample of images. It tells
    nothing of another training seed. If several seeds are given, their metrics are averaged.

    Args:
        scores_a: [n], or [s, n] for s seeds of method a.
        scores_b: [n], or [t, n] for t seeds of method b.
        is_anomaly: [n] bool.
        groups: [n] as in `measure`.
        bootstrap: number of resamples.
        seed: seeds the resampling.

    Returns:
        {metric: {"a": 0..1, "b": 0..1, "difference": a - b, "ci95": [low, high]}}; each is None if
        the metric is undefined.

    Raises:
        ValueError: as in `measure`.
    """
    values, samples = [], []
    for scores in (scores_a, scores_b):
        runs = [
            measure(row, None, None, is_anomaly, None, groups, bootstrap, seed)
            for row in np.atleast_2d(scores)
        ]
        defined = [name for name in IMAGE_METRICS if runs[0].values[name] is not None]
        values.append({n: float(np.mean([run.values[n] for run in runs])) for n in defined})
        samples.append({n: np.mean([r.samples[n] for r in runs], axis=0) for n in runs[0].samples})
    rows = {}
    for name in IMAGE_METRICS:
        a, b = (side.get(name) for side in values)
        drawn = all(name in side for side in samples)
        rows[name] = {
            "a": a,
            "b": b,
            "difference": None if a is None or b is None else a - b,
            "ci95": bootstrap_lib.interval(samples[0][name] - samples[1][name]) if drawn else None,
        }
    return rows


def _checked(scores, maps, masks, is_anomaly, has_mask):
    """Arrays that fit together and are finite.

    Returns:
        scores [n], maps or None, truth [n, h, w] bool or None (false without pixel truth and for
        good images), is_anomaly [n], used [n] bool: counts for pixel metrics.
    """
    scores, is_anomaly = checked_scores(scores, is_anomaly)
    if maps is None:
        return scores, None, None, is_anomaly, np.zeros(len(scores), bool)
    maps, masks, has_mask = np.asarray(maps), np.asarray(masks), np.asarray(has_mask)
    if (
        maps.ndim != 3
        or maps.shape != masks.shape
        or not len(maps) == len(scores) == len(has_mask)
        or not masks.dtype == has_mask.dtype == bool
    ):
        raise ValueError(
            f"with {len(scores)} scores, maps {maps.shape} must be [n, h, w], masks {masks.shape} "
            f"{masks.dtype} the same and boolean, has_mask {has_mask.shape} {has_mask.dtype} "
            "[n] and boolean"
        )
    ranking.require_finite(maps, "anomaly maps")
    has_truth = is_anomaly & has_mask
    truth = masks & has_truth[:, None, None] if masks[~has_truth].any() else masks
    return scores, maps, truth, is_anomaly, has_truth | ~is_anomaly


def _rows(stack: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The used images; no copy if all are used."""
    return stack if used.all() else stack[used]


def _any(masks: np.ndarray) -> np.ndarray:
    """[n] bool: the mask has a pixel."""
    return masks.reshape(len(masks), -1).any(axis=1)


class Pixels(NamedTuple):
    """Maps of the images that count for pixel metrics, sorted once for all pixel metrics.

    Attributes:
        maps: [n, h, w] finite anomaly maps.
        regions: defect regions of their masks.
        sorted_normal: the scores of all normal pixels, in a few ascending arrays.
        defect: [p] scores of the defect pixels, in the order of `regions.pixel`.
        pro_mmr: [n] per-image value, NaN if undefined.
        peaks: [n] the highest value of each map.
    """

    maps: np.ndarray
    regions: pro.Regions
    sorted_normal: list[np.ndarray]
    defect: np.ndarray
    pro_mmr: np.ndarray
    peaks: np.ndarray

    def defects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image [r], longer side in px [r] and highest map value [r] of every defect region."""
        return self.regions.image, self.regions.sides(), self.regions.highest(self.defect)

    def tables(self) -> tuple[ranking.Ranked, ranking.Ranked]:
        """Rankings of defect pixels against normal pixels: of weight 1, and of weight 1 / area."""
        return _tables(self.sorted_normal, self.defect, self.regions.weight)

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Empty: all values are exact."""
        return {}

    def group_histograms(self, group: np.ndarray, groups: int) -> bootstrap_lib.GroupHistograms:
        """Histograms of every group over quantile bins; `group` [n] indexes range(groups)."""
        edges = _edges(self)
        k = len(edges) + 1
        normal = np.zeros((groups, k))
        counts = ranking.map_threaded(lambda scores: _counts(scores, edges), self.maps)
        for g, count in zip(group, counts, strict=True):
            normal[g] += count
        owner, row = np.unique(group[self.regions.pixel_image], return_inverse=True)
        slot = row * k + np.searchsorted(edges, self.defect, "right")
        defect = np.bincount(slot, minlength=len(owner) * k).reshape(-1, k)
        overlap = np.bincount(slot, self.regions.weight, minlength=len(owner) * k).reshape(-1, k)
        normal[owner] -= defect
        tables = (np.ascontiguousarray(t[:, ::-1], np.float64) for t in (normal, defect, overlap))
        normal, defect, overlap = tables
        return bootstrap_lib.GroupHistograms(normal, owner, defect, overlap)


def gather(maps: np.ndarray, regions: pro.Regions) -> Pixels:
    """Sorts the normal pixels of maps [n, h, w], and scores every image by `pro_mmr`."""
    normal, defect = _split(maps, regions)
    peaks = maps.reshape(len(maps), -1).max(axis=1)
    return Pixels(maps, regions, normal, defect, pro.pro_mmr_per_image(maps, regions), peaks)


def _split(maps: np.ndarray, regions: pro.Regions) -> tuple[list[np.ndarray], np.ndarray]:
    """Normal pixels in ascending parts, and defect pixels in the order of `regions.pixel`."""
    values = maps.ravel()

    def ascending(part: slice) -> np.ndarray:
        inside = regions.pixel[(regions.pixel >= part.start) & (regions.pixel < part.stop)]
        normal = values[part].copy()
        normal[inside - part.start] = np.inf  # sorts last: cheaper than selecting the others first
        normal.sort()
        return normal[: len(normal) - len(inside)]

    parts = ranking.map_threaded(ascending, ranking.thread_slices(values.size))
    return parts, values[regions.pixel]


def _tables(
    sorted_normal: list[np.ndarray], defect: np.ndarray, weight: np.ndarray
) -> tuple[ranking.Ranked, ranking.Ranked]:
    """Rankings of the defect pixels with weight 1 and with `weight` [p], from one search."""
    both = ranking.rank(defect, sorted_normal, np.stack([np.ones(len(defect)), weight]))
    return tuple(both._replace(positive=row) for row in both.positive)


def _counts(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[k] pixels of one map in every bin."""
    below = np.searchsorted(np.sort(scores, axis=None), edges, "left")
    return np.diff(below, prepend=0, append=scores.size)


def _edges(pixels: Pixels) -> np.ndarray:
    """Ascending bin edges, about `_BINS` of them, fine in the ranges that decide the metrics.

    A quarter of the edges each are quantiles of the normal pixels, of their highest third (the
    range of AU-PRO), of the defect pixels, and of the defect pixels by region weight (small regions
    count as much as large ones). Each part of the normal pixels gives its share of the quantiles.
    """
    quarter = np.linspace(0, 1, _BINS // 4, endpoint=False)
    order = np.argsort(pixels.defect)
    ordered, weight = pixels.defect[order], np.cumsum(pixels.regions.weight[order])
    picks = [
        ordered[(quarter * len(ordered)).astype(np.int64)],
        ordered[np.searchsorted(weight, quarter * weight[-1])],
    ]
    share = quarter[:: len(pixels.sorted_normal)]
    for normal in (part for part in pixels.sorted_normal if len(part)):
        picks += [normal[(q * len(normal)).astype(np.int64)] for q in (share, (2 + share) / 3)]
    return np.unique(np.concatenate(picks))
