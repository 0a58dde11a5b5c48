"""A trained model over a test set: maps and scores in one jitted program, and what is kept of them.

A small test set is kept as a whole and its pixels are ranked exactly (`Predictions`). A large test
set leaves histograms only, and the few maps that are shown are computed once more (`Histograms`).
Both answer the same questions. Called by results.py.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmrjax import metrics
from mmrjax.data import geometry
from mmrjax.data.records import ANOMALY, Records
from mmrjax.evaluate import calibrate, guarantees
from mmrjax.methods import base
from mmrjax.metrics import streaming
from mmrjax.metrics.domain import Measured
from mmrjax.report import pictures
from mmrjax.runtime import devices, logs, placement, processes
from mmrjax.runtime import mesh as mesh_lib

# On NVIDIA cuBLAS adds bias and residual within its products, where a Triton kernel of XLA leaves
# them to others: 1.8 instead of 2.4 ms in 32 images of the full model (H200, the latter beside
# programs that were compiling), and compiled in 66 instead of 106 s.
SCORED_BY = {"xla_gpu_enable_triton_gemm": False}
EXACT_PIXELS = 200_000_000  # eval.pixel_metrics=auto is exact up to here: about 3 GB


@dataclasses.dataclass
class Predictions:
    """Maps and scores of the test images, beside the truth.

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

    @property
    def empty_view(self) -> np.ndarray:
        """[n] bool: no defect pixel in view."""
        return ~self.masks.any(axis=(1, 2))

    def measure(
        self, rows: np.ndarray, is_anomaly: np.ndarray, resamples: int, tiny_side: int
    ) -> Measured:
        """All metrics of the images where `rows` [n] is true, exact."""
        chosen = slice(None) if rows.all() else rows  # a slice copies nothing
        return metrics.measure(
            self.scores[chosen],
            self.maps[chosen],
            self.masks[chosen],
            is_anomaly[chosen],
            self.table["has_mask"][chosen],
            self.table["group"][chosen],
            bootstrap=resamples,
            tiny_side=tiny_side,
        )

    def scale(self) -> tuple[float, float]:
        """Colour scale of the whole set."""
        return pictures.fixed_scale(self.maps)

    def shown(self, rows: Sequence[int]) -> tuple[Mapping | np.ndarray, ...]:
        """Images, maps and masks, indexable by each of `rows`."""
        return self.images, self.maps, self.masks


@dataclasses.dataclass
class Histograms:
    """A test set without its maps; answers what `Predictions` answers.

    Attributes:
      counted: histograms of the n maps, by image and by defect region.
      scores: float32 [n].
      table: as in `Predictions`.
      predict_rows: maps and scores of some of the images, computed once more from their rows.
    """

    counted: streaming.Counted
    scores: np.ndarray
    table: dict[str, np.ndarray]
    predict_rows: Callable[[Sequence[int]], Predictions]

    @property
    def empty_view(self) -> np.ndarray:
        """[n] bool: no defect pixel in view."""
        return np.bincount(self.counted.image, minlength=len(self.scores)) == 0

    def measure(
        self, rows: np.ndarray, is_anomaly: np.ndarray, resamples: int, tiny_side: int
    ) -> Measured:
        """All metrics of the images where `rows` [n] is true; those from buckets with bounds."""
        return streaming.measure(
            self.scores[rows],
            self.counted.select(rows),
            is_anomaly[rows],
            self.table["has_mask"][rows],
            self.table["group"][rows],
            bootstrap=resamples,
            tiny_side=tiny_side,
        )

    def scale(self) -> tuple[float, float]:
        """Colour scale of the whole set, to the width of a bucket."""
        return pictures.fixed_scale(np.array(self.counted.quantiles(np.linspace(0, 1, 2001))))

    def shown(self, rows: Sequence[int]) -> tuple[Mapping | np.ndarray, ...]:
        """Images, maps and masks, indexable by each of `rows`."""
        found = self.predict_rows(rows)
        stacks = (found.images, found.maps, found.masks)
        return tuple(dict(zip(rows, stack, strict=True)) for stack in stacks)


def streams(config: ConfigDict, images: int) -> bool:
    """Whether only histograms of this many images are kept, by eval.pixel_metrics."""
    if config.eval.pixel_metrics != "auto":
        return config.eval.pixel_metrics == "streaming"
    height, width = geometry.View.of(config, evaluation=True).frame
    return images * height * width > EXACT_PIXELS


def make_predict(trained: base.Trained, view: geometry.View, leaves_out: bool = False):
    """The compiled program: uint8 images [b, *frame, 3] -> (maps [b, *frame], scores [b]), float32.

    With `leaves_out` it takes `away` of `Method.leave_out`, bool [b, count], as another argument.

    A tiled view runs window by window and needs the memory of one window. Overlapping windows give
    their mean. The score is the method's score of the map that is put together: a single
    window sees least at its border, and would be at its highest there.
    """
    predict = _window_program(trained, leaves_out)
    replicated = mesh_lib.replicated(trained.mesh)
    score = jax.jit(trained.method.score, out_shardings=replicated)

    def result(maps: dict) -> tuple[jax.Array, jax.Array]:
        return maps["map"], score(maps.get("scored", maps["map"]))

    if view.overlap is None:
        return lambda *arguments: result(predict(*arguments))
    corners, (h, w) = view.corners(), view.size
    windows = np.zeros(view.frame, np.float32)
    for top, left in corners:
        windows[top : top + h, left : left + w] += 1

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, part, top, left):
        before = jax.lax.dynamic_slice(total, (0, top, left), part.shape)
        return jax.lax.dynamic_update_slice(total, before + part, (0, top, left))

    cut = jax.jit(
        lambda images, top, left: jax.lax.dynamic_slice(
            images, (0, top, left, 0), (len(images), h, w, 3)
        ),
        out_shardings=mesh_lib.batched(trained.mesh),
    )

    def tiled(variables, frozen, images, *away):
        totals: dict[str, jax.Array] = {}
        for top, left in corners:
            parts = predict(variables, frozen, cut(images, top, left), *away)
            for name, part in parts.items():
                if name not in totals:
                    totals[name] = jnp.zeros(images.shape[:3], device=replicated)
                totals[name] = add(totals[name], part, top, left)
        return result({name: total / windows for name, total in totals.items()})

    return tiled


def _window_program(trained: base.Trained, leaves_out: bool):
    """The jitted program at the size that the networks see: {"map"} and, of some, {"scored"}."""
    method = trained.method
    function = method.leave_out if leaves_out else method.predict

    def predict(variables, frozen, images, *away):
        variables, frozen = placement.restore((variables, frozen))
        with method.precision():
            result = function(variables, frozen, geometry.to_unit(images), *away)
        return {name: result[name] for name in ("map", "scored") if name in result}

    options = SCORED_BY if devices.on_nvidia() else None
    replicated = mesh_lib.replicated(trained.mesh)
    return jax.jit(predict, out_shardings=replicated, compiler_options=options)


def one_behind(trained: base.Trained, predict: Callable, batches: Iterable) -> Iterator[tuple]:
    """Yields (batch, (maps, scores) on device) of batches whose first item is the images.

    The first item may also be a tuple of the images and of what else `predict` takes.
    One batch behind: the device works while the next images are decoded.
    """
    before = None
    for batch in batches:
        given = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        wait = logs.waiting("compiling the scores") if before is None else contextlib.nullcontext()
        with wait:
            result = predict(*trained.ready, *mesh_lib.put_batch(given, trained.mesh))
        if before is not None:
            yield before
        before = batch, result
    if before is not None:
        yield before


class Scorer:
    """A trained model over records; its program is compiled once."""

    def __init__(self, trained: base.Trained, config: ConfigDict):
        """Nothing is computed yet; ValueError when a batch cannot be split over the devices."""
        mesh_lib.check_divisible("eval.batch_size", config.eval.batch_size, trained.mesh)
        self._trained, self._config = trained, config
        self._view = geometry.View.of(config, evaluation=True)
        self._predict = make_predict(trained, self._view)

    def everything(self, records: Records, maps_file: pathlib.Path | None = None) -> Predictions:
        """Scores records and keeps all of it; writes the maps to `maps_file`.

        With several processes, the first one keeps it; the others return zeros.
        """
        shape = len(records), *self._view.frame
        images, masks = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)
        maps, scores = np.zeros(shape, np.float32), np.zeros(len(records), np.float32)
        for rows, image, mask, result in self._batches(records):
            if processes.is_first():  # in the others, memory that is never touched costs nothing
                images[rows], masks[rows] = image, mask
                maps[rows], scores[rows] = (np.asarray(x)[: len(mask)] for x in result)
        with _array_file(maps_file, shape) as file:
            if file is not None:
                file[:] = maps
        return Predictions(images, maps, scores, masks, dict(records.table))

    def histograms(self, records: Records, maps_file: pathlib.Path | None = None) -> Histograms:
        """Scores records, keeps histograms, and writes the maps to `maps_file`."""
        table, scores = dict(records.table), np.zeros(len(records), np.float32)
        has_truth = (table["label"] == ANOMALY) & table["has_mask"]
        counts = streaming.MapHistograms(self._trained.mesh)
        with _array_file(maps_file, (len(records), *self._view.frame)) as file:
            for rows, _, mask, (maps, score) in self._batches(records):
                counts.add(maps, mask & has_truth[rows, None, None])
                scores[rows] = np.asarray(score)[: len(mask)]
                if file is not None:
                    file[rows] = np.asarray(maps)[: len(mask)]

        def predict_rows(rows: Sequence[int]) -> Predictions:
            return self.everything(records.take(rows))

        return Histograms(counts.counted(), scores, table, predict_rows)

    def calibration(self, records: Records) -> calibrate.Calibration | None:
        """Scores held-out good images; None without any."""
        if not len(records):
            return None
        return self._calibration(records, guarantees.SPLIT)

    def left_out(self, records: Records) -> calibrate.Calibration | None:
        """Scores the training images, each as if its own group had not been trained on.

        Args:
          records: the training images, in the order of the training.

        Returns:
          None if there is one group: nothing is left without it.

        Raises:
          ValueError: the model was fitted on other images.
        """
        groups, fitted_on = records.table["group"], self._trained.variables.get(base.FITTED_ON)
        if fitted_on is None or set(np.asarray(fitted_on).tolist()) != set(range(len(records))):
            raise ValueError(
                "the model was not fitted on the good images of this call, so none can be left "
                "out; use another --workdir or --config.calibration.way=split"
            )
        if len(np.unique(groups)) < 2:
            return None
        fitted = groups[np.asarray(fitted_on)]
        method = self._trained.method
        exact = method.leaves_out_exactly(self._config)
        guarantee = guarantees.FULL if exact else guarantees.LEFT_OUT
        return self._calibration(records, guarantee, groups[:, None] == fitted)

    def _calibration(
        self, records: Records, guarantee: str, away: np.ndarray | None = None
    ) -> calibrate.Calibration:
        scores, peaks, medians = (np.zeros(len(records)) for _ in range(3))
        view = dataclasses.replace(self._view, stress="none")  # as a threshold is made in practice
        for rows, image, _, (maps, score) in self._batches(records, view, away):
            maps, scores[rows] = np.asarray(maps)[: len(image)], np.asarray(score)[: len(image)]
            peaks[rows], medians[rows] = maps.max(axis=(1, 2)), np.median(maps, axis=(1, 2))
        names = records.table["id"], records.table["group"]
        return calibrate.Calibration.of(*names, scores, peaks, medians, guarantee=guarantee)

    def _batches(
        self,
        records: Records,
        view: geometry.View | None = None,
        away: np.ndarray | None = None,
    ) -> Iterator[tuple]:
        """(rows, images, masks, result) per batch: only real rows, but of the result on device.

        Every batch has one shape there, the last is filled up. `away`, bool [n, count], leaves
        training images out, see `Method.leave_out`.
        """
        size, trained, view = self._config.eval.batch_size, self._trained, view or self._view
        own, predict = mesh_lib.own_rows(size, trained.mesh), self._predict
        batches = geometry.batches(records, view, size, own)
        batches = logs.progress(batches, "scoring", -(-len(records) // size))
        if away is not None:
            predict = make_predict(trained, view, leaves_out=True)
            batches = (
                ((image, np.resize(away[i * size : i * size + n], (size, away.shape[1]))), mask, n)
                for i, (image, mask, n) in enumerate(batches)
            )
        for i, (batch, result) in enumerate(one_behind(trained, predict, batches)):
            image, mask = batch[0] if away is None else batch[0][0], batch[1]
            image, mask = mesh_lib.complete((image, mask), trained.mesh)
            n = batch[2]
            yield slice(i * size, i * size + n), image[:n], mask[:n], result


@contextlib.contextmanager
def _array_file(path: pathlib.Path | None, shape: tuple[int, ...]) -> Iterator[np.ndarray | None]:
    """An array on disk to fill, which gets its name when it is complete; None without a path."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    array = np.lib.format.open_memmap(part, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):  # else a disk that fills up kills the process by SIGBUS
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    yield array
    os.replace(part, path)
