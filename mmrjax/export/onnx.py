"""The scorer of a run as ONNX, by way of PyTorch: mmrjax.export calls it for --output=….onnx.

The method gives its scorer as a PyTorch module (`Method.torch_scorer`), and torch.onnx traces the
module. Everything computes in float32. Needs the onnx extra.
"""

import contextlib
import logging
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
import onnxruntime
import torch
from torch import nn

from mmrjax import methods
from mmrjax.runs import detector as detector_lib

LARGEST = 2**31  # bytes that one ONNX file can hold: protobuf's limit
OPSET = 20  # runs on onnxruntime 1.17 and newer


class WithVerdict(nn.Module):
    """A scorer that also says whether the score exceeds a threshold."""

    def __init__(self, scorer: nn.Module, threshold: float):
        super().__init__()
        self.scorer, self.threshold = scorer, threshold

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 [b, h, w, 3] -> map [b, h, w], score [b], verdict bool [b]."""
        found, score = self.scorer(images)
        return found, score, score > self.threshold


def serialise(detector: detector_lib.Detector) -> bytes:
    """An ONNX file: "images", uint8 RGB [b, h, w, 3] -> "map", "score" and "is_anomaly".

    "is_anomaly" is absent without a threshold. b is free.

    Raises:
      ValueError: there is no PyTorch form of the method, or the model is too large for one file.
    """
    scorer, threshold = build(detector), detector.thresholds[0]
    size = sum(tensor.nbytes for tensor in scorer.state_dict().values())
    if size >= LARGEST:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB, an ONNX file holds 2; use --output=….jax or a "
            "smaller model"
        )
    names = ["map", "score"]
    if threshold is not None:
        scorer, names = WithVerdict(scorer, threshold), [*names, "is_anomaly"]
    images = torch.zeros((2, *detector.view.size, 3), dtype=torch.uint8)  # 1 would be a constant
    with _quiet():
        program = torch.onnx.export(
            scorer.eval().requires_grad_(False),
            (images,),
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("b")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    return program.model_proto.SerializeToString()


def run(path: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of an exported file for uint8 images [b, h, w, 3], on the CPU."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def build(detector: detector_lib.Detector) -> nn.Module:
    """The PyTorch form of a detector; ValueError if its method has none."""
    trained = detector.trained
    if trained.method.torch_scorer is None:
        known = [name for name, kind in methods.METHODS.items() if kind.torch_scorer is not None]
        raise ValueError(
            f"ONNX export knows {', '.join(sorted(known))}, not {trained.method.name}; use "
            "--output=….jax"
        )
    return trained.method.torch_scorer(trained.variables, trained.frozen)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences remarks of the exporter on its own code; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
