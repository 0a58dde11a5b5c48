"""Evaluation of one trained run: maps and scores in one jitted program, metrics, pictures.

Writes scores.csv, curves.json, maps/ and, last, results.json; each file appears whole or not at
all, so a killed evaluation is simply done again. Scores are raw float32: nothing is normalised, no
threshold is fitted, no test label reaches the model.
"""

import csv
import dataclasses
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

from mmrjax import files, logs, metrics, train, visualize
from mmrjax import mesh as mesh_lib
from mmrjax.data import geometry
from mmrjax.data.records import ANOMALY, Records

SCHEMA = 1
PACKAGES = ("mmrjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")


@dataclasses.dataclass
class Predictions:
    """What the model says of the test images, beside the truth.

    Attributes:
      images: uint8 [n, h, w, 3], as the model saw them.
      maps: float32 [n, h, w].
      scores: float32 [n].
      masks: bool [n, h, w], truth in the same view.
      table: columns id, domain, defect, group, label, has_mask of the n records.
    """

    images: np.ndarray
    maps: np.ndarray
    scores: np.ndarray
    masks: np.ndarray
    table: dict[str, np.ndarray]


def make_predict(trained: train.Trained):
    """The jitted program: uint8 images [b, h, w, 3] -> (maps [b, h, w], scores [b]), float32."""
    replicated = mesh_lib.replicated(trained.mesh)

    def predict(variables, frozen, images):
        result = trained.method.predict(variables, frozen, images / 255.0)
        return result["map"], result["score"]

    return jax.jit(predict, out_shardings=replicated)


def predict_all(
    trained: train.Trained, records: Records, indices: np.ndarray, config: ConfigDict
) -> Predictions:
    """Scores the records `indices`; every batch has one shape, the last is filled up."""
    batch_size = config.eval.batch_size
    mesh_lib.check_divisible("eval.batch_size", batch_size, trained.mesh)
    view = geometry.View.of(config, evaluation=True)
    predict = make_predict(trained)
    shape = len(indices), *view.size
    images, masks = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)
    maps, scores = np.zeros(shape, np.float32), np.zeros(len(indices), np.float32)
    batches = geometry.batches(records, indices, view, batch_size)
    total = -(-len(indices) // batch_size)
    for i, (image, mask, n) in enumerate(logs.progress(batches, "scoring", total)):
        result = predict(trained.variables, trained.frozen, mesh_lib.put_batch(image, trained.mesh))
        rows = slice(i * batch_size, i * batch_size + n)
        images[rows], masks[rows] = image[:n], mask[:n]
        maps[rows], scores[rows] = (np.asarray(x)[:n] for x in result)
    table = {name: column[indices] for name, column in records.table.items()}
    return Predictions(images, maps, scores, masks, table)


def evaluate(
    trained: train.Trained,
    records: Records,
    indices: np.ndarray,
    config: ConfigDict,
    seed: int,
    folder: pathlib.Path,
) -> dict:
    """Evaluates a run and writes its files into `folder`; returns results.json's content."""
    started = time.monotonic()
    predictions = predict_all(trained, records, indices, config)
    scored = time.monotonic()
    is_anomaly = predictions.table["label"] == ANOMALY
    notes = []
    if config.eval.metrics_mode == "mmr":
        is_anomaly, notes = _relabel(predictions, is_anomaly)
    key = f"{records.dataset}/{records.category}"
    domains, curves = {}, {}
    for domain, rows in domain_rows(predictions.table["domain"]).items():
        arguments = (
            predictions.scores[rows],
            predictions.maps[rows],
            predictions.masks[rows],
            is_anomaly[rows],
            predictions.table["has_mask"][rows],
        )
        groups = predictions.table["group"][rows]
        domains[domain] = metrics.evaluate(*arguments, groups, bootstrap=config.eval.bootstrap)
        curves[domain] = metrics.curves(*arguments)
    measured = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        **predictions.table,
        "label": np.where(is_anomaly, "anomaly", "good"),
        "score": predictions.scores,
    }
    files.write_text(folder / "scores.csv", _scores_csv(table))
    files.write_text(folder / "curves.json", json.dumps(curves))
    scale = visualize.fixed_scale(predictions.maps)
    visualize.write_gallery(
        folder / "maps",
        predictions.images,
        predictions.maps,
        predictions.masks,
        table,
        scale,
        config.report.gallery // 3,
    )
    if config.eval.save_maps:
        np.save(folder / "maps" / "maps.npy", predictions.maps)
    facts = _facts(trained, notes)
    facts["seconds"] |= {
        "scoring": round(scored - started, 1),
        "metrics": round(measured - scored, 1),
    }
    facts["eval"] = eval_fields(config)
    results = {
        "schema": SCHEMA,
        "dataset": records.dataset,
        "category": records.category,
        "method": trained.method.name,
        "seed": seed,
        "metrics": {key: domains},
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


def domain_rows(domain: np.ndarray) -> dict[str, np.ndarray]:
    """{domain: bool [n]} of every named domain, and "all"."""
    names = [name for name in sorted(set(domain.tolist())) if name]
    return {"all": np.ones(len(domain), bool)} | {name: domain == name for name in names}


def eval_fields(config: ConfigDict) -> dict:
    """The fields on which an evaluation's files depend, beside the trained model."""
    view = geometry.View.of(config, evaluation=True)
    return {
        "view": [list(view.resize), list(view.size), view.interpolation, view.mask_mode],
        "bootstrap": config.eval.bootstrap,
        "gallery": config.report.gallery,
        "save_maps": config.eval.save_maps,
    }


def percent(value: float | None) -> str:
    """A fraction as percent with one decimal, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def _relabel(predictions: Predictions, is_anomaly: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Official MMR labels: an anomaly whose mask the crop emptied counts as good (quirk 16)."""
    empty = is_anomaly & predictions.table["has_mask"] & ~predictions.masks.any(axis=(1, 2))
    note = f"official labels: {int(empty.sum())} anomalous images with an empty view count as good"
    return is_anomaly & ~empty, [note]


def _scores_csv(table: dict[str, np.ndarray]) -> str:
    columns = ("id", "label", "domain", "defect", "group", "score")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*(table[name] for name in columns[:-1]), table["score"], strict=True):
        writer.writerow([*row[:-1], repr(float(row[-1]))])
    return out.getvalue()


def _facts(trained: train.Trained, notes: list[str]) -> dict:
    device = jax.devices()[0]
    return {
        **trained.facts,
        "seconds": dict(trained.facts["seconds"]),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "notes": notes,
        "command": shlex.join(["python", "-m", "mmrjax.main", *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed: run from a checkout"
