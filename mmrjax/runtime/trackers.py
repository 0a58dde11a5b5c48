"""Experiment trackers, for who wants them: TensorBoard, Weights & Biases, MLflow.

`config.log.trackers` names them; none is the default. They are told what metrics.jsonl holds, which
stays the record of a run, and at the end its test metrics; nothing is ever read back from them. A
run that continues sends no step twice: event files are written anew from metrics.jsonl, and for the
two services <run>/trackers.json remembers which run of theirs it is and how far it has come.
Of several processes, the first alone does this. Called by logs.TrainLog, train.py and main.py.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence

from absl import logging
from ml_collections import ConfigDict

from mmrjax.runtime import config as config_lib
from mmrjax.runtime import files, processes

STATE = "trackers.json"
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "mmrjax"  # at a service, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise
LONGEST = 500  # characters of a field that MLflow takes


def check(names: Sequence[str]) -> None:
    """Raises ValueError for trackers that are unknown or not installed, with what to do."""
    for name in names:
        if name not in PACKAGES:
            known = ", ".join(PACKAGES)
            raise ValueError(f"--config.log.trackers={name}: unknown; choose from {known}")
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--config.log.trackers={name} needs {package}: pip install {package}, or "
                f"'mmrjax[{name}]'"
            )


@contextlib.contextmanager
def opened(config: ConfigDict, run: pathlib.Path, kind: str) -> Iterator[list["Tracker"]]:
    """The trackers of a run, closed at the end; none in any process but the first.

    Args:
      config: of the run.
      run: <workdir>/<method>/<category>/seed<k>.
      kind: "train" or "test", of what will be told.

    Raises:
      RuntimeError: a service cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for name in config.log.trackers if processes.is_first() else ():
            tracker = TRACKERS[name](config, run, kind)
            stack.callback(tracker.close)
            found.append(tracker)
        yield found


def tell_results(config: ConfigDict, run: pathlib.Path, results: Mapping) -> None:
    """Sends the test metrics of a run's results.json, as "test/<domain>/<metric>" in 0 to 1."""
    values = {
        f"test/{domain}/{name}": value
        for domains in results["metrics"].values()
        for domain, one in domains.items()
        for name, value in one.items()
        if isinstance(value, float)
    }
    line = {"step": _steps(run / "metrics.jsonl"), **values}
    with opened(config, run, "test") as found:
        for tracker in found:
            tracker.summary(line)


def _steps(log: pathlib.Path) -> int:
    """How many steps a run has trained; 0 for a method without any."""
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] + 1 if lines else 0


class Tracker:
    """What is told of one run, in lines of metrics.jsonl: "step", "time" and named values."""

    def __init__(self, config: ConfigDict, run: pathlib.Path, kind: str):
        """Opens it."""
        raise NotImplementedError

    def replay(self, lines: Iterable[Mapping]) -> None:
        """Takes the lines that metrics.jsonl holds already."""
        raise NotImplementedError

    def add(self, line: Mapping) -> None:
        """Takes a line."""
        raise NotImplementedError

    def flush(self) -> None:
        """After every group of lines."""

    def summary(self, line: Mapping) -> None:
        """Takes the test metrics; "step" is the number of trained steps."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends it."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in <run>/tensorboard, one of the training and one of the results."""

    def __init__(self, config: ConfigDict, run: pathlib.Path, kind: str):
        """Replaces the event file of that kind."""
        folder = run / "tensorboard"
        for old in folder.glob(f"events.*.{kind}"):
            old.unlink()
        module = importlib.import_module(PACKAGES["tensorboard"])
        self._writer = module.SummaryWriter(str(folder), filename_suffix=f".{kind}")

    def replay(self, lines: Iterable[Mapping]) -> None:
        """Writes them again: the file of the run that was killed may lack some, or hold more."""
        for line in lines:
            self.add(line)

    def add(self, line: Mapping) -> None:
        """Writes its values."""
        for name, value in _values(line).items():
            self._writer.add_scalar(name, value, line["step"], walltime=line.get("time"))

    def flush(self) -> None:
        """Puts what was added on the disk."""
        self._writer.flush()

    def summary(self, line: Mapping) -> None:
        """Writes its values."""
        self.add(line)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Service(Tracker):
    """A tracker elsewhere: it may be down, and what was sent cannot be taken back."""

    name: str

    def __init__(self, config: ConfigDict, run: pathlib.Path, kind: str):
        """Begins a run there, or goes on with the one that trackers.json knows."""
        self._path, self._module = run / STATE, importlib.import_module(PACKAGES[self.name])
        self._state = (files.read_json(self._path) or {}).get(self.name, {})
        title = "/".join(run.parts[-3:])
        flat = {k: v for k, v in config_lib.flatten(config).items() if not k.startswith("sweep.")}
        self._is_down = False
        try:
            identity = self.begin(self._state.get("id"), title, flat, run)
        except self.errors as e:
            raise RuntimeError(
                f"{self.name} does not begin a run: {e}; see to it, or leave it out of "
                "--config.log.trackers"
            ) from e
        self._remember(id=identity)

    @property
    def errors(self) -> type[Exception]:
        """What the package raises when its service does not answer or refuses."""
        raise NotImplementedError

    def begin(self, identity: str | None, title: str, fields: dict, run: pathlib.Path) -> str:
        """Begins or continues; returns its identity there."""
        raise NotImplementedError

    def send(self, values: dict[str, float], step: int) -> None:
        """Sends the values of one step."""
        raise NotImplementedError

    def replay(self, lines: Iterable[Mapping]) -> None:
        """Sends what was not sent before."""
        for line in lines:
            self.add(line)
        self.flush()

    def add(self, line: Mapping) -> None:
        """Sends its values, unless that step was sent before this run was killed."""
        if line["step"] >= self._state.get("next", 0) and not self._is_down:
            self._try(self.send, _values(line), line["step"])
            self._state["next"] = line["step"] + 1

    def flush(self) -> None:
        """Remembers how far it has come."""
        self._remember()

    def summary(self, line: Mapping) -> None:
        """Sends its values."""
        self._try(self.send, _values(line), line["step"])

    def _try(self, work, *args) -> None:
        """The training matters more than who watches it: a failure is said once."""
        try:
            work(*args)
        except self.errors as e:
            self._is_down = True
            logging.warning("%s is no longer told of this run: %s", self.name, e)

    def _remember(self, **facts) -> None:
        self._state |= facts
        content = {**(files.read_json(self._path) or {}), self.name: self._state}
        files.write_text(self._path, json.dumps(content))


class WandB(Service):
    """Weights & Biases; its own environment variables hold (WANDB_PROJECT, WANDB_MODE …)."""

    name = "wandb"

    @property
    def errors(self) -> type[Exception]:
        """Its base class."""
        return self._module.Error

    def begin(self, identity: str | None, title: str, fields: dict, run: pathlib.Path) -> str:
        """Begins or continues."""
        identity = identity or secrets.token_hex(4)
        self._run = self._module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=title,
            id=identity,
            resume="allow",
            dir=str(run),
            config=fields,
        )
        return identity

    def send(self, values: dict[str, float], step: int) -> None:
        """Sends the values of one step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Ends it."""
        self._run.finish()


class MLflow(Service):
    """MLflow at MLFLOW_TRACKING_URI, or where the package puts it by itself."""

    name = "mlflow"

    @property
    def errors(self) -> type[Exception]:
        """Its base class."""
        return self._module.exceptions.MlflowException

    def begin(self, identity: str | None, title: str, fields: dict, run: pathlib.Path) -> str:
        """Begins or continues; the fields of a run that exists cannot be changed there."""
        if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            self._module.set_experiment(PROJECT)
        if identity:
            self._module.start_run(run_id=identity)
            return identity
        identity = self._module.start_run(run_name=title).info.run_id
        self._module.log_params({name: str(value)[:LONGEST] for name, value in fields.items()})
        return identity

    def send(self, values: dict[str, float], step: int) -> None:
        """Sends the values of one step."""
        self._module.log_metrics(values, step=step)

    def close(self) -> None:
        """Ends it."""
        self._module.end_run()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def _values(line: Mapping) -> dict[str, float]:
    """{"train/loss": …} of a line; test metrics have their names already."""
    values = {name: value for name, value in line.items() if name not in ("step", "time")}
    return {name if "/" in name else f"train/{name}": value for name, value in values.items()}
