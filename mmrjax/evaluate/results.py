"""Evaluation of one trained run: scores of the test set (scoring.py), metrics, pictures.

Writes FILES and the pictures of the gallery, results.json last; each file appears whole or not at
all, so a killed evaluation is simply done again. Scores are raw float32: nothing is normalised, no
threshold is fitted, no test label reaches the model.
"""

import csv
import importlib.metadata
import io
import json
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
from mmrjax.evaluate import calibrate, scoring
from mmrjax.methods import base
from mmrjax.metrics import misses
from mmrjax.report import pictures
from mmrjax.runtime import files, processes

SCHEMA = 1
CALIBRATION = "calibration.json"
FILES = ("scores.csv", "curves.json", "maps/gallery.json", "results.json")
PACKAGES = ("mmrjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")


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
) -> dict:
    """Evaluates a run and writes its files into `folder`; returns results.json's content.

    All processes score; the first one measures and writes. From the good images `held_out`, which
    were not trained on, comes a threshold (see calibrate.py). The column "unseen" of the test
    images' table tells whose combination of defect and condition was kept from training (see
    data/tracks.py).
    """
    started = time.monotonic()
    scorer = scoring.Scorer(trained, config)
    keep_maps = config.eval.save_maps and processes.is_first()
    maps_file = folder / "maps" / "maps.npy" if keep_maps else None
    calibration = scorer.calibration(held_out)
    streaming = scoring.streams(config, len(records))
    found = (scorer.histograms if streaming else scorer.everything)(records, maps_file)
    gallery = processes.first(lambda: _gallery_rows(found, config))
    shown = found.shown(gallery)  # may score these once more
    seconds = time.monotonic() - started
    return processes.first(
        lambda: _write(trained, records, config, seed, folder, found, shown, calibration, seconds)
    )


def _gallery_rows(found: scoring.Predictions | scoring.Histograms, config: ConfigDict) -> list[int]:
    is_anomaly, _ = _labels(found, config.eval.metrics_mode)
    chosen = pictures.choose_gallery(found.scores, is_anomaly, config.report.gallery // 3)
    return [int(i) for i, _ in chosen]


def _write(
    trained: base.Trained,
    records: Records,
    config: ConfigDict,
    seed: int,
    folder: pathlib.Path,
    found: scoring.Predictions | scoring.Histograms,
    shown: tuple,
    calibration: calibrate.Calibration | None,
    scoring_seconds: float,
) -> dict:
    """Measures what was `found` and writes all files; `shown` holds the gallery's arrays."""
    started = time.monotonic()
    is_anomaly, ground_truth = _labels(found, config.eval.metrics_mode)
    key = f"{records.dataset}/{records.category}"
    domains, curves = {}, {}
    rows_of = domain_rows(found.table["domain"])
    for domain, rows in rows_of.items():
        measured = found.measure(rows, is_anomaly, config.eval.bootstrap, config.eval.tiny_side)
        domains[domain], curves[domain] = measured.report(), measured.curves()
        domains[domain]["defects"] = _by_defect(found, rows, is_anomaly, config)
    seconds = {"scoring": scoring_seconds, "metrics": time.monotonic() - started}
    facts = _facts(trained, seconds) | {
        "ground_truth": ground_truth,
        "pixel_metrics": "exact" if isinstance(found, scoring.Predictions) else "streaming",
        "error_at_most": metrics.largest_errors(domains.values()),
        "eval": eval_fields(config),
    }
    table = {
        **found.table,
        "label": np.where(is_anomaly, "anomaly", "good"),
        "record_label": np.where(found.table["label"] == ANOMALY, "anomaly", "good"),
        "score": found.scores,
    }
    files.write_text(folder / "scores.csv", _scores_csv(table))
    files.write_text(folder / "curves.json", json.dumps(curves))
    count = config.report.gallery // 3
    scale = found.scale()
    if calibration is not None:
        calibration.write(folder / CALIBRATION)
        scale = calibration.scale(config.calibration.target_fpr)
    pictures.write_gallery(folder / "maps", *shown, table, scale, count)
    results = {
        "schema": SCHEMA,
        "dataset": records.dataset,
        "category": records.category,
        "method": trained.method.name,
        "seed": seed,
        "metrics": {key: domains},
        "combinations": _combinations(found, is_anomaly, config),
        "calibration": _calibrated(calibration, config, found.scores, is_anomaly, rows_of),
        "facts": facts,
    }
    files.write_text(folder / "results.json", json.dumps(results, indent=1))
    logging.info(
        "%s %s seed %d: image AUROC %s, pixel AUROC %s, aupro_0.3 %s, pro_mmr %s",
        trained.method.name,
        key,
        seed,
        *(
            percent(domains["all"][m])
            for m in ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr")
        ),
    )
    return results


def _by_defect(found, rows: np.ndarray, is_anomaly: np.ndarray, config: ConfigDict) -> dict:
    """What is missed of each kind of defect, of the images where `rows` [n] is true."""
    defect, group = found.table["defect"], found.table["group"]
    columns = (column[rows] for column in (found.scores, is_anomaly, defect, group))
    return metrics.by_defect(*columns, bootstrap=config.eval.bootstrap)


def _combinations(found, is_anomaly: np.ndarray, config: ConfigDict) -> list[dict]:
    """Each kind of defect under each condition of each data set, for the cross-domain tracks.

    Held against the good images of the same data set and condition.
    """
    if not config.data.protocol.startswith("track_"):
        return []
    entries, table = [], found.table
    condition = table.get("condition", table["domain"])
    part = table.get("part", np.full(len(condition), ""))
    for place in sorted(set(zip(part.tolist(), condition.tolist(), strict=True))):
        rows = (part == place[0]) & (condition == place[1])
        for defect, entry in _by_defect(found, rows, is_anomaly, config).items():
            own = rows & is_anomaly & (table["defect"] == defect)
            names = {"part": place[0], "condition": place[1], "defect": defect}
            good = {
                "good": int((rows & ~is_anomaly).sum()),
                "unseen": bool(table["unseen"][own].all()),
            }
            entries.append({**names, **good, **entry})
    return entries


def domain_rows(domain: np.ndarray) -> dict[str, np.ndarray]:
    """{domain: bool [n]} of every named domain, and "all"."""
    names = [name for name in sorted(set(domain.tolist())) if name]
    return {"all": np.ones(len(domain), bool)} | {name: domain == name for name in names}


def eval_fields(config: ConfigDict) -> dict:
    """The fields on which an evaluation's files depend, beside the trained model."""
    view = geometry.View.of(config, evaluation=True)
    tiny_side = config.eval.tiny_side
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
    } | ({"target_fpr": config.calibration.target_fpr} if config.calibration.fraction else {})


def _calibrated(
    calibration: calibrate.Calibration | None,
    config: ConfigDict,
    scores: np.ndarray,
    is_anomaly: np.ndarray,
    rows: dict[str, np.ndarray],
) -> dict | None:
    """The threshold and what it does to the test images of each domain; why, if there is none."""
    target, fraction = config.calibration.target_fpr, config.calibration.fraction
    if not fraction:
        return None
    if calibration is None:
        facts = {"target_fpr": target, "threshold": None}
        facts["reason"] = (
            f"too few good images to hold {100 * fraction:.3g} % of them out; "
            f"all were trained on. {calibrate.groups_needed(target)} are needed"
        )
    else:
        facts = calibration.report(target)
    if facts["reason"]:
        logging.warning("no threshold: %s", facts["reason"])
        return facts
    domains = calibrate.rates_at(facts["threshold"], scores, is_anomaly, rows)
    return facts | {"domains": domains}


def percent(value: float | None) -> str:
    """A fraction as percent with one decimal, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def _labels(
    found: scoring.Predictions | scoring.Histograms, mode: str
) -> tuple[np.ndarray, dict[str, object]]:
    """The labels that the metrics use, bool [n], and what was decided, for results.json."""
    recorded = found.table["label"] == ANOMALY
    emptied = recorded & found.table["has_mask"] & found.empty_view
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
