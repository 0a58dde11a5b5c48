"""Training speed of the real step, next to a PyTorch twin: python -m mmrjax.bench --vs=torch.

Measures images per second of the jitted training step (augmentation from uint8, teacher, student,
AdamW) on textured random images in memory; with --vs=torch also torch_reference.py, which
gets images that are augmented and normalised already. Both run in processes of their own, in
A-B-B-A order, so that drift of the machine cancels; the ratio is of the medians.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from mmrjax import config as config_lib
from mmrjax import memory, methods, train
from mmrjax import mesh as mesh_lib
from mmrjax import state as state_lib

WARM_UP = 3  # calls before the first window


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints a line per measurement and one JSON summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/magnetic_tile.py")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--windows", type=int, default=5, help="per process")
    parser.add_argument("--steps", type=int, default=5, help="per window")
    parser.add_argument("--vs", choices=("torch",), help="what to compare with")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        print(json.dumps({"windows": measure(arguments)}))
        return 0
    if arguments.vs and jax.default_backend() != "cpu":
        print("error: --vs=torch compares on CPU only: JAX_PLATFORMS=cpu", file=sys.stderr)
        return 1
    if arguments.vs and not importlib.util.find_spec("torch"):
        print("error: --vs=torch needs torch: pip install 'mmrjax[torch]'", file=sys.stderr)
        return 1
    rates: dict[str, list[float]] = {"mmrjax": []}
    for name in ("mmrjax", "torch", "torch", "mmrjax") if arguments.vs else ("mmrjax",):
        windows = _run(name, arguments)
        rates.setdefault(name, []).extend(windows)
        print(f"{name}: {np.median(windows):.1f} img/s ({min(windows):.1f} to {max(windows):.1f})")
    medians = {name: round(float(np.median(values)), 2) for name, values in rates.items()}
    summary = {"images_per_second": medians, "windows": rates, "device": str(jax.devices()[0])}
    if arguments.vs:
        summary["ratio"] = round(medians["mmrjax"] / medians["torch"], 3)
    print(json.dumps(summary))
    return 0


def measure(arguments: argparse.Namespace) -> list[float]:
    """Images per second of the training step, one value per window."""
    memory.keep_freed()
    config = config_lib.load(arguments.config, ["teacher.weights=random", "student.init=scratch"])
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_divisible("--batch", arguments.batch, mesh)
    method = methods.create("mmr", config)
    frozen = mesh_lib.replicate(method.load_frozen()[0], mesh)
    variables, _ = method.init(jax.random.key(0), frozen)
    tx = method.optimiser(steps_per_epoch=1)
    step = state_lib.make_train_step(method, tx, train.make_augment(config), 1, mesh)
    state = mesh_lib.replicate(state_lib.create(variables, tx), mesh)
    resident = mesh_lib.replicate(_textured_images(arguments.batch), mesh)
    chunk = {
        "index": np.arange(arguments.batch, dtype=np.int32)[None],
        "weight": np.ones((1, arguments.batch), np.float32),
    }
    chunk = mesh_lib.put_batch(chunk, mesh, axis=1)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, logs = step(state, frozen, resident, chunk, jax.random.key(1))
        jax.block_until_ready((state, logs))

    run(WARM_UP)
    rates = []
    for _ in range(arguments.windows):
        started = time.perf_counter()
        run(arguments.steps)
        rates.append(arguments.steps * arguments.batch / (time.perf_counter() - started))
    return rates


def _textured_images(count: int) -> dict[str, np.ndarray]:
    """Blocks of random grey under noise, as large as a magnetic tile; zeros would run faster."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(40, 200, (count, 25, 40, 3)).repeat(16, axis=1).repeat(16, axis=2)
    image = np.clip(blocks + rng.normal(0, 12, blocks.shape), 0, 255).astype(np.uint8)
    return {"image": image, "size": np.tile(np.int32([[300, 250]]), (count, 1))}


def _run(name: str, arguments: argparse.Namespace) -> list[float]:
    """One process of `name`; its windows in images per second."""
    numbers = [f"--{n}={getattr(arguments, n)}" for n in ("batch", "windows", "steps")]
    if name == "mmrjax":
        command = ["-m", "mmrjax.bench", "--worker", f"--config={arguments.config}", *numbers]
    else:
        config = config_lib.load(arguments.config)
        width, depth, heads = methods.mmr.student_size(config.student)
        sizes = [f"--width={width}", f"--depth={depth}", f"--heads={heads}"]
        sizes += [f"--arch={config.teacher.name}", f"--threads={os.cpu_count()}"]
        command = ["-m", "mmrjax.torch_reference", "--benchmark", *sizes, *numbers]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return result["windows"]


if __name__ == "__main__":
    sys.exit(main())
