"""From scores, maps and truth to the metrics of one domain, with intervals, reasons and curves.

The last stop before results.json: everything undefined becomes None with a reason, everything
broken (NaN, shapes that do not fit) raises. Called by evaluate/results.py once per domain and
once for all.
"""

from collections.abc import Sequence

import numpy as np

from mmrjax.metrics import misses, pixels, pro, ranking
from mmrjax.metrics.domain import Measured, assemble, checked_scores, pixel_reason


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
    return measure(scores, maps, masks, is_anomaly, has_mask, groups, bootstrap, seed).report()


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
        on the curve; a curve whose area would be undefined is absent.
    """
    return measure(scores, maps, masks, is_anomaly, has_mask, bootstrap=0).curves(points)


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
    """What `evaluate` and `curves` report, from one pass; arguments and errors as in `evaluate`.

    Regions without a side of `tiny_side` px are tiny (misses.py).
    """
    scores, maps, truth, is_anomaly, used = _checked(scores, maps, masks, is_anomaly, has_mask)
    empty = np.zeros(len(scores), bool) if truth is None else ~_any(truth)
    reason = pixel_reason(maps is not None, is_anomaly, used, empty)
    if reason is None and truth[used].all():
        reason = "no normal pixel"
    counted = reason
    if reason is None:
        counted = pixels.gather(_rows(maps, used), pro.regions(_rows(truth, used)))
    return assemble(scores, is_anomaly, used, empty, counted, groups, bootstrap, seed, tiny_side)


def _checked(scores, maps, masks, is_anomaly, has_mask):
    """Arrays that fit together and are finite.

    Returns:
        scores [n], maps or None, truth [n, h, w] bool or None (false without pixel truth and for
        good images), is_anomaly [n], used [n] bool: counts for pixel metrics.
    """
    scores, is_anomaly = checked_scores(scores, is_anomaly)
    if maps is None:
        return scores, None, None, is_anomaly, np.zeros(len(scores), bool)
    maps, masks, has_mask = _stack(maps, "maps"), _stack(masks, "masks"), np.asarray(has_mask)
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


def _stack(stack: np.ndarray | Sequence[np.ndarray], what: str) -> np.ndarray:
    """As one array; ValueError when a list holds several sizes."""
    if not isinstance(stack, np.ndarray):
        shapes = sorted({np.shape(one) for one in stack})
        if len(shapes) > 1:
            raise ValueError(
                f"{what} of {len(shapes)} sizes, such as {shapes[0]} and {shapes[-1]}: give them "
                "one size, or count them with metrics.streaming, which takes any"
            )
    return np.asarray(stack)


def _rows(stack: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The used images; no copy when all are used."""
    return stack if used.all() else stack[used]


def _any(masks: np.ndarray) -> np.ndarray:
    """[n] bool: the mask has a pixel."""
    return masks.reshape(len(masks), -1).any(axis=1)
