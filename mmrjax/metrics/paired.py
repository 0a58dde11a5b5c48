"""Two methods on the same images: the difference of every metric, with a paired interval."""

from collections.abc import Sequence

import numpy as np

from mmrjax.metrics import exact
from mmrjax.metrics.bootstrap import interval
from mmrjax.metrics.domain import IMAGE_METRICS, METRICS


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
    """Metrics of method a minus those of method b; each resample of images serves both methods.

    The interval tells whether the difference would survive another sample of images. It tells
    nothing of another training seed. If several seeds are given, their metrics are averaged.

    Args:
        scores_a: [n], or [s, n] for s seeds of method a.
        scores_b: [n], or [t, n] for t seeds of method b.
        is_anomaly: [n] bool.
        groups: [n] as in `exact.evaluate`.
        maps_a: [n, h, w], or a sequence of s such stacks, for pixel metrics too; needs maps_b.
        maps_b: the same for method b.
        masks: [n, h, w] bool, needed with maps.
        has_mask: [n] bool, needed with maps.
        bootstrap: number of resamples.
        seed: seeds the resampling.

    Returns:
        {metric: {"difference": a - b or None, "ci95": [low, high] or None}} for the image metrics,
        with maps for all of METRICS.

    Raises:
        ValueError: as in `exact.evaluate`.
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
        result[name] = {"difference": difference, "ci95": interval(gap)}
    return result


def _mean_over_seeds(scores, maps, truth) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Values and samples of one method, averaged over its seeds; undefined metrics are left out."""
    scores = np.atleast_2d(scores)
    stacks = [maps] * len(scores) if maps is None or np.ndim(maps[0]) == 2 else maps
    masks, is_anomaly, has_mask, *rest = truth
    masks = None if maps is None else masks
    runs = [
        exact.measure(s, m, masks, is_anomaly, has_mask, *rest)
        for s, m in zip(scores, stacks, strict=True)
    ]
    values = {
        name: float(np.mean([run.values[name] for run in runs]))
        for name in METRICS
        if runs[0].values[name] is not None
    }
    return values, {n: np.mean([run.samples[n] for run in runs], axis=0) for n in runs[0].samples}
