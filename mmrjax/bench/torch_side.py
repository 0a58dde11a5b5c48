"""The other side of `mmrjax.bench`: the PyTorch twin of MMR, measured in a process of its own.

Needs the torch extra. Batches lie finished and normalised in memory, where ours augments inside the
step; the teacher runs without gradients and, but in the "official" variant, ends with layer 3.
"eager" and "official" run as PyTorch comes, TF32 in convolutions included; the others are tuned.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F

from mmrjax.runtime import devices
from mmrjax.weights import torch_twin as twin


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the twin."""

    tuned: bool = True  # fused AdamW, cuDNN tries its kernels, freed memory stays in the process
    channels_last: bool = False
    bfloat16: bool = False  # autocast, TF32 in what stays float32
    compiled: str = ""  # mode of torch.compile
    official: bool = False  # layer 4 is run and thrown away, the loss is read in every step


fastest = functools.partial(Variant, channels_last=True, bfloat16=True)
VARIANTS = {
    "eager": Variant(tuned=False),
    "official": Variant(tuned=False, official=True),
    "contiguous": Variant(),
    "channels_last": Variant(channels_last=True),
    "bfloat16": fastest(),
    "compile": fastest(compiled="default"),
    # Without CUDA graphs, whose results the next call overwrites.
    "max_autotune": fastest(compiled="max-autotune-no-cudagraphs"),
}
ON_CPU = ("eager", "official", "contiguous", "channels_last")


class Twin:
    """Both networks and the optimiser in one variant."""

    def __init__(self, args: argparse.Namespace):
        """Random weights; sizes from the command line."""
        self.variant, self.args = VARIANTS[args.variant], args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(args.threads)
        if self.variant.tuned:
            devices.keep_freed()
            torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = self.variant.bfloat16
        torch.manual_seed(0)
        stages = 4 if self.variant.official else 3
        size = (args.image_size, args.patch, args.width, args.depth, args.heads)
        teacher = twin.ResNetTeacher(args.arch, stages=stages)
        student = twin.MMRStudent(*size, teacher.channels)
        self.format = torch.channels_last if self.variant.channels_last else torch.contiguous_format
        self.teacher, self.student = (
            model.to(self.device, memory_format=self.format) for model in (teacher, student)
        )
        groups = twin.adamw_groups(self.student)
        fused = self.variant.tuned or None
        self.optimiser = torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.95), fused=fused)
        if mode := self.variant.compiled:
            self.teacher, self.student = (
                torch.compile(model, mode=mode) for model in (self.teacher, self.student)
            )
        images = twin.textured_images(2 * args.batch, args.image_size)
        images = images.to(self.device, memory_format=self.format)
        self.batches = images.split(args.batch)

    def train(self, steps: int) -> None:
        """Runs some steps."""
        for i in range(steps):
            with self._precision():
                with torch.no_grad():
                    targets = self.teacher(self.batches[i % 2])
                features = self.student(self.batches[i % 2], self.args.mask_ratio)
                loss = twin.mmr_loss(features, targets)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            if self.variant.official:
                loss.item()
        self._finish()

    def evaluate(self, batches: int) -> None:
        """Maps and scores of some batches."""
        size = (self.args.image_size,) * 2
        with torch.no_grad():
            for i in range(batches):
                with self._precision():
                    features = self.student(self.batches[i % 2], 0.0)
                    targets = self.teacher(self.batches[i % 2])
                if self.variant.official:
                    twin.image_scores(twin.anomaly_maps(features, targets, size))
                else:
                    anomaly_maps(features, targets, size).amax((1, 2))
        self._finish()

    def _precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.bfloat16)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def anomaly_maps(student: dict, teacher: dict, size: tuple[int, int], sigma=4.0) -> torch.Tensor:
    """`torch_reference.anomaly_maps` on the device: [b, h, w], the Gaussian as two convolutions."""
    total = sum(
        F.interpolate(
            twin.cosine_distance(student[name].float(), teacher[name].float())[:, None],
            size,
            mode="bilinear",
            align_corners=True,
        )
        for name in twin.LAYERS
        if name in student
    )
    radius = int(4 * sigma + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=total.device) / sigma) ** 2)
    taps = taps / taps.sum()
    # scipy's border repeats the last pixel: "symmetric", which torch does not have.
    flipped = torch.cat([total[..., :radius].flip(-1), total, total[..., -radius:].flip(-1)], -1)
    total = F.conv2d(flipped, taps.view(1, 1, 1, -1))
    flipped = torch.cat(
        [total[..., :radius, :].flip(-2), total, total[..., -radius:, :].flip(-2)], -2
    )
    return F.conv2d(flipped, taps.view(1, 1, -1, 1))[:, 0]


def windows(many, images_per_call: int, args: argparse.Namespace) -> list[float]:
    """Images per second of each window, after as long a warm-up."""
    many(2)
    started = time.perf_counter()
    many(1)
    calls = max(1, round(args.window_seconds / (time.perf_counter() - started)))
    many(calls)
    rates = []
    for _ in range(args.windows):
        started = time.perf_counter()
        many(calls)
        rates.append(calls * images_per_call / (time.perf_counter() - started))
    return rates


def parity(folder: pathlib.Path, arch: str) -> dict[str, float]:
    """Largest differences from what `bench_model.Programs.write_parity` wrote, in float32."""
    found = np.load(folder / "parity.npz", allow_pickle=False)
    student = twin.load_student(folder / "student.safetensors")
    teacher = twin.load_teacher(folder / "teacher.safetensors", arch)
    images = twin.normalise(found["images"])
    with torch.no_grad():
        targets = teacher(images)
        features = student(images, 0.0)
        maps = twin.anomaly_maps(features, targets, student.image_size)
        on_device = anomaly_maps(features, targets, student.image_size).numpy()
        masked = student(images, float(found["mask_ratio"]), torch.from_numpy(found["noise"]))
        loss = twin.mmr_loss(masked, targets).item()
    return {
        "map": float(np.abs(maps - found["map"]).max()),
        "map_on_device": float(np.abs(on_device - found["map"]).max()),
        "score": float(np.abs(twin.image_scores(maps) - found["score"]).max()),
        "loss": abs(loss - float(found["loss"])),
    }


def main() -> None:
    """Runs the command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--variant", default="eager", choices=VARIANTS)
    parser.add_argument(
        "--parity", type=pathlib.Path, help="compare with this folder, time nothing"
    )
    parser.add_argument("--task", default="train", choices=("train", "evaluate"))
    parser.add_argument("--mask_ratio", type=float, default=0.4)
    parser.add_argument("--window_seconds", type=float, default=2.0)
    numbers = {"batch": 16, "image_size": 224, "patch": 16, "width": 192, "depth": 6, "heads": 3}
    for name, default in {**numbers, "threads": 2, "windows": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.parity:
        print(json.dumps(parity(args.parity, args.arch)))
        return
    measured = Twin(args)
    many = measured.train if args.task == "train" else measured.evaluate
    rates = windows(many, args.batch, args)
    print(
        json.dumps({"windows": rates, "device": str(measured.device), "torch": torch.__version__})
    )


if __name__ == "__main__":
    main()
