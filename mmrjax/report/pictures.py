"""Pictures of anomaly maps: heat overlays on one fixed colour scale, truth outlines, the gallery.

Everything works on NumPy arrays with OpenCV; neither JAX nor a display is needed. Two rules keep
the pictures honest:

* All images of a run share one scale. A scale per image would paint a perfect part as hot as a
  broken part. `fixed_scale` takes the scale from the pooled maps and never sees a label.
* The colour map is perceptually uniform and rises in lightness from end to end (inferno), so that
  grey print and any colour vision keep the order.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import cv2
import numpy as np

from mmrjax.runtime import files

LOW_QUANTILE = 0.5  # half of all pixels carry no colour at all: normal regions stay visible
HIGH_QUANTILE = 0.995  # 1 pixel in 200 saturates: a few hot pixels cannot stretch the scale
MAX_SAMPLED_PIXELS = 20_000_000  # beyond this, quantiles are taken on an even subsample
MAX_OPACITY = 0.85  # the picture shines through even at the top of the scale
OUTLINE_RGB = (64, 224, 255)  # light cyan: far from every inferno colour and from grey metal
KINDS = ("best", "worst", "borderline")

# [256, 3] uint8 RGB, purple through orange to pale yellow. The near-black first fifth of inferno is
# left out: nobody would see it on dark metal.
_LEVELS = (np.linspace(0.2, 1, 256) * 256).clip(max=255).astype(np.uint8)
COLOURS = cv2.applyColorMap(_LEVELS, cv2.COLORMAP_INFERNO).reshape(256, 3)[:, ::-1]


def fixed_scale(maps: np.ndarray) -> tuple[float, float]:
    """One colour scale for a whole run, from all its maps and no label.

    `low` is the median and `high` the 99.5 % quantile of the pooled pixels of good and defective
    images alike. Neither a hot pixel nor the share of defects moves them far.

    Args:
        maps: anomaly maps, float [n, h, w]; values that are not finite are ignored.

    Returns:
        (low, high) with low < high; a constant map gives (value, value + a little).

    Raises:
        ValueError: there is no finite value.
    """
    values = np.asarray(maps).reshape(-1)
    stride = -(-values.size // MAX_SAMPLED_PIXELS)
    if stride > 1:
        width = np.shape(maps)[-1]
        while math.gcd(stride, width) != 1:  # a common factor would skip some columns always
            stride += 1
        values = values[::stride]
    values = values[np.isfinite(values)].astype(np.float64)
    if values.size == 0:
        raise ValueError(
            f"maps of shape {np.shape(maps)} hold no finite value to take a scale from"
        )
    low, high = (float(q) for q in np.quantile(values, (LOW_QUANTILE, HIGH_QUANTILE)))
    if high <= low:
        high = max(float(values.max()), low + max(1e-6, 1e-3 * abs(low)))
    return low, high


def scale_position(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Positions of values on the scale, float32: 0 at low and below, 1 at high and above."""
    low, high = scale
    if not high > low:
        raise ValueError(f"scale={scale} needs low < high; take it from fixed_scale")
    position = (np.asarray(values, np.float64) - low) / (high - low)
    return np.clip(position, 0.0, 1.0).astype(np.float32)


def colour_and_opacity(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour of a position on the scale, and its opacity over the picture.

    Opacity rises from 0, quickly at first: normal regions keep the look of the photograph, and a
    weak response is visible.

    Args:
        position: float [...] in 0..1, as `scale_position` gives.

    Returns:
        RGB uint8 [..., 3], and opacity float32 [...] in 0..MAX_OPACITY.
    """
    colour = COLOURS[np.rint(position * 255).astype(np.intp)]
    return colour, (MAX_OPACITY * position**0.7).astype(np.float32)


def heat_overlay(
    image: np.ndarray, anomaly_map: np.ndarray, scale: tuple[float, float]
) -> np.ndarray:
    """Paints an anomaly map over its picture.

    Args:
        image: RGB uint8 [h, w, 3].
        anomaly_map: float [h, w], same geometry as the image.
        scale: (low, high) from `fixed_scale`; equal values get equal colours in every image.

    Returns:
        RGB uint8 [h, w, 3].
    """
    if image.dtype != np.uint8 or image.shape[:2] != anomaly_map.shape or image.shape[2:] != (3,):
        raise ValueError(
            f"image is {image.dtype} {image.shape} and map {anomaly_map.shape}; expected uint8"
            " [h, w, 3] and [h, w] of one size: resize one to the other first"
        )
    colour, opacity = colour_and_opacity(scale_position(anomaly_map, scale))
    opacity = opacity[..., None]  # [h, w, 1]
    blend = image * (1 - opacity) + colour * opacity
    return np.rint(blend).astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draws the contour of the true defect around it, so that the defect itself stays visible.

    The line is bright with a dark rim, readable on light and on dark metal. It runs along the
    picture's edge if the defect touches the edge.

    Args:
        image: RGB uint8 [h, w, 3].
        mask: bool [h, w], true on the defect.

    Returns:
        A new RGB uint8 [h, w, 3]; equal to the image if the mask is empty.
    """
    mask = np.asarray(mask, bool)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask is {mask.shape} but the image {image.shape}; resize one first")
    thickness = max(1, round(min(mask.shape) / 120))
    line = _ring(mask, thickness)
    rim = _ring(mask | line, 1) & ~line
    drawn = image.copy()
    drawn[rim] = drawn[rim] // 4
    drawn[line] = OUTLINE_RGB
    return drawn


def draw_boxes(image: np.ndarray, boxes: Iterable) -> np.ndarray:
    """Draws the frames of anomalous regions, outside of them.

    Args:
        image: RGB uint8 [h, w, 3].
        boxes: with x, y, width and height in px each.

    Returns:
        A new RGB uint8 [h, w, 3].
    """
    drawn = np.ascontiguousarray(image).copy()
    thickness = max(1, round(min(image.shape[:2]) / 250))
    for box in boxes:
        corners = (
            (box.x - thickness, box.y - thickness),
            (box.x + box.width + thickness - 1, box.y + box.height + thickness - 1),
        )
        cv2.rectangle(drawn, *corners, (0, 0, 0), thickness + 2)  # a dark rim, for light parts
        cv2.rectangle(drawn, *corners, OUTLINE_RGB, thickness)
    return drawn


def _ring(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels within `thickness` outside the mask, and inside it along the picture's own edge."""
    side = 2 * thickness + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    grown = cv2.dilate(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    along_edge = np.ones_like(mask)
    along_edge[thickness:-thickness, thickness:-thickness] = False
    return (grown.astype(bool) & ~mask) | (mask & along_edge)


def crossing_score(scores: np.ndarray, is_anomaly: np.ndarray) -> float | None:
    """The score at which the two classes cross.

    The share of good images above the score equals the share of anomalies below. The score uses the
    labels: it serves to look at results, never as a threshold to decide with.

    Args:
        scores: float [n].
        is_anomaly: bool [n].

    Returns:
        The middle between two neighbouring scores, or None for a single class.
    """
    scores, is_anomaly = np.asarray(scores, np.float64), np.asarray(is_anomaly, bool)
    if is_anomaly.all() or not is_anomaly.any():
        return None
    levels = np.unique(scores)  # sorted
    cuts = np.concatenate([levels[:1], (levels[:-1] + levels[1:]) / 2, levels[-1:]])
    good, bad = np.sort(scores[~is_anomaly]), np.sort(scores[is_anomaly])
    good_above = 1 - np.searchsorted(good, cuts) / good.size
    bad_below = np.searchsorted(bad, cuts) / bad.size
    return float(cuts[np.argmin(np.abs(good_above - bad_below))])


def choose_gallery(
    scores: Sequence[float], is_anomaly: Sequence[bool], count: int
) -> list[tuple[int, str]]:
    """Chooses the clearest, the most wrong and the least decided images of a run.

    * best: two anomalies of the highest scores for each good image of the lowest; never an image on
      the wrong side of `crossing_score`.
    * worst: the anomaly scored lowest, the good image scored highest, and so on.
    * borderline: nearest to `crossing_score`; no image if there is a single class.

    The kinds take turns, so that each gets its share of few images and no image appears twice. Ties
    go to the lower index: the same input always gives the same gallery.

    Args:
        scores: finite anomaly score per image [n].
        is_anomaly: truth per image [n].
        count: images per kind; fewer if there are not enough.

    Returns:
        (index, kind) in the order best, worst, borderline, the clearest case of a kind first.
    """
    scores, is_anomaly = np.asarray(scores, np.float64), np.asarray(is_anomaly, bool)
    if scores.shape != is_anomaly.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and is_anomaly {is_anomaly.shape} must be [n]")
    cut = crossing_score(scores, is_anomaly)
    rising = np.argsort(scores, kind="stable")
    falling = np.argsort(-scores, kind="stable")
    right = np.ones(scores.shape, bool) if cut is None else (scores >= cut) == is_anomaly
    candidates = {
        "best": _take_turns(
            [i for i in falling if is_anomaly[i] and right[i]],
            [i for i in rising if not is_anomaly[i] and right[i]],
            first_share=2,
        ),
        "worst": _take_turns(
            [i for i in rising if is_anomaly[i]], [i for i in falling if not is_anomaly[i]]
        ),
        "borderline": iter(
            [] if cut is None else np.argsort(np.abs(scores - cut), kind="stable").tolist()
        ),
    }
    chosen: dict[int, str] = {}  # keeps the order of choice
    for _ in range(count):
        for kind in KINDS:
            index = next((int(i) for i in candidates[kind] if int(i) not in chosen), None)
            if index is not None:
                chosen[index] = kind
    return [(index, kind) for wanted in KINDS for index, kind in chosen.items() if kind == wanted]


def _take_turns(first: list, second: list, first_share: int = 1) -> Iterator:
    """Yields `first_share` items of the first list per item of the second until both are empty."""
    while first or second:
        yield from first[:first_share]
        yield from second[:1]
        first, second = first[first_share:], second[1:]


def write_gallery(
    folder: str | os.PathLike,
    images: Sequence[np.ndarray],
    maps: np.ndarray,
    masks: np.ndarray,
    table: Mapping[str, Sequence],
    scale: tuple[float, float],
    count: int,
) -> None:
    """Writes the chosen pictures of a run as PNG files, and gallery.json beside them.

    Every item has the picture as the model saw it (`000_image.png`) and its heat overlay
    (`000_heat.png`); an anomaly with pixel truth inside the frame also has its outline
    (`000_truth.png`). gallery.json is written last: a gallery with that file is complete.

    Args:
        folder: made if absent. Pictures of an earlier gallery are removed.
        images: RGB uint8 [n, h, w, 3], indexable; only the chosen images are read.
        maps: float [n, h, w].
        masks: bool [n, h, w].
        table: columns id, label ("good" or "anomaly"), domain, defect, score, has_mask, each [n].
        scale: (low, high) from `fixed_scale`.
        count: images per kind, see `choose_gallery`.

    Raises:
        ValueError: a label is neither "good" nor "anomaly".
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = [str(label) for label in table["label"]]
    if unknown := set(labels) - {"good", "anomaly"}:
        raise ValueError(f"labels {sorted(unknown)} in the table; expected 'good' or 'anomaly'")
    is_anomaly = [label == "anomaly" for label in labels]
    (folder / "gallery.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(r"\d{3,}_(image|heat|truth)\.png", path.name):
            path.unlink()
    items = []
    for number, (index, kind) in enumerate(choose_gallery(table["score"], is_anomaly, count)):
        image = np.asarray(images[index])
        pictures = {"image": image, "heat": heat_overlay(image, np.asarray(maps[index]), scale)}
        if is_anomaly[index] and table["has_mask"][index] and np.any(masks[index]):
            pictures["truth"] = outline(image, masks[index])
        names = {name: f"{number:03d}_{name}.png" for name in pictures}
        for name, pixels in pictures.items():
            write_png(folder / names[name], pixels)
        item = {name: str(table[name][index]) for name in ("id", "label", "domain", "defect")}
        score = float(table["score"][index])
        items.append({"kind": kind, "score": score, "truth": None, **item, **names})
    text = json.dumps({"scale": [float(scale[0]), float(scale[1])], "items": items}, indent=1)
    files.write_text(folder / "gallery.json", text + "\n")


def png(image: np.ndarray) -> bytes:
    """RGB uint8 [h, w, 3] as a PNG file."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def write_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes RGB uint8 [h, w, 3]; cv2.imwrite would report a bad path only by False."""
    files.write_bytes(path, png(image))
