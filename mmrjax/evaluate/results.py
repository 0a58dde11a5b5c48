"""Evaluation of one trained run: scores of the test set (scoring.py), metrics, pictures.

`evaluate` writes FILES and the pictures of the gallery, results.json last. Each file appears
complete or not at all, and an evaluation without results.json is repeated. Scores are raw float32:
nothing is normalised, and no test label reaches the model or a threshold.
"""

import csv
import importlib.metadata
import io
import json
import math
import pathlib
import shlex
import sys
import time

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mmrjax import metrics
from mmrjax.data import geometry
from mmrjax.data.records import ANOMALY, Records
from mmrjax.evaluate import calibrate, guarantees, scoring
from mmrjax.methods import base
from mmrjax.metrics import misses
from mmrjax.report import pictures, tables
from mmrjax.runtime import files, processes

SCHEMA = 1
CALIBRATION = "calibration.json"
FILES = ("scores.csv", "curves.json", "maps/gallery.json", "results.json")
PACKAGES = ("mmrjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
LOGGED = ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr")

# The rule that turns a mask at native size into ground truth, by eval.metrics_mode (quirk 16).
GROUND_TRUTH = {
    "standard": {
        "masks": "nearest neighbour, threshold 0.5",
        "labels": "as recorded; an anomaly whose mask the crop empties stays an anomaly",
    },
    metrics.OFFICIAL_MODE: {
        "masks": "official MMR code: bilinear, only pixels equal to the maximum (erodes borders)",
        "labels": "official MMR code: an anomaly whose mask the crop empties counts as good",
    },
}


def evaluate(
    trained: base.Trained,
    records: Records,
    held_out: Records,
    config: ConfigDict,
    seed: int,
    folder: pathlib.Path,
    left_out: Records | None = None,
) -> dict:
    """Evaluates a run and writes its files into `folder`.

    All processes score; the first one measures and writes.

    Args:
      trained: the run's model.
      records: the test images. A column "unseen" of their table tells whose combination of defect
        and condition was kept from training (data/tracks.py).
      held_out: good images that were not trained on; the threshold comes from them, unless from
        `left_out`.
      config: the run's.
      seed: the run's.
      folder: the run's, or that of another view of the run.
      left_out: the training images, if the threshold comes from leaving each out in turn.

    Returns:
      The content of results.json.
    """
    started = time.monotonic()
    scorer = scoring.Scorer(trained, config)
    keep_maps = config.eval.save_maps and processes.is_first()
    maps_file = folder / "maps" / "maps.npy" if keep_maps else None
    if left_out is None:
        calibration = scorer.calibration(held_out)
    else:
        calibration = scorer.left_out(left_out)
    streaming = scoring.streams(config, len(records))
    predicted = (scorer.histograms if streaming else scorer.everything)(records, maps_file)
    gallery = processes.first(lambda: _gallery_rows(predicted, config))
    shown = predicted.shown(gallery)  # the streaming form scores these images once more
    seconds = time.monotonic() - started
    parts = (predicted, shown, calibration, left_out is not None, seconds)
    return processes.first(lambda: _write(trained, records, config, seed, folder, *parts))


def _gallery_rows(
    predicted: scoring.Predictions | scoring.Histograms, config: ConfigDict
) -> list[int]:
    """Rows of the images that the gallery shows."""
    is_anomaly, _ = _labels(predicted, config.eval.metrics_mode)
    chosen = pictures.choose_gallery(predicted.scores, is_anomaly, config.report.gallery // 3)
    return [int(i) for i, _ in chosen]


def _write(
    trained: base.Trained,
    records: Records,
    config: ConfigDict,
    seed: int,
    folder: pathlib.Path,
    predicted: scoring.Predictions | scoring.Histograms,
    shown: tuple,
    calibration: calibrate.Calibration | None,
    leaves_out: bool,
    scoring_seconds: float,
) -> dict:
    """Measures the predictions and writes all files; `shown` holds the gallery's arrays."""
    started = time.monotonic()
    is_anomaly, ground_truth = _labels(predicted, config.eval.metrics_mode)
    key, name = f"{records.dataset}/{records.category}", trained.method.name
    rows_of = domain_rows(predicted.table["domain"])
    domains, curves = _measure(predicted, rows_of, is_anomaly, config)
    seconds = {"scoring": scoring_seconds, "metrics": time.monotonic() - started}
    table = {
        **predicted.table,
        "label": np.where(is_anomaly, "anomaly", "good"),
        "record_label": np.where(predicted.table["label"] == ANOMALY, "anomaly", "good"),
        "score": predicted.scores,
    }
    files.write_text(folder / "scores.csv", _scores_csv(table))
    files.write_text(folder / "curves.json", json.dumps(curves))
    scale = predicted.scale()
    if calibration is not None:
        calibration.write(folder / CALIBRATION)
        scale = calibration.scale(config.calibration.target_fpr)
    pictures.write_gallery(folder / "maps", *shown, table, scale, config.report.gallery // 3)
    results = {
        "schema": SCHEMA,
        "dataset": records.dataset,
        "category": records.category,
        "method": name,
        "seed": seed,
        "metrics": {key: domains},
        "combinations": _combinations(predicted, is_anomaly, config),
        "calibration": _calibrated(
            calibration, leaves_out, config, predicted.scores, is_anomaly, rows_of
        ),
        "facts": _facts(trained, seconds)
        | {
            "ground_truth": ground_truth,
            "pixel_metrics": "exact" if isinstance(predicted, scoring.Predictions) else "streaming",
            "error_at_most": metrics.largest_errors(domains.values()),
            "eval": eval_fields(config),
        },
    }
    files.write_text(folder / "results.json", json.dumps(results, indent=1))
    values = [tables.percent(domains["all"][metric]) for metric in LOGGED]
    text = "%s %s seed %d: image AUROC %s, pixel AUROC %s, aupro_0.3 %s, pro_mmr %s"
    logging.info(text, name, key, seed, *values)
    return results


def _measure(
    predicted: scoring.Predictions | scoring.Histograms,
    rows_of: dict[str, np.ndarray],
    is_anomaly: np.ndarray,
    config: ConfigDict,
) -> tuple[dict, dict]:
    """({domain: metrics}, {domain: curves}) of the images of each domain."""
    domains, curves = {}, {}
    for domain, rows in rows_of.items():
        measured = predicted.measure(rows, is_anomaly, config.eval.bootstrap, config.eval.tiny_side)
        domains[domain], curves[domain] = measured.report(), measured.curves()
        domains[domain]["defects"] = _by_defect(predicted, rows, is_anomaly, config)
    return domains, curves


def _by_defect(predicted, rows: np.ndarray, is_anomaly: np.ndarray, config: ConfigDict) -> dict:
    """Metrics of each kind of defect, over the images whose `rows` [n] is true."""
    defect, group = predicted.table["defect"], predicted.table["group"]
    columns = (column[rows] for column in (predicted.scores, is_anomaly, defect, group))
    return metrics.by_defect(*columns, bootstrap=config.eval.bootstrap)


def _combinations(predicted, is_anomaly: np.ndarray, config: ConfigDict) -> list[dict]:
    """Each kind of defect under each condition of each data set, for the cross-domain tracks.

    The good images of the same data set and condition are the negatives.
    """
    if not config.data.protocol.startswith("track_"):
        return []
    entries, table = [], predicted.table
    condition = table.get("condition", table["domain"])
    part = table.get("part", np.full(len(condition), ""))
    for place in sorted(set(zip(part.tolist(), condition.tolist(), strict=True))):
        rows = (part == place[0]) & (condition == place[1])
        for defect, entry in _by_defect(predicted, rows, is_anomaly, config).items():
            own = rows & is_anomaly & (table["defect"] == defect)
            names = {"part": place[0], "condition": place[1], "defect": defect}
            good, unseen = int((rows & ~is_anomaly).sum()), bool(table["unseen"][own].all())
            entries.append({**names, "good": good, "unseen": unseen, **entry})
    return entries


def domain_rows(domain: np.ndarray) -> dict[str, np.ndarray]:
    """{domain: bool [n]} of every named domain, and "all"."""
    names = [name for name in sorted(set(domain.tolist())) if name]
    return {"all": np.ones(len(domain), bool)} | {name: domain == name for name in names}


def eval_fields(config: ConfigDict) -> dict:
    """The settings on which an evaluation's files depend, beside the trained model."""
    view = geometry.View.of(config, evaluation=True)
    tiny_side = config.eval.tiny_side
    may_calibrate = config.calibration.fraction or config.calibration.way != "split"
    return {
        "view": [list(view.resize), list(view.size), view.interpolation, view.mask_mode]
        + ([] if view.overlap is None else [f"tiles overlap by {view.overlap}"])
        + ([] if view.stress == "none" else [f"stress: {view.stress}"])
        + ([] if tiny_side == misses.TINY_SIDE else [f"tiny below {tiny_side} px"]),
        "metrics_mode": config.eval.metrics_mode,
        "pixel_metrics": config.eval.pixel_metrics,
        "bootstrap": config.eval.bootstrap,
        "gallery": config.report.gallery,
        "save_maps": config.eval.save_maps,
        **({"threshold": config.calibration.way} if config.calibration.way != "split" else {}),
    } | ({"target_fpr": config.calibration.target_fpr} if may_calibrate else {})


def _calibrated(
    calibration: calibrate.Calibration | None,
    leaves_out: bool,
    config: ConfigDict,
    scores: np.ndarray,
    is_anomaly: np.ndarray,
    rows: dict[str, np.ndarray],
) -> dict | None:
    """The threshold and its rates on the test images of each domain, or the reason for none."""
    target, fraction = config.calibration.target_fpr, config.calibration.fraction
    if not (fraction or leaves_out):
        return None
    if calibration is not None:
        facts = calibration.report(target)
    else:
        facts = {"target_fpr": target, "threshold": None}
        facts["reason"] = "one good part cannot be held against others: two or more are needed"
    if facts["reason"] and not leaves_out:
        facts["reason"] = _too_few(facts["reason"] if calibration else "", target, fraction)
    if facts["reason"]:
        logging.warning("no threshold: %s", facts["reason"])
        return facts
    logging.info("threshold %.6g: %s", facts["threshold"], facts["promise"])
    domains = calibrate.rates_at(facts["threshold"], scores, is_anomaly, rows)
    return facts | {"domains": domains}


def _too_few(reason: str, target: float, fraction: float) -> str:
    """Why held-out images give no threshold, and how many images would."""
    needed = guarantees.parts_needed(target)
    reason = reason or (
        f"too few good images to hold {100 * fraction:.3g} % of them out; "
        f"all were trained on. {needed} are needed"
    )
    in_all = math.ceil(needed / fraction - guarantees.ROUNDING)
    return f"{reason}, which takes {in_all} good parts at calibration.fraction={fraction:g}"


def _labels(
    predicted: scoring.Predictions | scoring.Histograms, mode: str
) -> tuple[np.ndarray, dict[str, object]]:
    """The labels that the metrics use, bool [n], and the facts about them for results.json."""
    recorded = predicted.table["label"] == ANOMALY
    emptied = recorded & predicted.table["has_mask"] & predicted.empty_view
    relabelled = emptied if mode == metrics.OFFICIAL_MODE else np.zeros_like(emptied)
    facts = {
        "metrics_mode": mode,
        **GROUND_TRUTH[mode],
        "anomalies_without_defect_in_view": int(emptied.sum()),
        "of_these_counted_as_good": int(relabelled.sum()),
        "both_label_sets": "scores.csv: label as used here, record_label as recorded",
    }
    return recorded & ~relabelled, facts


def _scores_csv(table: dict[str, np.ndarray]) -> str:
    joined = ("condition",) if "condition" in table else ()
    columns = ("id", "label", "record_label", "domain", *joined, "defect", "group", "score")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*(table[name] for name in columns[:-1]), table["score"], strict=True):
        writer.writerow([*row[:-1], repr(float(row[-1]))])
    return out.getvalue()


def _facts(trained: base.Trained, seconds: dict[str, float]) -> dict:
    device = jax.devices()[0]
    rounded = {phase: round(duration, 1) for phase, duration in seconds.items()}
    return {
        **trained.facts,
        "seconds": trained.facts["seconds"] | rounded,
        "versions": {name: _version(name) for name in PACKAGES},
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "notes": trained.facts.get("notes", []),
        "command": shlex.join(["python", "-m", "mmrjax.main", *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed: run from a checkout"
