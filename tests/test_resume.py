"""Killed and resumed equals uninterrupted, bit for bit; SIGTERM saves and leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import pytest

FIELDS = ("train.epochs=6", "ckpt.every_seconds=0", "method.names=mmr", "train.seeds=3")


def command(tiny_args, workdir):
    args = [a for a in tiny_args if not a.startswith("--workdir")]
    fields = [f"--config.{field}" for field in FIELDS]
    return [sys.executable, "-m", "mmrjax.main", *args, *fields, f"--workdir={workdir}"]


def start(tiny_args, workdir):
    return subprocess.Popen(
        command(tiny_args, workdir),
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_dir(workdir):
    return workdir / "mmr" / "parts" / "seed3"


def wait_for_step(workdir, step, process):
    folder = run_dir(workdir) / "checkpoints" / str(step)
    deadline = time.monotonic() + 240
    while not folder.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def final_state(workdir):
    with ocp.CheckpointManager(run_dir(workdir) / "checkpoints") as manager:
        step = manager.latest_step()
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    return step, meta["checksums"]


def losses(workdir):
    lines = (run_dir(workdir) / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tiny_raw, tiny_fields, tmp_path_factory):
    home = tmp_path_factory.mktemp("uninterrupted")
    args = ["--config=configs/folder.py", *tiny_fields(tiny_raw, home / "records")]
    process = start(args, home / "run")
    assert process.wait(timeout=400) == 0, process.communicate()[1]
    return home / "run", args


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, how):
    whole, args = uninterrupted
    process = start(args, tmp_path / "run")
    wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(how)
    status = process.wait(timeout=120)
    assert status == (-9 if how is signal.SIGKILL else 143)
    stopped = final_state(tmp_path / "run")[0]
    assert stopped < final_state(whole)[0]
    process = start(args, tmp_path / "run")
    assert process.wait(timeout=400) == 0, process.communicate()[1]
    assert "resuming at step" in process.communicate()[1]
    assert final_state(tmp_path / "run") == final_state(whole)
    assert losses(tmp_path / "run") == losses(whole)
    scores = [run_dir(w) / "scores.csv" for w in (whole, tmp_path / "run")]
    assert scores[0].read_bytes() == scores[1].read_bytes()


def test_a_torn_last_line_of_the_log_is_dropped(tmp_path):
    from mmrjax import logs

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    with logs.TrainLog(path, start=1, stop=2, steps_per_epoch=2, batch=4):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0]
