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
from collections.abc import Sequence

import jax
import numpy as np

from mmrjax import bench_model, files, memory, methods
from mmrjax import config as config_lib
from mmrjax import mesh as mesh_lib

PARITY = {"map": 1e-4, "map_on_device": 1e-4, "score": 1e-4, "loss": 1e-4}  # float32
COMPILATIONS = 8  # at once; eleven did not end in four minutes on sixteen cores
RECIPE_IMAGES = 521  # of AeBAD-S, the paper's
PARTS = ("ceiling", "gflop", "compile_seconds", "train", "evaluate", "latency_ms", "with_metrics")
WHOLE_RUN = "recipe"
RANDOM = ("teacher.weights=random", "student.init=scratch")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints tables, and all of it as JSON with --json."""
    arguments = _parse(argv)
    if arguments.worker:
        memory.keep_freed()
        print(json.dumps(work(arguments.worker, arguments)))
        return 0
    result = {"facts": _facts(arguments)}
    try:
        if arguments.warm_up:
            print(f"compiled: {', '.join(_warm_up(arguments))}")
            return 0
        if arguments.vs:
            result["parity"] = _parity(arguments)
            _print_parity(result["parity"])
        if not arguments.only_vs:
            result["mmrjax"] = _ours("everything", arguments)
            _print_ours(result["mmrjax"])
        if arguments.vs:
            result["versus"] = {
                f"{task} {batch}": _take_turns(task, batch, arguments)
                for task, batches in _batches(arguments).items()
                for batch in batches
            }
            _print_versus(result["versus"])
    except (ValueError, subprocess.CalledProcessError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if arguments.json:
        files.write_text(arguments.json, json.dumps(result, indent=1))
        print(f"written: {arguments.json}")
    failed = result.get("mmrjax", {}).get("failed", {})
    for name, reason in failed.items():
        print(f"error: {name} was not measured: {reason}", file=sys.stderr)
    return 1 if failed else 0


def work(task: str, arguments: argparse.Namespace) -> dict:
    """Runs one task in this process: everything, train:B, evaluate:B or parity:FOLDER."""
    name, _, value = task.partition(":")
    fields = [o.removeprefix("--config.") for o in arguments.overrides]
    if name == "parity":
        fields += ["train.compute_dtype=float32"]
    config = config_lib.load(arguments.config, [*RANDOM, *fields])
    numbers = "windows", "window_seconds", "requests", "images"
    plan = bench_model.Plan(**{name: getattr(arguments, name) for name in numbers})
    programs = bench_model.Programs(config, plan)
    if name == "parity":
        programs.write_parity(pathlib.Path(value))
        return {}
    if name == "train":
        return programs.train(int(value))
    if name == "evaluate":
        return programs.evaluate(int(value))
    return _everything(programs, arguments)


def _everything(programs: bench_model.Programs, arguments: argparse.Namespace) -> dict:
    """The parts that were asked for; the whole run first, while nothing is compiled yet."""
    train, evaluate = _batches(arguments).values()
    measure = {
        "recipe": lambda: programs.recipe(RECIPE_IMAGES, arguments.test_images, train[0]),
        "ceiling": programs.ceiling,
        "gflop": programs.counts,
        "compile_seconds": lambda: programs.compilation(train[0], evaluate[0]),
        "train": lambda: {str(batch): programs.train(batch) for batch in train},
        "evaluate": lambda: {str(batch): programs.evaluate(batch) for batch in evaluate},
        "latency_ms": programs.latency,
        "with_metrics": lambda: programs.with_metrics(arguments.test_images, evaluate[-1]),
    }
    found, failed = {}, {}
    for name in (name for name in measure if name in arguments.parts):
        try:
            found[name] = measure[name]()
        except Exception as e:  # whatever it is, the other parts may have taken minutes
            traceback.print_exc()
            failed[name] = f"{type(e).__name__}: {e}"
    rates = [*found.get("train", {}).values()]
    rates += [one["resident"] for one in found.get("evaluate", {}).values()]
    for rate in rates if "ceiling" in found else ():
        rate["of_ceiling"] = rate["gflops"] / found["ceiling"]["matmul_gflops"]
    return found | ({"failed": failed} if failed else {})


# --- processes


def _ours(task: str, arguments: argparse.Namespace) -> dict:
    numbers = ("windows", "window_seconds", "requests", "images", "test_images", "config")
    flags = [f"--{n}={getattr(arguments, n)}" for n in numbers]
    flags += [
        f"--{n}={','.join(map(str, getattr(arguments, n)))}"
        for n in ("train_batches", "eval_batches")
    ]
    flags += [f"--parts={','.join(arguments.parts)}", *arguments.overrides]
    started = time.perf_counter()
    found = _run(["-m", "mmrjax.bench", f"--worker={task}", *flags])
    if WHOLE_RUN in found:  # from a cold process: start, imports and compilation are in it
        found[WHOLE_RUN]["process"] = time.perf_counter() - started
    return found


def _torch(flags: Sequence[str], arguments: argparse.Namespace) -> dict:
    config = config_lib.load(
        arguments.config, [*RANDOM, *(o.removeprefix("--config.") for o in arguments.overrides)]
    )
    width, depth, heads = methods.mmr.student_size(config.student)
    side, other = config.data.image_size
    if side != other:
        raise ValueError(f"data.image_size={side},{other}: the twin is timed on squares")
    sizes = {"width": width, "depth": depth, "heads": heads, "image_size": side}
    sizes |= {"arch": config.teacher.name, "threads": os.cpu_count()}
    sizes |= {"mask_ratio": config.student.mask_ratio}
    return _run(["-m", "mmrjax.bench_torch", *(f"--{k}={v}" for k, v in sizes.items()), *flags])


def _run(command: Sequence[str]) -> dict:
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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
        jobs["parity"] = functools.partial(_parity, arguments)
    with concurrent.futures.ThreadPoolExecutor(COMPILATIONS) as pool:
        done = [pool.submit(job) for job in jobs.values()]
    for job in done:
        job.result()
    return list(jobs)


def _parity(arguments: argparse.Namespace) -> dict[str, float]:
    """Largest differences between both sides, same weights and images; ValueError above PARITY."""
    with tempfile.TemporaryDirectory() as folder:
        _ours(f"parity:{folder}", arguments)
        found = _torch([f"--parity={folder}"], arguments)
    wrong = [
        f"{name} {found[name]:.1e}" for name, allowed in PARITY.items() if found[name] > allowed
    ]
    if wrong:
        raise ValueError(f"the twin computes something else, nothing is timed: {', '.join(wrong)}")
    return found


def _take_turns(task: str, batch: int, arguments: argparse.Namespace) -> dict:
    """Windows of ours and of every variant, A-B-C-C-B-A."""
    sides = ["mmrjax", *arguments.variants]
    windows: dict[str, list[float]] = {side: [] for side in sides}
    for side in (*sides, *reversed(sides)):
        if side == "mmrjax":
            found = _ours(f"{task}:{batch}", arguments)
            found = found["windows"] if task == "train" else found["resident"]["windows"]
        else:
            flags = {"variant": side, "task": task, "batch": batch, "windows": arguments.windows}
            flags["window_seconds"] = arguments.window_seconds
            found = _torch([f"--{k}={v}" for k, v in flags.items()], arguments)["windows"]
        windows[side] += found
        print(f"{task} {batch} {side}: {np.median(found):.1f} img/s", file=sys.stderr, flush=True)
    ours = np.median(windows["mmrjax"])
    return {
        side: {"median": float(np.median(w)), "min": min(w), "max": max(w), "windows": w}
        | ({} if side == "mmrjax" else {"ratio": float(ours / np.median(w))})
        for side, w in windows.items()
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
    mesh_lib.show_cores([*arguments.train_batches, *several])
    if arguments.vs and not arguments.worker:
        arguments.variants = _variants(arguments.variants, parser)
    return arguments


def _variants(given: tuple[str, ...] | None, parser: argparse.ArgumentParser) -> tuple[str, ...]:
    try:
        from mmrjax import bench_torch
    except ModuleNotFoundError as e:
        parser.error(f"--vs=torch needs {e.name}: pip install 'mmrjax[torch]'")
    on_cpu = jax.default_backend() == "cpu"
    known = tuple(bench_torch.VARIANTS)
    chosen = given or (bench_torch.ON_CPU if on_cpu else known)
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


def _print_parity(found: dict[str, float]) -> None:
    print("outputs equal those of the twin: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))


def _print_ours(found: dict) -> None:
    if ceiling := found.get("ceiling"):
        print(
            f"matrix product {ceiling['matmul_gflops']:.0f} GFLOP/s, "
            f"copy {ceiling['copy_gb_per_s']:.1f} GB/s"
        )
    for name, counted in found.get("gflop", {}).items():
        lowered = counted["lowered"]
        told = "not counted by this platform" if lowered is None else f"{lowered:.2f}"
        print(f"{name}: {counted['paper']:.2f} GFLOP per image on paper, lowered program: {told}")
    rows = [("", "images/s", "min", "max", "of ceiling", "temporary MiB", "peak MiB")]
    for batch, one in found.get("train", {}).items():
        rows.append(_row(f"train, batch {batch}", one, one["memory"]))
    for batch, one in found.get("evaluate", {}).items():
        rows.append(_row(f"evaluate, batch {batch}", one["resident"], one["memory"]))
        rows.append(_row("  from and to the host", one["from_host"], None))
    if len(rows) > 1:
        _print_rows(rows)
    if latency := found.get("latency_ms"):
        print("one image, ms: " + ", ".join(f"{n} {latency[n]:.2f}" for n in ("p50", "p90", "p99")))
    for name, seconds in found.get("compile_seconds", {}).items():
        print(
            f"compile {name}: {seconds['cold']:.1f} s cold, {seconds['warm']:.1f} s from the cache"
        )
    if whole := found.get("with_metrics"):
        print(
            f"evaluation of {whole['images']} images: "
            f"maps and scores {whole['forward_seconds']:.1f} s, "
            f"metrics {whole['metrics_seconds']:.1f} s"
        )
    if WHOLE_RUN in found:
        phases = {k: v for k, v in found[WHOLE_RUN].items() if k != "images"}
        words = ", ".join(f"{k.removesuffix('_seconds')} {v:.1f}" for k, v in phases.items())
        print(f"whole run, seconds: {words}")


def _row(name: str, one: dict, memory_used: dict | None) -> tuple[str, ...]:
    rate = [f"{one['images_per_second'][key]:.1f}" for key in ("median", "min", "max")]
    share = f"{100 * one['of_ceiling']:.0f} %" if "of_ceiling" in one else ""
    used = (
        [f"{memory_used[f'{key}_mib']:.0f}" for key in ("temporary", "peak")] if memory_used else []
    )
    return (name, *rate, share, *used, *[""] * (2 - len(used)))


def _print_versus(found: dict) -> None:
    rows = [("", "images/s", "min", "max", "ours / it")]
    for name, sides in found.items():
        for side, one in sides.items():
            numbers = [f"{one[key]:.1f}" for key in ("median", "min", "max")]
            ratio = f"{one['ratio']:.2f}" if "ratio" in one else ""
            rows.append((f"{name}, {side}", *numbers, ratio))
    _print_rows(rows)


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
