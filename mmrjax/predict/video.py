"""A video with its anomalies: an overlay on every frame and the curve of scores under it.

The video is read twice, so that every frame can show the complete curve. Between the two passes
memory holds the scores alone; a temporary file holds the maps at the size of the view.
"""

import pathlib
import tempfile
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from absl import logging

from mmrjax.data import geometry
from mmrjax.report import pictures
from mmrjax.runs import detector as detector_lib
from mmrjax.runtime import logs

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
CODEC = "mp4v"  # MPEG-4 part 2: every build of OpenCV can write it
CURVE_HEIGHT = 120  # px under a frame, at least
COLOURS = {"paper": (24, 24, 24), "line": (236, 236, 236), "threshold": (64, 224, 255),
           "above": (252, 165, 10), "now": (150, 150, 150)}  # fmt: skip


def is_video(path: str) -> bool:
    """Whether a path is an existing file with the suffix of a video."""
    return path.lower().endswith(SUFFIXES) and pathlib.Path(path).is_file()


def frames(path: pathlib.Path) -> Iterator[np.ndarray]:
    """Yields the frames of a video, RGB uint8 [h, w, 3].

    Raises:
      ValueError: OpenCV cannot read it.
    """
    video = cv2.VideoCapture(str(path))
    try:
        is_read, frame = video.read()
        if not is_read:
            raise ValueError(f"{path}: OpenCV reads no frame; convert it to .mp4, or to images")
        while is_read:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            is_read, frame = video.read()
    finally:
        video.release()


def properties(path: pathlib.Path) -> tuple[float, int]:
    """(frames per second, frames that the header promises, 0 if none)."""
    video = cv2.VideoCapture(str(path))
    rate, count = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
    video.release()
    return (rate if 0 < rate < 1000 else 25.0), max(0, int(count))


def run(
    detector: detector_lib.Detector,
    path: pathlib.Path,
    output: pathlib.Path,
    rows: list[dict],
    draws: bool = True,
    each_frame: Callable[[int, detector_lib.Prediction], None] | None = None,
) -> list[str]:
    """Scores a video and writes <output>/<name>_overlay.mp4.

    Args:
      detector: a trained run.
      path: the video.
      output: folder to write into.
      rows: gets a row per frame, for scores.csv.
      draws: writes the overlay.
      each_frame: called with the number and the prediction of each frame.

    Returns:
      A line if the video has fewer frames than its header says.
    """
    rate, promised = properties(path)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output) as maps:
        items = logs.progress(enumerate(frames(path)), "scoring", promised or None)
        for number, _, prediction in detector.stream(items):
            place = {"path": path.name, "frame": number, "seconds": round(number / rate, 3)}
            rows.append({**place, **prediction.row()})
            if each_frame:
                each_frame(number, prediction)
            maps.write(prediction.view_map.astype(np.float16).tobytes())
        if draws and detector.scale is not None:
            maps.seek(0)
            _write_overlay(detector, path, output, rate, rows, maps)
    short = promised - len(rows)
    return [f"{path}: the last {short} of {promised} frames"] if short > 0 else []


def _write_overlay(detector, path, output, rate, rows, maps) -> None:
    """The second pass: every frame with its map, boxes and the curve."""
    scores = np.array([row["score"] for row in rows], float)  # None becomes NaN
    target, view = output / f"{path.stem}_overlay.mp4", detector.view
    panel, writer = None, None
    items = logs.progress(zip(frames(path), rows, strict=False), "drawing", len(rows))
    for number, (frame, row) in enumerate(items):
        h, w = frame.shape[:2]
        view_map = np.frombuffer(maps.read(2 * view.frame[0] * view.frame[1]), np.float16)
        view_map = view_map.reshape(view.frame).astype(np.float32)
        own = np.nan_to_num(geometry.unview_map(view_map, view, (h, w)), nan=-np.inf)
        drawn = pictures.heat_overlay(frame, own, detector.scale)
        drawn = pictures.draw_boxes(drawn, [detector_lib.Box(*b, 0.0) for b in row["boxes"] or ()])
        if writer is None:
            height = max(CURVE_HEIGHT, h // 5)
            panel = curve(scores, row["threshold"], (height, w))
            size = (w, h + height)
            writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*CODEC), rate, size)
            if not writer.isOpened():
                raise OSError(f"OpenCV cannot write {target}: is the disk full?")
        below = panel.copy()
        x = _column(number, len(rows), w)
        cv2.line(below, (x, 0), (x, len(below) - 1), COLOURS["now"], 1)
        writer.write(cv2.cvtColor(np.vstack([drawn, below]), cv2.COLOR_RGB2BGR))
    writer.release()
    logging.info("wrote %s", target)


def curve(scores: np.ndarray, threshold: float | None, size: tuple[int, int]) -> np.ndarray:
    """The scores of all frames over time, scores above the threshold in another colour.

    Args:
      scores: float [n].
      threshold: drawn as a line; None for no line.
      size: (height, width) in px.

    Returns:
      RGB uint8 [h, w, 3].
    """
    h, w = size
    picture = np.full((h, w, 3), COLOURS["paper"], np.uint8)
    marks = [] if threshold is None else [threshold]
    low, high = min([*scores, *marks]), max([*scores, *marks])

    def row(value: float) -> int:
        return round((h - 9) * (1 - (value - low) / max(high - low, 1e-12))) + 4

    points = [(_column(i, len(scores), w), row(score)) for i, score in enumerate(scores)]
    for i, (start, end) in enumerate(zip(points, points[1:] or points, strict=False)):
        is_above = threshold is not None and max(scores[i : i + 2]) > threshold
        cv2.line(picture, start, end, COLOURS["above" if is_above else "line"], 2, cv2.LINE_AA)
    if threshold is not None:
        cv2.line(picture, (0, row(threshold)), (w - 1, row(threshold)), COLOURS["threshold"], 1)
    return picture


def _column(number: int, count: int, width: int) -> int:
    return round(number * (width - 1) / max(count - 1, 1))
