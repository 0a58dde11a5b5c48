"""Time of the metrics: python -m mmrjax.bench.metrics.

Measures on synthetic maps of 224 x 224: pixel AUROC and AU-PRO of 690 of them (34.6 million pixels)
from one exact sort; all metrics of a whole evaluation of 1,639, with curves and intervals, over all
images and four domains, exact and streaming; and, for comparison, the forward pass of a model over
as many images. Wall times of several repetitions, and processor time ("cpu"), which other programs
on the machine disturb least. No data set is needed.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from scipy import ndimage

from mmrjax import methods, metrics
from mmrjax.data import geometry
from mmrjax.evaluate import scoring
from mmrjax.methods import base
from mmrjax.metrics import misses, streaming
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib

SIZE = 224
DOMAINS = ("background", "illumination", "same", "view")
DEFECTS = ("ablation", "breakdown", "fracture", "groove")


@dataclasses.dataclass(frozen=True)
class Case:
    """A synthetic test set: one image in three is good, the others have one to three defects."""

    maps: np.ndarray  # float32 [n, h, w]
    masks: np.ndarray  # bool [n, h, w]
    domain: np.ndarray  # str [n]

    @property
    def predictions(self) -> scoring.Predictions:
        """The same as a model's predictions."""
        n = len(self.maps)
        table = {
            "label": self.masks.any(axis=(1, 2)),
            "has_mask": np.ones(n, bool),
            "group": np.arange(n),
            "domain": self.domain,
            "defect": np.where(
                self.masks.any(axis=(1, 2)), np.array(DEFECTS)[np.arange(n) % 4], ""
            ),
        }
        scores = self.maps.max(axis=(1, 2))
        return scoring.Predictions(np.zeros(0), self.maps, scores, self.masks, table)


def make_case(n: int, size: int = SIZE) -> Case:
    """Smooth maps with the offset of each image in them, and weak blobs where the defects are."""
    rng = np.random.default_rng(0)
    maps, masks = np.zeros((n, size, size), np.float32), np.zeros((n, size, size), bool)
    for i in range(n):
        coarse = rng.normal(size=(14, 14))
        maps[i] = ndimage.zoom(coarse, size / 14, order=1)
        for _ in range(rng.integers(1, 4) if i % 3 else 0):
            y, x = rng.integers(0, size * 4 // 5, 2)
            h, w = rng.integers(4, size // 4, 2)
            masks[i, y : y + h, x : x + w] = True
        blob = ndimage.gaussian_filter(masks[i].astype(np.float32), 4)
        maps[i] = np.exp(0.3 * maps[i] + 0.2 * rng.normal() + blob * rng.random())
    return Case(maps, masks, np.array(DOMAINS)[np.arange(n) % len(DOMAINS)])


def exact_pair(case: Case) -> tuple[float, float]:
    """Pixel AUROC and AU-PRO, from maps and masks."""
    return metrics.pixel_auroc_and_aupro(case.maps, case.masks)


def whole_evaluation(found: scoring.Predictions | scoring.Histograms, resamples: int) -> dict:
    """All metrics of an evaluation, over all images and for each domain."""
    is_anomaly, domain = found.table["label"], found.table["domain"]
    columns = found.scores, is_anomaly, found.table["defect"], found.table["group"]
    results = {}
    for name in ("all", *DOMAINS):
        rows = np.ones(len(domain), bool) if name == "all" else domain == name
        measured = found.measure(rows, is_anomaly, resamples, misses.TINY_SIDE)
        results[name] = measured.report() | {"curves": measured.curves()}
        some = (column[rows] for column in columns)
        results[name]["defects"] = metrics.by_defect(*some, bootstrap=resamples)
    return results


def streamed_evaluation(case: Case, resamples: int, batch: int = 32) -> dict:
    """The same from histograms, with the time it takes to count them."""
    histograms = streaming.MapHistograms(mesh_lib.make_mesh(1))
    for start in range(0, len(case.maps), batch):
        some = case.maps[start : start + batch]
        padded = np.pad(some, ((0, batch - len(some)), (0, 0), (0, 0)))
        histograms.add(padded, case.masks[start : start + batch])
    same = case.predictions
    found = scoring.Histograms(histograms.counted(), same.scores, same.table, lambda rows: None)
    return whole_evaluation(found, resamples)


def forward_seconds(config_file: str, overrides: Sequence[str], images: int) -> float:
    """Seconds that the model's maps and scores of this many images take, from two timed batches."""
    config = config_lib.load(
        config_file, ["teacher.weights=random", "student.init=scratch", *overrides]
    )
    mesh = mesh_lib.make_mesh()
    method = methods.create("mmr", config)
    frozen = mesh_lib.replicate(method.load_frozen()[0], mesh)
    variables = mesh_lib.replicate(method.init(jax.random.key(0), frozen)[0], mesh)
    view = geometry.View.of(config)
    trained = base.Trained(method, variables, frozen, {}, mesh)
    predict = scoring.make_predict(trained, view)
    batch = config.eval.batch_size
    shape = (batch, *config.data.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    on_device = mesh_lib.put_batch(pixels, mesh)
    run = lambda: jax.block_until_ready(predict(*trained.ready, on_device))  # noqa: E731
    run()
    return _seconds(run, 2)["median"] / batch * images


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", type=int, default=690, help="maps for pixel AUROC and AU-PRO")
    parser.add_argument("--images", type=int, default=1639, help="of the whole evaluation")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", default="", help="also time this model's forward pass")
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [o for o in overrides if not o.startswith("--config.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    case = make_case(max(arguments.pair, arguments.images))
    pair = Case(*(a[: arguments.pair] for a in dataclasses.astuple(case)))
    whole = Case(*(a[: arguments.images] for a in dataclasses.astuple(case)))
    result: dict[str, object] = {"pixels_of_pair": pair.maps.size, "pixels": whole.maps.size}
    tasks: dict[str, Callable[[], object]] = {
        "exact_pair": lambda: exact_pair(pair),
        "whole_exact": lambda: whole_evaluation(whole.predictions, arguments.bootstrap),
        "whole_streaming": lambda: streamed_evaluation(whole, arguments.bootstrap),
    }
    for name, task in tasks.items():
        result[f"{name}_seconds"] = _seconds(task, arguments.repeats)
    if arguments.config:
        fields = [o.removeprefix("--config.") for o in overrides]
        result["forward_seconds"] = forward_seconds(arguments.config, fields, arguments.images)
    print(json.dumps(result, indent=1))
    return 0


def _seconds(task: Callable[[], object], repeats: int) -> dict[str, float]:
    """Wall time of a call, and the least processor time of all its threads together."""
    wall, processor = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        task()
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    summary = {"median": np.median(wall), "min": min(wall), "max": max(wall), "cpu": min(processor)}
    return {name: round(float(seconds), 6) for name, seconds in summary.items()}


if __name__ == "__main__":
    sys.exit(main())
