"""The PyTorch side of `mmrjax.bench --vs=torch`, measured in a process of its own.

Reads what `Programs.write_torch` wrote. For training, batches lie normalised in memory, whereas JAX
crops and flips inside the measured step. "eager" runs as PyTorch comes; the other variants are
tuned: fused AdamW, cuDNN tries its kernels, freed memory stays in the process.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np
import torch

from mmrjax import methods
from mmrjax.bench import programs
from mmrjax.runs import restore
from mmrjax.runtime import devices
from mmrjax.weights import layouts


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the module."""

    tuned: bool = True
    channels_last: bool = True
    bfloat16: bool = False  # autocast of the networks, TF32 in what stays float32
    compiled: bool = False  # torch.compile


VARIANTS = {
    "eager": Variant(tuned=False, channels_last=False),
    "channels_last": Variant(),
    "bfloat16": Variant(bfloat16=True),
    "compile": Variant(bfloat16=True, compiled=True),
}
ON_CPU = ("eager", "channels_last")


class Torch:
    """A scorer, its optimiser and images in a variant."""

    def __init__(self, arguments: argparse.Namespace):
        """Loads the scorer onto the GPU, if there is one."""
        variant, batch = VARIANTS[arguments.variant], arguments.batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(arguments.threads)
        if variant.tuned:
            devices.keep_freed()
            torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = variant.bfloat16
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        scorer = load(arguments.folder).to(self.device, memory_format=layout)
        images = np.load(arguments.folder / "compared.npz", allow_pickle=False)["images"]
        pixels = torch.from_numpy(np.resize(images, (2 * batch, *images.shape[1:])))
        self.pixels = pixels.to(self.device).split(batch)
        if arguments.task == "train":
            if not hasattr(scorer, "loss"):
                raise SystemExit("error: the PyTorch form of this method cannot train")
            scorer.student.requires_grad_(True)
            self.images = [
                scorer.normalise(x).contiguous(memory_format=layout) for x in self.pixels
            ]
            self.optimiser = scorer.optimiser(fused=variant.tuned or None)
        bfloat16 = torch.autocast(self.device.type, torch.bfloat16, enabled=variant.bfloat16)
        scorer.features = bfloat16(scorer.features)
        compiled = torch.compile if variant.compiled else lambda function: function
        self.loss = compiled(bfloat16(scorer.loss)) if arguments.task == "train" else None
        self.score = compiled(scorer)

    def train(self, steps: int) -> None:
        """Runs some training steps."""
        for i in range(steps):
            self.optimiser.zero_grad(set_to_none=True)
            self.loss(self.images[i % 2]).backward()
            self.optimiser.step()
        self._finish()

    def evaluate(self, batches: int) -> None:
        """Computes maps and scores of some batches."""
        with torch.no_grad():
            for i in range(batches):
                self.score(self.pixels[i % 2])
        self._finish()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def load(folder: pathlib.Path) -> torch.nn.Module:
    """The PyTorch form of the method whose weights `Programs.write_torch` has written."""
    config = restore.read_config(folder)
    with np.load(folder / "weights.npz", allow_pickle=False) as file:
        weights = layouts.unflatten({name: file[name] for name in file.files})
    method = methods.create(config.method.names[0], config)
    scorer = method.torch_scorer(weights["variables"], weights["frozen"])
    return scorer.eval().requires_grad_(False)


def differences(folder: pathlib.Path) -> dict[str, float]:
    """Largest differences of maps and scores from JAX's; float32 on the CPU.

    They are relative to the largest value of JAX's maps if that exceeds 1.
    """
    compared = np.load(folder / "compared.npz", allow_pickle=False)
    with torch.no_grad():
        found = load(folder)(torch.from_numpy(compared["images"]))
    scale = max(1.0, float(np.abs(compared["map"]).max()))
    pairs = zip(("map", "score"), found, strict=True)
    return {k: float(np.abs(x.numpy() - compared[k]).max()) / scale for k, x in pairs}


def main() -> None:
    """Runs the command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--task", choices=("compare", "train", "evaluate"), required=True)
    parser.add_argument("--variant", default="eager", choices=VARIANTS)
    for name in ("batch", "threads", "windows"):
        parser.add_argument(f"--{name}", type=int, default=2)
    parser.add_argument("--window_seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # JAX only reads weights: the device is PyTorch's
    if arguments.task == "compare":
        print(json.dumps(differences(arguments.folder)))
        return
    measured = Torch(arguments)
    run = measured.train if arguments.task == "train" else measured.evaluate
    plan = programs.Plan(arguments.windows, arguments.window_seconds)
    rate = programs.measure(run, arguments.batch, plan)
    print(json.dumps({"windows": rate["windows"]}))


if __name__ == "__main__":
    main()
