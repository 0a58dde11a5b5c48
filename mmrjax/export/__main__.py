"""The scorer of a run as one file: python -m mmrjax.export --workdir=<run> --output=scorer.jax.

The file holds the weights, the normalisation, the map, the score and the threshold. Its input is
uint8 RGB [b, h, w, 3] at the model's input size, for any b. The file is a serialised JAX program
(jax.export) for cpu, cuda and tpu. JAX alone runs it, without this package:

    scorer = jax.export.deserialize(open("scorer.jax", "rb").read())
    found = scorer.call(images)   # {"map": [b, h, w], "score": [b], "is_anomaly": [b]}

A name that ends in .onnx makes an ONNX file (see export/onnx.py) for onnxruntime, whose input is
called "images" and whose outputs have the same names.

<output>.json beside the file says how an image becomes the input, and what the threshold promises.
The file is loaded again and compared with the model before the command succeeds.
"""

import argparse
import functools
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax import export

from data_builders import files as image_folders
from mmrjax import methods
from mmrjax.data import geometry
from mmrjax.models import backbones
from mmrjax.runs import arguments as arguments_lib
from mmrjax.runs import detector as detector_lib
from mmrjax.runs import places
from mmrjax.runtime import command_line, files

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5  # of scores and maps; relative if the map exceeds 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = arguments_lib.parse_export(argv)
    return command_line.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    detector = detector_lib.load(places.run(arguments.workdir))
    if arguments.calibration is not None:
        detector = detector.with_file(arguments.calibration)
    if arguments.target_fpr is not None:
        detector = detector.with_target(arguments.target_fpr)
    write(detector, arguments.output, arguments.images)
    return 0


def write(
    detector: detector_lib.Detector, path: pathlib.Path, folder: str | None = None
) -> pathlib.Path:
    """Writes the file and its .json, and compares the file with the model; returns the path.

    Args:
      detector: a trained run.
      path: the file; its suffix says its kind.
      folder: images to compare on; noise if None.

    Raises:
      ValueError: an unknown suffix, absent extras, or a method without this form.
      RuntimeError: the file differs from the model.
    """
    arguments_lib.check_kind(path)
    images = inputs(detector, folder)
    is_onnx = path.suffix == ".onnx"
    form = importlib.import_module("mmrjax.export.onnx") if is_onnx else sys.modules[__name__]
    files.write_bytes(path, form.serialise(detector))
    found = form.run(path, images)
    difference = compare(detector, path, found, images, is_onnx)
    text = json.dumps(description(detector, found, is_onnx), indent=1)
    files.write_text(path.with_name(f"{path.name}.json"), text)
    size = path.stat().st_size / 2**20
    print(f"loaded again: differs by {difference:.1e} on {len(images)} images")
    print(f"wrote {path} ({size:.1f} MiB)")
    return path


def serialise(detector: detector_lib.Detector) -> bytes:
    """The program with its weights, polymorphic in the batch, for all PLATFORMS."""
    trained = detector.trained
    variables, frozen = jax.device_get((trained.variables, trained.frozen))
    threshold = detector.thresholds[0]
    method = _portable(trained.method)

    def score(images):
        out = _map_and_score(method, variables, frozen, images)
        return (
            out if threshold is None else out | {"is_anomaly": ~(out["score"] <= threshold)}
        )  # NaN too

    (b,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((b, *detector.view.size, 3), np.uint8)
    return bytes(export.export(jax.jit(score), platforms=PLATFORMS)(images).serialize())


def _map_and_score(
    method: methods.base.Method, variables: dict, frozen: dict, images: jax.Array
) -> dict[str, jax.Array]:
    """uint8 images [b, h, w, 3] -> {"map": float32 [b, h, w], "score": float32 [b]}."""
    with method.precision():
        found = method.predict(variables, frozen, geometry.to_unit(images))
    return {"map": found["map"], "score": method.score(found.get("scored", found["map"]))}


def _portable(method: methods.base.Method, dtype: str = "") -> methods.base.Method:
    """The method with kernels that exist on every platform and for a batch of any size.

    Args:
      method: the method of a run.
      dtype: compute dtype; "" keeps that of the run.
    """
    config = method.config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(method.portable))
    config.train.compute_dtype = dtype or config.train.compute_dtype
    portable = methods.create(method.name, config)
    for name, network in vars(portable).items():
        if isinstance(network, backbones.Backbone):
            setattr(portable, name, network.with_conv("direct"))
        if isinstance(network, nn.Module) and hasattr(network, "conv"):
            setattr(portable, name, network.clone(conv="direct"))
    return portable


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


def run(path: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Runs an exported program on uint8 images [b, h, w, 3]."""
    return jax.device_get(export.deserialize(path.read_bytes()).call(images))


def compare(
    detector: detector_lib.Detector,
    path: pathlib.Path,
    found: dict[str, np.ndarray],
    images: np.ndarray,
    in_float32: bool,
) -> float:
    """The largest difference of a file's maps and scores from the model's (see TOLERANCE).

    Args:
      detector: the model.
      path: the file.
      found: its results for `images`.
      images: uint8 [b, h, w, 3].
      in_float32: whether the file computes in float32; the model may compute in bfloat16.

    Raises:
      RuntimeError: it exceeds TOLERANCE.
    """
    trained = detector.trained
    method = _portable(trained.method, "float32" if in_float32 else "")
    want = jax.jit(functools.partial(_map_and_score, method))(
        *jax.device_get((trained.variables, trained.frozen)), images
    )
    scale = max(1.0, float(np.abs(want["map"]).max()))
    difference = max(
        float(np.abs(found[name] - np.asarray(want[name])).max()) / scale
        for name in ("map", "score")
    )
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{path} differs from the model by {difference:.1e}; do not use it")
    return difference


def description(
    detector: detector_lib.Detector, found: dict[str, np.ndarray], is_onnx: bool
) -> dict:
    """How an image becomes the input, and what the threshold promises.

    Args:
      detector: the model.
      found: maps and scores of some images, as `compare` takes them.
      is_onnx: whether the file is ONNX.
    """
    view, (threshold, _, reason) = detector.view, detector.thresholds
    calibration = detector.calibration
    return {
        "method": detector.trained.method.name,
        "input": f"uint8 RGB [b, {view.size[0]}, {view.size[1]}, 3]",
        "size": list(view.size),
        "resize": list(view.resize),
        "interpolation": view.interpolation,
        "as": "Pillow before 13: antialiased, columns first",
        "then": "centre crop" if view.overlap is None else f"windows, {view.overlap} px overlap",
        "overlap": view.overlap,
        "score_is_peak": np.array_equal(found["score"], found["map"].max(axis=(1, 2))),
        "threshold": threshold,
        "no_threshold_because": reason or None,
        "calibration": calibration and calibration.report(detector.target_fpr),
        "scale": detector.scale,
        "platforms": ["onnxruntime"] if is_onnx else list(PLATFORMS),
    }


if __name__ == "__main__":
    sys.exit(main())
