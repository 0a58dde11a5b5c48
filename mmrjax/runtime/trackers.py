"""Experiment trackers: TensorBoard, Weights & Biases, MLflow.

`config.log.trackers` names the trackers of a run, none by default. A tracker gets the lines of
metrics.jsonl, which stays the record of the run, and at the end the test metrics; nothing is read
back from it. A run that continues sends no step twice: TensorBoard's event file is written anew
from metrics.jsonl, and <run>/trackers.json holds the identity of the run at a service and the next
step to send. Only the first of several processes has trackers.
"""

import contextlib
import importlib
import importlib.util
import json
import operator
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from mmrjax.runtime import config as config_lib
from mmrjax.runtime import files, processes

STATE = "trackers.json"
PROJECT = "mmrjax"  # at a service, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise
LONGEST = 500  # characters of a field that MLflow takes


def check(names: Sequence[str]) -> None:
    """Raises ValueError for trackers that are unknown or not installed, with what to do."""
    for name in names:
        if name not in SERVICES:
            known = ", ".join(SERVICES)
            raise ValueError(f"--config.log.trackers={name}: unknown; choose from {known}")
        package = SERVICES[name].package
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--config.log.trackers={name} needs {package}: pip install {package}, or "
                f"'mmrjax[{name}]'"
            )


@contextlib.contextmanager
def opened(config: ConfigDict, run: pathlib.Path, kind: str) -> Iterator[list["Tracker"]]:
    """The trackers of a run, closed at the end; none in any process but the first.

    Args:
      config: the configuration of the run.
      run: <workdir>/<method>/<category>/seed<k>.
      kind: "train" or "test", the kind of lines to come.

    Raises:
      RuntimeError: a service cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        names = config.log.trackers if processes.is_first() else ()
        trackers = []
        for name in names:
            trackers.append(Tracker(name, config, run, kind))
            stack.callback(trackers[-1].close)
        yield trackers


def tell_results(config: ConfigDict, run: pathlib.Path, results: Mapping) -> None:
    """Sends the test metrics of a run's results.json, as "test/<domain>/<metric>" in 0 to 1."""
    values = {
        f"test/{domain}/{name}": value
        for domains in results["metrics"].values()
        for domain, metrics in domains.items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }
    log = run / "metrics.jsonl"  # absent for a method without training steps
    lines = log.read_text().splitlines() if log.exists() else []
    step = json.loads(lines[-1])["step"] + 1 if lines else 0
    with opened(config, run, "test") as trackers:
        for tracker in trackers:
            tracker.send({"step": step, **values})


class Tracker:
    """A run at a tracker; lines are those of metrics.jsonl: "step", "time", named values."""

    def __init__(self, name: str, config: ConfigDict, run: pathlib.Path, kind: str):
        """Begins a run there, or goes on with the run that trackers.json holds."""
        self._name, self._path, self._is_down = name, run / STATE, False
        self._state = (files.read_json(self._path) or {}).get(name, {})
        flat = config_lib.flatten(config).items()
        fields = {field: value for field, value in flat if not field.startswith("sweep.")}
        service = SERVICES[name]
        module = importlib.import_module(service.package)
        self._errors = operator.attrgetter(service.error)(module) if service.error else ()
        try:
            self._session = service.begin(module, run, kind, self._state.get("id"), fields)
        except self._errors as e:
            raise RuntimeError(
                f"{name} does not begin a run: {e}; see to it, or leave it out of "
                "--config.log.trackers"
            ) from e
        self.close = self._session.close
        self.flush()

    def replay(self, lines: Iterable[Mapping]) -> None:
        """Takes the lines that metrics.jsonl holds already."""
        for line in lines:
            self.add(line)
        self.flush()

    def add(self, line: Mapping) -> None:
        """Sends a line, unless its step was sent before this run was killed."""
        if line["step"] >= self._state.get("next", 0) and self.send(line):
            self._state["next"] = line["step"] + 1

    def send(self, line: Mapping) -> bool:
        """Sends a line; False if the tracker is down, which is said once and stops no training."""
        values = {name: value for name, value in line.items() if name not in ("step", "time")}
        values = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        try:
            if not self._is_down:
                self._session.send(values, line["step"], line.get("time"))
        except self._errors as e:
            self._is_down = True
            logging.warning("%s is no longer told of this run: %s", self._name, e)
        return not self._is_down

    def flush(self) -> None:
        """Puts event files on the disk, and notes how far a service has come."""
        self._session.flush()
        if self._session.identity:
            self._state["id"] = self._session.identity
            content = {**(files.read_json(self._path) or {}), self._name: self._state}
            files.write_text(self._path, json.dumps(content))


class Session(NamedTuple):
    """A begun run at a tracker."""

    send: Callable[[dict[str, float], int, float | None], object]  # values, step, time
    close: Callable[[], None]
    flush: Callable[[], None] = lambda: None
    identity: str | None = None  # for trackers.json; None sends every line anew


def _tensorboard(module: ModuleType, run: pathlib.Path, kind: str, *_) -> Session:
    """Replaces the event file of this kind in <run>/tensorboard."""
    for old in (run / "tensorboard").glob(f"events.*.{kind}"):
        old.unlink()
    writer = module.SummaryWriter(str(run / "tensorboard"), filename_suffix=f".{kind}")

    def send(values: dict[str, float], step: int, time: float | None) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step, walltime=time)

    return Session(send, writer.close, writer.flush)


def _wandb(
    module: ModuleType, run: pathlib.Path, kind: str, identity: str | None, fields
) -> Session:
    """Weights & Biases; its own environment variables hold (WANDB_MODE …)."""
    identity = identity or secrets.token_hex(4)
    begun = module.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name="/".join(run.parts[-3:]),
        id=identity,
        resume="allow",
        dir=str(run),
        config=fields,
    )
    return Session(
        lambda values, step, time: begun.log(values, step=step), begun.finish, identity=identity
    )


def _mlflow(
    module: ModuleType, run: pathlib.Path, kind: str, identity: str | None, fields
) -> Session:
    """MLflow at MLFLOW_TRACKING_URI, or in the place that the package chooses."""
    if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        module.set_experiment(PROJECT)
    if identity:
        module.start_run(run_id=identity)  # its fields cannot be changed any more
    else:
        identity = module.start_run(run_name="/".join(run.parts[-3:])).info.run_id
        module.log_params({name: str(value)[:LONGEST] for name, value in fields.items()})
    return Session(
        lambda values, step, time: module.log_metrics(values, step=step),
        module.end_run,
        identity=identity,
    )


class Service(NamedTuple):
    """How a tracker is used: its package, its error class there, and what begins a run."""

    package: str
    error: str  # "" if it has none
    begin: Callable[..., Session]


SERVICES = {
    "tensorboard": Service("tensorboardX", "", _tensorboard),
    "wandb": Service("wandb", "Error", _wandb),
    "mlflow": Service("mlflow", "exceptions.MlflowException", _mlflow),
}
