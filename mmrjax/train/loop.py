"""The one training loop, for every method, read from top to bottom.

Order per run: frozen weights and data, initial variables, `prepare`, each gradient stage, `fit`. A
checkpoint holds everything that training changes; the position in the data is the step.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mmrjax.data import augment, feed, geometry
from mmrjax.data.records import Records
from mmrjax.methods import base
from mmrjax.runtime import checkpoint, files, logs, placement, processes, trackers
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import begun
from mmrjax.train import step as step_lib

LOG = "metrics.jsonl"
PREPARED = 64  # training images that a method may look at beforehand
STEPS_PER_CALL = 64  # on accelerators: about a second of work, never more than an epoch


@dataclasses.dataclass
class Training:
    """The things that all steps of one training work with."""

    method: base.Method
    frozen: dict  # with the method's extras
    records: Records  # good training images
    seed: int
    folder: pathlib.Path
    store: checkpoint.Store
    mesh: jax.sharding.Mesh
    evaluate_only: bool

    @property
    def config(self) -> ConfigDict:
        """The whole configuration."""
        return self.method.config

    def refuse_to_train(self, done: str) -> None:
        """Raises ValueError when this call may only evaluate."""
        if self.evaluate_only:
            raise ValueError(
                f"{self.folder} is not trained to the end ({done}); run it without --mode=evaluate"
            )

    def open(self, name: str) -> checkpoint.Checkpoints:
        """The checkpoints in a folder; another call may be writing there if this one evaluates.

        A folder that does not exist yet is made even by an evaluation: Orbax refuses to read it.
        """
        read_only = self.evaluate_only and (self.store.root / name).is_dir()
        return self.store.open(name, self.config.ckpt.keep, read_only)


@dataclasses.dataclass
class Views:
    """Training images in evaluation geometry, as often as they are gone through.

    Yields (float32 [b, h, w, 3] in [0, 1] on device, number of real rows).
    """

    training: Training
    records: Records
    label: str

    @property
    def rows(self) -> np.ndarray:
        """The record of every window, int32 [windows], in the order of the batches."""
        size, windows = self.training.config.eval.batch_size, len(self._view.corners())
        starts, count = range(0, len(self.records), size), len(self.records)
        batches = [np.arange(start, min(start + size, count), dtype=np.int32) for start in starts]
        return np.concatenate([np.tile(batch, windows) for batch in batches])

    @property
    def parts(self) -> int:
        """How many parts the images show; photographs of one part are a group."""
        return len(np.unique(self.records.table["group"]))

    @property
    def _view(self) -> geometry.View:
        return geometry.View.of(self.training.config)

    def __iter__(self) -> Iterator[tuple[jax.Array, int]]:
        """Begins with the first image; a tiled image comes window by window."""
        config, mesh = self.training.config, self.training.mesh
        view, size = self._view, config.eval.batch_size
        own = mesh_lib.own_rows(size, mesh)
        batches = geometry.batches(self.records, view, size, own)
        (h, w), corners = view.size, view.corners()
        to_unit, is_first = jax.jit(geometry.to_unit), True
        for image, _, real in logs.progress(batches, self.label, -(-len(self.records) // size)):
            for top, left in corners:
                window = image[:, top : top + h, left : left + w]
                # The caller compiles its program on the first batch.
                wait = logs.waiting(f"compiling: {self.label}")
                with wait if is_first else contextlib.nullcontext():
                    yield to_unit(mesh_lib.put_batch(window, mesh)), real
                is_first = False


def train(
    method: base.Method,
    records: Records,
    seed: int,
    folder: pathlib.Path,
    evaluate_only: bool = False,
    labelled: Records | None = None,
    store: checkpoint.Store | None = None,
) -> base.Trained:
    """Trains a method with one seed, or picks up where a killed run stopped.

    Args:
      method: with its configuration.
      records: the good images to train on.
      seed: seed of initial values, order, crops and masks.
      folder: the run's folder; metrics.jsonl goes there.
      evaluate_only: refuse to train what is not finished.
      labelled: defective records that a method may learn from, if it can.
      store: for checkpoints/<stage>/ and fitted/; None keeps them in `folder`.

    Raises:
      ValueError: bad configuration or weights, too few images, or an unfinished run with
        `evaluate_only`.
      Interrupted: after SIGTERM or SIGINT, once the state is saved.
    """
    method.check_run(method.config, len(records))
    stages = method.stages(records)
    store = store or checkpoint.Store(folder)
    mesh = _make_mesh(method.config, stages)
    labelled = records.take([]) if labelled is None else labelled
    with method.precision():
        frozen, facts = method.load_frozen()
        sha256 = facts.get("teacher", {}).get("sha256")
        processes.first(lambda: begun.hold_teacher(folder, store, sha256))
        frozen = mesh_lib.replicate(frozen, mesh)
        key_init, key_train, key_fit = jax.random.split(jax.random.key(seed), 3)
        variables, init_facts = method.init(key_init, frozen)
        parameters = {"trained": _count(variables["params"]), "frozen": _count(frozen)}
        facts |= {**init_facts, "parameters": parameters, "compute_dtype": str(method.dtype)}
        extras, notes = _extras(method, records, labelled, folder, store, evaluate_only)
        facts |= notes
        used = frozen | mesh_lib.replicate(extras, mesh)  # in training; scoring does without extras
        training = Training(method, used, records, seed, folder, store, mesh, evaluate_only)
        facts["seconds"] = {}
        if method.prepare is not None:
            views = Views(training, _evenly(records, PREPARED), "preparing")
            variables, prepared = method.prepare(variables, frozen, views)
            facts |= prepared
        variables = _run_stages(training, stages, variables, key_train, facts)
        if method.fit is not None:
            started = time.monotonic()
            variables, was_fitted = _fit(training, variables, key_fit)
            if was_fitted:
                facts["seconds"]["fitting"] = round(time.monotonic() - started, 1)
    return base.Trained(method, variables, frozen, facts, mesh)


def make_feed(
    config: ConfigDict, records: Records, stage: base.Stage, seed: int, mesh: jax.sharding.Mesh
) -> feed.Feed:
    """The training batches of a stage."""
    on_cpu = jax.default_backend() == "cpu"
    return feed.Feed(
        records,
        mode=config.data.feed,
        resident_gib=config.data.resident_gib,
        max_side=config.data.max_side,
        plan=stage.plan,
        seed=seed,
        steps_per_call=config.train.steps_per_call or (1 if on_cpu else STEPS_PER_CALL),
        device_mesh=mesh,
    )


def _make_mesh(config: ConfigDict, stages: list[base.Stage]) -> jax.sharding.Mesh:
    """The devices that share all batches of a run."""
    sizes = [config.eval.batch_size, *(stage.plan.batch_size for stage in stages)]
    mesh = mesh_lib.make_mesh(fsdp=config.train.fsdp, batch_sizes=sizes)
    for stage in stages:
        mesh_lib.check_divisible(stage.plan.batch_field, stage.plan.batch_size, mesh)
    mesh_lib.check_divisible("eval.batch_size", config.eval.batch_size, mesh)
    return mesh


def _extras(method, records, labelled, folder, store, evaluate_only) -> tuple[dict, dict]:
    """The method's extras and facts about them; only the facts when nothing is trained."""
    if evaluate_only:  # the defects may be gone
        facts = processes.first(lambda: files.read_json(folder / begun.LABELLED) or {})
        facts.pop("sha256", None)
        return {}, facts
    arrays, facts = method.extras(records, labelled)
    if arrays:
        processes.first(lambda: begun.hold_extras(folder, store, arrays, facts))
    return arrays, facts


def _evenly(records: Records, most: int) -> Records:
    """All records or, if there are more, `most` of them, evenly spaced."""
    count = min(len(records), most)
    return records.take(np.linspace(0, len(records) - 1, count).round().astype(int))


def _run_stages(
    training: Training, stages: list[base.Stage], variables: dict, key: jax.Array, facts: dict
) -> dict:
    """Runs the gradient stages that are still to do; returns the trained variables."""
    first, epochs, seconds = 0, 0, 0.0
    for number, stage in enumerate(stages):
        own_key = key if number == 0 else jax.random.fold_in(key, number)
        variables, steps = _run_stage(training, stage, variables, own_key, (first, epochs))
        spent = processes.first(
            lambda lines=(first, first + steps), batch=stage.plan.batch_size: logs.seconds(
                training.folder / LOG, batch, *lines
            )
        )
        seconds = None if spent is None or seconds is None else seconds + spent
        first, epochs = first + steps, epochs + stage.epochs
    if stages:
        facts["seconds"]["training"] = seconds if seconds is None else round(seconds, 1)
    return variables


def _run_stage(
    training: Training,
    stage: base.Stage,
    variables: dict,
    key: jax.Array,
    first: tuple[int, int],
) -> tuple[dict, int]:
    """Trains one stage to its end, or restores it; (variables, steps of the stage).

    Args:
      training: the run.
      stage: the stage.
      variables: as the stages before left them.
      key: PRNG key of the stage.
      first: steps and epochs of all stages before.
    """
    steps_per_epoch = stage.plan.steps_per_epoch(len(training.records))
    total = stage.epochs * steps_per_epoch
    state = step_lib.create(variables, stage)
    shardings = step_lib.shardings(state, training.mesh)
    state = mesh_lib.put(state, shardings)
    folder = f"{begun.CHECKPOINTS}/{stage.name}"
    with training.open(folder) as checkpoints:
        start, tree = checkpoints.restore(step_lib.to_tree(state)) or (0, None)
        state = state if tree is None else step_lib.from_tree(state, tree)
        if 0 < start < total:
            logging.info("resuming at step %d of %d%s", start, total, _of(training, stage))
        if start < total:
            training.refuse_to_train(f"step {start} of {total}{_of(training, stage)}")
            step_fn = step_lib.make_train_step(
                training.method,
                stage,
                augment.make_augment(training.config, stage.augment),
                steps_per_epoch,
                training.mesh,
                shardings,
            )
            state = _loop(training, stage, step_fn, state, start, total, key, checkpoints, first)
    return state.variables, total


def _loop(training, stage, step_fn, state, start, total, key, checkpoints, first):
    """Step, log, save when due, stop when asked; in this order, so that a save is complete.

    Clocks and signals are the processes' own, what follows from them is not.
    """
    config = training.config
    data = make_feed(config, training.records, stage, training.seed, training.mesh)
    sizes = (start, total, data.steps_per_epoch, stage.plan.batch_size)
    rates = np.zeros(stage.epochs) if stage.rates is None else stage.rates
    step, last_save = start, time.monotonic()
    with (
        trackers.opened(config, training.folder, "train") as tracked,
        logs.TrainLog(training.folder / LOG, *sizes, stage.rate_field, tracked, first) as log,
        processes.StopRequest() as stop,
    ):
        frozen = placement.place(training.frozen, training.method.dtype)
        for chunk in data.chunks(start, total):
            if step == start:
                with logs.waiting(f"compiling the training step{_of(training, stage)}"):
                    state, values = step_fn(state, frozen, data.resident, chunk, key)
                log.restart()
            else:
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
                if not step_lib.is_finite(state):  # the last update shows in no loss yet
                    remedy = logs.remedy(stage.rate_field)
                    raise FloatingPointError(
                        f"a parameter is not finite after step {step - 1}"
                        f"{_of(training, stage)}; {remedy}"
                    )
                checkpoints.save(step, step_lib.to_tree(state))
                last_save = time.monotonic()
            if stopped:
                checkpoints.wait()
                done = f"stopped at step {step} of {total}{_of(training, stage)}, saved"
                raise processes.Interrupted(done, stopped)
    return state


def _of(training: Training, stage: base.Stage) -> str:
    """The stage of a step, for messages; nothing for the only stage of a method."""
    return f" of stage {stage.name}" if len(training.method.stage_names) > 1 else ""


def _fit(training: Training, variables: dict, key: jax.Array) -> tuple[dict, bool]:
    """Fits, or restores a finished fit; (variables, whether it was done now)."""
    with training.open(begun.FITTED) as checkpoints:
        restored = checkpoints.restore(mesh_lib.replicated(training.mesh))
        if restored is not None:
            return {**variables, **restored[1]}, False
        training.refuse_to_train("not fitted")
        views = Views(training, training.records, "fitting")
        fitted = training.method.fit(variables, training.frozen, views, len(views.rows), key)
        new = {name: fitted[name] for name in fitted if name not in variables}
        if training.method.leave_out is not None:
            new[base.FITTED_ON] = views.rows
        new = mesh_lib.replicate(new, training.mesh)
        checkpoints.save(0, new)
    return {**variables, **new}, True


def _count(tree) -> int:
    """Numbers in all arrays of a tree."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))
