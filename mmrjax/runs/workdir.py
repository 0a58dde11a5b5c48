"""A work directory: where its runs lie, whether a call may go on with them, and what is finished.

<workdir>/<method>/<category>/seed<k>/ holds a run, <workdir>/evaluations/<view>/… another view of
it. A run's config.json tells what it was trained with and on; a call that differs in what shapes
training is refused. Among several processes, the first alone calls these functions.
"""

import json
import pathlib

from ml_collections import ConfigDict

from mmrjax import methods
from mmrjax.evaluate import results as evaluate
from mmrjax.metrics import misses
from mmrjax.runtime import checkpoint, files
from mmrjax.runtime import config as config_lib
from mmrjax.train import begun

# What may change between two calls on one work directory without touching what was trained.
FREE_FIELDS = (
    "title",
    "method.names",
    "data.raw_dir",
    "raw_dirs.",
    "data.data_dir",
    "data.categories",
    "data.feed",
    "data.resident_gib",
    "data.reference_domain",
    "calibration.target_fpr",
    "train.seeds",
    "train.steps_per_call",
    "train.fsdp",
    "eval.",
    "sweep.metrics",
    "sweep.average",
    "sweep.source",
    "report.",
    "log.",
    "ckpt.",
)


def run_path(name: str, category: str, seed: int) -> pathlib.Path:
    """The folder of a run, below the work directory or the root of a view."""
    return pathlib.Path(name, category, f"seed{seed}")


def trained_runs(workdir: pathlib.Path) -> list[tuple[str, str, int]]:
    """(method, category, seed) of every run in a work directory.

    Raises:
      FileNotFoundError: there is none.
    """
    runs = [(*run.parts[-3:-1], int(run.name[4:])) for run in files.runs(workdir, "config.json")]
    runs = [run for run in runs if run[0] in methods.METHODS]
    if not runs:
        raise FileNotFoundError(f"nothing trained in {workdir}; run once without --mode=evaluate")
    return runs


def has_results(config: ConfigDict, root: pathlib.Path) -> bool:
    """Whether each method and seed of `config` has results of each category it names, or of one."""
    return all(
        any(root.glob(f"{name}/{category}/seed{seed}/results.json"))
        for name in config.method.names
        for category in config.data.categories or ("*",)
        for seed in config.train.seeds
    )


def results_root(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """The work directory, or a folder in it for a view or a mode other than the trained one."""
    parts = []
    if config.eval.resize and tuple(config.eval.resize) != tuple(config.data.resize):
        parts.append("resize{}x{}".format(*config.eval.resize))
    if config.eval.stress != "none":
        parts.append(config.eval.stress)
    if config.eval.metrics_mode != "standard":
        parts.append(f"metrics_{config.eval.metrics_mode}")
    if config.eval.tiny_side != misses.TINY_SIDE:
        parts.append(f"tiny{config.eval.tiny_side}")
    return workdir / "evaluations" / "-".join(parts) if parts else workdir


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Looks whether `config` may run in a work directory.

    Raises:
      ValueError: it is no folder, or it holds a sweep or runs on another data set.
    """
    for place in (workdir, *workdir.parents):
        if place.is_file():
            raise ValueError(f"--workdir={workdir}: {place} is a file; name another folder")
    if "rows" in (files.read_json(workdir / "results.json") or {}):
        raise ValueError(f"{workdir} holds a sweep, with runs of its own; use another --workdir")
    for run in files.runs(workdir, "config.json"):
        stored = files.read_json(run / "config.json") or {}
        stored = stored.get("data", {}).get("name", config.data.name)
        if stored != config.data.name:
            raise ValueError(
                f"{workdir} holds runs on {stored}, this configuration is for {config.data.name}; "
                "use another --workdir"
            )


def settle(
    config: ConfigDict,
    name: str,
    run: pathlib.Path,
    digest: str,
    mode: str,
    store: checkpoint.Store | None = None,
) -> ConfigDict:
    """Holds the configuration against the run's config.json, or writes that.

    Args:
      config: the configuration of this call.
      name: name of the method.
      run: directory of the run.
      digest: digest of the records; a run belongs to the data it was trained on.
      mode: with "evaluate", what is stored wins over `config` in every field that shaped training.
      store: the run's checkpoints; None takes those in `run`.

    Returns:
      The configuration to go on with.

    Raises:
      ValueError: fields that change what is trained differ, naming them; other data; or a run
        that has lost its config.json.
    """
    path = run / "config.json"
    stored = files.read_json(path)
    was_begun = begun.has_saved(store or checkpoint.Store(run))
    if was_begun and stored is None:
        raise ValueError(
            f"{path} is absent or damaged, so nothing tells what the checkpoints beside it were "
            "trained with; put it back, or use another --workdir"
        )
    if stored is None or not (was_begun or mode == "evaluate"):
        # A run without any saved step may still change its mind.
        content = {**config.to_dict(), "data_digest": digest}
        files.write_text(path, json.dumps(content, indent=1))
        return config
    if stored.pop("data_digest", digest) != digest:
        raise ValueError(
            f"{run} was trained on other data than the records hold now; use another --workdir"
        )
    settled = config.copy_and_resolve_references()
    differing = _differing(config_lib.flatten(ConfigDict(stored)), config, name)
    if differing and mode == "evaluate":
        settled.update_from_flattened_dict(differing)
    elif differing:
        flat = config_lib.flatten(config)
        listed = "; ".join(f"{f}: was {old!r}, is {flat[f]!r}" for f, old in differing.items())
        raise ValueError(
            f"{run} was trained with another configuration ({listed}); use another --workdir, or "
            "for another view of the same model --mode=evaluate --config.eval.resize=…"
        )
    return settled


def _differing(before: dict, config: ConfigDict, name: str) -> dict:
    """{field: value `before`} of what shapes the training of a method and is not as in `config`."""
    method = methods.METHODS[name]
    others = {group for kind in methods.METHODS.values() for group in kind.groups()}
    others = {f"{group}." for group in others - method.groups()}
    differing = {}
    for field, value in config_lib.flatten(config).items():
        old = before.get(field, value)
        old = tuple(old) if isinstance(value, tuple) else old
        if old != value and not field.startswith((*FREE_FIELDS, *method.free, *others)):
            differing[field] = old
    return differing


def is_finished(folder: pathlib.Path, config: ConfigDict) -> bool:
    """Whether all files of an evaluation with the present fields are there."""
    results = files.read_json(folder / "results.json") or {}
    needed = [*evaluate.FILES]
    if (results.get("calibration") or {}).get("images"):  # a threshold was drawn from that many
        needed.append(evaluate.CALIBRATION)
    if not all((folder / name).is_file() for name in needed):
        return False
    return results.get("facts", {}).get("eval") == evaluate.eval_fields(config)
