"""The measured programs of one method, in one process: training step, scoring, latency, memory.

Inputs are textured random images, never constant: zeros run faster on a GPU. Weights are random, so
that neither data sets nor downloads are needed.
"""

import dataclasses
import functools
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmrjax import methods
from mmrjax.data import augment, geometry
from mmrjax.data.records import Records
from mmrjax.evaluate import scoring
from mmrjax.methods import base
from mmrjax.runs import pretrained
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.runtime import placement
from mmrjax.train import loop
from mmrjax.train import step as step_lib
from mmrjax.weights import layouts

IMAGE_SIZE = (300, 250)  # (height, width) of a training image in px
FITTED_AT_ONCE = 32  # images in a batch of `Method.fit`
COMPARED_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
      windows: number of time windows of each rate.
      window_seconds: least length of a window.
      requests: single images that the latency is taken of.
      images: training images.
    """

    windows: int = 5
    window_seconds: float = 2.0
    requests: int = 200
    images: int = 64


class Programs:
    """The programs of one method with random weights.

    Attributes:
      fit_seconds: duration of `Method.fit` on the training images; None if the method has no fit.
    """

    def __init__(self, config: ConfigDict, name: str, plan: Plan):
        """Draws the weights and fits the method; nothing else is compiled yet."""
        self.config, self.name, self.plan = config, name, plan
        self.method = methods.create(name, config)
        pretrained.fetch(self.method)
        self.view = geometry.View.of(config, evaluation=True)
        self.records = textured_records(plan.images)
        mesh = mesh_lib.make_mesh()
        self.devices = mesh.size
        with self.method.precision():
            frozen = mesh_lib.replicate(self.method.load_frozen()[0], mesh)
            variables, _ = self.method.init(jax.random.key(0), frozen)
            batches, count = self._batches(mesh)
            if self.method.prepare is not None:
                variables, _ = self.method.prepare(variables, frozen, batches)
            self.fit_seconds = None
            if self.method.fit is not None:
                started = time.perf_counter()
                key = jax.random.key(1)
                variables = self.method.fit(variables, frozen, batches, count, key)
                self.fit_seconds = time.perf_counter() - started
        self.variables, self.frozen = jax.device_get((variables, frozen))

    def _batches(self, mesh: jax.sharding.Mesh) -> tuple[list, int]:
        """([(float32 images [b, h, w, 3] on device, b)], number of all images)."""
        size = mesh.size * max(1, min(FITTED_AT_ONCE, self.plan.images) // mesh.size)
        number = -(-self.plan.images // size)
        images = geometry.to_unit(textured(size, self.view.size))
        return [(mesh_lib.put_batch(images, mesh), size)] * number, number * size

    def train(self, batch: int) -> dict[str, dict]:
        """Rates of the gradient stages at a batch size, {stage: see `measure`}.

        A step augments uint8 images, runs the networks and updates the parameters.
        """
        config = self.config.copy_and_resolve_references()
        flat = config_lib.flatten(config)
        fields = {stage.plan.batch_field for stage in self.method.stages(self.records)}
        fields = {
            f: (batch,) * len(flat[f]) if isinstance(flat[f], tuple) else batch for f in fields
        }
        config.update_from_flattened_dict(fields)
        method = methods.create(self.name, config)
        return {stage.name: self._stage(method, stage) for stage in method.stages(self.records)}

    def _stage(self, method: base.Method, stage: base.Stage) -> dict:
        config, batch = method.config, stage.plan.batch_size
        mesh = mesh_lib.make_mesh(batch_sizes=[batch])
        mesh_lib.check_divisible("--train_batches", batch, mesh)
        state = step_lib.create(jax.tree.map(jnp.array, self.variables), stage)
        shardings = step_lib.shardings(state, mesh)
        state = mesh_lib.put(state, shardings)
        data = loop.make_feed(config, self.records, stage, seed=0, mesh=mesh)
        chunk = next(data.chunks(0, data.steps_per_epoch))
        extras, _ = method.extras(self.records, self.records.take([]))
        frozen = mesh_lib.replicate(self.frozen | extras, mesh)
        frozen = placement.place(frozen, method.dtype)
        augmented = augment.make_augment(config, stage.augment)
        step = step_lib.make_train_step(
            method, stage, augmented, data.steps_per_epoch, mesh, shardings
        )

        def run(calls: int) -> None:
            nonlocal state
            for _ in range(calls):
                state, logs = step(state, frozen, data.resident, chunk, jax.random.key(1))
            jax.block_until_ready((state, logs))

        return measure(run, len(chunk["index"]) * batch, self.plan)

    def scorer(self, batch: int) -> tuple[base.Trained, Callable]:
        """(trained method, program for batches) on as many devices as divide the batch."""
        mesh = mesh_lib.make_mesh(math.gcd(batch, self.devices))
        weights = (mesh_lib.replicate(tree, mesh) for tree in (self.variables, self.frozen))
        trained = base.Trained(self.method, *weights, {}, mesh)
        return trained, scoring.make_predict(trained, self.view)

    def evaluate(self, batch: int) -> dict[str, dict]:
        """Rates of maps and scores, for images on the device and for images on the host."""
        trained, predict = self.scorer(batch)
        pixels = textured(batch, self.view.frame)
        on_device = mesh_lib.put_batch(pixels, trained.mesh)
        score = functools.partial(predict, *trained.ready)

        def from_device(calls: int) -> None:
            jax.block_until_ready([score(on_device) for _ in range(calls)])

        def from_host(calls: int) -> None:
            batches = ((pixels,) for _ in range(calls))
            for _, result in scoring.one_behind(trained, predict, batches):
                jax.device_get(result)

        return {
            "from_device": measure(from_device, batch, self.plan),
            "from_host": measure(from_host, batch, self.plan),
        }

    def latency(self) -> dict[str, float]:
        """Milliseconds from one uint8 image on the host to its score and map on the host."""
        trained, predict = self.scorer(1)
        pixels = textured(1, self.view.frame)

        def answer() -> float:
            started = time.perf_counter()
            on_device = mesh_lib.put_batch(pixels, trained.mesh)
            jax.device_get(predict(*trained.ready, on_device))
            return 1e3 * (time.perf_counter() - started)

        for _ in range(max(3, self.plan.requests // 10)):
            answer()
        times = [answer() for _ in range(self.plan.requests)]
        p50, p90, p99 = np.percentile(times, (50, 90, 99))
        return {"p50": p50, "p90": p90, "p99": p99, "max": max(times)}

    def write_torch(self, folder: pathlib.Path) -> None:
        """Writes configuration, weights, images, and the maps and scores that JAX gives for these.

        Files: config.json, weights.npz, and compared.npz with `images` uint8 [n, h, w, 3], `map`
        [n, h, w] and `score` [n].

        Raises:
          ValueError: the method has no PyTorch form.
        """
        if self.method.torch_scorer is None:
            raise ValueError(f"{self.name} has no PyTorch form; measure it without --vs=torch")
        (folder / "config.json").write_text(json.dumps(self.method.config.to_dict()))
        weights = {"variables": self.variables, "frozen": self.frozen}
        np.savez(folder / "weights.npz", **layouts.flatten(jax.device_get(weights)))
        trained, predict = self.scorer(COMPARED_IMAGES)
        images = textured(COMPARED_IMAGES, self.view.size)
        on_device = mesh_lib.put_batch(images, trained.mesh)
        maps, scores = jax.device_get(predict(*trained.ready, on_device))
        np.savez(folder / "compared.npz", images=images, map=maps, score=scores)


def measure(run: Callable[[int], None], images_per_call: int, plan: Plan) -> dict:
    """Measures a program from its first call on.

    Args:
      run: calls the program so many times, and waits for the results.
      images_per_call: images that a call processes.
      plan: number and length of the windows.

    Returns:
      {"images_per_second": {"median", "min", "max"}, "windows": images per second of each window,
      "compile_seconds": duration of the first call less that of a later call, "peak_mib": the most
      memory of device or process so far, None if another program before took more}.
    """
    before = _peak_mib()
    first = _seconds(run, 1)
    run(1)
    one = _seconds(run, 1)
    calls = max(1, round(plan.window_seconds / one))
    run(calls)
    rates = [calls * images_per_call / _seconds(run, calls) for _ in range(plan.windows)]
    peak = _peak_mib()
    return {
        "images_per_second": {"median": np.median(rates), "min": min(rates), "max": max(rates)},
        "windows": rates,
        "compile_seconds": max(0.0, first - one),
        "peak_mib": peak if peak > before else None,
    }


def _seconds(run: Callable[[int], None], calls: int) -> float:
    started = time.perf_counter()
    run(calls)
    return time.perf_counter() - started


def _peak_mib() -> float:
    """Most memory so far: of the first device or, if the device does not count, of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, per MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def textured_records(count: int) -> Records:
    """Good training images of two domains in memory."""
    images = textured(count, IMAGE_SIZE)
    rows = [{"image": cv2.imencode(".png", x)[1].tobytes(), "mask": b""} for x in images]
    names = np.array([f"{i:06}" for i in range(count)])
    table = {name: np.full(count, "") for name in ("defect", "split")}
    table |= {"id": names, "group": names, "domain": np.array(["a", "b"])[np.arange(count) % 2]}
    table |= {"label": np.zeros(count, int), "has_mask": np.zeros(count, bool)}
    places = [("train", i) for i in range(count)]
    return Records("textured", "textured", table, "", {"train": rows}, places)


def textured(count: int, size: tuple[int, int]) -> np.ndarray:
    """Blocks of random colours under noise, uint8 [count, *size, 3]."""
    rng = np.random.default_rng(0)
    rows, columns = (-(-n // 16) for n in size)
    noise = rng.normal(0, 12, (*size, 3)).astype(np.int16)
    images = np.empty((count, *size, 3), np.uint8)
    for image in images:  # one by one: many at once would be large
        blocks = rng.integers(40, 200, (rows, columns, 3), np.int16).repeat(16, 0).repeat(16, 1)
        image[:] = np.clip(blocks[: size[0], : size[1]] + noise, 0, 255)
    return images
