"""Bootstrap over groups: the values every metric takes on resampled sets of groups.

A resample draws as many groups as there are, with replacement. The images of a group (frames of a
video, exposures of a tile) are drawn together. A resample is one row of multiplicities, `draws`;
the first row is all ones, the data themselves. Image metrics and `pro_mmr` are exact per resample.
The other pixel metrics come from one histogram per group over common bins, so that a resample is
one matrix product. The error of the bins stays below 1e-3, and `domain.assemble` removes it to
first order: it shifts the samples so that row 0 equals the value of the whole set.
"""

from typing import NamedTuple

import numpy as np

from mmrjax.metrics import ranking

_BLOCK = 128  # resamples at once: the temporary arrays stay at a few MB


class GroupHistograms(NamedTuple):
    """Pixels per group and bin, best bin first; only the groups in `owner` have defect pixels.

    Attributes:
        normal: [g, k] normal pixels of every group.
        owner: [d] the groups with defects.
        defect: [d, k] their defect pixels.
        overlap: [d, k] the same, each weighing 1 / area of its region.
    """

    normal: np.ndarray
    owner: np.ndarray
    defect: np.ndarray
    overlap: np.ndarray


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
        Metric name -> [b], NaN for resamples of only one class.
    """
    blocks = []
    for start in range(0, len(draws), _BLOCK):
        ranked = ranking.grouped(scores, is_anomaly, draws[start : start + _BLOCK, group])
        blocks.append(ranking.area_precision_f1(ranked))
    names = ("image_auroc", "image_ap", "image_f1_max")
    return dict(zip(names, np.concatenate(blocks, axis=1), strict=True))


def pixel_samples(
    histograms: GroupHistograms,
    pro_mmr: np.ndarray,
    group: np.ndarray,
    draws: np.ndarray,
    limit: float,
) -> dict[str, np.ndarray]:
    """Pixel metrics of every resample.

    Args:
        histograms: pixels of all g groups.
        pro_mmr: [m] value of each image that counts for pixel metrics, NaN if undefined.
        group: [m] index of its group.
        draws: [b, g] multiplicities.
        limit: largest false-positive rate of AU-PRO.

    Returns:
        Metric name -> [b], NaN for resamples without a defect pixel or without a normal pixel.
    """
    blocks = []
    for start in range(0, len(draws), _BLOCK):
        rows = draws[start : start + _BLOCK]
        owners = rows[:, histograms.owner]
        pixel = ranking.from_counts(owners @ histograms.defect, rows @ histograms.normal)
        region = pixel._replace(positive=owners @ histograms.overlap)
        blocks.append([*ranking.area_precision_f1(pixel), ranking.area(region, limit)])
    names = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3")
    samples = dict(zip(names, np.concatenate(blocks, axis=1), strict=True))
    defined = ~np.isnan(pro_mmr)
    weights = draws[:, group[defined]]
    with np.errstate(invalid="ignore"):
        samples["pro_mmr"] = weights @ pro_mmr[defined] / weights.sum(axis=1)
    return samples


def interval(samples: np.ndarray | None) -> list[float] | None:
    """95 % percentile interval of the defined samples; None if fewer than half are defined."""
    if samples is None:
        return None
    defined = samples[~np.isnan(samples)]
    if 2 * len(defined) < len(samples) or not len(defined):
        return None
    return [float(end) for end in np.percentile(defined, [2.5, 97.5])]
