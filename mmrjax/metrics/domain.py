"""The metrics of one domain from ranked scores and counted pixels, with intervals and reasons.

An undefined value is None, with a reason beside it. exact.py ranks the pixels, streaming.py counts
them in buckets; both hand them on as `PixelCounts`, streaming.py with bounds.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mmrjax.metrics import bootstrap, misses, pro, ranking

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3", "pro_mmr")
TINY_METRICS = ("tiny_recall",)
METRICS = IMAGE_METRICS + PIXEL_METRICS + TINY_METRICS
PRO_LIMIT = 0.3


class PixelCounts(Protocol):
    """The input of the pixel metrics: `exact.Pixels` or `streaming.Counted`.

    Attributes:
        pro_mmr: [m] per-image value of the images that count, NaN if undefined.
        peaks: [m] the highest value of each map.
    """

    pro_mmr: np.ndarray
    peaks: np.ndarray

    def defects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image [r] (index into the m), longer side in px [r] and peak [r] of every region."""

    def tables(self) -> tuple[ranking.Ranked, ranking.Ranked]:
        """Rankings of defect pixels against normal pixels: of weight 1, and of weight 1 / area."""

    def bounds(self) -> dict[str, tuple[float, float]]:
        """{metric: (lowest, highest)} possible value of every metric that is not exact."""

    def group_histograms(self, group: np.ndarray, groups: int) -> bootstrap.GroupHistograms:
        """Histograms of each group of images; `group` [m] indexes range(groups)."""


class Measured(NamedTuple):
    """Metrics of one domain, and the rankings and resamples behind them.

    Attributes:
        values: metric -> 0..1, or None if undefined.
        reasons: metric -> why it is None.
        bounds: metric -> (low, high) around its exact value; only metrics that are not exact.
        counts: numbers of images, see `report`.
        samples: metric -> [b] values on resampled groups.
        image: ranking of the image scores, None if image metrics are undefined.
        region: ranking of the pixels by region weight, None if pixel metrics are undefined.
    """

    values: dict[str, float | None]
    reasons: dict[str, str]
    bounds: dict[str, tuple[float, float]]
    counts: dict[str, int]
    samples: dict[str, np.ndarray]
    image: ranking.Ranked | None
    region: ranking.Ranked | None

    def report(self) -> dict:
        """The domain's entry in results.json.

        Returns:
            {metric: 0..1 or None for each of METRICS, "counts": {good, anomaly, pixel_images,
            empty_masks, and, if any, dropped_resamples: the most resamples in which a metric was
            undefined}, "reasons": {metric: why it is None}, "ci95": {metric: [low, high] or None},
            and, if any metric is inexact, "bounds": {metric: [low, high]}}. An interval is None if
            the metric is, if there is only one group, or if the metric is undefined in over half of
            the resamples.
        """
        dropped = max((int(np.isnan(s).sum()) for s in self.samples.values()), default=0)
        extra = {"dropped_resamples": dropped} if dropped else {}
        intervals = {name: bootstrap.interval(self.samples.get(name)) for name in METRICS}
        entry = {
            **self.values,
            "counts": {**self.counts, **extra},
            "reasons": self.reasons,
            "ci95": {
                name: None if pair is None else [min(max(end, 0.0), 1.0) for end in pair]
                for name, pair in intervals.items()
            },
        }
        bounds = {name: list(pair) for name, pair in self.bounds.items()}
        return entry | ({"bounds": bounds} if bounds else {})

    def curves(self, points: int = 300) -> dict[str, dict[str, list[float]]]:
        """ROC of the image scores, and region overlap against false-positive rate up to PRO_LIMIT.

        Returns:
            {"roc": {"fpr", "tpr"}, "pro": {"fpr", "pro"}}, lists of at most `points` numbers that
            lie on the curve; a curve whose area would be undefined is absent.
        """
        result = {}
        if self.image is not None:
            x, y = ranking.thin(*ranking.polyline(self.image), points)
            result["roc"] = {"fpr": x.tolist(), "tpr": y.tolist()}
        if self.region is not None:
            x, y = ranking.thin(*pro.head(*ranking.polyline(self.region), PRO_LIMIT), points)
            result["pro"] = {"fpr": x.tolist(), "pro": y.tolist()}
        return result


def assemble(
    scores: np.ndarray,
    is_anomaly: np.ndarray,
    used: np.ndarray,
    empty: np.ndarray,
    counted: PixelCounts | str,
    groups: Sequence | None,
    resamples: int,
    seed: int,
    tiny_side: int,
) -> Measured:
    """All metrics of a domain, whichever way its pixels were counted.

    Args:
        scores: [n] finite.
        is_anomaly: [n] bool.
        used: [n] bool, counts for pixel metrics.
        empty: [n] bool, no defect pixel in view.
        counted: pixels of the used images, or the reason why pixel metrics are undefined.
        groups: [n] as in `exact.measure`, or None.
        resamples: number, as `bootstrap` in `exact.measure`.
        seed: seeds the bootstrap.
        tiny_side: as in `misses.tiny_recall`.
    """
    group = _group_index(groups, len(scores))
    draws = None  # a single group tells nothing of others
    if resamples and group.max() > 0:
        draws = bootstrap.multiplicities(group.max() + 1, resamples, seed)
    image = _of_images(scores, is_anomaly, group, draws)
    if isinstance(counted, str):
        pixel, bounds = _Part({}, dict.fromkeys(PIXEL_METRICS + TINY_METRICS, counted), {}), {}
    else:
        pixel = _of_pixels(counted, is_anomaly[used], group[used], draws, tiny_side)
        bounds = counted.bounds()
    values = dict.fromkeys(METRICS) | image.values | pixel.values
    samples = {n: s for n, s in (image.samples | pixel.samples).items() if values[n] is not None}
    return Measured(
        values,
        image.reasons | pixel.reasons,
        bounds,
        {
            "good": int((~is_anomaly).sum()),
            "anomaly": int(is_anomaly.sum()),
            "pixel_images": int(used.sum()),
            "empty_masks": int((is_anomaly & used & empty).sum()),
        },
        {name: sample[1:] + (values[name] - sample[0]) for name, sample in samples.items()},
        image.ranked,
        pixel.ranked,
    )


class _Part(NamedTuple):
    """Half of a domain's metrics; `samples` are [1 + b], the first value of the data themselves."""

    values: dict[str, float]
    reasons: dict[str, str]
    samples: dict[str, np.ndarray]
    ranked: ranking.Ranked | None = None


def _of_images(
    scores: np.ndarray, is_anomaly: np.ndarray, group: np.ndarray, draws: np.ndarray | None
) -> _Part:
    """The image metrics and the ranking of the scores."""
    if reason := _image_reason(is_anomaly):
        return _Part({}, dict.fromkeys(IMAGE_METRICS, reason), {})
    ranked = ranking.rank(scores[is_anomaly], np.sort(scores[~is_anomaly]))
    samples = {} if draws is None else bootstrap.image_samples(scores, is_anomaly, group, draws)
    return _Part(_three("image", ranked), {}, samples, ranked)


def _of_pixels(
    counted: PixelCounts,
    is_anomaly: np.ndarray,
    group: np.ndarray,
    draws: np.ndarray | None,
    tiny_side: int,
) -> _Part:
    """The pixel metrics of m images and the ranking of their pixels by region weight."""
    pixel, region = counted.tables()
    values = _three("pixel", pixel) | {"aupro_0.3": float(ranking.area(region, PRO_LIMIT))}
    reasons, samples = {}, {}
    defined = counted.pro_mmr[~np.isnan(counted.pro_mmr)]
    if len(defined):
        values["pro_mmr"] = float(np.mean(defined))
    else:
        reasons["pro_mmr"] = "no normal pixel in any defective image"
    shares, reason = misses.tiny_recall(
        counted.peaks, is_anomaly, counted.defects(), group, draws, tiny_side
    )
    if reason:
        reasons["tiny_recall"] = reason
    else:
        values["tiny_recall"] = float(shares[0])
    if draws is not None:
        histograms = counted.group_histograms(group, draws.shape[1])
        samples = bootstrap.pixel_samples(histograms, counted.pro_mmr, group, draws, PRO_LIMIT)
        samples |= {} if reason else {"tiny_recall": shares}
    return _Part(values, reasons, samples, region)


def checked_scores(scores: np.ndarray, is_anomaly: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays [n]; ValueError if they do not fit, are empty or are not finite."""
    scores, is_anomaly = np.asarray(scores), np.asarray(is_anomaly)
    if scores.ndim != 1 or scores.shape != is_anomaly.shape or is_anomaly.dtype != bool:
        raise ValueError(
            f"scores {scores.shape} and is_anomaly {is_anomaly.shape} {is_anomaly.dtype} must both "
            "be [n], is_anomaly boolean"
        )
    if not len(scores):
        raise ValueError("no image to evaluate; expected at least one in this domain")
    ranking.require_finite(scores, "image scores")
    return scores, is_anomaly


def _three(prefix: str, ranked: ranking.Ranked) -> dict[str, float]:
    """AUROC, average precision and best F1 of one ranking."""
    names = (f"{prefix}_{name}" for name in ("auroc", "ap", "f1_max"))
    return dict(zip(names, map(float, ranking.area_precision_f1(ranked)), strict=True))


def _image_reason(is_anomaly: np.ndarray) -> str | None:
    """Why image metrics are undefined, or None."""
    if not is_anomaly.any():
        return "no anomalous image"
    return "no good image" if is_anomaly.all() else None


def pixel_reason(
    has_maps: bool, is_anomaly: np.ndarray, used: np.ndarray, empty: np.ndarray
) -> str | None:
    """Why pixel metrics are undefined, or None; arguments as in `assemble`."""
    if not has_maps:
        return "no anomaly map"
    if not is_anomaly.any():
        return "no anomalous image"
    if not (is_anomaly & used).any():
        return "no pixel ground truth"
    return None if (used & ~empty).any() else "no defect pixel in view"


def _group_index(groups: Sequence | None, n: int) -> np.ndarray:
    """[n] index of each image's group, 0..g-1."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"groups has {len(groups)} entries for {n} images")
    return np.unique(np.asarray(groups), return_inverse=True)[1]
