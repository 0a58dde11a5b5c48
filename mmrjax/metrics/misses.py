"""Missed defects at a given false-positive rate: by kind of defect, and of tiny defects.

The threshold of a rate is the lowest score of a good test image above which at most that share of
the good test images lies. A defect that scores higher is detected. The threshold describes the test
and decides nothing. Intervals come from the same resamples of groups as those of all other metrics.
"""

from collections.abc import Sequence

import numpy as np

from mmrjax.metrics import bootstrap as bootstrap_lib

MISSED = {"missed_at_5": 0.05, "missed_at_1": 0.01}
TINY_RATE = 0.05
TINY_SIDE = 10  # px in view

_ROUNDING = 1e-9  # error of rate * weight
_BLOCK = 128  # resamples at once


def detected_share(
    good: np.ndarray,
    bad: np.ndarray,
    rate: float,
    good_weight: np.ndarray,
    bad_weight: np.ndarray,
) -> np.ndarray:
    """Share of defects above the threshold of a rate, in every resample.

    Args:
        good: [n] scores of good images.
        bad: [m] scores of defects.
        rate: share of good images that may be flagged, in [0, 1).
        good_weight: [b, n] how often each good image counts.
        bad_weight: [b, m] how often each defect counts.

    Returns:
        float64 [b], NaN if no good image or no defect counts.
    """
    levels, place = np.unique(-np.asarray(good, np.float64), return_inverse=True)  # highest first
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(levels)))
    # `rank` levels of good images are as high as the defect: it is detected if the threshold is
    # the level of that index (0 is the highest) or a lower one.
    rank = np.searchsorted(levels, -np.asarray(bad, np.float64), side="right")
    shares = []
    for start in range(0, len(good_weight), _BLOCK):
        rows = slice(start, start + _BLOCK)
        weight = np.add.reduceat(good_weight[rows][:, order], starts, axis=1)
        above = np.cumsum(weight, axis=1) - weight
        total = weight.sum(axis=1)
        threshold = (above <= rate * total[:, None] + _ROUNDING).sum(axis=1) - 1
        counts = bad_weight[rows]
        detected = (counts * (rank <= threshold[:, None])).sum(axis=1)
        with np.errstate(invalid="ignore"):
            shares.append(np.where(total > 0, detected / counts.sum(axis=1), np.nan))
    return np.concatenate(shares)


def too_few(good: int, rate: float) -> str | None:
    """Why so few good images cannot show a rate, or None if they are enough."""
    needed = round(1 / rate)
    return None if good >= needed else f"fewer than {needed} good images"


def by_defect(
    scores: np.ndarray,
    is_anomaly: np.ndarray,
    defect: Sequence[str],
    groups: Sequence | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Image metrics of each kind of defect against all good images.

    Args:
        scores: [n] finite image scores, higher means more anomalous.
        is_anomaly: [n] bool.
        defect: [n] kind of defect; the entries of good images are not read.
        groups: [n] hashable; images of a group are resampled together. Default: each alone.
        bootstrap: number of resamples for the 95 % intervals; 0 for none.
        seed: seeds the resampling.

    Returns:
        {kind: {"images", "groups" (of defective images), "image_auroc" 0..1, "missed_at_5" and
        "missed_at_1" (share of its images that are missed at a rate of 5 % and of 1 %), "ci95":
        {metric: [low, high] or None}, "reasons": {metric: why it is None}}}, sorted by kind.
    """
    scores, is_anomaly = np.asarray(scores), np.asarray(is_anomaly)
    defect = np.asarray(defect).astype(str)
    groups = np.arange(len(scores)) if groups is None else np.asarray(groups)
    return {
        str(kind): _one_kind(scores, is_anomaly, is_anomaly & (defect == kind), groups, bootstrap,
                             seed)
        for kind in np.unique(defect[is_anomaly])
    }  # fmt: skip


def _one_kind(scores, is_anomaly, is_kind, groups, resamples, seed) -> dict:
    """The entry of one kind in `by_defect`."""
    names = ("image_auroc", *MISSED)
    entry = {"images": int(is_kind.sum()), "groups": len(np.unique(groups[is_kind]))}
    values, reasons = dict.fromkeys(names), {}
    chosen = ~is_anomaly | is_kind
    good, bad = scores[~is_anomaly], scores[is_kind]
    index = np.unique(groups[chosen], return_inverse=True)[1]
    several = resamples if index.max() > 0 else 0
    draws = bootstrap_lib.multiplicities(index.max() + 1, several, seed)
    weight = draws[:, index]
    kind = is_kind[chosen]
    samples = {}
    if len(good):
        samples["image_auroc"] = bootstrap_lib.image_samples(scores[chosen], kind, index, draws)[
            "image_auroc"
        ]
    else:
        reasons["image_auroc"] = "no good image"
    for name, rate in MISSED.items():
        if reason := too_few(len(good), rate):
            reasons[name] = reason
        else:
            samples[name] = 1 - detected_share(good, bad, rate, weight[:, ~kind], weight[:, kind])
    values |= {name: float(sample[0]) for name, sample in samples.items()}
    ci95 = {
        name: bootstrap_lib.interval(samples[name][1:]) if name in samples else None
        for name in names
    }
    return {**entry, **values, "ci95": ci95, "reasons": reasons}


def tiny_recall(
    peaks: np.ndarray,
    is_anomaly: np.ndarray,
    region: tuple[np.ndarray, np.ndarray, np.ndarray],
    group: np.ndarray,
    draws: np.ndarray | None,
    tiny_side: int = TINY_SIDE,
) -> tuple[np.ndarray | None, str | None]:
    """Share of tiny defects whose hottest pixel is above the threshold of TINY_RATE.

    TINY_RATE of the good images may have a pixel above the threshold.

    Args:
        peaks: [n] the highest value of each image's map.
        is_anomaly: [n] bool.
        region: image [r], longer side in px [r] and highest map value [r] of every defect region.
        group: [n] index of each image's group.
        draws: [b, g] multiplicities, the first row all ones; None for the data alone.
        tiny_side: px; a region whose bounding box has no side of that length is tiny.

    Returns:
        ([b] or [1] shares, None), or (None, why the share is undefined).
    """
    image, side, peak = region
    tiny = side < tiny_side
    if not tiny.any():
        return None, f"no defect under {tiny_side} px in view"
    if reason := too_few(int((~is_anomaly).sum()), TINY_RATE):
        return None, reason
    draws = np.ones((1, group.max() + 1)) if draws is None else draws
    good_weight, bad_weight = draws[:, group[~is_anomaly]], draws[:, group[image[tiny]]]
    return detected_share(peaks[~is_anomaly], peak[tiny], TINY_RATE, good_weight, bad_weight), None
