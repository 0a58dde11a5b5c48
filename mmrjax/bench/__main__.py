"""Speed and memory of a method on this machine: python -m mmrjax.bench --config=….

Measures the training step and the evaluation (maps and scores) at several batch sizes, the latency
of a single image, memory and the time of compiling. The method is the first of
--config.method.names. With --vs=torch the method also runs in PyTorch, if it has a PyTorch form:
maps and scores are compared first, and nothing is timed if they differ. Both sides then take turns
in processes of their own, A-B-B-A, so that a drift of the machine's speed cancels.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from mmrjax import methods
from mmrjax.runs import arguments as arguments_lib
from mmrjax.runtime import command_line, devices, files
from mmrjax.runtime import config as config_lib

RANDOM = (
    "teacher.weights=random",
    "data.feed=resident",
    *(f"{field}=scratch" for kind in methods.METHODS.values() for field in kind.initial),
)
# Largest differences from PyTorch in float32, by the compute dtype of JAX.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.01}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    devices.keep_freed()
    return command_line.run(lambda: _run(_parse(argv)))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.worker:
        print(json.dumps(_work(arguments)))
        return 0
    result = _compare(arguments) if arguments.vs else _measure(arguments)
    if arguments.json:
        files.write_text(arguments.json, json.dumps(result, indent=1))
        print(f"written: {arguments.json}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = arguments_lib.parse_bench(argv)
    if arguments.vs and not arguments.worker:
        arguments.variants = _variants(arguments.variants)
    several = [size for size in arguments.eval_batches if size > 1]  # an image is on one device
    devices.show_cores([*arguments.train_batches, *several])
    return arguments


def _variants(given: tuple[str, ...]) -> tuple[str, ...]:
    import torch

    from mmrjax.bench import torch_side

    known = tuple(torch_side.VARIANTS)
    if wrong := [name for name in given if name not in known]:
        raise ValueError(f"--variants={wrong[0]}: known are {', '.join(known)}")
    return given or (known if torch.cuda.is_available() else torch_side.ON_CPU)


def _programs(arguments: argparse.Namespace):
    from mmrjax.bench import programs

    config = config_lib.load(arguments.config, [*RANDOM, *arguments.overrides])
    config_lib.validate(config, methods.METHODS)
    plan = programs.Plan(**{name: getattr(arguments, name) for name in arguments_lib.BENCH_NUMBERS})
    return programs.Programs(config, config.method.names[0], plan)


def _measure(arguments: argparse.Namespace) -> dict:
    """Measures all parts in this process and prints a table."""
    programs, result = _programs(arguments), {}
    device = jax.devices()[0]
    name = f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
    result["facts"] = {"method": programs.name, "config": arguments.config, "device": name}
    print(f"{programs.method.title} of {arguments.config} on {name}")
    rows = [("", "images/s", "min", "max", "compiling s", "peak MiB")]
    if "train" in arguments.parts:  # first, so that the peak of the memory is its own
        result["train"] = {batch: programs.train(batch) for batch in arguments.train_batches}
        for batch, stages in result["train"].items():
            rows += [_row(f"{name}, batch {batch}", rate) for name, rate in stages.items()]
        if not any(result["train"].values()):
            print("the method has no training step")
    if programs.fit_seconds is not None:
        result["fit_seconds"] = programs.fit_seconds
        print(f"fit on {arguments.images} images: {programs.fit_seconds:.1f} s")
    if "evaluate" in arguments.parts:
        result["evaluate"] = {batch: programs.evaluate(batch) for batch in arguments.eval_batches}
        for batch, rates in result["evaluate"].items():
            rows.append(_row(f"evaluate, batch {batch}", rates["from_device"]))
            rows.append(_row("  from and to the host", rates["from_host"]))
    if len(rows) > 1:
        _print(rows)
    if "latency" in arguments.parts:
        result["latency_ms"] = latency = programs.latency()
        print("one image, ms: " + ", ".join(f"{k} {x:.2f}" for k, x in latency.items()))
    return result


def _row(name: str, rate: dict) -> tuple[str, ...]:
    """A row of the table from what `programs.measure` returns."""
    rates = [f"{rate['images_per_second'][key]:.1f}" for key in ("median", "min", "max")]
    peak = "" if rate["peak_mib"] is None else f"{rate['peak_mib']:.0f}"
    return (name, *rates, f"{rate['compile_seconds']:.1f}", peak)


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


# --- side by side with PyTorch


def _work(arguments: argparse.Namespace) -> dict:
    """Runs a task in this process: torch:FOLDER, train:BATCH or evaluate:BATCH."""
    programs = _programs(arguments)
    task, _, value = arguments.worker.partition(":")
    if task == "torch":
        programs.write_torch(pathlib.Path(value))
        return {"dtype": programs.method.dtype.name}
    if task == "train":
        (rate,) = programs.train(int(value)).values()
        return rate
    return programs.evaluate(int(value))["from_device"]


def _compare(arguments: argparse.Namespace) -> dict:
    """Compares outputs, then times both sides in turns and prints a table.

    Raises:
      ValueError: the outputs differ by more than TOLERANCE, or are not numbers.
      RuntimeError: a side failed.
    """
    sides, tasks = ("mmrjax", *arguments.variants), []
    config = config_lib.load(arguments.config, arguments.overrides)
    trains = len(methods.METHODS[config.method.names[0]].stage_names) == 1
    if "train" in arguments.parts and not trains:
        print("training is not compared: the method has not exactly one gradient stage")
    for task, batches in (("train", arguments.train_batches), ("evaluate", arguments.eval_batches)):
        tasks += [
            (task, batch)
            for batch in batches
            if task in arguments.parts and (trains or task != "train")
        ]
    with tempfile.TemporaryDirectory() as folder:
        allowed = TOLERANCE[_ours(f"torch:{folder}", arguments)["dtype"]]
        result = {"differences": _torch(folder, arguments, task="compare"), "versus": {}}
        text = ", ".join(f"{name} {x:.1e}" for name, x in result["differences"].items())
        if not all(x <= allowed for x in result["differences"].values()):
            raise ValueError(f"PyTorch computes something else, nothing is timed: {text}")
        print(f"outputs differ from PyTorch's in float32 by {text}")
        rows = [("", "images/s", "min", "max", "ours / it")]
        for task, batch in tasks:
            windows: dict[str, list[float]] = {side: [] for side in sides}
            for side in (*sides, *reversed(sides)):
                if side == "mmrjax":
                    found = _ours(f"{task}:{batch}", arguments)
                else:
                    found = _torch(folder, arguments, task=task, batch=batch, variant=side)
                windows[side] += found["windows"]
            result["versus"][f"{task} {batch}"] = windows
            ours = np.median(windows["mmrjax"])
            for side, rates in windows.items():
                numbers = [f"{x:.1f}" for x in (np.median(rates), min(rates), max(rates))]
                ratio = "" if side == "mmrjax" else f"{ours / np.median(rates):.2f}"
                rows.append((f"{task} {batch}, {side}", *numbers, ratio))
    _print(rows)
    return result


def _ours(task: str, arguments: argparse.Namespace) -> dict:
    """The result of a task of `_work` in a process of its own."""
    flags = [
        f"--{name}={getattr(arguments, name)}" for name in (*arguments_lib.BENCH_NUMBERS, "config")
    ]
    for name in ("train_batches", "eval_batches"):
        flags.append(f"--{name}={','.join(map(str, getattr(arguments, name)))}")
    overrides = [f"--config.{field}" for field in arguments.overrides]
    return _process(["mmrjax.bench", f"--worker={task}", *flags, *overrides])


def _torch(folder: str, arguments: argparse.Namespace, **flags) -> dict:
    """The result of a task of `torch_side` in a process of its own."""
    flags |= {"folder": folder, "threads": devices.cores(), "windows": arguments.windows}
    flags["window_seconds"] = arguments.window_seconds
    return _process(["mmrjax.bench.torch_side", *(f"--{k}={v}" for k, v in flags.items())])


def _process(module: Sequence[str]) -> dict:
    """The JSON object on the last line that `python -m` prints; RuntimeError if it fails."""
    done = subprocess.run([sys.executable, "-m", *module], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(module[:2])} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
