"""Trains the embedded teacher `fdsl18` on procedural images alone and writes its weights.

    python scripts/pretrain_teacher.py --output=mmrjax/weights/fdsl18.safetensors

A ResNet-18 of reduced width, stem to layer 3, with BatchNorm; what is written has BatchNorm folded
in and float16 numbers. No photograph and no file is read. Drawing: scripts/procedural/textures.py
and scenes.py; what is learned: objective.py. A run that was stopped goes on from its last state
(<output>.state, every five minutes), to the same weights on the same machine.

Needs the torch extra: the job was made for two CPU cores, where PyTorch's bfloat16 convolutions
train this network several times faster than XLA's (docs/fdsl18.md).
"""

import argparse
import io
import math
import os
import pathlib
import time

import jax
import numpy as np
import torch
from absl import logging
from procedural import objective, stream
from torch import nn

from mmrjax import files, logs, torch_reference
from mmrjax.models import resnet
from mmrjax.weights import storage, torch_names

NAME = "fdsl18"
STATE_SECONDS = 300.0
LICENCE = "Apache-2.0 (trained by mmrjax on procedural images)"
WARM_UP = 0.05  # of the steps
MEAN, STD = (torch.tensor(x)[:, None, None] for x in (resnet.IMAGENET_MEAN, resnet.IMAGENET_STD))


class Network(torch_reference.ResNetTeacher):
    """The twin's teacher, not frozen: torchvision's names, BatchNorm of the batch."""

    def __init__(self, arch: resnet.Architecture):
        super().__init__("resnet18", arch.stem, arch.widths)
        self.requires_grad_(True)
        nn.Module.train(self)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.05

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """uint8 [b, h, w, 3] -> {layer: float32 [b, c, h', w']}; computed in bfloat16."""
        x = (images.permute(0, 3, 1, 2) / 255 - MEAN) / STD  # channels stay last in memory
        with torch.autocast("cpu", torch.bfloat16):
            features = super().forward(x)
        return {n: features[f"layer{n}"].float() for n in (1, 2, 3)}


class Training:
    """The network, its optimiser and one step of it."""

    def __init__(self, arch: resnet.Architecture, steps: int, learning_rate: float, seed: int):
        """The first state of a seed."""
        torch.manual_seed(seed)
        self.step, self._steps, self._seed = 0, steps, seed
        self._learning_rate = learning_rate
        self.network = Network(arch).to(memory_format=torch.channels_last)
        self.scales = nn.ParameterDict(
            {name: torch.tensor(objective.FIRST_SCALE) for name in objective.TERMS}
        )
        weights = list(self.network.named_parameters())
        decayed = [p for name, p in weights if p.ndim == 4]
        others = [p for name, p in weights if p.ndim != 4] + list(self.scales.parameters())
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
        self._optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        self._parts = (self.network, self.scales, self._optimiser)

    def update(self, images: np.ndarray, damage: np.ndarray) -> dict[str, float]:
        """One step on [e, v, h, w, 3] and [e, v, h, w]: the values of the objective."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.step)
        features = self.network(torch.from_numpy(images).flatten(0, 1))
        value, terms = objective.loss(features, self.scales, torch.from_numpy(damage), generator)
        self._optimiser.zero_grad()
        value.backward()
        parameters = [p for group in self._optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 2.0)
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate()
        self._optimiser.step()
        self.step += 1
        return {"loss": value.item(), **terms}

    def _rate(self) -> float:
        """Linear warm-up, then half a cosine to zero."""
        warm = WARM_UP * self._steps
        if self.step < warm:
            return self._learning_rate * self.step / warm
        done = (self.step - warm) / (self._steps - warm)
        return self._learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def save(self, path: pathlib.Path) -> None:
        """Writes everything that changes in training, whole or not at all."""
        buffer = io.BytesIO()
        torch.save((self.step, [part.state_dict() for part in self._parts]), buffer)
        files.write_bytes(path, buffer.getvalue())

    def restore(self, path: pathlib.Path) -> None:
        """The reverse of `save`."""
        self.step, states = torch.load(path, weights_only=True)
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)

    def folded(self) -> dict:
        """float16 variables of `models.resnet.ResNet`: every BatchNorm in its convolution."""
        state = {name: leaf.numpy() for name, leaf in self.network.state_dict().items()}
        variables = torch_names.teacher_from_torch(state, resnet.architecture(NAME))
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), variables)


def train(args: argparse.Namespace) -> Training:
    """Runs the training up to step `args.stop`, from the last state if there is one."""
    torch.set_num_threads(args.threads)
    training = Training(resnet.architecture(NAME), args.steps, args.learning_rate, args.seed)
    path = args.output.with_suffix(".state")
    if path.exists():
        training.restore(path)
        logging.info("continuing at step %d from %s", training.step, path)
    start, began, last_saved, shown = training.step, time.monotonic(), time.monotonic(), {}
    source = stream.batches(
        args.seed, args.classes, args.episodes, args.views, start, args.stop, args.workers
    )
    for images, damage in logs.progress(source, "pretraining", args.stop - start):
        for name, value in training.update(images, damage).items():
            shown[name] = 0.98 * shown.get(name, value) + 0.02 * value
        if training.step % 100 == 0:
            seen = (training.step - start) * args.episodes * args.views
            rate = seen / (time.monotonic() - began)
            words = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
            logging.info("step %d of %d: %s; %.0f images/s", training.step, args.steps, words, rate)
        if time.monotonic() - last_saved > STATE_SECONDS:
            training.save(path)
            last_saved = time.monotonic()
    training.save(path)
    return training


def command(args: argparse.Namespace) -> str:
    """The command line that makes the same weights; where they were written does not matter."""
    fields = [
        f"--{name}={value}" for name, value in vars(args).items() if name not in ("output", "stop")
    ]
    return " ".join(["python scripts/pretrain_teacher.py", *fields])


def main() -> None:
    """Parses the command line, trains and writes."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a .safetensors file")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--stop", type=int, help="leave after this step, to go on another time")
    parser.add_argument("--episodes", type=int, default=10, help="designs in a step")
    parser.add_argument("--views", type=int, default=6, help="views of a design")
    parser.add_argument("--classes", type=int, default=4160, help="textures")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--threads", type=int, default=max(1, cores - 1), help="that train")
    args = parser.parse_args()
    args.stop = args.steps if args.stop is None else min(args.stop, args.steps)
    logs.setup()
    training = train(args)
    if args.stop < args.steps:
        logging.info("stopped at step %d; the same command without --stop goes on", args.stop)
        return
    facts = {"kind": "teacher", "arch": NAME, "licence": LICENCE, "command": command(args)}
    storage.write(args.output, training.folded(), facts)
    logging.info("wrote %s, %.2f MB", args.output, args.output.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
