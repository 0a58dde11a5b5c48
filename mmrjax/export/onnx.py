"""The scorer of a run as ONNX, by way of PyTorch: called by export.py for --output=….onnx.

The networks are those of torch_reference.py with the run's weights; normalisation, map, score and
verdict are written here once more in PyTorch, from the same constant matrices as the JAX ones, and
torch.onnx traces the whole. Everything computes in float32. Needs the onnx extra; export.py imports
this module only when an ONNX file is wanted.
"""

import contextlib
import logging
import pathlib
import warnings
from collections.abc import Iterator

import jax
import numpy as np
import onnxruntime
import torch
from torch import nn

from mmrjax.methods import anomaly_map, patchcore
from mmrjax.models import resnet
from mmrjax.runs import detector as detector_lib
from mmrjax.weights import torch_names, torch_twin

LARGEST = 2**31  # bytes that one ONNX file can hold: protobuf's limit
OPSET = 20  # runs on onnxruntime 1.17 and newer


def serialise(detector: detector_lib.Detector) -> bytes:
    """An ONNX file: "images", uint8 RGB [b, h, w, 3] -> "map", "score" and "is_anomaly".

    "is_anomaly" is absent without a threshold. b is free.

    Raises:
      ValueError: there is no PyTorch form of the method, or the model is too large for one file.
    """
    scorer = build(detector)
    size = sum(tensor.nbytes for tensor in scorer.state_dict().values())
    if size >= LARGEST:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB, an ONNX file holds 2; use --output=….jax, or a "
            "smaller patchcore.coreset"
        )
    images = torch.zeros((2, *detector.view.size, 3), dtype=torch.uint8)  # 1 would be a constant
    names = ["map", "score", "is_anomaly"][: 2 if scorer.threshold is None else 3]
    with _quiet():
        program = torch.onnx.export(
            scorer,
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
    """What an exported file says of uint8 images [b, h, w, 3], on the CPU."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def build(detector: detector_lib.Detector) -> "Scorer":
    """The PyTorch form of a detector; ValueError when its method has none."""
    method = detector.trained.method.name
    if method not in SCORERS:
        raise ValueError(
            f"ONNX export knows {' and '.join(sorted(SCORERS))}, not {method}; use --output=….jax"
        )
    return SCORERS[method](detector).eval().requires_grad_(False)


class Scorer(nn.Module):
    """Frozen teacher, normalisation, statistics by place, verdict; a subclass gives the parts."""

    def __init__(self, detector: detector_lib.Detector):
        super().__init__()
        self.config = detector.trained.method.config
        self.size, self.threshold = detector.view.size, detector.thresholds[0]
        arch = self.config.teacher.name
        variables = jax.device_get(detector.trained.frozen["teacher"])
        state = _tensors(torch_names.teacher_to_torch(variables, resnet.architecture(arch)))
        self.teacher = torch_twin.teacher_of(state, arch)
        places = jax.device_get(detector.trained.variables).get("places", {})
        for part, x in places.items():
            self.register_buffer(f"place_{part}", torch.tensor(np.stack([x["mean"], x["std"]])))
        self.by_place = bool(places)
        self.register_buffer("mean", torch.tensor(resnet.IMAGENET_MEAN))
        self.register_buffer("std", torch.tensor(resnet.IMAGENET_STD))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 [b, h, w, 3] -> map [b, h, w], score [b] and, with a threshold, verdict [b]."""
        x = (images.float() / 255 - self.mean) / self.std
        parts, score = self.judge(x.permute(0, 3, 1, 2))
        if self.by_place:  # methods/by_place.py
            places = {part: getattr(self, f"place_{part}") for part in parts}
            parts = {part: (x - places[part][0]) / places[part][1] for part, x in parts.items()}
        found = sum(parts.values())
        if self.by_place or score is None:
            score = found.amax((1, 2))
        return (found, score) if self.threshold is None else (found, score, score > self.threshold)

    def smooth(
        self,
        distance: torch.Tensor,
        align_corners: bool,
        sigma: float = anomaly_map.GAUSSIAN_SIGMA,
    ) -> torch.Tensor:
        """As anomaly_map.upsample_and_smooth: [b, h_l, w_l] -> [b, h, w]."""
        rows, columns = (
            _constant(anomaly_map.operator(n, size, align_corners, sigma))
            for n, size in zip(distance.shape[1:], self.size, strict=True)
        )
        return rows @ distance @ columns.T


class MMRScorer(Scorer):
    """methods/mmr.py, `predict`."""

    def __init__(self, detector: detector_lib.Detector):
        super().__init__(detector)
        student = detector.trained.method.student
        grid = tuple(side // student.patch for side in self.size)
        variables = jax.device_get(detector.trained.variables)
        state = _tensors(torch_names.student_to_torch(variables, grid))
        header = {"heads": student.heads, "image_size": "{},{}".format(*self.size)}
        self.student = torch_twin.student_of(state, header)

    def judge(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], None]:
        """Normalised [b, 3, h, w] -> parts of the map [b, h, w], whose maximum is the score."""
        features, targets = self.student.unmasked(images), self.teacher(images)
        distance = torch_twin.cosine_distance
        parts = {k: self.smooth(distance(x, targets[k]), True) for k, x in features.items()}
        return parts, None


class PatchCoreScorer(Scorer):
    """methods/patchcore.py, `predict`."""

    def __init__(self, detector: detector_lib.Detector):
        super().__init__(detector)
        memory = detector.trained.variables["memory"]
        self.scales = patchcore.by_part(self.config.patchcore.scales)
        self.memories = nn.ModuleDict(
            {
                part: Memory(memory if len(self.scales) == 1 else memory[part])
                for part in self.scales
            }
        )

    def judge(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Normalised [b, 3, h, w] -> a part [b, h, w] for each scale; score [b] if another."""
        parts, peak = {}, 0.0
        for part, scale in self.scales.items():
            distance = self.memories[part](self.embed(images, scale))
            parts[part] = self.smooth(distance, False, patchcore.smoothing(scale))
            peak = peak + distance.amax((1, 2))
        return parts, peak if self.config.patchcore.score == "patch" else None

    def embed(self, images: torch.Tensor, scale: float) -> torch.Tensor:
        """Patch embeddings [b, h, w, d]."""
        options = self.config.patchcore
        size = patchcore.scaled(tuple(images.shape[2:]), scale, max(options.layers))
        features = self.teacher(_resize(images.permute(0, 2, 3, 1), size).permute(0, 3, 1, 2))
        layers = [features[f"layer{layer}"] for layer in sorted(options.layers)]
        grid, pooled = layers[0].shape[2:], []
        for x in layers:
            x = _neighbourhoods(x, options.patch)
            x = x @ _constant(patchcore.adaptive_pool_matrix(x.shape[-1], options.width))
            pooled.append(_resize(x, grid))
        x = torch.stack(pooled, dim=-2)
        return x.flatten(3).unflatten(3, (options.width, len(pooled))).mean(dim=-1)


class Memory(nn.Module):
    """What a fit keeps of one scale."""

    def __init__(self, memory: dict):
        super().__init__()
        bank = np.array(memory["bank"])
        for name in ("whitening", "expected"):  # there with the options of these names
            there = torch.from_numpy(np.array(memory[name])) if name in memory else None
            self.register_buffer(name, there)
        self.register_buffer("bank", torch.from_numpy(bank))
        self.register_buffer("squares", torch.from_numpy(np.sum(bank**2, axis=1)))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Squared distances of patches [b, h, w, d] to their nearest bank rows, [b, h, w].

        Relative to what the rows expect, where the run has that.
        """
        patches = patches if self.whitening is None else patches @ self.whitening
        best, expected = None, None
        for start in range(0, len(self.bank), patchcore.BANK_ROWS_PER_CHUNK):
            chunk = slice(start, start + patchcore.BANK_ROWS_PER_CHUNK)
            part, row = (self.squares[chunk] - 2 * patches @ self.bank[chunk].T).min(-1)
            if self.expected is not None:
                own = self.expected[chunk][row]
                expected = own if best is None else torch.where(part < best, own, expected)
            best = part if best is None else torch.minimum(best, part)
        distance = (best + patches.square().sum(-1)).clamp(min=0)
        return distance if expected is None else distance / expected


SCORERS = {"mmr": MMRScorer, "patchcore": PatchCoreScorer}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own code; what matters it raises."""
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


def _neighbourhoods(x: torch.Tensor, size: int) -> torch.Tensor:
    """Zero-padded s x s neighbourhoods, channel-major: [b, c, h, w] -> [b, h, w, c * s * s]."""
    h, w = x.shape[2:]
    x = nn.functional.pad(x, (size // 2,) * 4)
    shifts = [x[:, :, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return torch.stack(shifts, dim=2).flatten(1, 2).permute(0, 2, 3, 1)


def _resize(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Bilinear, averaging where it shrinks: [b, h, w, d] -> [b, *grid, d]."""
    if tuple(x.shape[1:3]) == tuple(grid):
        return x
    rows, columns = (
        _constant(anomaly_map.resize_matrix(n, m)) for n, m in zip(x.shape[1:3], grid, strict=True)
    )
    x = columns @ x  # [b, h, grid w, d]
    return (rows @ x.flatten(2)).unflatten(2, x.shape[2:])


def _constant(matrix: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(matrix.astype(np.float32))


def _tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in state.items()}
