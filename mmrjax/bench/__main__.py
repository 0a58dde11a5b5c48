"""Speed and memory on this machine, next to a PyTorch twin: python -m mmrjax.bench --vs=torch.

Measures training and evaluation over batch sizes, the latency of one image, compilation cold and
from the cache, memory and the count of operations, against a matrix product of the same run. With
--vs=torch the same model runs in PyTorch too: outputs are compared first, and without parity no
time is printed; then both take turns in processes of their own, A-B-B-A, so that drift of the
machine cancels. Ratios are of medians over all windows. TFDS and Grain are not needed.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mmrjax import methods
from mmrjax.bench import model, tables
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import devices, files

# Largest differences from the twin in float32 that are allowed, by the dtype of ours.
PARITY = {
    "float32": {"map": 1e-4, "map_on_device": 1e-4, "score": 1e-4, "loss": 1e-4},
    # Four times what was found on a processor, small model and full one, and more.
    "bfloat16": {"map": 0.01, "map_on_device": 0.01, "score": 0.005, "loss": 0.002},
}
COMPILATIONS = 8  # at once; eleven did not end in four minutes on sixteen cores
RECIPE_IMAGES = 521  # of AeBAD-S, the paper's
PARTS = ("train", "evaluate", "latency_ms", "ceiling", "gflop", "compile_seconds", "with_metrics")
WHOLE_RUN = "recipe"
RANDOM = ("teacher.weights=random", "student.init=scratch")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints tables, and all of it as JSON with --json.

    The file is written anew after each part and turn: a run that is cut off leaves what it had.
    """
    arguments = _parse(argv)
    if arguments.worker:
        devices.keep_freed()
        print(json.dumps(work(arguments.worker, arguments, _tell)))
        return 0
    result: dict = {"facts": _facts(arguments)}
    error = None
    try:
        if arguments.warm_up:
            print(f"compiled: {', '.join(_warm_up(arguments))}")
            return 0
        _measure(arguments, result)
    except (ValueError, subprocess.CalledProcessError) as e:
        error = e
    tables.ours(result.get("mmrjax", {}))  # what there is, also after an error
    tables.versus(result.get("versus", {}))
    if arguments.json and not error:
        print(f"written: {arguments.json}")
    failed = result.get("mmrjax", {}).get("failed", {}) | result.get("failed", {})
    for name, reason in failed.items():
        print(f"error: {name} was not measured: {reason}", file=sys.stderr)
    if error:
        print(f"error: {error}", file=sys.stderr)
    return 1 if failed or error else 0


def _measure(arguments: argparse.Namespace, result: dict) -> None:
    """Fills `result`, and keeps it after each part and turn."""
    if arguments.vs:
        result["parity"] = _parity(arguments, _dtypes(arguments))
        tables.parity(result["parity"])
    if not arguments.only_vs:
        for found in _everything_of_ours(arguments):
            result["mmrjax"] = found
            _keep(result, arguments)
    if arguments.vs:
        _versus(arguments, result)


def _keep(result: dict, arguments: argparse.Namespace) -> None:
    if arguments.json:
        files.write_text(arguments.json, json.dumps(result, indent=1))


def _tell(found: dict) -> None:
    """Prints one line for the process that asked, which keeps the last."""
    print(json.dumps(found), flush=True)


def work(task: str, arguments: argparse.Namespace, tell: Callable = lambda found: None) -> dict:
    """Runs one task in this process: everything, train:B, evaluate:B or parity:DTYPE:FOLDER.

    `tell` takes what is there of everything after each part.
    """
    name, _, value = task.partition(":")
    fields = [o.removeprefix("--config.") for o in arguments.overrides]
    if name == "parity":
        dtype, _, folder = value.partition(":")
        fields += [f"train.compute_dtype={dtype}"]
    config = config_lib.load(arguments.config, [*RANDOM, *fields])
    numbers = "windows", "window_seconds", "requests", "images"
    plan = model.Plan(**{name: getattr(arguments, name) for name in numbers})
    programs = model.Programs(config, plan)
    if name == "parity":
        programs.write_parity(pathlib.Path(folder))
        return {}
    if name == "train":
        return programs.train(int(value))
    if name == "evaluate":
        return programs.evaluate(int(value))
    return _everything(programs, arguments, tell)


def _everything(programs: model.Programs, arguments: argparse.Namespace, tell: Callable) -> dict:
    """The parts that were asked for.

    The whole run comes first, while nothing is compiled yet; then training, while the peak of the
    memory is its own.
    """
    train, evaluate = _batches(arguments).values()
    measure = {
        "recipe": lambda: programs.recipe(RECIPE_IMAGES, arguments.test_images, train[0]),
        "train": lambda: {str(batch): programs.train(batch) for batch in train},
        "evaluate": lambda: {str(batch): programs.evaluate(batch) for batch in evaluate},
        "latency_ms": programs.latency,
        "ceiling": programs.ceiling,
        "gflop": programs.counts,
        "compile_seconds": lambda: programs.compilation(train[0], evaluate[0]),
        "with_metrics": lambda: programs.with_metrics(arguments.test_images, evaluate[-1]),
    }
    found, failed = {}, {}
    for name in (name for name in measure if name in arguments.parts):
        try:
            found[name] = measure[name]()
        except Exception as e:  # whatever it is, the other parts may have taken minutes
            traceback.print_exc()
            failed[name] = f"{type(e).__name__}: {e}"
        tell(found)
    rates = [*found.get("train", {}).values()]
    rates += [one["resident"] for one in found.get("evaluate", {}).values()]
    for rate in rates if "ceiling" in found else ():
        share = rate["devices"] / found["ceiling"]["devices"]  # one image is scored on one
        rate["of_ceiling"] = rate["gflops"] / (share * found["ceiling"]["matmul_gflops"])
    return found | ({"failed": failed} if failed else {})


# --- processes


def _ours(task: str, arguments: argparse.Namespace) -> dict:
    """The numbers of one of our tasks, measured in a process of its own."""
    *_, found = _lines(["-m", "mmrjax.bench", f"--worker={task}", *_flags(arguments)])
    return found


def _everything_of_ours(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields the numbers so far after each part, and at last all numbers."""
    started = time.perf_counter()
    found: dict = {}
    for found in _lines(["-m", "mmrjax.bench", "--worker=everything", *_flags(arguments)]):
        yield found
    if WHOLE_RUN in found:  # from a cold process: start, imports and compilation are in it
        found[WHOLE_RUN]["process"] = time.perf_counter() - started
        yield found


def _flags(arguments: argparse.Namespace) -> list[str]:
    numbers = ("windows", "window_seconds", "requests", "images", "test_images", "config")
    lists = ("train_batches", "eval_batches", "parts")
    return [
        *(f"--{name}={getattr(arguments, name)}" for name in numbers),
        *(f"--{name}={','.join(map(str, getattr(arguments, name)))}" for name in lists),
        *arguments.overrides,
    ]


def _torch(flags: Sequence[str], arguments: argparse.Namespace) -> dict:
    config = config_lib.load(
        arguments.config, [*RANDOM, *(o.removeprefix("--config.") for o in arguments.overrides)]
    )
    width, depth, heads = methods.mmr.student_size(config.student)
    side, other = config.data.image_size
    if side != other:
        raise ValueError(f"data.image_size={side},{other}: the twin is timed on squares")
    sizes = {"width": width, "depth": depth, "heads": heads, "image_size": side}
    sizes |= {"arch": config.teacher.name, "threads": devices.cores()}
    sizes |= {"mask_ratio": config.student.mask_ratio}
    named = [f"--{name}={value}" for name, value in sizes.items()]
    *_, found = _lines(["-m", "mmrjax.bench.torch_side", *named, *flags])
    return found


def _lines(command: Sequence[str]) -> Iterator[dict]:
    """The objects that a process of its own prints, one a line, as they come."""
    command = [sys.executable, *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _warm_up(arguments: argparse.Namespace) -> list[str]:
    """Compiles every program into the caches of JAX and PyTorch, all at once; their names.

    On a GPU a full-size program takes more than a minute, mostly on one core, and measurements
    cannot run side by side. Compilations can.
    """
    short = argparse.Namespace(**{**vars(arguments), "windows": 1, "window_seconds": 0.01})
    tasks = [
        f"{task}:{batch}" for task, batches in _batches(arguments).items() for batch in batches
    ]
    tasks += ["evaluate:1"] * ("latency_ms" in arguments.parts and "evaluate:1" not in tasks)
    jobs = {f"mmrjax {task}": functools.partial(_ours, task, short) for task in tasks}
    if arguments.vs:
        for task, batch in (
            (t, batches[0]) for t, batches in _batches(arguments).items() if batches
        ):
            flags = ["--variant=compile", f"--task={task}", f"--batch={batch}", "--windows=1"]
            flags.append("--window_seconds=0.01")
            jobs[f"torch {task}:{batch}"] = functools.partial(_torch, flags, arguments)
        for dtype in _dtypes(arguments):
            jobs[f"parity {dtype}"] = functools.partial(_parity, arguments, [dtype])
    with concurrent.futures.ThreadPoolExecutor(COMPILATIONS) as pool:
        done = [pool.submit(job) for job in jobs.values()]
    for job in done:
        job.result()
    return list(jobs)


def _dtypes(arguments: argparse.Namespace) -> list[str]:
    """In which outputs are compared: float32, and what is timed if that is another."""
    fields = [o.removeprefix("--config.") for o in arguments.overrides]
    name = config_lib.load(arguments.config, [*RANDOM, *fields]).train.compute_dtype
    return list(dict.fromkeys(["float32", methods.base.compute_dtype(name).name]))


def _parity(arguments: argparse.Namespace, dtypes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Largest differences from the twin in float32, same weights and images, by dtype of ours.

    Raises:
      ValueError: one is above PARITY, or not a number.
    """
    found = {}
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as folder:
            _ours(f"parity:{dtype}:{folder}", arguments)
            found[dtype] = _torch([f"--parity={folder}"], arguments)
        wrong = [
            f"{name} {found[dtype][name]:.1e}"
            for name, allowed in PARITY[dtype].items()
            if not found[dtype][name] <= allowed
        ]
        if wrong:
            raise ValueError(
                f"the twin computes something else in {dtype}, nothing is timed: {', '.join(wrong)}"
            )
    return found


def _versus(arguments: argparse.Namespace, result: dict) -> None:
    """Both sides in turns, A-B-C-C-B-A, for each task and batch, into result["versus"].

    A variant of the twin that fails is named in result["failed"] and left out.
    """
    result["versus"] = {}
    sides = ["mmrjax", *arguments.variants]
    for task, batch in ((t, b) for t, batches in _batches(arguments).items() for b in batches):
        name = f"{task} {batch}"
        windows: dict[str, list[float]] = {side: [] for side in sides}
        for side in (*sides, *reversed(sides)):
            if f"{name}, {side}" in result.get("failed", {}):
                continue
            try:
                found = _windows(side, task, batch, arguments)
            except subprocess.CalledProcessError as e:
                if side == "mmrjax":
                    raise
                result.setdefault("failed", {})[f"{name}, {side}"] = str(e)
                windows[side].clear()  # of one turn alone the machine's drift would not cancel
            else:
                windows[side] += found
                print(f"{name} {side}: {np.median(found):.1f} img/s", file=sys.stderr, flush=True)
            result["versus"][name] = _ratios(windows)
            _keep(result, arguments)


def _windows(side: str, task: str, batch: int, arguments: argparse.Namespace) -> list[float]:
    """Images per second in the windows of one process."""
    if side == "mmrjax":
        found = _ours(f"{task}:{batch}", arguments)
        return found["windows"] if task == "train" else found["resident"]["windows"]
    flags = {"variant": side, "task": task, "batch": batch, "windows": arguments.windows}
    flags["window_seconds"] = arguments.window_seconds
    return _torch([f"--{k}={v}" for k, v in flags.items()], arguments)["windows"]


def _ratios(windows: dict[str, list[float]]) -> dict[str, dict]:
    """Medians, extremes and how many times as fast ours is, of the sides that have windows."""
    ours = np.median(windows["mmrjax"])
    return {
        side: {"median": float(np.median(w)), "min": min(w), "max": max(w), "windows": w}
        | ({} if side == "mmrjax" else {"ratio": float(ours / np.median(w))})
        for side, w in windows.items()
        if w
    }


# --- the command line and the tables


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/magnetic_tile.py")
    parser.add_argument("--train_batches", type=_numbers, default=(16,))
    parser.add_argument("--eval_batches", type=_numbers, default=(1, 32))
    parser.add_argument("--windows", type=int, default=5, help="per process")
    parser.add_argument("--window_seconds", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=200, help="single images for the latency")
    parser.add_argument("--images", type=int, default=64, help="training images in memory")
    parser.add_argument("--test_images", type=int, default=128, help="of an evaluation")
    parser.add_argument(
        "--parts",
        type=lambda s: tuple(s.split(",")),
        default=PARTS,
        help=f"what to measure, of {', '.join(PARTS)} and {WHOLE_RUN}, a whole run on "
        f"{RECIPE_IMAGES} images",
    )
    parser.add_argument("--vs", choices=("torch",), help="what to compare with")
    parser.add_argument("--only_vs", action="store_true", help="nothing but the comparison")
    parser.add_argument("--variants", type=lambda s: tuple(s.split(",")), help="of the twin")
    parser.add_argument(
        "--warm_up",
        action="store_true",
        help="only compile, everything at once; needs JAX_COMPILATION_CACHE_DIR",
    )
    parser.add_argument("--json", type=files.local_path, help="file for all numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments, arguments.overrides = parser.parse_known_args(argv)
    unknown = [o for o in arguments.overrides if not o.startswith("--config.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    if min(arguments.windows, arguments.window_seconds, arguments.requests) <= 0:
        parser.error("--windows, --window_seconds and --requests must be positive")
    both = arguments.train_batches and arguments.eval_batches
    if not (both or arguments.only_vs or arguments.worker):
        parser.error("--train_batches and --eval_batches: one may be empty with --only_vs alone")
    if wrong := [part for part in arguments.parts if part not in (*PARTS, WHOLE_RUN)]:
        parser.error(f"--parts={wrong[0]}: known are {', '.join((*PARTS, WHOLE_RUN))}")
    if arguments.warm_up and not jax.config.jax_compilation_cache_dir:
        parser.error("--warm_up: name a folder in JAX_COMPILATION_CACHE_DIR to compile into")
    several = [
        size for size in arguments.eval_batches if size > 1
    ]  # one image is scored on one device
    devices.show_cores([*arguments.train_batches, *several])
    if arguments.vs and not arguments.worker:
        arguments.variants = _variants(arguments.variants, parser)
    return arguments


def _variants(given: tuple[str, ...] | None, parser: argparse.ArgumentParser) -> tuple[str, ...]:
    try:
        from mmrjax.bench import torch_side
    except ModuleNotFoundError as e:
        parser.error(f"--vs=torch needs {e.name}: pip install 'mmrjax[torch]'")
    on_cpu = jax.default_backend() == "cpu"
    known = tuple(torch_side.VARIANTS)
    chosen = given or (torch_side.ON_CPU if on_cpu else known)
    for name in chosen:
        if name not in known:
            parser.error(f"unknown variant {name!r}; available: {', '.join(known)}")
    return chosen


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _batches(arguments: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    return {"train": arguments.train_batches, "evaluate": arguments.eval_batches}


def _facts(arguments: argparse.Namespace) -> dict:
    device = jax.devices()[0]
    return {
        "command": " ".join(["python -m mmrjax.bench", *sys.argv[1:]]),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "config": arguments.config,
    }


if __name__ == "__main__":
    sys.exit(main())
