"""Scores images with an exported ONNX file: python score_onnx.py SCORER.onnx IMAGE...

SCORER.onnx and SCORER.onnx.json come from `python -m mmrjax.export --output=SCORER.onnx`. The
script needs onnxruntime, numpy and Pillow, and nothing else. It prints a line per image: score,
verdict, path. Files that cannot be read are named and skipped; the exit status is then 3.

With Pillow 11 or 12 and 8-bit PNG or BMP files the scores are those of `mmrjax.predict`. Pillow 13
resizes in another order, by a grey level here and there, and OpenCV's JPEG decoder, which mmrjax
uses, may round otherwise than Pillow's; scores then differ a little.

The image of a tiled run is scored window by window. If the score is the peak of the map, as of MMR,
it is taken from the mean of the windows, as mmrjax does. The file says nothing of other scores but
their values: of PatchCore the highest score of a window is printed. It may exceed that of mmrjax if
the peak lies in an overlap, because mmrjax takes the mean there too.
"""

import io
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# Pillow opens no other: it would hand PostScript, however named, to another program.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def load_image(path: str, about: dict) -> np.ndarray:
    """An image file, upright, resized and, unless windows look at all of it, cropped to its centre.

    uint8 [h, w, 3].
    """
    with open(path, "rb") as stream:
        data = stream.read()  # from a path, Pillow 12 turns an uncompressed RGBA TIFF wrongly
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        if is_deep(data, file):
            raise ValueError("more than 8 bits a pixel; scale it to 8 first")
        if file.format != "MPO" and getattr(file, "n_frames", 1) > 1:
            raise ValueError("several pages; save the one that is meant as a file of its own")
        image = ImageOps.exif_transpose(file).convert("RGB")
    how = Image.Resampling[about["interpolation"].upper()]
    pixels = np.asarray(image.resize(about["resize"][::-1], how))
    if about["overlap"] is not None:
        return pixels
    top, left = (round((n - s) / 2) for n, s in zip(about["resize"], about["size"], strict=True))
    return pixels[top : top + about["size"][0], left : left + about["size"][1]]


def is_deep(data: bytes, file: Image.Image) -> bool:
    """Whether a file has more than 8 bits a channel; Pillow would drop some without a word."""
    if file.format == "PNG":
        return data[24:25] == b"\x10"  # bit depth of the IHDR chunk
    depths = getattr(file, "tag_v2", {}).get(258, (8,))  # a TIFF's BitsPerSample
    return max(depths) > 8 or file.mode.startswith(("I", "F"))


def corners(about: dict) -> list[tuple[int, int]]:
    """(top, left) of the windows that together look at all of a resized image."""
    step = [size - about["overlap"] for size in about["size"]]
    axes = [
        [*range(0, whole - size, s), whole - size]
        for whole, size, s in zip(about["resize"], about["size"], step, strict=True)
    ]
    return [(top, left) for top in axes[0] for left in axes[1]]


def score(session: onnxruntime.InferenceSession, pixels: np.ndarray, about: dict):
    """(score, map [h, w]) of an image; of windows the mean map, its peak or the largest score."""
    if about["overlap"] is None:
        found = session.run(["score", "map"], {"images": pixels[None]})
        return float(found[0][0]), found[1][0]
    (h, w), best = about["size"], -np.inf
    total, seen = np.zeros((2, *pixels.shape[:2]), np.float32)
    for top, left in corners(about):
        window = pixels[None, top : top + h, left : left + w]
        scores, maps = session.run(["score", "map"], {"images": window})
        total[top : top + h, left : left + w] += maps[0]
        seen[top : top + h, left : left + w] += 1
        best = max(best, float(scores[0]))
    whole = total / seen
    return float(whole.max()) if about["score_is_peak"] else best, whole


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    scorer, *paths = sys.argv[1:]
    with open(f"{scorer}.json", encoding="utf-8") as file:
        about = json.load(file)
    session = onnxruntime.InferenceSession(scorer, providers=["CPUExecutionProvider"])
    status = 0
    for path in paths:
        try:
            pixels = load_image(path, about)
        except (OSError, SyntaxError, ValueError) as e:  # Pillow's, of damaged files
            print(f"skipped: {path}: {e}", file=sys.stderr)
            status = 3
            continue
        found, _ = score(session, pixels, about)
        verdict = "-"  # without a threshold
        if about["threshold"] is not None:
            verdict = "anomaly" if found > about["threshold"] else "good"
            if not np.isfinite(found):
                verdict, status = "cannot judge", 3
        print(f"{found:.6f} {verdict:7} {path}")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
