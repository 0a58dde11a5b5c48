"""The threshold on the page: verdicts per domain at it, and the scores that the slider counts.

The threshold is that of the run's held-out good images (calibrate.py). Where a run has none, the
slider starts where the classes cross, which uses the labels, and the page says so. Called by
report.py; the script of the page (templates/report.js) counts again when the slider moves.
"""

import json
from collections.abc import Mapping

import numpy as np

from mmrjax.report import files, pictures, tables

LEVELS = 400  # positions of the slider


def panel(run: files.Run, title: str) -> dict | None:
    """What the template shows of one run, or None when it has no scores."""
    scores = np.asarray(run.scores.get("score", ()), float)
    finite = np.isfinite(scores)
    if not finite.any():
        return None
    scores, domains = scores[finite], run.scores["domain"][finite]
    is_anomaly = run.scores["label"][finite] == "anomaly"
    calibration = run.results.get("calibration") or {}
    threshold = calibration.get("threshold")
    start = threshold if threshold is not None else pictures.crossing_score(scores, is_anomaly)
    start = float(scores.max()) if start is None else float(start)
    names = [name for name in dict.fromkeys(domains.tolist()) if name]
    chosen = {"all": np.ones(len(scores), bool)}
    if len(names) > 1:
        chosen |= {name: domains == name for name in names}
    kept = {
        name: {
            "good": scores[own & ~is_anomaly].tolist(),
            "anomaly": scores[own & is_anomaly].tolist(),
        }
        for name, own in chosen.items()
    }
    levels = np.quantile(scores, np.linspace(0, 1, min(LEVELS, len(scores))))
    levels = sorted({*levels.tolist(), start})
    return {
        "title": title,
        "run": run.path,
        "data": json.dumps({"threshold": start, "levels": levels, "domains": kept}),
        "start": levels.index(start),
        "last": len(levels) - 1,
        "shown": f"{start:.5g}",
        "rows": [_row(name, own, start, calibration) for name, own in kept.items()],
        "calibrated": threshold is not None,
        "sentence": _sentence(calibration),
    }


def _row(name: str, own: Mapping, threshold: float, calibration: Mapping) -> dict:
    """Counts and rates of one domain; the interval is that of the evaluation."""
    flagged = sum(score > threshold for score in own["good"])
    found = sum(score > threshold for score in own["anomaly"])
    n_good, n_bad = len(own["good"]), len(own["anomaly"])
    measured = (calibration.get("domains") or {}).get(name) or {}
    low, high = measured.get("fpr_ci95") or (None, None)
    interval = "" if low is None else f"{100 * low:.1f} – {100 * high:.1f}"
    return {
        "domain": name,
        "label": tables.domain_title(name),
        "counts": [n_good - flagged, flagged, found, n_bad - found],
        "fpr": tables.percent(flagged / n_good if n_good else None),
        "interval": interval,
        "found": tables.percent(found / n_bad if n_bad else None),
    }


def _sentence(calibration: Mapping) -> str:
    """Where the threshold comes from and what it promises, or why there is none."""
    if calibration.get("threshold") is not None:
        count, groups = calibration["images"], calibration["groups"]
        of_groups = "" if groups == count else f" of {groups} groups"
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
