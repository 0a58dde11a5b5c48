"""Exact ranking metrics (AUROC, average precision, best F1), their curves, and threads for NumPy.

All metrics follow from one small table, `Ranked`: the distinct scores of the positives, best first,
and how many negatives lie above each. An exact ranking of 40 million pixels, a histogram of them
and a bootstrap resample of 700 images all become such a table, so each formula is written once.
Leading axes are resamples. The module knows neither images nor regions.

Equal scores form one threshold, as in scikit-learn, so AUROC gives half a point to a tie. If a
group is a bucket of different scores (streaming.py), the `*_bounds` tell the lowest and the highest
value that the unknown order inside the buckets allows.

NumPy releases the GIL while it sorts, searches and selects, so `map_threaded` gains from threads.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import special

THREADS = min(8, os.cpu_count() or 1)  # more sorted parts would mean more searches afterwards

In = TypeVar("In")
Out = TypeVar("Out")


class Ranked(NamedTuple):
    """Positives per tie group against the negatives around them, best score first.

    Attributes:
        positive: [..., k] weight (or count) of the positives in each group of equal scores.
        above: [..., k] weight of the negatives scoring strictly above the group.
        at_or_above: [..., k] weight of the negatives scoring at least as much as the group.
        negatives: [...] weight of all negatives.
    """

    positive: np.ndarray
    above: np.ndarray
    at_or_above: np.ndarray
    negatives: np.ndarray


def require_finite(values: np.ndarray, what: str) -> None:
    """Raises ValueError if `values` [n, ...] holds NaN or infinity, saying how many of the n do."""
    if np.isfinite(values).all():
        return
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    raise not_finite(bad.sum(), len(values), what, bad.argmax())


def not_finite(bad: int, total: int, what: str, first: int) -> ValueError:
    """The error for `bad` of `total` things that hold NaN or infinity."""
    return ValueError(
        f"{bad} of {total} {what} hold NaN or infinity (first: {first}); "
        "the model has diverged or overflowed: lower the learning rate or compute in float32, "
        "then predict again"
    )


def rank(
    positives: np.ndarray,
    sorted_negatives: np.ndarray | Sequence[np.ndarray],
    weights: np.ndarray | None = None,
) -> Ranked:
    """Ranks individual positives against sorted negatives.

    Args:
        positives: [p] scores of the positives, any order, p > 0.
        sorted_negatives: [n] scores of the negatives, ascending; float32 stays float32. Or several
            such arrays, which together hold the negatives.
        weights: [..., p] weight of each positive, one row per weighting; default 1.

    Returns:
        Table with k <= p groups, float64; `positive` has the leading axes of `weights`.
    """
    if isinstance(sorted_negatives, np.ndarray):
        sorted_negatives = [sorted_negatives]
    if weights is None:
        ordered = np.sort(positives)[::-1]
        starts = _starts(ordered)
        size = np.diff(starts, append=len(ordered))
    else:
        order = np.argsort(positives)[::-1]
        ordered = positives[order]
        starts = _starts(ordered)
        size = np.add.reduceat(weights[..., order], starts, axis=-1)
    values = ordered[starts]
    n = sum(map(len, sorted_negatives))
    below = sum(map_threaded(lambda part: _below(part, values), sorted_negatives))  # [2, k]
    return Ranked(
        positive=size.astype(np.float64),
        above=(n - below[1]).astype(np.float64),
        at_or_above=(n - below[0]).astype(np.float64),
        negatives=np.float64(n),
    )


def _below(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[2, k] int64: how many lie strictly below each value, and how many at or below it."""
    return np.stack([np.searchsorted(ascending, values, side) for side in ("left", "right")])


def from_counts(positive: np.ndarray, negative: np.ndarray) -> Ranked:
    """Table from the weight of positives and negatives per group, [..., k], best score first."""
    at_or_above = np.cumsum(negative, axis=-1, dtype=np.float64)
    total = at_or_above[..., -1] if at_or_above.shape[-1] else np.zeros(at_or_above.shape[:-1])
    return Ranked(np.asarray(positive, np.float64), at_or_above - negative, at_or_above, total)


def grouped(scores: np.ndarray, is_positive: np.ndarray, weights: np.ndarray) -> Ranked:
    """Table of n scores under many weightings at once.

    Args:
        scores: [n].
        is_positive: [n] bool.
        weights: [..., n] multiplicity of each score, one row per resample.

    Returns:
        Table with leading axes as `weights` and one group per distinct score.
    """
    order = np.argsort(scores, kind="stable")[::-1]
    starts = _starts(scores[order])
    weights = np.asarray(weights, np.float64)[..., order]
    positive = np.add.reduceat(weights * is_positive[order], starts, axis=-1)
    negative = np.add.reduceat(weights * ~is_positive[order], starts, axis=-1)
    return from_counts(positive, negative)


def area(ranked: Ranked, limit: float = 1.0) -> np.ndarray:
    """Area under true-positive against false-positive rate up to `limit`, divided by `limit`.

    Closed form of the trapezoid with linear interpolation at the limit. A share a of the negatives
    lies strictly above a group, a share b at or above the group: the group adds its weight times
    the mean of max(0, limit - x) over x in [a, b]. Counts and limit 1 give AUROC, region weights
    give AU-PRO.

    Returns:
        [...] in 0..1; NaN without positives or without negatives.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        low = ranked.above / ranked.negatives[..., None]
        high = ranked.at_or_above / ranked.negatives[..., None]
        full = limit - (low + high) / 2
        cut = np.maximum(limit - low, 0) ** 2 / (2 * (high - low))
        gain = np.where(high <= limit, full, np.where(low < limit, cut, 0))
        total = ranked.positive.sum(axis=-1)
        result = (ranked.positive * gain).sum(axis=-1) / (limit * total)
        return np.where((total > 0) & (ranked.negatives > 0), result, np.nan)


def precision_area(ranked: Ranked) -> np.ndarray:
    """Average precision: mean over positives of the precision at their score, no interpolation.

    Returns:
        [...] in 0..1; NaN without positives or without negatives (any scores would give 1).
    """
    hits = np.cumsum(ranked.positive, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(hits > 0, hits / (hits + ranked.at_or_above), 0)
        result = (ranked.positive * precision).sum(axis=-1) / hits[..., -1]
    return np.where((hits[..., -1] > 0) & (ranked.negatives > 0), result, np.nan)


def best_f1(ranked: Ranked) -> np.ndarray:
    """Largest F1 = 2 TP / (TP + FP + P) over all thresholds; NaN as in `precision_area`."""
    hits = np.cumsum(ranked.positive, axis=-1)
    total = hits[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        result = (2 * hits / (hits + ranked.at_or_above + total[..., None])).max(axis=-1)
    return np.where((total > 0) & (ranked.negatives > 0), result, np.nan)


def area_bounds(ranked: Ranked, limit: float = 1.0) -> tuple[float, float]:
    """Smallest and largest `area` that scores within the groups could have.

    The value lies lowest when all negatives of a group outrank its positives, highest when all
    positives of a group outrank its negatives.
    """
    ends = []
    for rivals in (ranked.at_or_above, ranked.above):
        gain = np.maximum(limit - rivals / ranked.negatives, 0)
        ends.append(float((ranked.positive * gain).sum() / (limit * ranked.positive.sum())))
    return ends[0], ends[1]


def precision_bounds(ranked: Ranked) -> tuple[float, float]:
    """Smallest and largest `precision_area`; `positive` must be integer counts.

    The value lies lowest when the negatives of a group come first and its p positives follow one by
    one. With c positives before the group and b negatives at or above the group, the j-th of the p
    sees precision (c + j) / (c + j + b), and the sum over j is
    p - b (digamma(c + p + b + 1) - digamma(c + b + 1)). The value lies highest when all positives
    come first and at once.
    """
    hits = np.cumsum(ranked.positive)
    before, b = hits - ranked.positive, ranked.at_or_above
    lost = b * (special.digamma(hits + b + 1) - special.digamma(before + b + 1))
    some = ranked.positive > 0
    high = ranked.positive[some] * (hits / np.maximum(hits + ranked.above, 1))[some]
    return float((ranked.positive - lost).sum() / hits[-1]), float(high.sum() / hits[-1])


def f1_bounds(ranked: Ranked) -> tuple[float, float]:
    """Smallest and largest `best_f1`.

    A threshold between groups exists; a threshold inside a group may be better. The latter is best
    when all positives of the group come before its negatives.
    """
    hits = np.cumsum(ranked.positive)
    high = (2 * hits / (hits + ranked.above + hits[-1])).max()
    return float(best_f1(ranked)), float(high)


def polyline(ranked: Ranked) -> tuple[np.ndarray, np.ndarray]:
    """Vertices of the curve from (0, 0) to (1, 1): false-positive and true-positive rate.

    Returns:
        Two arrays [2 k + 2]: each group gives the vertex before and the vertex after its threshold.
    """
    hits = np.cumsum(ranked.positive) / ranked.positive.sum()
    before = np.concatenate([[0.0], hits[:-1]])
    x = np.stack([ranked.above, ranked.at_or_above], axis=1).ravel() / ranked.negatives
    y = np.stack([before, hits], axis=1).ravel()
    return np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], y, [1.0]])


def thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` points of a monotone polyline, evenly spaced along it, both ends kept.

    Every returned point lies on the polyline; a polyline that is short enough is returned as it is.
    """
    moved = np.concatenate([[True], (np.diff(x) != 0) | (np.diff(y) != 0)])
    x, y = x[moved], y[moved]
    corner = np.ones(len(x), bool)
    corner[1:-1] = np.diff(x)[:-1] * np.diff(y)[1:] != np.diff(y)[:-1] * np.diff(x)[1:]
    x, y = x[corner], y[corner]
    if len(x) <= points:
        return x, y
    along = (x - x[0]) / max(x[-1] - x[0], 1e-12) + (y - y[0]) / max(y[-1] - y[0], 1e-12)
    even = np.linspace(0, along[-1], points)
    return np.interp(even, along, x), np.interp(even, along, y)


def area_precision_f1(ranked: Ranked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUROC, average precision and best F1 of the same table, [...] each."""
    return area(ranked), precision_area(ranked), best_f1(ranked)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Index of the first member of every run of equal values."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])


def map_threaded(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """[function(item) for item in items], computed by several threads, in the order of the items.

    Raises:
        Exception: whatever `function` raises for an item.
    """
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def thread_slices(size: int, smallest: int = 1 << 20) -> list[slice]:
    """Slices that cover range(size), one per thread but none shorter than `smallest`."""
    count = max(1, min(THREADS, size // smallest))
    ends = [size * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]
