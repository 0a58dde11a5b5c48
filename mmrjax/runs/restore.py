"""A trained run read again from its folder, without its data: configuration, student, teacher.

Nothing in the folder is touched, not even while the run is still training. Called by convert.py,
and by detector.py and export/ for the whole of it.
"""

import math
import pathlib

import jax
from absl import logging
from ml_collections import ConfigDict

from mmrjax import methods, weights
from mmrjax.methods import base, mmr
from mmrjax.models import mae
from mmrjax.runs import places, pretrained
from mmrjax.runtime import checkpoint, devices, files
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import begun
from mmrjax.train import step as step_lib
from mmrjax.weights import layouts, source

WHOLE = "mae_whole"  # `official` of methods that train a whole masked autoencoder


def find_run(workdir: pathlib.Path) -> pathlib.Path:
    """The run folder that is meant: `workdir` itself, or the only run in it (see places.run)."""
    return pathlib.Path(places.run(workdir))


def trained(
    folder: pathlib.Path, store: checkpoint.Store | None = None
) -> tuple[base.Trained, ConfigDict]:
    """A run ready to score images, and its configuration; on as many devices as share a batch.

    Args:
      folder: <workdir>/<method>/<category>/seed<k>.
      store: the run's checkpoints; None takes those in `folder`.

    Raises:
      FileNotFoundError: no run, no weights of the teacher, or nothing trained yet.
      ValueError, RuntimeError: the run is damaged or does not fit.
    """
    folder, store = folder.resolve(), store or checkpoint.Store(folder)
    config, name = read_config(folder), folder.parent.parent.name
    for field in methods.METHODS.get(
        name, base.Method
    ).initial:  # what it began with is no longer needed
        config.update_from_flattened_dict({field: "scratch"})
    method = methods.create(name, config)
    pretrained.fetch(method)
    mesh = mesh_lib.make_mesh(math.gcd(config.eval.batch_size, len(devices.available())))
    with method.precision():
        frozen, facts = method.load_frozen()
        _check_teacher(config, folder, facts.get("teacher", {}))
        frozen = mesh_lib.replicate(frozen, mesh)
        variables, _ = method.init(jax.random.key(0), frozen)
    if method.stage_names:
        variables, step = _last_state(method, variables, folder, store, mesh)
        if not (folder / "results.json").exists():
            logging.warning("%s: not trained to the end, this is step %d", folder, step)
    if method.fit is not None:
        variables |= _fitted(folder, store, mesh)
    return base.Trained(method, variables, frozen, facts, mesh), config


def _fitted(folder: pathlib.Path, store: checkpoint.Store, mesh: jax.sharding.Mesh) -> dict:
    if store.present(begun.FITTED):
        with store.open(begun.FITTED, read_only=True) as checkpoints:
            restored = checkpoints.restore(mesh_lib.replicated(mesh))
        if restored is not None:
            return restored[1]
    raise FileNotFoundError(f"{folder} is not fitted yet; run python -m mmrjax.main to the end")


def _last_state(
    method: base.Method,
    variables: dict,
    folder: pathlib.Path,
    store: checkpoint.Store,
    mesh: jax.sharding.Mesh,
) -> tuple[dict, int]:
    """(variables, step) of the newest intact checkpoint of the method's last stage.

    Args:
      method: the run's method.
      variables: as `Method.init` draws them, or their shapes.
      folder: the run's folder.
      store: the run's checkpoints.
      mesh: on which the variables are laid.
    """
    saved = store.stages(begun.CHECKPOINTS)
    stage = next((name for name in reversed(method.stage_names) if name in saved), None)
    if stage is None:
        raise FileNotFoundError(f"{folder} has no checkpoints of a trained student")
    directory = f"{begun.CHECKPOINTS}/{stage}"
    with store.open(directory, read_only=True) as checkpoints:
        restored = checkpoints.restore(mesh_lib.replicated(mesh))
    if restored is None:
        raise FileNotFoundError(f"{store.root / directory} holds no finished checkpoint")
    step, tree = restored
    found = step_lib.variables_of(tree)
    checkpoint.check_leaves(found, variables, store.root / directory / str(step))
    return found, step


def read_config(folder: pathlib.Path) -> ConfigDict:
    """The configuration of a run.

    Args:
      folder: <workdir>/<method>/<category>/seed<k>.

    Raises:
      FileNotFoundError: that is no run, naming those that are below it.
    """
    stored = files.read_json(folder / "config.json")
    if stored is None:
        runs = ", ".join(map(str, files.runs(folder, "config.json", above="**")[:6]))
        hint = f"; runs in it: {runs}" if runs else ""
        raise FileNotFoundError(f"{folder} is no run folder: it has no readable config.json{hint}")
    config = config_lib.load(str(config_lib.PACKAGED / "common.py"))
    before = config_lib.flatten(ConfigDict(stored))
    for field, value in config_lib.flatten(config).items():
        if field in before and not field.startswith("sweep."):
            old = before[field]
            config.update_from_flattened_dict(
                {field: tuple(old) if isinstance(value, tuple) else old}
            )
    return config


def student(
    config: ConfigDict, folder: pathlib.Path, store: checkpoint.Store | None = None
) -> tuple[dict, int]:
    """The student of an MMR or MMR+ run's newest intact checkpoint, on the host, and its step.

    Raises:
      FileNotFoundError: the run has no checkpoint of a student.
      ValueError, RuntimeError: the checkpoints are of another model, or damaged.
    """
    kind = _kind(folder)
    kind = kind if kind and issubclass(kind, mmr.MMR) else mmr.MMR
    variables, step, _ = _newest(kind, config, folder, store)
    return variables, step


def autoencoder(
    config: ConfigDict, folder: pathlib.Path, store: checkpoint.Store | None = None
) -> tuple[dict, int, mae.MaskedAutoencoder]:
    """The masked autoencoder of a run's newest intact checkpoint, its step, and its module.

    Raises:
      FileNotFoundError: the run has no checkpoint.
      ValueError, RuntimeError: no run with a masked autoencoder, or damaged checkpoints.
    """
    kind = _kind(folder)
    if kind is None or kind.official != WHOLE:
        raise ValueError(f"{folder} is no run whose method trains a masked autoencoder")
    variables, step, method = _newest(kind, config, folder, store)
    own = {"params": variables["params"]["autoencoder"], "positions": variables["positions"]}
    return own, step, method.autoencoder


def _kind(folder: pathlib.Path) -> type[base.Method] | None:
    """The method of a run folder."""
    return methods.METHODS.get(folder.resolve().parent.parent.name)


def _newest(
    kind: type[base.Method],
    config: ConfigDict,
    folder: pathlib.Path,
    store: checkpoint.Store | None,
) -> tuple[dict, int, base.Method]:
    """The variables of a run's newest intact checkpoint on the host, its step, and its method."""
    config = config.copy_and_resolve_references()
    for field in kind.initial:  # what it began with is no longer needed
        config.update_from_flattened_dict({field: "scratch"})
    method = kind(config)
    variables = layouts.hollow(lambda key: method.init(key, {})[0])
    variables, step = _last_state(
        method, variables, folder, store or checkpoint.Store(folder), mesh_lib.make_mesh(1)
    )
    return jax.device_get(variables), step, method


def teacher(config: ConfigDict, folder: pathlib.Path) -> tuple[dict, dict]:
    """The frozen teacher that a run was trained with, as `weights.load_teacher` gives it.

    Raises:
      FileNotFoundError, ValueError: its file is missing, damaged, or not the one of the training.
    """
    fields = config.teacher
    pretrained.found(lambda: weights.teacher_file(fields.name, fields.weights))
    _, variables, facts = weights.load_teacher(fields.name, fields.weights, fields.seed)
    _check_teacher(config, folder, facts)
    return variables, facts


def _check_teacher(config: ConfigDict, folder: pathlib.Path, facts: dict) -> None:
    noted = files.read_json(folder / begun.TEACHER) or results_facts(folder).get("teacher", {})
    used = noted.get("sha256")
    if used and used != facts.get("sha256"):
        raise ValueError(
            f"the run was trained with teacher weights of sha256 {used[:8]}…, "
            f"{config.teacher.weights} has {str(facts.get('sha256'))[:8]}… now"
        )


def student_licence(config: ConfigDict, folder: pathlib.Path) -> str | None:
    """The licence of the weights that a run's student started from; None where they were drawn.

    As the training found it; while it has no results, as the configuration tells.
    """
    if facts := results_facts(folder).get("student"):
        return facts["licence"]
    if config.student.init in ("scratch", "mae"):
        return {"scratch": None, "mae": source.MAE_LICENCE}[config.student.init]
    return source.header(pathlib.Path(config.student.init)).get("licence", source.LOCAL)


def results_facts(folder: pathlib.Path) -> dict:
    """The facts in a run's results.json; {} while it has none."""
    return (files.read_json(folder / "results.json") or {}).get("facts", {})
