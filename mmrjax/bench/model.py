"""What `mmrjax.bench` measures of our own programs, in one process: numbers, no words.

Inputs are textured random images, never constant: zeros run faster on a GPU. Neither TFDS nor Grain
is needed. Every rate is a list of windows; a window lasts at least `window_seconds`.
"""

import dataclasses
import functools
import math
import pathlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from mmrjax import methods, weights
from mmrjax.bench import flops, metrics
from mmrjax.data import epochs, geometry
from mmrjax.evaluate import scoring
from mmrjax.methods import losses
from mmrjax.models import resnet
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.runtime import placement
from mmrjax.train import loop as train
from mmrjax.train import step as state_lib

CANVAS = (400, 640)  # of a training image as it lies in memory, as large as a magnetic tile
SIZE = (300, 250)  # what of it is image
PARITY_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure."""

    windows: int = 5
    window_seconds: float = 2.0
    requests: int = 200  # of the latency
    images: int = 64  # resident training images


class Programs:
    """The training step and the scorer of one configuration, with random weights."""

    def __init__(self, config: ConfigDict, plan: Plan):
        """Builds the networks; nothing of them is compiled yet."""
        self.config, self.plan = config, plan
        self.mesh = mesh_lib.make_mesh()
        self.method = methods.METHODS["mmr"](config)  # without statistics by place: none are learnt
        self.on_cpu = jax.default_backend() == "cpu"
        if self.method.dtype == jnp.float32:
            jax.config.update("jax_default_matmul_precision", "highest")
        self.frozen = mesh_lib.replicate(self.method.load_frozen()[0], self.mesh)
        variables, _ = self.method.init(jax.random.key(0), self.frozen)
        self.variables = mesh_lib.replicate(variables, self.mesh)
        self.trained, self.scorer = self._on(self.mesh)
        self._scorers = {self.mesh.size: (self.trained, self.scorer)}

    def _on(self, mesh: jax.sharding.Mesh) -> tuple[train.Trained, Callable]:
        weights = (mesh_lib.replicate(part, mesh) for part in (self.variables, self.frozen))
        trained = train.Trained(self.method, *weights, {}, mesh)
        view = geometry.View.of(self.config, evaluation=True)
        return trained, scoring.make_predict(trained, view)

    def scorer_of(self, batch: int) -> tuple[train.Trained, Callable]:
        """The networks, and what scores a batch, on as many devices as share it."""
        devices = math.gcd(batch, self.mesh.size)
        if devices not in self._scorers:
            self._scorers[devices] = self._on(mesh_lib.make_mesh(devices))
        return self._scorers[devices]

    # --- the machine

    def ceiling(self) -> dict[str, float]:
        """The matrix products and copies that all devices manage at once: GFLOP/s and GB/s."""
        side = 2048 if self.on_cpu else 8192
        one = np.random.default_rng(0).normal(size=(1, side, side)).astype(self.method.dtype)
        a = mesh_lib.put_batch(np.repeat(one, self.mesh.size, axis=0), self.mesh)
        product = jax.jit(lambda a: a @ a)
        copy = jax.jit(lambda a: a + 1)  # reads and writes once
        seconds = {f: self._call_seconds(lambda f=f: f(a)) for f in (product, copy)}
        return {
            "matmul_gflops": 2 * len(a) * side**3 / seconds[product] / 1e9,
            "devices": len(a),
            "copy_gb_per_s": 2 * a.nbytes / seconds[copy] / 1e9,
            "matmul_side": side,
        }

    def _call_seconds(self, call: Callable) -> float:
        jax.block_until_ready(call())
        best = []
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready([call() for _ in range(5)])
            best.append((time.perf_counter() - started) / 5)
        return min(best)

    # --- training

    def train(self, batch: int) -> dict:
        """Images per second of the real step: augmentation from uint8, both networks, AdamW."""
        mesh_lib.check_divisible("--train_batches", batch, self.mesh)
        before = _peak_mib()
        step, state, arguments, k = self.step(batch)

        def call(state):
            state, logs = step(state, *arguments)
            return state, logs

        def many(calls: int) -> None:
            nonlocal state
            for _ in range(calls):
                state, logs = call(state)
            jax.block_until_ready((state, logs))

        windows = _windows_of(self.plan, many, k * batch)
        return self._rate(windows, flops.training_step(self.config), self.mesh) | {
            "steps_per_call": k,
            "compilations": step._cache_size(),
            "memory": _memory(step.lower(state, *arguments).compile(), before),
        }

    def step(self, batch: int, steps_per_call: int = 0, images: int = 0):
        """(step, state, its other arguments, steps in a call); `images` in memory or the plan's."""
        tx = self.method.optimiser(steps_per_epoch=1)
        augment = train.make_augment(self.config)
        step = state_lib.make_train_step(self.method, tx, augment, 1, self.mesh)
        # Copied: the step donates its state, and the weights serve again.
        state = state_lib.create(jax.tree.map(jnp.copy, self.variables), tx)
        state = mesh_lib.replicate(state, self.mesh)
        k = steps_per_call or self.config.train.steps_per_call or (1 if self.on_cpu else 32)
        rng = np.random.default_rng(0)
        count = max(images or self.plan.images, batch)
        chunk = {
            "index": np.stack([rng.permutation(count)[:batch] for _ in range(k)]).astype(np.int32),
            "weight": np.ones((k, batch), np.float32),
        }
        chunk = mesh_lib.put_batch(chunk, self.mesh, axis=1)
        resident = mesh_lib.replicate(resident_images(count), self.mesh)
        frozen = placement.place(self.frozen, self.method.dtype)
        return step, state, (frozen, resident, chunk, jax.random.key(1)), k

    # --- evaluation

    def evaluate(self, batch: int) -> dict:
        """Images per second of maps and scores: from device memory, and from and to the host."""
        before = _peak_mib()
        trained, scorer = self.scorer_of(batch)
        compiled = scorer._cache_size()
        pixels = finished_images(batch, self.config.data.image_size)
        on_device = mesh_lib.put_batch(pixels, trained.mesh)
        score = functools.partial(scorer, *trained.ready)

        def resident(calls: int) -> None:
            jax.block_until_ready([score(on_device) for _ in range(calls)])

        def from_host(calls: int) -> None:
            batches = ((pixels,) for _ in range(calls))
            for _, result in scoring.one_behind(trained, scorer, batches):
                jax.device_get(result)

        counted = flops.inference(self.config), trained.mesh
        return {
            "resident": self._rate(_windows_of(self.plan, resident, batch), *counted),
            "from_host": self._rate(_windows_of(self.plan, from_host, batch), *counted),
            "compilations": scorer._cache_size() - compiled,
            "memory": _memory(scorer.lower(*trained.ready, on_device).compile(), before),
        }

    def with_metrics(self, images: int, batch: int) -> dict[str, float]:
        """Seconds of a whole evaluation: maps and scores from the host, then every metric."""
        case = metrics.make_case(images, self.config.data.image_size[0])
        pixels = finished_images(batch, self.config.data.image_size)
        trained, scorer = self.scorer_of(batch)
        jax.block_until_ready(scorer(*trained.ready, mesh_lib.put_batch(pixels, trained.mesh)))
        started = time.perf_counter()
        batches = ((pixels,) for _ in range(-(-images // batch)))
        for _, result in scoring.one_behind(trained, scorer, batches):
            jax.device_get(result)
        forward = time.perf_counter() - started
        # The maps of random networks say nothing: ranking those of `make_case` takes as long.
        started = time.perf_counter()
        metrics.whole_evaluation(case.predictions, self.config.eval.bootstrap)
        seconds = time.perf_counter() - started
        return {"images": images, "forward_seconds": forward, "metrics_seconds": seconds}

    def latency(self) -> dict[str, float]:
        """Milliseconds from uint8 on the host to score and map on the host, one image at a time."""
        trained, scorer = self.scorer_of(1)
        pixels = finished_images(1, self.config.data.image_size)

        def answer():
            on_device = mesh_lib.put_batch(pixels, trained.mesh)
            jax.device_get(scorer(*trained.ready, on_device))

        for _ in range(max(3, self.plan.requests // 10)):
            answer()
        taken = []
        for _ in range(self.plan.requests):
            started = time.perf_counter()
            answer()
            taken.append(1e3 * (time.perf_counter() - started))
        p50, p90, p99 = np.percentile(taken, (50, 90, 99))
        return {"p50": p50, "p90": p90, "p99": p99, "max": max(taken), "requests": len(taken)}

    # --- compilation

    def compilation(self, train_batch: int, eval_batch: int) -> dict[str, dict[str, float]]:
        """Seconds to lower and compile both programs: cold, and with the persistent cache."""
        step, state, arguments, _ = self.step(train_batch)
        trained, scorer = self.scorer_of(eval_batch)
        pixels = finished_images(eval_batch, self.config.data.image_size)
        on_device = mesh_lib.put_batch(pixels, trained.mesh)
        programs = {
            "train": lambda: step.lower(state, *arguments),
            "evaluate": lambda: scorer.lower(*trained.ready, on_device),
        }
        found: dict[str, dict[str, float]] = {name: {} for name in programs}
        before = jax.config.jax_compilation_cache_dir
        with tempfile.TemporaryDirectory() as folder:  # an empty one: cold is cold
            _use_cache(folder)
            try:
                for when in ("cold", "warm"):
                    jax.clear_caches()
                    known = _entries(folder)
                    for name, lower in programs.items():
                        started = time.perf_counter()
                        lower().compile()
                        found[name][when] = time.perf_counter() - started
                if len(known) < len(programs) or _entries(folder) - known:
                    raise RuntimeError("the cache did not answer: programs were compiled twice")
                if before:  # what follows, also in other processes, need not compile these again
                    shutil.copytree(folder, before, dirs_exist_ok=True)
            finally:
                _use_cache(before)
        return found

    def counts(self) -> dict[str, dict[str, float | None]]:
        """GFLOP of one image: on paper, and of the lowered program with the loop unrolled.

        None of a platform that does not count; jax 0.11 on CUDA does not.
        """
        config = self.config.copy_and_resolve_references()
        config.student.unroll = 64
        unrolled = Programs(config, self.plan)
        for name in ("student", "teacher"):  # before they are traced
            network = getattr(unrolled.method, name)
            setattr(unrolled.method, name, network.clone(conv="direct"))
        size = self.mesh.size
        step, state, arguments, _ = unrolled.step(size, steps_per_call=1)
        pixels = finished_images(size, config.data.image_size)
        lowered = {
            "train": step.lower(state, *arguments),
            "evaluate": unrolled.scorer.lower(*unrolled.trained.ready, pixels),
        }
        counted = {name: one.cost_analysis() for name, one in lowered.items()}
        paper = {"train": flops.training_step(config), "evaluate": flops.inference(config)}
        return {
            name: {
                "paper": paper[name] / 1e9,
                "lowered": found["flops"] / size / 1e9 if found else None,
            }
            for name, found in counted.items()
        }

    # --- a whole run

    def recipe(self, images: int, test_images: int, batch: int) -> dict[str, float]:
        """Seconds of the phases of a whole run with everything in memory, from a cold start."""
        per_epoch = epochs.steps_per_epoch(images, batch)
        started = time.perf_counter()
        step, state, arguments, k = self.step(batch, images=images)
        state, logs = jax.block_until_ready(step(state, *arguments))
        compiled = time.perf_counter()
        for _ in range(-(-self.config.train.epochs * per_epoch // k) - 1):
            state, logs = step(state, *arguments)
        jax.block_until_ready((state, logs))
        trained = time.perf_counter()
        phases = {"first_call": compiled - started, "training": trained - compiled}
        return phases | self.with_metrics(test_images, min(256, test_images))

    # --- parity

    def write_parity(self, folder: pathlib.Path) -> None:
        """Writes weights, images and what comes out of them, for the other side to repeat.

        Files: student.safetensors, teacher.safetensors (PyTorch's names), parity.npz with `images`
        uint8 [n, h, w, 3], `noise` [n, patches], `map` [n, h, w], `score` [n], `loss` and
        `mask_ratio`.
        """
        config = self.config
        side = config.data.image_size
        images = finished_images(PARITY_IMAGES, side)
        patches = (side[0] // 16) * (side[1] // 16)
        noise = np.random.default_rng(1).random((PARITY_IMAGES, patches)).astype(np.float32)
        grid = tuple(n // 16 for n in side)
        facts = {"heads": str(methods.mmr.student_size(config.student)[2])}
        host = jax.device_get((self.variables, self.frozen["teacher"]))
        names, arch = weights.torch_names, self.method.teacher.arch
        for name, state in (
            ("student", names.student_to_torch(host[0], grid)),
            ("teacher", names.teacher_to_torch(host[1], arch)),
        ):
            weights.storage.write_torch(folder / f"{name}.safetensors", state, facts)
        trained, scorer = self.scorer_of(PARITY_IMAGES)
        on_device = mesh_lib.put_batch(images, trained.mesh)
        maps, scores = jax.device_get(scorer(*trained.ready, on_device))
        loss = jax.jit(self._masked_loss)(self.variables, self.frozen, images, noise)
        np.savez(
            folder / "parity.npz",
            **{"images": images, "noise": noise, "map": maps, "score": scores},
            loss=np.float64(loss),
            mask_ratio=np.float64(self.config.student.mask_ratio),
        )

    def _masked_loss(self, variables, frozen, images, noise):
        pixels = resnet.normalise(images / 255.0)
        ratio = self.config.student.mask_ratio
        features = self.method.student.apply(variables, pixels, noise, ratio)
        targets = self.method.teacher.apply(frozen["teacher"], pixels)
        return losses.multi_scale_cosine(features, targets, jnp.ones(len(images)))[0]

    # --- common parts

    def _rate(self, windows: list[float], flop: float, mesh: jax.sharding.Mesh) -> dict:
        median = float(np.median(windows))
        return {
            "images_per_second": {"median": median, "min": min(windows), "max": max(windows)},
            "windows": windows,
            "gflops": median * flop / 1e9,
            "devices": mesh.size,
        }


def _memory(compiled, before: float) -> dict[str, float | None]:
    """MiB: what a program takes and needs beside; the peak, if it is higher than `before`."""
    analysis, peak = compiled.memory_analysis(), _peak_mib()
    return {
        "arguments_mib": analysis.argument_size_in_bytes / 2**20,
        "temporary_mib": analysis.temp_size_in_bytes / 2**20,
        "peak_mib": peak if peak > before else None,  # else it is that of something else
    }


def _peak_mib() -> float:
    """Most memory so far: on the first device or, where that does not count, of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, per MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def windows(call: Callable, images_per_call: int, plan: Plan) -> list[float]:
    """Images per second in each window of repeated calls, whose last result is waited for."""

    def many(calls: int) -> None:
        jax.block_until_ready([call() for _ in range(calls)])

    return _windows_of(plan, many, images_per_call)


def _windows_of(plan: Plan, many: Callable[[int], None], images_per_call: int) -> list[float]:
    """Images per second of each window, after as long a warm-up."""
    many(2)
    started = time.perf_counter()
    many(1)
    calls = max(1, round(plan.window_seconds / (time.perf_counter() - started)))
    many(calls)
    rates = []
    for _ in range(plan.windows):
        started = time.perf_counter()
        many(calls)
        rates.append(calls * images_per_call / (time.perf_counter() - started))
    return rates


def _entries(cache: str) -> set[str]:
    return {path.name for path in pathlib.Path(cache).glob("*-cache")}


def _use_cache(folder: str | None) -> None:
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)
    if folder:
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def resident_images(count: int) -> dict[str, np.ndarray]:
    """Training images as the loop keeps them: {"image": uint8 [n, *CANVAS, 3], "size": [n, 2]}."""
    image = _textured(count, CANVAS)
    return {"image": image, "size": np.tile(np.int32([SIZE]), (count, 1))}


def finished_images(count: int, size: tuple[int, int]) -> np.ndarray:
    """Test images uint8 [count, *size, 3]."""
    return _textured(count, tuple(size))


def _textured(count: int, size: tuple[int, int]) -> np.ndarray:
    """Blocks of random colours under noise; one image at a time, since many would be large."""
    rng = np.random.default_rng(0)
    rows, columns = (-(-n // 16) for n in size)
    noise = rng.normal(0, 12, (*size, 3)).astype(np.int16)
    images = np.empty((count, *size, 3), np.uint8)
    for image in images:
        blocks = rng.integers(40, 200, (rows, columns, 3), np.int16).repeat(16, 0).repeat(16, 1)
        image[:] = np.clip(blocks[: size[0], : size[1]] + noise, 0, 255)
    return images
