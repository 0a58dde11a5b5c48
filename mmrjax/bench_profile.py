"""Where the time of a training step or an evaluation goes: operations, by their sum.

    python -m mmrjax.bench_profile --config=configs/aebad.py --task=train --batch=16

Prints the rate, then a row per kernel (GPU), or per operation and the line of the model it comes
from (CPU, where operations of several threads add up): milliseconds and calls in a step or a batch.
The programs and images are those of `mmrjax.bench`. Needs neither TFDS nor Grain.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from jax.profiler import ProfileData

from mmrjax import bench, bench_model, memory
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


def by_operation(planes: Iterable, sources: Mapping[str, str]) -> dict[str, tuple[float, int]]:
    """{operation and where it comes from: (milliseconds, calls)} over all threads of a CPU.

    Args:
      planes: of a profile.
      sources: {operation: path in the model}, see `sources_of`.
    """
    total, calls = collections.Counter(), collections.Counter()
    for event in (e for plane in planes for line in plane.lines for e in line.events):
        operation = str(dict(event.stats).get("hlo_op", ""))
        kind = re.sub(r"[.\d]+$", "", operation)
        if not kind or kind in ("while", "call", "conditional"):  # what they hold is told itself
            continue
        name = f"{kind} | {sources.get(operation, '')}"
        total[name] += event.duration_ns / 1e6
        calls[name] += 1
    return {name: (time, calls[name]) for name, time in total.most_common()}


def sources_of(hlo: str) -> dict[str, str]:
    """{operation: the end of its path in the model}, read off a compiled program's text."""
    found = re.findall(r'^ *(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"', hlo, re.MULTILINE)
    return {operation: path[-80:] for operation, path in found}


def _program(
    task: str, batch: int, overrides: Sequence[str], config: str
) -> tuple[Callable, int, Callable[[], str]]:
    """(what runs once, how many steps or batches that is, what gives the compiled text)."""
    loaded = config_lib.load(config, [*bench.RANDOM, *overrides])
    programs = bench_model.Programs(loaded, bench_model.Plan(images=max(batch, 128)))
    if task == "evaluate":
        pixels = bench_model.finished_images(batch, loaded.data.image_size)
        pixels = mesh_lib.put_batch(pixels, programs.mesh)
        scored = (*programs.trained.ready, pixels)
        lowered = programs.scorer.lower(*scored)
        return lambda: programs.scorer(*scored), 1, lambda: lowered.compile().as_text()
    step, state, arguments, k = programs.step(batch)
    lowered = step.lower(state, *arguments)

    def run():
        nonlocal state
        state, logs = step(state, *arguments)
        return logs

    return run, k, lambda: lowered.compile().as_text()


def profile(run: Callable, text: Callable[[], str]) -> dict[str, tuple[float, int]]:
    """`by_kernel` or `by_operation` of CALLS calls."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = ProfileData.from_file(str(path)).planes
        if jax.default_backend() == "gpu":
            return by_kernel(planes)
        return by_operation(planes, sources_of(text()))


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
    mesh_lib.show_cores([arguments.batch])
    if jax.default_backend() not in ("cpu", "gpu"):
        print("error: profiles are read on CPUs and GPUs only", file=sys.stderr)
        return 1
    memory.keep_freed()
    fields = [o.removeprefix("--config.") for o in overrides]
    run, k, text = _program(arguments.task, arguments.batch, fields, arguments.config)
    plan = bench_model.Plan(windows=3, window_seconds=0.7)
    rates = bench_model.windows(run, k * arguments.batch, plan)
    found = profile(run, text)
    per = CALLS * k
    kernels = sum(time for time, _ in found.values()) / per
    print(f"images/s: {', '.join(f'{rate:.0f}' for rate in rates)}; in operations {kernels:.3f} ms")
    for name, (time, calls) in [*found.items()][: arguments.rows]:
        print(f"{time / per:8.4f} ms x{calls / per:6.1f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
