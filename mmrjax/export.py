"""The scorer of a run as one file: python -m mmrjax.export --workdir=<run> --output=scorer.jax.

The file holds the weights, the normalisation, the map, the score and the threshold; what goes in is
uint8 RGB [b, h, w, 3] at the model's input size, for any b. It is a serialised JAX program
(jax.export) for cpu, cuda and tpu. JAX alone runs it, without this package:

    scorer = jax.export.deserialize(open("scorer.jax", "rb").read())
    found = scorer.call(images)   # {"map": [b, h, w], "score": [b], "is_anomaly": [b]}

<output>.json beside it says how an image becomes that input, and what the threshold promises. The
file is loaded again and compared with the model before the command succeeds.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax import export

from data_builders import files as image_folders
from mmrjax import detector as detector_lib
from mmrjax import files
from mmrjax.data import geometry

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5  # of scores and maps; relative where the map exceeds 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parse(argv)
    try:
        detector = detector_lib.load(arguments.workdir, arguments.target_fpr)
        images = inputs(detector, arguments.images)
        files.write_bytes(arguments.output, serialise(detector))
        difference = compare(detector, arguments.output, images)
        text = json.dumps(description(detector), indent=1)
        files.write_text(arguments.output.with_name(f"{arguments.output.name}.json"), text)
    except (ValueError, RuntimeError, OSError) as e:
        if os.environ.get("MMRJAX_TRACEBACK"):
            raise
        print(f"error: {files.explain(e)}", file=sys.stderr)
        return 1
    size = arguments.output.stat().st_size / 2**20
    print(f"loaded again: differs by {difference:.1e} on {len(images)} images")
    print(f"wrote {arguments.output} ({size:.1f} MiB)")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; argparse ends the program when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrjax.export",
        description="Writes the scorer of a run as a serialised JAX program.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of a run")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="such as scorer.jax")
    parser.add_argument("--images", help="folder of images to compare on; otherwise noise")
    parser.add_argument("--target_fpr", type=float, help="false-positive rate of the threshold")
    return parser.parse_args(argv)


def serialise(detector: detector_lib.Detector) -> bytes:
    """The program with its weights, polymorphic in the batch, for all PLATFORMS."""
    trained = detector.trained
    variables, frozen = jax.device_get((trained.variables, trained.frozen))
    threshold = detector.thresholds[0]

    def score(images):
        found = trained.method.predict(variables, frozen, images / 255.0)
        out = {"map": found["map"], "score": found["score"]}
        return out if threshold is None else out | {"is_anomaly": found["score"] > threshold}

    (b,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, *detector.view.size, 3), np.uint8)
    return bytes(export.export(jax.jit(score), platforms=PLATFORMS)(images).serialize())


def inputs(detector: detector_lib.Detector, folder: str | None) -> np.ndarray:
    """Images to compare on, uint8 [n, h, w, 3]: up to one batch of a folder, or noise.

    Raises:
      FileNotFoundError: there is no image in the folder.
    """
    view = detector.view
    if folder is None:
        return np.random.default_rng(0).integers(0, 256, (3, *view.size, 3), dtype=np.uint8)
    paths = image_folders.list_images(folder)[: detector.config.eval.batch_size]
    if not paths:
        raise FileNotFoundError(f"--images={folder}: no image there")
    frames = [
        geometry.view_image(
            detector_lib.read_image(path), view.resize, view.size, view.interpolation
        )
        for path in paths
    ]
    return np.stack(frames)


def compare(detector: detector_lib.Detector, path: pathlib.Path, images: np.ndarray) -> float:
    """The largest difference of the file's maps and scores from the model's (see TOLERANCE).

    Raises:
      RuntimeError: it exceeds TOLERANCE.
    """
    found = export.deserialize(path.read_bytes()).call(images)
    predict = jax.jit(detector.trained.method.predict)
    trained = detector.trained
    want = predict(*jax.device_get((trained.variables, trained.frozen)), images / np.float32(255))
    scale = max(1.0, float(np.abs(want["map"]).max()))
    difference = max(
        float(np.abs(np.asarray(found[name]) - np.asarray(want[name])).max()) / scale
        for name in ("map", "score")
    )
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{path} differs from the model by {difference:.1e}; do not use it")
    return difference


def description(detector: detector_lib.Detector) -> dict:
    """How an image becomes the input, and what the threshold promises."""
    view, (threshold, _, reason) = detector.view, detector.thresholds
    calibration = detector.calibration
    return {
        "method": detector.trained.method.name,
        "input": f"uint8 RGB [b, {view.size[0]}, {view.size[1]}, 3]",
        "resize": list(view.resize),
        "interpolation": f"{view.interpolation}, antialiased, as Pillow",
        "then": "centre crop" if view.overlap is None else f"windows, {view.overlap} px overlap",
        "threshold": threshold,
        "no_threshold_because": reason or None,
        "calibration": calibration and calibration.report(detector.target_fpr),
        "scale": detector.scale,
        "platforms": list(PLATFORMS),
    }


if __name__ == "__main__":
    sys.exit(main())
