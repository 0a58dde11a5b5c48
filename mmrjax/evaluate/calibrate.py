"""Thresholds from the scores of good images that the model has not seen: conformal prediction.

The images were held out of training, or each was scored by the model without its own part. A new
good image is exchangeable with them, so its score exceeds the threshold with a probability of at
most the target rate, whatever the distribution of scores (Vovk et al. 2005). guarantees.py says
which promise is proven, and by what. Photographs of one part are not exchangeable one by one. Each
group of photographs therefore weighs as much as any other, and the guarantee is for an image of a
new group (Lee, Barber and Willett 2023, arXiv 2306.06342: hierarchical conformal prediction).

The promise does not hold under a domain shift: results.py measures the rate there, and a few good
images of the new domain recalibrate (mmrjax.predict --recalibrate). No defective image is ever
used.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mmrjax.evaluate import guarantees
from mmrjax.evaluate.guarantees import ROUNDING, percent
from mmrjax.runtime import files

SCHEMA = 1
SOURCES = {
    guarantees.SPLIT: "held-out good images",
    guarantees.FULL: "good training images, each scored without its own part",
    guarantees.LEFT_OUT: "good training images, each scored without its own part",
}


class TooFew(ValueError):
    """Too few held-out images for the target false-positive rate."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Scores of good images not seen by the model, and the thresholds that follow from them.

    Attributes:
      ids: names of the n images.
      groups: the n groups; images of one group show one part.
      scores: float [n], image scores.
      peaks: float [n], the largest value of each map.
      floor: the usual value of a good pixel: the median over images of their maps' medians.
      source: the origin of the images, a text for people.
      guarantee: the promise of the thresholds, one of guarantees.py.
    """

    ids: Sequence[str]
    groups: Sequence[str]
    scores: np.ndarray
    peaks: np.ndarray
    floor: float
    source: str = SOURCES[guarantees.SPLIT]
    guarantee: str = guarantees.SPLIT

    @classmethod
    def of(
        cls, ids, groups, scores, peaks, medians, source: str = "", guarantee: str = guarantee
    ) -> "Calibration":
        """The calibration of n images from their scores and their maps' maxima and medians [n].

        Raises:
          ValueError: there is no image, or an unknown guarantee.
        """
        if guarantee not in SOURCES:
            raise ValueError(f"unknown guarantee {guarantee!r}; known: {', '.join(SOURCES)}")
        source = source or SOURCES[guarantee]
        if not len(scores):
            raise ValueError("no good image to calibrate with")
        ids, groups = [str(name) for name in ids], [str(name) for name in groups]
        scores, peaks = np.asarray(scores, np.float64), np.asarray(peaks, np.float64)
        return cls(ids, groups, scores, peaks, float(np.median(medians)), source, guarantee)

    @property
    def smallest_rate(self) -> float:
        """The smallest false-positive rate that these images can promise."""
        return 1 / (len(set(self.groups)) + 1)

    def reachable(self, target_fpr: float) -> float:
        """The rate to set the threshold for: the target, or the smallest possible one.

        Held-out images that are too few for the target stay so: more can be held out. If all
        training images have been left out once, there are no more, and the smallest rate is taken.
        """
        if self.guarantee == guarantees.SPLIT:
            return target_fpr
        return max(target_fpr, self.smallest_rate)

    def promise(self, target_fpr: float) -> str:
        """The promise of `threshold(reachable(target_fpr))`, in words."""
        at = self.threshold(self.reachable(target_fpr))
        promised = promised_rate(self.scores, self.groups, at)
        parts = len(set(self.groups))
        return guarantees.sentence(self.guarantee, parts, promised, target_fpr)

    def threshold(self, target_fpr: float) -> float:
        """The score that good images exceed at a rate of at most `target_fpr`."""
        return threshold(self.scores, self.groups, target_fpr, self._kind)

    def pixel_threshold(self, target_fpr: float) -> float:
        """The map value that good images exceed anywhere at a rate of at most `target_fpr`."""
        return threshold(self.peaks, self.groups, target_fpr, self._kind)

    @property
    def _kind(self) -> str:
        return f"{'held-out ' * (self.guarantee == guarantees.SPLIT)}good image"

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Conformal p-values float [m]: at most a if and only if a score exceeds `threshold(a)`."""
        above = _weight_above(self.scores, self.groups, np.asarray(scores, np.float64), equal=True)
        return (1 + above) / (len(set(self.groups)) + 1)

    def scale(self, target_fpr: float) -> tuple[float, float]:
        """Colour scale: the usual good pixel at its low end, the threshold in the middle.

        With too few images for the rate, the largest peak replaces the threshold.
        """
        try:
            middle = self.pixel_threshold(self.reachable(target_fpr))
        except TooFew:
            middle = float(self.peaks.max())
        return self.floor, self.floor + 2 * max(middle - self.floor, 1e-6)

    def report(self, target_fpr: float) -> dict:
        """Threshold and promised rate for results.json; a `reason` if there is no threshold."""
        facts = {
            "source": self.source,
            "images": len(self.ids),
            "groups": len(set(self.groups)),
            "target_fpr": target_fpr,
            "smallest_fpr": self.smallest_rate,
            "threshold": None,
            "promised_fpr": None,
            "reason": None,
            "guarantee": self.guarantee,
            "proven": self.guarantee in guarantees.PROVEN,
            "provisional": None,
            "promise": None,
            "simultaneous": None,
        }
        try:
            facts["threshold"] = at = self.threshold(self.reachable(target_fpr))
            facts["promised_fpr"] = promised = promised_rate(self.scores, self.groups, at)
            facts["provisional"] = guarantees.is_provisional(promised, target_fpr)
            facts["promise"] = self.promise(target_fpr)
            facts["simultaneous"] = self._simultaneous(at)
        except TooFew as e:
            facts["reason"] = str(e)
        return facts

    def _simultaneous(self, threshold: float) -> dict:
        """The bound that holds at every threshold at once, and its value at `threshold`."""
        steps = guarantees.simultaneous(self.scores, self.groups)
        return {
            "confidence": guarantees.CONFIDENCE,
            "proven": self.guarantee == guarantees.SPLIT,
            "at_threshold": guarantees.bound_at(steps, threshold),
            **steps,
        }

    def write(self, path: pathlib.Path) -> None:
        """Writes the calibration as JSON."""
        rows = zip(self.ids, self.groups, self.scores, self.peaks, strict=True)
        names = ("id", "group", "score", "peak")
        content = {
            "schema": SCHEMA,
            "source": self.source,
            "guarantee": self.guarantee,
            "floor": self.floor,
            "images": [
                dict(zip(names, (*row[:2], *map(float, row[2:])), strict=True)) for row in rows
            ],
        }
        files.write_text(path, json.dumps(content, indent=1))


def read(path: pathlib.Path) -> Calibration | None:
    """The calibration in a file; None if there is no file.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if content.get("schema") != SCHEMA:
            raise ValueError(f"schema {content.get('schema')!r}, this version reads {SCHEMA}")
        rows = content["images"]
        columns = [[row[name] for row in rows] for name in ("id", "group", "score", "peak")]
        if not np.isfinite(np.array([*columns[2], *columns[3], content["floor"]], float)).all():
            raise ValueError("a score is no finite number")  # such a threshold would pass anything
        floor = np.array([content["floor"]])
        guarantee = content.get("guarantee", guarantees.SPLIT)
        return Calibration.of(*columns, floor, content["source"], guarantee)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is no calibration ({e}); delete it and evaluate again") from e


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def threshold(
    scores: np.ndarray,
    groups: Sequence[str],
    target_fpr: float,
    kind: str = "held-out good image",
) -> float:
    """The conformal quantile: the smallest held-out score that keeps the rate.

    Args:
      scores: float [n] of held-out good images.
      groups: [n].
      target_fpr: in (0, 1).
      kind: what an image is, for the message.

    Returns:
      A score; a new image is called anomalous when its own is larger.

    Raises:
      TooFew: the groups allow no rate so small; the message names the smallest rate.
      ValueError: `target_fpr` is not in (0, 1).
    """
    if not 0 < target_fpr < 1:
        raise ValueError(f"target_fpr={target_fpr}: a rate lies between 0 and 1, such as 0.05")
    count = len(set(groups))
    if guarantees.parts_needed(target_fpr) > count:
        what = f"{count} {kind}{'s' * (count != 1)}"
        what += "" if count == len(groups) else f" (groups, of {len(groups)} images)"
        raise TooFew(
            f"{what} can promise false-positive rates from {percent(1 / (count + 1))} on, not "
            f"{percent(target_fpr)}: that needs {guarantees.parts_needed(target_fpr)}"
        )
    scores = np.asarray(scores, np.float64)
    allowed = promised_rate(scores, groups, scores) <= target_fpr + ROUNDING
    return float(scores[allowed].min())


def promised_rate(scores: np.ndarray, groups: Sequence[str], at) -> np.ndarray | float:
    """The rate that is promised when `at` (a score, or several) is the threshold."""
    above = _weight_above(np.asarray(scores, np.float64), groups, np.asarray(at), equal=False)
    rate = (1 + above) / (len(set(groups)) + 1)
    return float(rate) if np.ndim(at) == 0 else rate


def rates_at(
    threshold: float, scores: np.ndarray, is_anomaly: np.ndarray, rows: Mapping[str, np.ndarray]
) -> dict[str, dict]:
    """False-positive rate and detected share of test images at a threshold, by domain.

    Args:
      threshold: images that score higher are called anomalous.
      scores: float [n].
      is_anomaly: bool [n], the truth.
      rows: {domain: bool [n]}.

    Returns:
      {domain: counts of good and anomaly and of the flagged ones among them, the false-positive
      rate with its exact 95 % interval (Clopper and Pearson), the share of detected anomalies};
      None if a count is 0.
    """
    flagged = scores > threshold
    out = {}
    for domain, own in rows.items():
        good, bad = own & ~is_anomaly, own & is_anomaly
        false, detected = int((flagged & good).sum()), int((flagged & bad).sum())
        n_good, n_bad = int(good.sum()), int(bad.sum())
        interval = None
        if n_good:
            from scipy import stats  # here: its import takes as long as many a prediction

            ends = stats.binomtest(false, n_good).proportion_ci(method="exact")
            interval = [float(ends.low), float(ends.high)]
        out[domain] = {
            "good": n_good,
            "good_flagged": false,
            "fpr": false / n_good if n_good else None,
            "fpr_ci95": interval,
            "anomaly": n_bad,
            "anomaly_flagged": detected,
            "found": detected / n_bad if n_bad else None,
        }
    return out


def _weight_above(
    scores: np.ndarray, groups: Sequence[str], at: np.ndarray, equal: bool
) -> np.ndarray:
    """Number of groups above each score in `at`; a group counts by the share of its images."""
    _, inverse, counts = np.unique(np.asarray(groups, str), return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    weights = (1 / counts[inverse])[order]
    above = np.concatenate([np.cumsum(weights[::-1])[::-1], [0.0]])
    return above[np.searchsorted(scores[order], at, side="left" if equal else "right")]
