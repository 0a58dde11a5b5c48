"""Where the time of a training step or an evaluation goes on a GPU: kernels, by their sum.

    python -m mmrjax.bench_profile --config=configs/aebad.py --task=train --batch=16

Prints the rate, then a row per kernel: milliseconds and calls in a step (or a batch), and its name.
The programs and images are those of `mmrjax.bench`. Needs neither TFDS nor Grain.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.profiler import ProfileData

from mmrjax import bench, bench_model
from mmrjax import config as config_lib
from mmrjax import mesh as mesh_lib

CALLS = 3  # profiled


def by_kernel(planes: Iterable) -> dict[str, tuple[float, int]]:
    """{operation and kernel: (milliseconds, calls)} over the streams of all GPUs, largest first.

    Numbers at the end of an operation's name are dropped: copies of a block are one row.
    """
    total, calls = collections.Counter(), collections.Counter()
    for plane in planes:
        if "gpu" not in plane.name.lower():
            continue
        for event in (
            e for line in plane.lines if line.name.startswith("Stream") for e in line.events
        ):
            operation = re.sub(r"[.\d]+$", "", str(dict(event.stats).get("hlo_op", "")))
            name = f"{operation} | {event.name[:80]}"
            total[name] += event.duration_ns / 1e6
            calls[name] += 1
    return {name: (time, calls[name]) for name, time in total.most_common()}


def _program(task: str, batch: int, overrides: Sequence[str], config: str) -> tuple[Callable, int]:
    """(what runs once, how many steps or batches that is)."""
    loaded = config_lib.load(config, [*bench.RANDOM, *overrides])
    programs = bench_model.Programs(loaded, bench_model.Plan(images=max(batch, 128)))
    if task == "evaluate":
        pixels = bench_model.finished_images(batch, loaded.data.image_size)
        pixels = mesh_lib.put_batch(pixels, programs.mesh)
        return lambda: programs.scorer(*programs.trained.ready, pixels), 1
    step, state, arguments, k = programs.step(batch)

    def run():
        nonlocal state
        state, logs = step(state, *arguments)
        return logs

    return run, k


def profile(run: Callable) -> dict[str, tuple[float, int]]:
    """`by_kernel` of CALLS calls."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run() for _ in range(CALLS)])
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return by_kernel(ProfileData.from_file(str(path)).planes)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/magnetic_tile.py")
    parser.add_argument("--task", choices=("train", "evaluate"), default="train")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=60)
    arguments, overrides = parser.parse_known_args(argv)
    if unknown := [o for o in overrides if not o.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    if jax.default_backend() != "gpu":
        print("error: kernels are listed on a GPU only; none is to be seen here", file=sys.stderr)
        return 1
    fields = [o.removeprefix("--config.") for o in overrides]
    run, k = _program(arguments.task, arguments.batch, fields, arguments.config)
    plan = bench_model.Plan(windows=3, window_seconds=0.7)
    rates = bench_model.windows(run, k * arguments.batch, plan)
    found = profile(run)
    per = CALLS * k
    kernels = sum(time for time, _ in found.values()) / per
    print(f"images/s: {', '.join(f'{rate:.0f}' for rate in rates)}; kernels {kernels:.3f} ms")
    for name, (time, calls) in [*found.items()][: arguments.rows]:
        print(f"{time / per:8.4f} ms x{calls / per:6.1f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
