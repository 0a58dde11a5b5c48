"""A trained model for images from anywhere: scores, verdicts, p-values, maps, boxes.

    detector = mmrjax.load("runs/mine/patchcore/parts/seed54")
    for prediction in detector.predict(["a.png", "b.png"]):
        print(prediction.score, prediction.is_anomaly, prediction.p_value, prediction.boxes)

The images pass through the functions of an evaluation (geometry.view_image, scoring.make_predict),
so the scores are the same. A detector writes no file; mmrjax.predict does.
"""

import base64
import collections
import concurrent.futures
import dataclasses
import functools
import html
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import cv2
import numpy as np
from ml_collections import ConfigDict

from data_builders import images as image_files
from mmrjax import methods
from mmrjax.data import geometry
from mmrjax.evaluate import calibrate, scoring
from mmrjax.methods import base
from mmrjax.report import page, pictures
from mmrjax.runs import places, restore, staging
from mmrjax.runtime import devices, files, logs

FULL_SCALE = 65535  # white of 16-bit images by default
CANNOT_JUDGE = "cannot judge"  # the verdict of a score that is no finite number
THREADS = 4  # that decode images
GALLERY = 3  # pictures of the test that a detector shows of itself
SMALL_BATCHES = (1, 8)  # images; one picture costs one, not a whole batch


@dataclasses.dataclass(frozen=True)
class Box:
    """A region whose map exceeds the threshold, in pixels of the image; `peak` is its maximum."""

    x: int
    y: int
    width: int
    height: int
    peak: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Score, verdict and map of one image.

    Attributes:
      score: the higher, the more anomalous.
      threshold: higher scores are anomalous; None for a model without calibration.
      p_value: how often a good part scores as high; None without calibration.
      boxes: anomalous regions, the most anomalous first; None without threshold.
      view_map: float32 [h, w], the map at the size of the view.
      view: resize and crop of the image before the model.
      size: (height, width) of the image in px.
      source: the path or the pixels that `predict` was given; None from `stream`.
      scale: the colour scale of the run's pictures; None if the run has none.
    """

    score: float
    threshold: float | None
    p_value: float | None
    boxes: list[Box] | None
    view_map: np.ndarray = dataclasses.field(repr=False)
    view: geometry.View = dataclasses.field(repr=False)
    size: tuple[int, int]
    source: object = dataclasses.field(default=None, repr=False)
    scale: tuple[float, float] | None = dataclasses.field(default=None, repr=False)

    @property
    def is_anomaly(self) -> bool | None:
        """The verdict; None without threshold, and for a score that is no finite number."""
        if self.threshold is None or not np.isfinite(self.score):
            return None
        return self.score > self.threshold

    @functools.cached_property
    def map(self) -> np.ndarray:
        """The map in the image's own pixels, float32; NaN outside the view."""
        return geometry.unview_map(self.view_map, self.view, self.size)

    def row(self) -> dict:
        """Score, threshold, verdict, p-value and boxes as plain values, for a table."""
        return {
            "score": self.score if np.isfinite(self.score) else None,
            "threshold": self.threshold,
            "verdict": {None: "", False: "good", True: "anomaly"}[self.is_anomaly]
            if np.isfinite(self.score)
            else CANNOT_JUDGE,
            "p_value": self.p_value,
            "boxes": self.boxes and [[box.x, box.y, box.width, box.height] for box in self.boxes],
        }

    def overlay(self, image: np.ndarray) -> np.ndarray:
        """The image, RGB uint8 [h, w, 3], with heat and boxes on the run's colour scale."""
        heat = np.nan_to_num(self.map, nan=-np.inf)
        return pictures.draw_boxes(pictures.heat_overlay(image, heat, self.scale), self.boxes or ())

    def _repr_png_(self) -> bytes | None:
        """The image beside its overlay, for a notebook."""
        if self.source is None or self.scale is None:
            return None
        image = self.source
        image = read_image(image, FULL_SCALE) if isinstance(image, str | os.PathLike) else image
        return pictures.png(np.hstack([image, self.overlay(image)]))

    def _repr_html_(self) -> str:
        """Verdict, score and name above the picture, for a notebook."""
        verdict = self.row()["verdict"] or "no verdict"
        name = self.source if isinstance(self.source, str | os.PathLike) else ""
        text = f"<b>{verdict}</b>, score {self.score:.4g} {html.escape(str(name))}"
        return f"<p>{text}</p>{_picture(self._repr_png_())}"


class Detector:
    """A trained run with its threshold; see `load`.

    Attributes:
      run: folder or address of the run; "" if there is none.
      exporter: writes the scorer as a file; `mmrjax.load` sets it, since programs stand above.
    """

    def __init__(
        self,
        trained: base.Trained,
        config: ConfigDict,
        calibration: calibrate.Calibration | None = None,
        scale: tuple[float, float] | None = None,
    ):
        """Nothing is compiled yet.

        Args:
          trained: the model.
          config: the run's; view, batch size and target rate are used.
          calibration: None for a model that only scores.
          scale: colour scale of a model without calibration.
        """
        self.trained, self.config, self.calibration = trained, config, calibration
        self.view = geometry.View.of(config, evaluation=True)
        self.target_fpr = config.calibration.target_fpr
        self.full_scale = 0  # white of 16-bit images; 0 refuses such images
        self._scale = scale
        self.run, self.exporter = "", None
        self._predict = scoring.make_predict(trained, self.view)

    @property
    def scale(self) -> tuple[float, float] | None:
        """The colour scale of all pictures: (no colour, strongest colour) in map values."""
        return self.calibration.scale(self.target_fpr) if self.calibration else self._scale

    @functools.cached_property
    def thresholds(self) -> tuple[float | None, float | None, str]:
        """(threshold of scores, threshold of pixels, reason if there are none)."""
        if self.calibration is None:
            return None, None, "the run has no good images for a threshold (calibration.*)"
        try:
            target = self.calibration.reachable(self.target_fpr)
            score = self.calibration.threshold(target)
            return score, self.calibration.pixel_threshold(target), ""
        except calibrate.TooFew as e:
            return None, None, str(e)

    def with_target(self, target_fpr: float) -> "Detector":
        """A detector with another false-positive rate.

        Raises:
          ValueError: there is no calibration, or too small a one for this rate.
        """
        if self.calibration is None:
            raise ValueError(f"no rate can be set: {self.thresholds[2]}")
        self.calibration.threshold(target_fpr)
        return self._replaced(self.calibration, target_fpr)

    def with_calibration(self, calibration: calibrate.Calibration) -> "Detector":
        """A detector with the threshold of another calibration."""
        return self._replaced(calibration, self.target_fpr)

    def with_file(self, path: pathlib.Path) -> "Detector":
        """A detector with the threshold of a calibration.json.

        Raises:
          FileNotFoundError, ValueError: the file is absent or damaged.
        """
        calibration = calibrate.read(path)
        if calibration is None:
            raise FileNotFoundError(f"--calibration={path}: no such file")
        return self.with_calibration(calibration)

    def recalibrated(
        self, images: Iterable, source: str = "given good images", groups: Sequence[str] = ()
    ) -> "Detector":
        """A detector with a threshold from other good images, such as of a new domain.

        Args:
          images: as in `predict`; good images that were not trained on.
          source: the origin of the images, a text for people.
          groups: name of the part that each image shows; () if every image shows another part.
        """
        images = list(images)
        predictions = self.predict(images)
        names = [
            str(image) if isinstance(image, str | os.PathLike) else f"image {i}"
            for i, image in enumerate(images)
        ]
        calibration = calibrate.Calibration.of(
            names,
            groups or names,
            [prediction.score for prediction in predictions],
            [prediction.view_map.max() for prediction in predictions],
            [np.median(prediction.view_map) for prediction in predictions],
            source,
        )
        return self.with_calibration(calibration)

    def _replaced(self, calibration: calibrate.Calibration, target_fpr: float) -> "Detector":
        config = self.config.copy_and_resolve_references()
        config.calibration.target_fpr = target_fpr
        other = Detector(self.trained, config, calibration, self._scale)
        other.full_scale, other._predict = self.full_scale, self._predict  # compiled already
        other.run, other.exporter = self.run, self.exporter
        return other

    def predict(self, images: Iterable) -> list[Prediction]:
        """Scores images, in their order.

        Args:
          images: paths, or RGB pixels uint8 [h, w, 3] of any sizes.

        Raises:
          ValueError: an image cannot be read, or is no RGB uint8; or a path stands alone.
        """
        if isinstance(images, str | os.PathLike):  # a str would pass as a list of its letters
            raise ValueError(f"expected a list of images, found one path; give [{str(images)!r}]")
        items = ahead(lambda given: (given, self._loaded(given)), images)
        return [
            dataclasses.replace(prediction, source=given)
            for given, _, prediction in self.stream(items)
        ]

    def export(self, path: str | os.PathLike) -> pathlib.Path:
        """Writes the scorer with its threshold as one file, .jax or .onnx (see mmrjax.export).

        Raises:
          ValueError: an unknown suffix, missing extras, or a detector that is of no run.
        """
        if self.exporter is None:
            raise ValueError("a detector of mmrjax.load or mmrjax.train can be exported")
        return self.exporter(self, pathlib.Path(path))

    def report(self) -> pathlib.Path:
        """Writes the report of the run's work directory anew; its path, a file to open."""
        if not self.run or files.is_remote(self.run):
            raise ValueError("no folder to write into: python -m mmrjax.report --workdir=…")
        return pathlib.Path(page.write_report(places.home(self.run), methods.METHODS))

    def _repr_html_(self) -> str:
        """Method, run and threshold above pictures of the run's gallery, for a notebook."""
        threshold, _, reason = self.thresholds
        line = f"no threshold: {reason}" if threshold is None else f"threshold {threshold:.4g}"
        title = f"{self.trained.method.title}, {self.run}: {line}"
        return f"<p>{html.escape(title)}</p>{''.join(map(_picture, self._gallery()))}"

    def _gallery(self) -> Iterator[bytes]:
        """Up to GALLERY pictures of the run's test, each beside its heat, as PNG."""
        maps = pathlib.Path(self.run, "maps")
        items = (files.read_json(maps / "gallery.json") or {}).get("items", [])
        for item in items[:GALLERY]:
            yield pictures.png(np.hstack([read_image(maps / item[x]) for x in ("image", "heat")]))

    def stream(self, items: Iterable[tuple]) -> Iterator[tuple[object, np.ndarray, Prediction]]:
        """Yields (key, image, prediction) for each (key, RGB uint8 [h, w, 3]); memory is constant.

        A few images make a small batch (see `_batch_size`), others batches of eval.batch_size, of
        which the last is filled up. A score depends on its image alone.
        """
        view, most = self.view, self.config.eval.batch_size

        def batches() -> Iterator[tuple]:
            rest, size = iter(items), 0
            while chunk := list(itertools.islice(rest, most)):
                size = max(size, self._batch_size(len(chunk)))  # no shape more after a full one
                frames = np.zeros((size, *view.frame, 3), np.uint8)
                for row, (_, image) in enumerate(chunk):
                    frames[row] = geometry.view_image(
                        image, view.resize, view.frame, view.interpolation
                    )
                yield frames, chunk

        for (_, chunk), (maps, scores) in scoring.one_behind(
            self.trained, self._predict, batches()
        ):
            maps, scores = np.asarray(maps), np.asarray(scores)
            for row, (key, image) in enumerate(chunk):
                yield key, image, self._prediction(scores[row], maps[row], image.shape[:2])

    def _batch_size(self, count: int) -> int:
        """The smallest batch that holds `count` images: 1, 8 or eval.batch_size, on all devices."""
        shared = self.trained.mesh.size
        sizes = [-(-size // shared) * shared for size in SMALL_BATCHES]
        most = self.config.eval.batch_size
        return min(size for size in (*sizes, most) if count <= size <= most)

    def _loaded(self, image) -> np.ndarray:
        """Pixels of a path or an array."""
        if isinstance(image, str | os.PathLike):
            return read_image(image, self.full_scale)
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"expected paths or RGB pixels uint8 [h, w, 3], found {image.dtype} {image.shape}"
            )
        return image

    def _prediction(self, score, view_map: np.ndarray, size: tuple[int, int]) -> Prediction:
        threshold, pixel_threshold, _ = self.thresholds
        calibration = self.calibration
        return Prediction(
            score=float(score),
            threshold=threshold,
            p_value=None if calibration is None else float(calibration.p_values(score)),
            boxes=None
            if pixel_threshold is None
            else boxes(view_map, pixel_threshold, self.view, size),
            view_map=view_map,
            view=self.view,
            size=size,
            scale=self.scale,
        )


def _picture(png: bytes | None) -> str:
    """An image of a page; "" without one."""
    if png is None:
        return ""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def load(
    workdir: str | os.PathLike | None = None,
    target_fpr: float | None = None,
    show_cores: bool = False,
) -> Detector:
    """A trained run, ready to predict.

    Args:
      workdir: <workdir>/<method>/<category>/seed<k>, a folder with one run in it, an address in a
        bucket, gs://…, or the name of a data set; None for the latest run (see places.py).
      target_fpr: false-positive rate of the threshold; None = the run's calibration.target_fpr.
      show_cores: makes each core of a CPU a device, for the whole process, unless JAX has started.

    Raises:
      FileNotFoundError, ValueError: no run, several runs, or a damaged run, with what to do.
    """
    place = places.run(workdir)
    with staging.opened(place, ".json") as stage:
        run = restore.find_run(stage.folder)
        if show_cores:
            devices.show_cores([restore.read_config(run).eval.batch_size])
        with logs.waiting(f"loading {stage.named(str(run))}"):
            trained, config = restore.trained(run, stage.store(run))
        calibration = calibrate.read(run / "calibration.json")
        gallery = files.read_json(run / "maps" / "gallery.json") or {}
    scale = tuple(gallery["scale"]) if "scale" in gallery else None
    detector = Detector(trained, config, calibration, scale)
    detector.run = place
    return detector if target_fpr is None else detector.with_target(target_fpr)


def read_image(path: str | os.PathLike, full_scale: int = 0) -> np.ndarray:
    """An image file as RGB uint8 [h, w, 3], with the pixels that its record would have.

    Args:
      path: png, jpg, bmp, tif or webp.
      full_scale: the value of 16-bit images that becomes 255; 0 = such images are refused.

    Raises:
      ValueError: the file is absent, damaged or not supported, naming it.
    """
    path = pathlib.Path(path)
    try:
        if not full_scale and image_files.largest_value(path):
            raise ValueError(
                f"{path}: 16 bits a pixel; say which value is white, as in --full_scale=4095"
            )
        data, _ = image_files.encode_image(path, str(path), full_scale or FULL_SCALE)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from e
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def boxes(
    view_map: np.ndarray, threshold: float, view: geometry.View, size: tuple[int, int]
) -> list[Box]:
    """Bounding boxes of the connected regions above a threshold, in pixels of the image.

    Args:
      view_map: float32 [h, w], at the size of the view.
      threshold: a map value.
      view: resize and crop of the image before the model.
      size: (height, width) of the image in px.
    """
    is_above = (view_map > threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(is_above, connectivity=8)
    regions = []
    for label in range(1, count):
        left, top, width, height = (int(n) for n in stats[label, :4])
        y0, x0 = view.to_image((top, left), size)
        y1, x1 = view.to_image((top + height, left + width), size)
        x, y = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
        right, bottom = min(size[1], int(np.ceil(x1))), min(size[0], int(np.ceil(y1)))
        peak = float(view_map[labels == label].max())
        regions.append(Box(x, y, right - x, bottom - y, peak))
    return sorted(regions, key=lambda box: -box.peak)


def ahead(work: Callable, items: Iterable) -> Iterator:
    """map(work, items) by threads, never more than a few items ahead: memory is constant."""
    items, waiting = iter(items), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        while True:
            for item in itertools.islice(items, 2 * THREADS - len(waiting)):
                waiting.append(pool.submit(work, item))
            if not waiting:
                return
            yield waiting.popleft().result()
