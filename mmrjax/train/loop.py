"""The one training loop, for every method.

Order per run: teacher and data, initial state, resume, gradient stage, fit stage, last checkpoint.
A checkpoint holds everything that training changes; the position in the data is the step.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mmrjax import methods
from mmrjax.data import augment, epochs, feed, geometry
from mmrjax.data.records import Records
from mmrjax.methods import optim
from mmrjax.runtime import checkpoint, files, logs, placement, processes, trackers
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import step as state_lib

LOG = "metrics.jsonl"
TEACHER = "teacher.json"  # the sha256 of the weights that a run is trained with
LABELLED = "labelled.json"  # the sha256 of the labelled defects that it is trained with, and counts
PREPARED = 64  # training images that a method may look at beforehand
STEPS_PER_CALL = 64  # on accelerators: about a second of work, never more than an epoch


@dataclasses.dataclass
class Trained:
    """A finished run, ready for evaluation."""

    method: methods.base.Method
    variables: dict
    frozen: dict
    facts: dict
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def ready(self) -> tuple[dict, dict]:
        """(variables, frozen) as a scoring program takes them."""
        weights = self.variables, self.frozen
        return placement.place(weights, self.method.dtype, self.method.unroll)


@dataclasses.dataclass
class Run:
    """What both stages of a run, gradient and fit, work with."""

    config: ConfigDict
    method: methods.base.Method
    frozen: dict
    records: Records
    indices: np.ndarray
    seed: int
    folder: pathlib.Path
    mesh: jax.sharding.Mesh
    evaluate_only: bool

    def refuse_to_train(self, done: str) -> None:
        """Raises ValueError when this call may only evaluate."""
        if self.evaluate_only:
            raise ValueError(
                f"{self.folder} is not trained to the end ({done}); run it without --mode=evaluate"
            )

    @property
    def plan(self) -> epochs.Plan:
        """How the batches are filled."""
        return self.method.plan(self.records, self.indices)

    def views(self, indices: np.ndarray, label: str) -> Iterator[tuple[jax.Array, int]]:
        """Batches of the records `indices` in evaluation geometry, with the number of real rows."""
        view, size = geometry.View.of(self.config), self.config.eval.batch_size
        own = mesh_lib.own_rows(size, self.mesh)
        batches = geometry.batches(self.records, indices, view, size, own)
        (h, w), corners = view.size, view.corners()
        for image, _, real in logs.progress(batches, label, -(-len(indices) // size)):
            for top, left in corners:
                window = image[:, top : top + h, left : left + w]
                yield mesh_lib.put_batch(window, self.mesh), real

    def feed(self) -> feed.Feed:
        """The training batches."""
        on_cpu = jax.default_backend() == "cpu"
        data, train = self.config.data, self.config.train
        return feed.Feed(
            self.records,
            self.indices,
            mode=data.feed,
            resident_gib=data.resident_gib,
            max_side=data.max_side,
            plan=self.plan,
            seed=self.seed,
            steps_per_call=train.steps_per_call or (1 if on_cpu else STEPS_PER_CALL),
            device_mesh=self.mesh,
        )


@dataclasses.dataclass
class Views:
    """The training images of a run as `Run.views` gives them, as often as they are asked for."""

    run: Run
    label: str

    def __iter__(self) -> Iterator[tuple[jax.Array, int]]:
        """Begins with the first image."""
        return self.run.views(self.run.indices, self.label)


def train(
    config: ConfigDict,
    name: str,
    records: Records,
    indices: np.ndarray,
    seed: int,
    folder: pathlib.Path,
    evaluate_only: bool = False,
    labelled: Sequence[int] = (),
) -> Trained:
    """Trains one method on one category with one seed, or picks up where a killed run stopped.

    Args:
      config: the whole configuration.
      name: of the method.
      records: of the category.
      indices: records to train on.
      seed: of initial values, order, crops and masks.
      folder: of this run; checkpoints/, fitted/ and metrics.jsonl go there.
      evaluate_only: refuse to train what is not finished.
      labelled: defective records that a method may learn from, if it can.

    Raises:
      ValueError: bad configuration or weights, too few images for statistics by place, or an
        unfinished run with `evaluate_only`.
      processes.Interrupted: after SIGTERM or SIGINT, once the state is saved.
    """
    method = methods.create(name, config)
    config = method.config
    if config.score.by_place:
        methods.by_place.check(name, config, len(indices))
    sizes = [config.eval.batch_size] + [config.train.batch_size] * method.trains
    mesh = mesh_lib.make_mesh(fsdp=config.train.fsdp, batch_sizes=sizes)
    if method.trains:
        field = method.own.get("train.batch_size", "train.batch_size")
        mesh_lib.check_divisible(field, config.train.batch_size, mesh)
    mesh_lib.check_divisible("eval.batch_size", config.eval.batch_size, mesh)
    if method.dtype == jnp.float32:  # also on accelerators, whose default is less
        jax.config.update("jax_default_matmul_precision", "highest")
    frozen, facts = method.load_frozen()
    processes.first(lambda: _hold_teacher(folder, facts.get("teacher", {}).get("sha256")))
    frozen = mesh_lib.replicate(frozen, mesh)
    key_init, key_train, key_fit = jax.random.split(jax.random.key(seed), 3)
    variables, init_facts = method.init(key_init, frozen)
    parameters = {"trained": _count(variables["params"]), "frozen": _count(frozen)}
    facts |= {**init_facts, "parameters": parameters, "compute_dtype": str(method.dtype)}
    if evaluate_only:  # the defects may be gone
        kept, labels = {}, processes.first(lambda: files.read_json(folder / LABELLED) or {})
        labels.pop("sha256", None)
    else:
        kept, labels = method.keep_labelled(records, np.asarray(labelled, int), indices)
        if kept:
            processes.first(lambda: _hold_labelled(folder, kept, labels))
    facts |= labels
    used = frozen | mesh_lib.replicate(kept, mesh)  # in training; what scores does without
    run = Run(config, method, used, records, indices, seed, folder, mesh, evaluate_only)
    facts["seconds"] = {}
    if method.prepares:
        rows = _evenly(indices, PREPARED)
        variables, found = method.prepare(variables, frozen, run.views(rows, "preparing"))
        facts |= found
    if method.trains:
        variables = _gradient_stage(run, variables, key_train)
        facts["seconds"]["training"] = processes.first(
            lambda: logs.seconds(folder / LOG, config.train.batch_size)
        )
    if method.fits:
        started = time.monotonic()
        variables, fitted = _fit_stage(run, variables, key_fit)
        if fitted:
            facts["seconds"]["fitting"] = round(time.monotonic() - started, 1)
    return Trained(method, variables, frozen, facts, mesh)


def _evenly(indices: np.ndarray, most: int) -> np.ndarray:
    """All of `indices` or, if there are more, `most` of them, evenly spaced."""
    count = min(len(indices), most)
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]


def has_saved(folder: pathlib.Path) -> bool:
    """Whether a run holds anything trained or fitted."""
    return any(checkpoint.present(folder / stage) for stage in ("checkpoints", "fitted"))


def _hold_teacher(folder: pathlib.Path, sha256: str | None) -> None:
    """Notes the teacher's weights when a run begins; a begun one refuses others.

    The configuration tells a file's name only, and what is in it may have been exchanged.

    Raises:
      ValueError: the run was begun with weights of another sha256.
    """
    path, begun = folder / TEACHER, has_saved(folder)
    used = (files.read_json(path) or {}).get("sha256", sha256)  # older runs noted none
    if begun and used != sha256:
        raise ValueError(
            f"{folder} was begun with teacher weights of sha256 {str(used)[:8]}…, the file has "
            f"{str(sha256)[:8]}… now; put the first ones back, or use another --workdir"
        )
    if not begun:
        files.write_text(path, json.dumps({"sha256": sha256}))


def _hold_labelled(folder: pathlib.Path, kept: dict, facts: dict) -> None:
    """Notes the labelled defects when a run begins; a begun one refuses others.

    Raises:
      ValueError: the run was begun with others.
    """
    digest = hashlib.sha256()
    for array in jax.tree.leaves(kept):
        digest.update(np.ascontiguousarray(array).tobytes())
    path, sha256 = folder / LABELLED, digest.hexdigest()
    noted = (files.read_json(path) or {}).get("sha256", sha256)
    if has_saved(folder) and noted != sha256:
        raise ValueError(
            f"{folder} was begun with other labelled defects (sha256 {noted[:8]}…, now "
            f"{sha256[:8]}…); put the first ones back, or use another --workdir"
        )
    files.write_text(path, json.dumps({**facts, "sha256": sha256}))


def _gradient_stage(run: Run, variables: dict, key: jax.Array) -> dict:
    """Runs the steps that are still to do and returns the trained variables."""
    config = run.config
    steps_per_epoch = run.plan.steps_per_epoch(len(run.indices))
    total = config.train.epochs * steps_per_epoch
    tx = run.method.optimiser(steps_per_epoch)
    state = state_lib.create(variables, tx)
    shardings = state_lib.shardings(state, run.mesh)
    state = mesh_lib.put(state, shardings)
    with checkpoint.Checkpoints(run.folder / "checkpoints", config.ckpt.keep) as checkpoints:
        start, state = checkpoints.restore(state) or (0, state)
        if 0 < start < total:
            logging.info("resuming at step %d of %d", start, total)
        if start < total:
            run.refuse_to_train(f"step {start} of {total}")
            step_fn = state_lib.make_train_step(
                run.method, tx, make_augment(config), steps_per_epoch, run.mesh, shardings
            )
            state = _loop(run, step_fn, state, start, total, key, checkpoints)
    return state.variables


def _loop(run, step_fn, state, start, total, key, checkpoints) -> state_lib.TrainState:
    """Step, log, save when due, stop when asked; in this order, so that a save is complete.

    Clocks and signals are the processes' own, what follows from them is not.
    """
    config, data = run.config, run.feed()
    rate_field = run.method.own.get("optim.learning_rate", "optim.learning_rate")
    sizes = (start, total, data.steps_per_epoch, config.train.batch_size)
    rates = optim.learning_rates(config.optim, config.train.epochs)
    step, last_save = start, time.monotonic()
    with (
        trackers.opened(config, run.folder, "train") as told,
        logs.TrainLog(run.folder / LOG, *sizes, rate_field, told) as log,
        processes.StopRequest() as stop,
    ):
        frozen = placement.place(run.frozen, run.method.dtype)
        for chunk in data.chunks(start, total):
            state, values = step_fn(state, frozen, data.resident, chunk, key)
            count = len(chunk["index"])  # of one epoch
            rate = np.full(count, rates[step // data.steps_per_epoch])
            log.add(step, {**values, "lr": rate})
            step += count
            due = time.monotonic() - last_save >= config.ckpt.every_seconds
            show, due, stopped = processes.agree(log.is_due(), due, stop.signal)
            save = due or stopped or step == total
            if show or save:
                log.flush()  # raises on a loss that is not finite: such a state is not saved
            if save:
                if not state_lib.is_finite(state):  # the last update shows in no loss yet
                    remedy = logs.remedy(rate_field)
                    raise FloatingPointError(
                        f"a parameter is not finite after step {step - 1}; {remedy}"
                    )
                checkpoints.save(step, state)
                last_save = time.monotonic()
            if stopped:
                checkpoints.wait()
                raise processes.Interrupted(f"stopped at step {step} of {total}, saved", stopped)
    return state


def _fit_stage(run: Run, variables: dict, key: jax.Array) -> tuple[dict, bool]:
    """Fits, or restores a finished fit; (variables, whether it was done now)."""
    config = run.config
    with checkpoint.Checkpoints(run.folder / "fitted", config.ckpt.keep) as checkpoints:
        restored = checkpoints.restore(mesh_lib.replicated(run.mesh))
        if restored is not None:
            return {**variables, **restored[1]}, False
        run.refuse_to_train("not fitted")
        count = len(run.indices) * len(geometry.View.of(config).corners())
        fitted = run.method.fit(variables, run.frozen, Views(run, "fitting"), count, key)
        new = {name: fitted[name] for name in fitted if name not in variables}
        new = mesh_lib.replicate(new, run.mesh)
        checkpoints.save(0, new)
    return {**variables, **new}, True


def make_augment(config: ConfigDict) -> state_lib.Augment:
    """The training augmentation that `config.train` describes: (key, image, size) -> image."""
    train, kind = config.train, config.train.augment
    view = geometry.View.of(config)
    size_hw = view.size
    scale, ratio = tuple(train.crop_scale), tuple(train.crop_ratio)
    resize = tuple(config.data.resize) if config.data.tiling else None

    def apply(key: jax.Array, image: jax.Array, size: jax.Array) -> jax.Array:
        window = jnp.concatenate([jnp.zeros(2, jnp.int32), size])
        if resize:  # a window as large as those of the evaluation, anywhere
            key, key_window = jax.random.split(key)
            window = augment.random_window(key_window, size, size_hw, resize)
        if kind == "none":
            if resize:
                return augment.crop_resize(image, window, size_hw) / 255.0
            return augment.view(image, size, view.resize, size_hw, view.interpolation) / 255.0
        flip = kind == "rrc_flip"
        return augment.augment(key, image, window, size_hw, scale, ratio, flip)

    return apply


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
