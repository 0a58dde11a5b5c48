"""The benchmark measures the real programs of every method, and compares outputs before rates."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmrjax.bench import __main__ as bench
from mmrjax.bench import programs
from mmrjax.runtime import mesh as mesh_lib

TINY = [
    *("student.width=24", "student.depth=1", "student.heads=2", "patchcore.coreset=0.5"),
    *("data.image_size=32,32", "data.resize=32,32", "patchcore.width=16"),
]
SHORT = ["--windows=2", "--window_seconds=0.001", "--requests=3", "--images=4"]
FLAGS = [*(f"--config.{field}" for field in TINY), *SHORT]
FLAGS += ["--train_batches=2", "--eval_batches=2"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A batch of two cannot be split over the eight devices of the other tests."""
    with pytest.MonkeyPatch.context() as patch:
        make = mesh_lib.make_mesh
        patch.setattr(mesh_lib, "make_mesh", lambda *args, **kwargs: make(1))
        yield


def test_every_part_is_measured_printed_and_written(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main([*FLAGS, f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    rates = [*found["train"]["2"].values(), *found["evaluate"]["2"].values()]
    assert len(rates) == 3
    for rate in rates:
        summary = rate["images_per_second"]
        assert len(rate["windows"]) == 2
        assert summary["min"] == min(rate["windows"]) > 0
        assert summary["median"] == np.median(rate["windows"])
    assert found["train"]["2"]["train"]["compile_seconds"] > 0
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    printed = capsys.readouterr().out
    assert f"{found['train']['2']['train']['images_per_second']['median']:.1f}" in printed
    assert "from and to the host" in printed


def test_a_method_without_training_steps_is_fitted_and_scored(capsys):
    flags = ["--config.method.names=patchcore", "--parts=train,evaluate"]
    assert bench.main([*FLAGS, *flags]) == 0
    printed = capsys.readouterr().out
    assert "no training step" in printed
    assert "fit on 4 images" in printed
    assert "evaluate, batch 2" in printed


def test_the_peak_of_another_program_is_not_reported(monkeypatch):
    plan, peaks = programs.Plan(windows=1, window_seconds=1e-6), iter((1.0, 2.0, 2.0, 2.0))
    monkeypatch.setattr(programs, "_peak_mib", lambda: next(peaks))
    run = lambda calls: jax.block_until_ready(jax.numpy.ones(calls))  # noqa: E731
    assert programs.measure(run, 1, plan)["peak_mib"] == 2
    assert programs.measure(run, 1, plan)["peak_mib"] is None


def test_neither_tfds_nor_grain_is_needed():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('grain', 'tensorflow_datasets')));"
        "from mmrjax.bench import programs, __main__ as bench; bench._parse([])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--windows=0"], "must be positive"),
        (["--batchs=3"], "unknown argument '--batchs=3'"),
        (["--parts=speed"], "--parts=speed: known are train"),
    ],
)
def test_bad_flags_are_refused_with_a_reason(flags, words, capsys):
    with pytest.raises(SystemExit) as failure:
        bench._parse(flags)
    assert failure.value.code == 2
    assert words in capsys.readouterr().err


# --- side by side with PyTorch


@pytest.fixture
def sides(monkeypatch):
    """Both sides replaced by a record of the calls; rates 20 and 10 images/s."""
    pytest.importorskip("torch")
    calls = []

    def ours(task, arguments):
        calls.append(f"mmrjax {task.partition(':')[0]}")
        return {"dtype": "float32", "windows": [20.0]}

    def torch(folder, arguments, task, batch=0, variant=""):
        calls.append(f"torch {task} {variant}".strip())
        return {"map": torch.difference} if task == "compare" else {"windows": [10.0]}

    torch.difference = 0.0
    monkeypatch.setattr(bench, "_ours", ours)
    monkeypatch.setattr(bench, "_torch", torch)
    return calls, torch


def test_outputs_are_compared_first_then_both_take_turns(sides, tmp_path, capsys):
    path = tmp_path / "bench.json"
    flags = ["--vs=torch", "--variants=eager,channels_last", "--eval_batches=", f"--json={path}"]
    assert bench.main(flags) == 0
    turns = ["mmrjax train", "torch train eager", "torch train channels_last"]
    assert sides[0] == ["mmrjax torch", "torch compare", *turns, *reversed(turns)]
    found = json.loads(path.read_text())
    assert found["versus"]["train 16"] == {
        "mmrjax": [20.0, 20.0], "eager": [10.0, 10.0], "channels_last": [10.0, 10.0],
    }  # fmt: skip
    assert "2.00" in capsys.readouterr().out


@pytest.mark.parametrize("difference", [0.01, float("nan")])
def test_if_outputs_differ_nothing_is_timed(sides, capsys, difference):
    calls, torch = sides
    torch.difference = difference
    assert bench.main(["--vs=torch"]) == 1
    assert calls == ["mmrjax torch", "torch compare"]
    assert "nothing is timed" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize("method", ["mmr", "patchcore"])
def test_pytorch_computes_the_same_and_runs(method, tmp_path, monkeypatch, capsys):
    torch_side = pytest.importorskip("mmrjax.bench.torch_side")
    flags = [f"--worker=torch:{tmp_path}", f"--config.method.names={method}"]
    assert bench.main([*FLAGS, *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"dtype": "float32"}
    assert max(torch_side.differences(tmp_path).values()) <= bench.TOLERANCE["float32"]
    broken = dict(np.load(tmp_path / "compared.npz"))
    np.savez(tmp_path / "compared.npz", **broken | {"map": broken["map"] + 0.1})
    assert torch_side.differences(tmp_path)["map"] > bench.TOLERANCE["float32"]
    tasks = [("evaluate", "channels_last"), ("train", "eager")]
    for task, variant in tasks:
        arguments = [f"--folder={tmp_path}", f"--task={task}", f"--variant={variant}"]
        arguments += ["--batch=2", "--windows=2", "--window_seconds=0.001"]
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        if (method, task) == ("patchcore", "train"):
            with pytest.raises(SystemExit, match="cannot train"):
                torch_side.main()
            return
        torch_side.main()
        assert min(json.loads(capsys.readouterr().out)["windows"]) > 0
