"""The threshold on the page: verdicts per domain at it, and the scores that the slider counts.

The threshold is that of good images that the model has not seen (mmrjax/evaluate/calibrate.py). Its
promise is for the threshold as it was set; beside the slider stands the bound that holds for every
threshold at once (mmrjax/evaluate/guarantees.py). A run
without a threshold starts the slider at the score at which the classes cross. That score uses the
labels, and the page says so. The script of the page (templates/report.js) counts anew when the
slider moves.
"""

import json
from collections.abc import Mapping

import numpy as np

from mmrjax.report import files, pictures, tables

LEVELS = 400  # positions of the slider


def start(run: files.Run) -> float | None:
    """The threshold at which the slider starts; None for a run without finite scores."""
    columns = _finite(run)
    if columns is None:
        return None
    scores, is_anomaly, _ = columns
    threshold = (run.results.get("calibration") or {}).get("threshold")
    if threshold is None:
        threshold = pictures.crossing_score(scores, is_anomaly)
    return float(scores.max() if threshold is None else threshold)


def panel(run: files.Run) -> dict | None:
    """The template's view of a run; None for a run without finite scores."""
    columns = _finite(run)
    if columns is None:
        return None
    scores, is_anomaly, domains = columns
    calibration, threshold = run.results.get("calibration") or {}, start(run)
    names = [name for name in dict.fromkeys(domains.tolist()) if name]
    chosen = {"all": np.ones(len(scores), bool)}
    if len(names) > 1:
        chosen |= {name: domains == name for name in names}
    by_domain = {
        name: {
            "good": scores[rows & ~is_anomaly].tolist(),
            "anomaly": scores[rows & is_anomaly].tolist(),
        }
        for name, rows in chosen.items()
    }
    levels = np.quantile(scores, np.linspace(0, 1, min(LEVELS, len(scores))))
    levels = sorted({*levels.tolist(), threshold})
    bounds = _bounds(calibration.get("simultaneous"), levels)
    data = {"threshold": threshold, "levels": levels, "bounds": bounds, "domains": by_domain}
    return {
        "title": run.title,
        "run": run.path,
        "data": json.dumps(data),
        "bound": bounds and bounds[levels.index(threshold)],
        "bounded": _bounded(calibration.get("simultaneous")),
        "start": levels.index(threshold),
        "last": len(levels) - 1,
        "shown": f"{threshold:.5g}",
        "rows": [_row(name, own, threshold, calibration) for name, own in by_domain.items()],
        "calibrated": calibration.get("threshold") is not None,
        "sentence": _sentence(calibration),
    }


def _bounds(steps: Mapping | None, levels: list[float]) -> list[str] | None:
    """The simultaneous bound at each level, in percent; None for a run without."""
    if not steps:
        return None
    bounds = np.array([1.0, *steps["bound"]])
    rows = np.searchsorted(steps["at"], levels, side="right")
    return [tables.percent(bound) for bound in bounds[rows]]


def _bounded(steps: Mapping | None) -> str:
    """The meaning of the bound, as the sentence before its number."""
    if not steps:
        return ""
    doubt = "" if steps["proven"] else ", as far as scores of parts left out are independent"
    return (
        f"Wherever you slide it: with a confidence of {100 * steps['confidence']:.0f} %{doubt}, "
        "the share of good parts above it, in %, is at most"
    )


def _finite(run: files.Run) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(scores, is_anomaly, domains) of the images with a finite score; None if there is none."""
    scores = np.asarray(run.scores.get("score", ()), float)
    finite = np.isfinite(scores)
    if not finite.any():
        return None
    return scores[finite], run.scores["label"][finite] == "anomaly", run.scores["domain"][finite]


def _row(name: str, own: Mapping, threshold: float, calibration: Mapping) -> dict:
    """Counts and rates of one domain; the interval is that of the evaluation."""
    flagged = sum(score > threshold for score in own["good"])
    detected = sum(score > threshold for score in own["anomaly"])
    n_good, n_bad = len(own["good"]), len(own["anomaly"])
    measured = (calibration.get("domains") or {}).get(name) or {}
    low, high = measured.get("fpr_ci95") or (None, None)
    interval = "" if low is None else f"{100 * low:.1f} – {100 * high:.1f}"
    return {
        "domain": name,
        "label": tables.domain_title(name),
        "counts": [n_good - flagged, flagged, detected, n_bad - detected],
        "fpr": tables.percent(flagged / n_good if n_good else None),
        "interval": interval,
        "found": tables.percent(detected / n_bad if n_bad else None),
    }


def _sentence(calibration: Mapping) -> str:
    """Origin and promise of the threshold, or the reason why there is none."""
    if calibration.get("threshold") is not None:
        count, groups = calibration["images"], calibration["groups"]
        of_groups = "" if groups == count else f" of {groups} groups"
        if calibration.get("guarantee") not in (None, "split conformal"):
            return (
                f"Set by {count} {calibration['source']}{of_groups}: {calibration['promise']}. "
                "This is for parts under the conditions of the training. Under other conditions "
                "nothing is promised: read off below what they do to it."
            )
        return (
            f"Set by {count} good images{of_groups} that were held out of training: a good part "
            "under the conditions of the training is flagged with a probability of at most "
            f"{tables.percent(calibration['promised_fpr'])} % (asked for: "
            f"{tables.percent(calibration['target_fpr'])} %). Possible are multiples of "
            f"{tables.percent(calibration['smallest_fpr'])} %. Under other conditions "
            "nothing is promised: read off below what they do to it."
        )
    why = calibration.get("reason") or "no good images were held out (calibration.fraction is 0)"
    return (
        f"This run has no threshold: {why}. The slider starts where as many good as defective "
        "images are misjudged; that uses the labels of the test and is no threshold to work with."
    )
