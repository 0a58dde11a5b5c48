"""From scores, maps and truth to the metrics of one domain, with intervals, reasons and curves.

The last stop before results.json: everything undefined becomes None with a reason, everything
broken (NaN, shapes that do not fit) raises. Called by mmrjax/evaluate.py once per domain and once
for all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmrjax.metrics import bootstrap as resampling
from mmrjax.metrics import pro, ranking

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3", "pro_mmr")
METRICS = IMAGE_METRICS + PIXEL_METRICS
PRO_LIMIT = 0.3


class _Measured(NamedTuple):
    """Exact values, reasons for the missing ones, counts, and resampled values [b] per metric."""

    values: dict[str, float | None]
    reasons: dict[str, str]
    counts: dict[str, int]
    samples: dict[str, np.ndarray]


def evaluate(
    scores: np.ndarray,
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    is_anomaly: np.ndarray,
    has_mask: np.ndarray | None,
    groups: Sequence | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Metrics of one domain.

    Pixel metrics use the good images (as all normal, whatever their mask) and those anomalous
    images that have pixel truth. An anomalous image whose mask is empty in view keeps its label;
    its pixels count as normal and it does not enter `pro_mmr`.

    Args:
        scores: [n] image scores, higher means more anomalous.
        maps: [n, h, w] anomaly maps, or None where a method has none.
        masks: [n, h, w] bool; rows without pixel truth are not read. None only with `maps` None.
        is_anomaly: [n] bool.
        has_mask: [n] bool, false where the image has no pixel truth. None only with `maps` None.
        groups: [n] hashable; images of a group are resampled together. Default: each image alone.
        bootstrap: number of resamples for the 95 % intervals; 0 for none.
        seed: of the resampling.

    Returns:
        {metric: 0..1 or None for each of METRICS, "counts": {good, anomaly, pixel_images,
        empty_masks, and, if any, dropped_resamples: the most resamples in which a metric was
        undefined}, "reasons": {metric: why it is None}, "ci95": {metric: [low, high] or None}}. An
        interval is None where the metric is, where there is one group only, or where over half of
        the resamples dropped.

    Raises:
        ValueError: NaN or infinity in scores or maps, or arrays that do not fit together.
    """
    measured = _measure(scores, maps, masks, is_anomaly, has_mask, groups, bootstrap, seed)
    intervals = {name: _interval(measured.samples.get(name)) for name in METRICS}
    dropped = max((int(np.isnan(s).sum()) for s in measured.samples.values()), default=0)
    extra = {"dropped_resamples": dropped} if dropped else {}
    return {
        **measured.values,
        "counts": {**measured.counts, **extra},
        "reasons": measured.reasons,
        "ci95": {
            name: None if pair is None else [min(max(end, 0.0), 1.0) for end in pair]
            for name, pair in intervals.items()
        },
    }


def paired_difference(
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    is_anomaly: np.ndarray,
    groups: Sequence | None = None,
    *,
    maps_a: np.ndarray | None = None,
    maps_b: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    has_mask: np.ndarray | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Metrics of method a minus method b on the same images, each resample drawn once for both.

    The interval says whether the difference would survive another sample of images; it says nothing
    about another training seed, unless several seeds are given, whose metrics are then averaged.

    Args:
        scores_a: [n], or [s, n] for s seeds of method a.
        scores_b: [n], or [t, n] for t seeds of method b.
        is_anomaly: [n] bool.
        groups: [n] as in `evaluate`.
        maps_a: [n, h, w] (or a sequence of s of them) for pixel metrics too; then maps_b likewise.
        maps_b: the same for method b.
        masks: [n, h, w] bool, needed with maps.
        has_mask: [n] bool, needed with maps.
        bootstrap: number of resamples.
        seed: of the resampling.

    Returns:
        {metric: {"difference": a - b or None, "ci95": [low, high] or None}} for the image metrics,
        with maps for all of METRICS.

    Raises:
        ValueError: as in `evaluate`.
    """
    truth = (masks, is_anomaly, has_mask, groups, bootstrap, seed)
    values_a, samples_a = _mean_over_seeds(scores_a, maps_a, truth)
    values_b, samples_b = _mean_over_seeds(scores_b, maps_b, truth)
    result = {}
    for name in METRICS if maps_a is not None and maps_b is not None else IMAGE_METRICS:
        if name not in values_a or name not in values_b:
            result[name] = {"difference": None, "ci95": None}
            continue
        difference = values_a[name] - values_b[name]
        gap = samples_a[name] - samples_b[name] if name in samples_a and name in samples_b else None
        result[name] = {"difference": difference, "ci95": _interval(gap)}
    return result


def curves(
    scores: np.ndarray,
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    is_anomaly: np.ndarray,
    has_mask: np.ndarray | None,
    points: int = 300,
) -> dict[str, dict[str, list[float]]]:
    """Curves to plot: ROC of the image scores, region overlap against false-positive rate to 0.3.

    Arguments and errors as in `evaluate`.

    Returns:
        {"roc": {"fpr", "tpr"}, "pro": {"fpr", "pro"}}, lists of at most `points` numbers that lie
        on the exact curve; a curve whose area would be undefined is absent.
    """
    scores, maps, truth, is_anomaly, used = _checked(scores, maps, masks, is_anomaly, has_mask)
    result = {}
    if _image_reason(is_anomaly) is None:
        ranked = ranking.rank(scores[is_anomaly], np.sort(scores[~is_anomaly]))
        x, y = ranking.thin(*ranking.polyline(ranked), points)
        result["roc"] = {"fpr": x.tolist(), "tpr": y.tolist()}
    if _pixel_reason(maps, truth, is_anomaly, used) is None:
        x, y = ranking.thin(
            *pro.pro_curve(_rows(maps, used), _rows(truth, used), PRO_LIMIT), points
        )
        result["pro"] = {"fpr": x.tolist(), "pro": y.tolist()}
    return result


def _measure(scores, maps, masks, is_anomaly, has_mask, groups, resamples, seed) -> _Measured:
    """Exact metrics and their resampled values; the work of `evaluate`, arguments as there."""
    scores, maps, truth, is_anomaly, used = _checked(scores, maps, masks, is_anomaly, has_mask)
    group = _group_index(groups, len(scores))
    draws = None  # one group alone says nothing about others
    if resamples and group.max() > 0:
        draws = resampling.multiplicities(group.max() + 1, resamples, seed)
    counts = {
        "good": int((~is_anomaly).sum()),
        "anomaly": int(is_anomaly.sum()),
        "pixel_images": int(used.sum()),
        "empty_masks": 0 if truth is None else int((is_anomaly & used & ~_any(truth)).sum()),
    }
    values, reasons = dict.fromkeys(METRICS), {}
    samples = {}
    reason = _image_reason(is_anomaly)
    if reason is None:
        ranked = ranking.rank(scores[is_anomaly], np.sort(scores[~is_anomaly]))
        values |= _three("image", ranked)
        if draws is not None:
            samples |= resampling.image_samples(scores, is_anomaly, group, draws)
    else:
        reasons |= dict.fromkeys(IMAGE_METRICS, reason)
    reason = _pixel_reason(maps, truth, is_anomaly, used)
    if reason is None:
        pixels = resampling.gather_pixels(_rows(maps, used), pro.regions(_rows(truth, used)))
        values |= _pixel_values(pixels)
        if values["pro_mmr"] is None:
            reasons["pro_mmr"] = "no normal pixel in any defective image"
        if draws is not None:
            samples |= resampling.pixel_samples(pixels, group[used], draws, PRO_LIMIT)
    else:
        reasons |= dict.fromkeys(PIXEL_METRICS, reason)
    shifted = {n: s[1:] + (values[n] - s[0]) for n, s in samples.items() if values[n] is not None}
    return _Measured(values, reasons, counts, shifted)


def _three(prefix: str, ranked: ranking.Ranked) -> dict[str, float]:
    """AUROC, average precision and best F1 of one ranking."""
    return {
        f"{prefix}_auroc": float(ranking.area(ranked)),
        f"{prefix}_ap": float(ranking.precision_area(ranked)),
        f"{prefix}_f1_max": float(ranking.best_f1(ranked)),
    }


def _pixel_values(pixels: resampling.Pixels) -> dict[str, float | None]:
    """The five exact pixel metrics."""
    overlap = ranking.rank(pixels.defect, pixels.sorted_normal, pixels.found.weight)
    defined = pixels.pro_mmr[~np.isnan(pixels.pro_mmr)]
    return {
        **_three("pixel", ranking.rank(pixels.defect, pixels.sorted_normal)),
        "aupro_0.3": float(ranking.area(overlap, PRO_LIMIT)),
        "pro_mmr": float(np.mean(defined)) if len(defined) else None,
    }


def _mean_over_seeds(scores, maps, truth) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Values and samples of one method, averaged over its seeds; undefined metrics are left out."""
    scores = np.atleast_2d(scores)
    stacks = [maps] * len(scores) if maps is None or np.ndim(maps[0]) == 2 else maps
    masks, is_anomaly, has_mask, *rest = truth
    masks = None if maps is None else masks
    runs = [
        _measure(s, m, masks, is_anomaly, has_mask, *rest)
        for s, m in zip(scores, stacks, strict=True)
    ]
    values = {
        name: float(np.mean([run.values[name] for run in runs]))
        for name in METRICS
        if runs[0].values[name] is not None
    }
    return values, {n: np.mean([run.samples[n] for run in runs], axis=0) for n in runs[0].samples}


def _interval(samples: np.ndarray | None) -> list[float] | None:
    """95 % percentile interval of the defined samples; None where fewer than half are defined."""
    if samples is None:
        return None
    defined = samples[~np.isnan(samples)]
    if 2 * len(defined) < len(samples) or not len(defined):
        return None
    return [float(end) for end in np.percentile(defined, [2.5, 97.5])]


def _checked(scores, maps, masks, is_anomaly, has_mask):
    """Arrays that fit together and are finite.

    Returns:
        scores [n], maps or None, truth [n, h, w] bool or None (false without pixel truth and for
        good images), is_anomaly [n], used [n] bool: counts for pixel metrics.
    """
    scores, is_anomaly = np.asarray(scores), np.asarray(is_anomaly)
    if scores.ndim != 1 or scores.shape != is_anomaly.shape or is_anomaly.dtype != bool:
        raise ValueError(
            f"scores {scores.shape} and is_anomaly {is_anomaly.shape} {is_anomaly.dtype} must both "
            "be [n], is_anomaly boolean"
        )
    if not len(scores):
        raise ValueError("no image to evaluate; expected at least one in this domain")
    ranking.require_finite(scores, "image scores")
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


def _image_reason(is_anomaly: np.ndarray) -> str | None:
    """Why image metrics are undefined, or None."""
    if not is_anomaly.any():
        return "no anomalous image"
    return "no good image" if is_anomaly.all() else None


def _pixel_reason(maps, truth, is_anomaly, used) -> str | None:
    """Why pixel metrics are undefined, or None."""
    if maps is None:
        return "no anomaly map"
    if not is_anomaly.any():
        return "no anomalous image"
    if not (is_anomaly & used).any():
        return "no pixel ground truth"
    if not truth.any():
        return "no defect pixel in view"
    return "no normal pixel" if truth[used].all() else None


def _group_index(groups: Sequence | None, n: int) -> np.ndarray:
    """[n] index of each image's group, 0..g-1."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"groups has {len(groups)} entries for {n} images")
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _rows(stack: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The used images; no copy when all are used."""
    return stack if used.all() else stack[used]


def _any(masks: np.ndarray) -> np.ndarray:
    """[n] bool: the mask has a pixel."""
    return masks.reshape(len(masks), -1).any(axis=1)
