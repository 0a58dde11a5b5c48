"""Bootstrap over groups: the values every metric takes on resampled sets of groups.

A resample draws as many groups as there are, with replacement (all images of a group together:
frames of a video, exposures of a tile). It is one row of multiplicities, `draws`; the first row is
all ones, the data themselves. Image metrics and `pro_mmr` are exact per resample. The other pixel
metrics come from one histogram per group over common bins, so that a resample is one matrix
product; the bins follow the quantiles of both classes and leave an error below 1e-3, which the
caller removes to first order by shifting the samples so that row 0 equals the exact value. Called
by evaluation.py.
"""

from typing import NamedTuple

import numpy as np

from mmrjax.metrics import pro, ranking

_BLOCK = 128  # resamples handled at once: keeps the temporary arrays at a few MB
_BINS = 4096


class Pixels(NamedTuple):
    """The images that count for pixel metrics, with everything computed once.

    Attributes:
        maps: [n, h, w] finite anomaly maps.
        found: regions of their masks.
        sorted_normal: scores of all normal pixels, ascending.
        defect: [p] scores of the defect pixels, in the order of `found.pixel`.
        pro_mmr: [n] per-image value, NaN where undefined.
    """

    maps: np.ndarray
    found: pro.Regions
    sorted_normal: np.ndarray
    defect: np.ndarray
    pro_mmr: np.ndarray


def gather_pixels(maps: np.ndarray, found: pro.Regions) -> Pixels:
    """Sorts the normal pixels once; takes one copy of them, no other large array."""
    values = maps.ravel()
    normal = values[found.normal()]
    normal.sort()
    return Pixels(maps, found, normal, values[found.pixel], pro.pro_mmr_per_image(maps, found))


def multiplicities(groups: int, resamples: int, seed: int) -> np.ndarray:
    """[1 + resamples, groups] float64: how often each group is drawn; row 0 is all ones."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    return np.concatenate([np.ones((1, groups)), drawn])


def image_samples(
    scores: np.ndarray, is_anomaly: np.ndarray, group: np.ndarray, draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Image metrics of every resample, exact.

    Args:
        scores: [n] finite.
        is_anomaly: [n] bool.
        group: [n] index of each image's group, the column of `draws`.
        draws: [b, g] multiplicities.

    Returns:
        Metric name -> [b], NaN where a resample holds only one class.
    """
    blocks = []
    for start in range(0, len(draws), _BLOCK):
        ranked = ranking.grouped(scores, is_anomaly, draws[start : start + _BLOCK, group])
        blocks.append(
            [ranking.area(ranked), ranking.precision_area(ranked), ranking.best_f1(ranked)]
        )
    names = ("image_auroc", "image_ap", "image_f1_max")
    return dict(zip(names, np.concatenate(blocks, axis=1), strict=True))


def pixel_samples(
    pixels: Pixels, group: np.ndarray, draws: np.ndarray, limit: float, bins: int = _BINS
) -> dict[str, np.ndarray]:
    """Pixel metrics of every resample; arguments as in `image_samples`, `group` for `pixels.maps`.

    Returns:
        Metric name -> [b], NaN where a resample has no defect pixel (or no normal one).
    """
    tables = _histograms(pixels, group, draws.shape[1], bins)
    blocks = []
    for start in range(0, len(draws), _BLOCK):
        rows = draws[start : start + _BLOCK]
        normal = rows @ tables.normal
        pixel = ranking.from_counts(rows[:, tables.owner] @ tables.defect, normal)
        region = pixel._replace(positive=rows[:, tables.owner] @ tables.overlap)
        blocks.append(
            [
                ranking.area(pixel),
                ranking.precision_area(pixel),
                ranking.best_f1(pixel),
                ranking.area(region, limit),
            ]
        )
    names = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3")
    samples = dict(zip(names, np.concatenate(blocks, axis=1), strict=True))
    defined = ~np.isnan(pixels.pro_mmr)
    weights = draws[:, group[defined]]
    with np.errstate(invalid="ignore"):
        samples["pro_mmr"] = weights @ pixels.pro_mmr[defined] / weights.sum(axis=1)
    return samples


class _Histograms(NamedTuple):
    """Counts per group and bin, best bin first; only `owner` groups have defect pixels."""

    normal: np.ndarray  # [g, k]
    owner: np.ndarray  # [d] groups with defects
    defect: np.ndarray  # [d, k] defect pixels
    overlap: np.ndarray  # [d, k] defect pixels weighted with 1 / area; a row sums to its regions


def _histograms(pixels: Pixels, group: np.ndarray, groups: int, bins: int) -> _Histograms:
    """Histograms of normal pixels, defect pixels and region weights of every group."""
    edges = _edges(pixels, bins)
    k = len(edges) + 1
    normal = np.zeros((groups, k))
    for scores, g in zip(pixels.maps, group, strict=True):
        below = np.searchsorted(np.sort(scores, axis=None), edges, "left")
        normal[g] += np.diff(below, prepend=0, append=scores.size)
    owner, row = np.unique(group[pixels.found.pixel_image], return_inverse=True)
    slot = row * k + np.searchsorted(edges, pixels.defect, "right")
    defect = np.bincount(slot, minlength=len(owner) * k).reshape(-1, k)
    overlap = np.bincount(slot, pixels.found.weight, minlength=len(owner) * k).reshape(-1, k)
    normal[owner] -= defect
    return _Histograms(
        *(np.ascontiguousarray(normal[:, ::-1]), owner),
        *(np.ascontiguousarray(table[:, ::-1], dtype=np.float64) for table in (defect, overlap)),
    )


def _edges(pixels: Pixels, bins: int) -> np.ndarray:
    """Ascending bin edges, fewer than `bins`, fine where the metrics look.

    A quarter each: quantiles of the normal pixels, of their highest third (the range of AU-PRO), of
    the defect pixels, and of the defect pixels by region weight (small regions count as much as
    large ones).
    """
    quarter = np.linspace(0, 1, bins // 4, endpoint=False)
    order = np.argsort(pixels.defect)
    ordered, weight = pixels.defect[order], np.cumsum(pixels.found.weight[order])
    normal, n = pixels.sorted_normal, len(pixels.sorted_normal)
    picks = [
        normal[(quarter * n).astype(np.int64)],
        normal[((2 + quarter) / 3 * n).astype(np.int64)],
        ordered[(quarter * len(ordered)).astype(np.int64)],
        ordered[np.searchsorted(weight, quarter * weight[-1])],
    ]
    return np.unique(np.concatenate(picks))
