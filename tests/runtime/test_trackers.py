"""TensorBoard reads what metrics.jsonl holds, once; the two services are fakes that take notes."""

import importlib.machinery
import importlib.util
import json
import struct
import sys
import types

import numpy as np
import pytest

from mmrjax import main
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import logs, processes, trackers

WANDB, MLFLOW = "wandb", "mlflow"


def events(folder) -> list[tuple[str, int, float, float]]:
    """(tag, step, value, time) of every scalar in the event files of a folder, in their order.

    A record is its length, a checksum, the bytes of an Event, another checksum.
    """
    event_pb2 = pytest.importorskip(
        "tensorboardX.proto.event_pb2", reason="needs the tensorboard extra"
    )
    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found += [
                (value.tag, event.step, value.simple_value, event.wall_time)
                for value in event.summary.value
            ]
    return found


def config_with(*names):
    return config_lib.load("configs/folder.py", [f"log.trackers={','.join(names)}"])


def note(config, run, start, stop, fail_at=None):
    """Trains steps [start, stop) as far as the log can tell; ends without closing at `fail_at`."""
    run.mkdir(parents=True, exist_ok=True)
    opened = trackers.opened(config, run, "train")
    opened_trackers = opened.__enter__()
    log = logs.TrainLog(run / "metrics.jsonl", start, stop, 5, 4, trackers=opened_trackers)
    for step in range(start, stop):
        log.add(step, {"loss": np.array([1 / (step + 1)]), "lr": np.array([0.1])})
        log.flush()
        if step == fail_at:
            return
    log.__exit__()
    opened.__exit__(None, None, None)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_event_files_with_its_losses_and_results(finished):
    pytest.importorskip("tensorboardX", reason="needs the tensorboard extra")
    for method in ("mmr", "patchcore"):
        run = finished[0] / method / "parts" / "seed1"
        steps = len(lines(run)) if method == "mmr" else 0
        found = events(run / "tensorboard")
        losses = {step: (value, at) for tag, step, value, at in found if tag == "train/loss"}
        assert sorted(losses) == list(range(steps))
        for line in lines(run) if steps else ():
            assert losses[line["step"]] == pytest.approx((line["loss"], line["time"]))
        results = json.loads((run / "results.json").read_text())
        expected = results["metrics"]["folder/parts"]["all"]
        tested = {tag: (step, value) for tag, step, value, _ in found if tag.startswith("test/")}
        for name in ("image_auroc", "aupro_0.3"):
            assert tested[f"test/all/{name}"] == pytest.approx((steps, expected[name]))
        assert not any("counts" in tag for tag in tested)


def test_a_killed_run_that_goes_on_has_every_step_once(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the tensorboard extra")
    config, run = config_with("tensorboard"), tmp_path / "mmr" / "parts" / "seed1"
    note(config, run, 0, 9, fail_at=6)
    before = [value for tag, _, value, _ in events(run / "tensorboard") if tag == "train/loss"]
    note(config, run, 4, 9)  # the last checkpoint was that of step 4
    found = [(step, value) for tag, step, value, _ in events(run / "tensorboard") if "loss" in tag]
    assert [step for step, _ in found] == list(range(9))
    np.testing.assert_allclose([value for _, value in found], [1 / (i + 1) for i in range(9)])
    assert before[:4] == [value for _, value in found[:4]]


class FakeRun(types.SimpleNamespace):
    """A run of either service: what it was begun with, and what it was sent."""


def fake_module(name, monkeypatch):
    """A module that takes notes of its runs, by identity."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.runs, module.active, module.fails = {}, None, False

    class Down(Exception):
        pass

    def begin(identity, **facts):
        if module.fails == "begin":
            raise Down("not logged in")
        known = identity in module.runs
        run = module.runs.setdefault(identity, FakeRun(sent=[], params={}, ended=0, **facts))
        run.resumed = known
        module.active = run
        run.log = lambda values, step: send(values, step)
        run.finish = end
        run.info = types.SimpleNamespace(run_id=identity)
        return run

    def send(values, step):
        if module.fails:
            raise Down("no route to host")
        module.active.sent.append((step, values))

    def end():
        module.active.ended += 1

    if name == WANDB:
        module.Error = Down
        module.init = lambda id, **facts: begin(id, **facts)
    else:
        module.exceptions = types.SimpleNamespace(MlflowException=Down)
        module.set_experiment = lambda name: setattr(module, "experiment", name)
        module.start_run = lambda run_id=None, run_name="": begin(
            run_id or f"run{len(module.runs)}", name=run_name
        )
        module.log_params = lambda params: module.active.params.update(params)
        module.log_metrics, module.end_run = send, end
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("name", [WANDB, MLFLOW])
def test_a_service_gets_every_step_once_and_then_the_results(name, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    module = fake_module(name, monkeypatch)
    config, run = config_with(name), tmp_path / "mmr" / "parts" / "seed1"
    note(config, run, 0, 9, fail_at=6)
    note(config, run, 4, 9)
    metrics = {"folder/parts": {"all": {"image_auroc": 0.75, "counts": {}, "pixel_ap": None}}}
    trackers.tell_results(config, run, {"metrics": metrics})
    assert len(module.runs) == 1
    (only,) = module.runs.values()
    assert only.name == "mmr/parts/seed1"
    assert only.resumed
    assert [step for step, _ in only.sent] == [*range(9), 9]
    for step, values in only.sent[:9]:
        assert values["train/loss"] == 1 / (step + 1)
        assert values.keys() >= {"train/lr", "train/epoch", "train/images_per_second"}
    assert only.sent[9][1] == {"test/all/image_auroc": 0.75}
    if name == WANDB:
        assert (only.project, only.resume, only.dir) == ("mmrjax", "allow", str(run))
        assert only.config["data.name"] == "folder"
    else:
        assert module.experiment == "mmrjax"
        assert only.params["data.name"] == "folder"


def test_a_tracker_that_is_added_later_gets_the_history(tmp_path, monkeypatch):
    module = fake_module(WANDB, monkeypatch)
    run = tmp_path / "mmr" / "parts" / "seed1"
    note(config_with(), run, 0, 9, fail_at=6)
    assert not (run / trackers.STATE).exists()
    note(config_with(WANDB), run, 4, 9)
    (only,) = module.runs.values()
    assert [step for step, _ in only.sent] == list(range(9))


@pytest.mark.parametrize("name", [WANDB, MLFLOW])
def test_a_service_that_goes_down_is_said_once_and_stops_nothing(
    name, tmp_path, monkeypatch, caplog
):
    module = fake_module(name, monkeypatch)
    module.fails = "send"
    run = tmp_path / "mmr" / "parts" / "seed1"
    note(config_with(name), run, 0, 5)
    assert len(lines(run)) == 5
    said = [r.getMessage() for r in caplog.records if "no longer told" in r.getMessage()]
    assert len(said) == 1
    assert "no route to host" in said[0]


@pytest.mark.parametrize("name", [WANDB, MLFLOW])
def test_a_service_that_does_not_begin_is_refused_in_words(name, tmp_path, monkeypatch):
    fake_module(name, monkeypatch).fails = "begin"
    with pytest.raises(RuntimeError, match=rf"{name} does not begin a run: not logged in; see to"):
        note(config_with(name), tmp_path / "mmr" / "parts" / "seed1", 0, 5)


def test_what_is_unknown_or_not_installed_is_refused_before_anything(
    tiny_args, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "mlflow" else find(n, *a)
    )
    for name, message in (
        ("mlflow", "needs mlflow: pip install mlflow, or 'mmrjax[mlflow]'"),
        ("tensorbord", "unknown; choose from tensorboard, wandb, mlflow"),
    ):
        assert main.main([*tiny_args, f"--config.log.trackers={name}"]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_tells(tmp_path, monkeypatch):
    module = fake_module(WANDB, monkeypatch)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with trackers.opened(config_with(WANDB), tmp_path, "train") as none:
        assert none == []
    assert module.runs == {}
    assert list(tmp_path.iterdir()) == []
