"""The benchmark measures the real programs, compares outputs first, and takes turns."""

import argparse
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmrjax.bench import __main__ as bench
from mmrjax.bench import model, tables
from mmrjax.models import winograd
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib

TINY = [
    *("student.width=24", "student.depth=2", "student.heads=2", "eval.bootstrap=10"),
    *("data.image_size=32,32", "data.resize=32,32", "train.epochs=2"),
]
TINY = [f"--config.{field}" for field in TINY]
SHORT = ["--windows=2", "--window_seconds=0.001", "--requests=3", "--test_images=6"]
BATCHES = ["--train_batches=2", "--eval_batches=1,2"]


def arguments(*flags):
    return bench._parse([*TINY, *SHORT, *BATCHES, *flags])


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A batch of two cannot be split over the eight of the other tests."""
    with pytest.MonkeyPatch.context() as patch:
        make = mesh_lib.make_mesh
        patch.setattr(model.mesh_lib, "make_mesh", lambda *args, **kwargs: make(1))
        yield


@pytest.fixture(scope="module")
def everything(one_device):
    return bench.work("everything", arguments())


def test_every_rate_has_windows_with_median_least_and_most(everything):
    rates = [everything["train"]["2"]]
    for batch in ("1", "2"):
        rates += [everything["evaluate"][batch][where] for where in ("resident", "from_host")]
    for rate in rates:
        summary = rate["images_per_second"]
        assert len(rate["windows"]) == 2
        assert summary["median"] == np.median(rate["windows"]) > 0
        assert summary["min"] == min(rate["windows"])
        assert summary["max"] == max(rate["windows"])


def test_utilisation_is_of_the_matrix_product_of_the_same_run(everything):
    one = everything["train"]["2"]
    flop = everything["gflop"]["train"]["paper"]
    rate = one["images_per_second"]["median"] * flop
    assert one["of_ceiling"] == pytest.approx(rate / everything["ceiling"]["matmul_gflops"])


def test_the_ceiling_is_of_all_devices_and_a_rate_is_held_against_its_own(monkeypatch):
    programs = object.__new__(model.Programs)
    programs.on_cpu, programs.method = True, argparse.Namespace(dtype=np.float32)
    programs.mesh = jax.sharding.Mesh(np.array(jax.devices()[:2])[:, None], mesh_lib.AXES)
    programs._call_seconds = lambda call: 1.0
    ceiling = programs.ceiling()
    assert (ceiling["devices"], ceiling["matmul_gflops"]) == (2, 2 * 2 * 2048**3 / 1e9)
    one = {"resident": {"gflops": ceiling["matmul_gflops"] / 8, "devices": 1}}
    programs.evaluate = lambda batch: one
    found = bench._everything(programs, arguments("--parts=evaluate,ceiling"), lambda found: None)
    assert found["evaluate"]["1"]["resident"]["of_ceiling"] == 1 / 4


class Failing:
    """Of the machine only the matrix product can be measured."""

    compilation = latency = None  # not asked for

    def ceiling(self):
        return {"matmul_gflops": 2.0, "copy_gb_per_s": 1.0, "devices": 1}

    def counts(self):
        raise RuntimeError("nobody counts here")


def test_a_part_that_fails_takes_no_other_with_it(monkeypatch, tmp_path, capsys):
    told = []
    found = bench._everything(Failing(), arguments("--parts=gflop,ceiling"), told.append)
    assert found["ceiling"]["matmul_gflops"] == 2
    assert found["failed"] == {"gflop": "RuntimeError: nobody counts here"}
    assert len(told) == 2
    monkeypatch.setattr(bench, "_lines", lambda *_: iter([found]))
    assert bench.main([f"--json={tmp_path}/all.json"]) == 1
    captured = capsys.readouterr()
    assert "gflop was not measured: RuntimeError: nobody counts here" in captured.err
    assert "matrix product 2 GFLOP/s" in captured.out
    assert json.loads((tmp_path / "all.json").read_text())["mmrjax"]["ceiling"] == found["ceiling"]


def test_a_platform_that_counts_no_operations_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    fields = [field.removeprefix("--config.") for field in TINY]
    config = config_lib.load("configs/magnetic_tile.py", [*bench.RANDOM, *fields])
    counts = model.Programs(config, model.Plan(images=2)).counts()
    assert counts["train"]["lowered"] is counts["evaluate"]["lowered"] is None
    tables.ours({"gflop": counts})
    assert "lowered program: not counted by this platform" in capsys.readouterr().out


def test_no_operation_hides_in_a_loop_over_images(monkeypatch):
    """At this width 3x3 convolutions are by tiles on a CPU, with fewer products, in loops."""
    fields = [field.removeprefix("--config.") for field in TINY]
    fields += ["data.image_size=64,64", "data.resize=64,64"]
    config = config_lib.load("configs/magnetic_tile.py", [*bench.RANDOM, *fields])
    counted = model.Programs(config, model.Plan(images=2)).counts()
    monkeypatch.setattr(winograd, "by_tiles", winograd.direct)
    assert counted == model.Programs(config, model.Plan(images=2)).counts()


def test_operations_on_paper_are_those_of_the_lowered_program(everything):
    """At 32 px elementwise work counts for more than at 224, where the guards allow 3 %."""
    for counts in everything["gflop"].values():
        assert counts["lowered"] == pytest.approx(counts["paper"], rel=0.35)


def test_one_program_is_compiled_once_and_the_cache_answers_the_second_time(everything):
    rows = [everything["train"]["2"], *everything["evaluate"].values()]
    assert [one["compilations"] for one in rows] == [1, 1, 1]
    assert all(one["memory"]["temporary_mib"] > 0 for one in rows)
    for seconds in everything["compile_seconds"].values():
        assert set(seconds) == {"cold", "warm"}


def test_a_cache_that_does_not_answer_is_told(monkeypatch, no_cache):
    """Of two small programs in place of the networks'."""
    add, x = jax.jit(lambda x, y: x + y), np.ones(4, np.float32)
    programs = object.__new__(model.Programs)
    programs.config = config_lib.load("configs/magnetic_tile.py")
    programs.step = lambda batch: (add, x, (x,), 1)
    programs.scorer_of = lambda batch: (
        argparse.Namespace(ready=(x,), mesh=mesh_lib.make_mesh(1)),
        add,
    )
    monkeypatch.setattr(model, "finished_images", lambda *_: x)
    assert set(programs.compilation(2, 2)) == {"train", "evaluate"}
    monkeypatch.setattr(model, "_use_cache", lambda folder: None)
    with pytest.raises(RuntimeError, match="the cache did not answer"):
        programs.compilation(2, 2)


def test_the_peak_of_something_else_is_told_as_nobodys():
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert model._memory(compiled, before=0.0)["peak_mib"] > 0
    assert model._memory(compiled, before=1e9)["peak_mib"] is None


def test_latency_and_whole_evaluation_are_reported(everything):
    latency = everything["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    assert latency["requests"] == 3
    whole = everything["with_metrics"]
    assert whole["images"] == 6
    assert min(whole["forward_seconds"], whole["metrics_seconds"]) > 0


def test_tables_show_what_was_measured(everything, capsys):
    tables.ours(everything)
    out = capsys.readouterr().out
    median = everything["train"]["2"]["images_per_second"]["median"]
    assert f"{median:.1f}" in out
    assert "from and to the host" in out


def test_neither_tfds_nor_grain_is_needed():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('grain', 'tensorflow_datasets')));"
        "from mmrjax.bench import __main__ as bench; bench._parse([])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def no_cache():
    """Programs that ran in this process before have chosen one."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--windows=0"], "must be positive"),
        (["--batchs=3"], "unknown argument '--batchs=3'"),
        (["--parts=speed"], "--parts=speed: known are train"),
        (["--warm_up"], "JAX_COMPILATION_CACHE_DIR"),
        (["--train_batches=", "--eval_batches=2"], "--train_batches and --eval_batches"),
    ],
)
def test_bad_flags_are_refused_with_a_reason(flags, words, capsys, no_cache):
    with pytest.raises(SystemExit) as failure:
        bench._parse(flags)
    assert failure.value.code == 2
    assert words in capsys.readouterr().err


# --- next to the twin


@pytest.fixture
def sides(monkeypatch):
    """Both sides replaced by a record of who was called; rates 20 and 10 images/s."""
    pytest.importorskip("torch")
    calls = []

    def ours(task, arguments):
        calls.append(f"mmrjax {task}")
        return {"windows": [20.0], "resident": {"windows": [20.0]}}

    def torch(flags, arguments):
        if flags[0].startswith("--parity"):
            calls.append("torch parity")
            return dict.fromkeys(bench.PARITY["float32"], torch.difference)
        calls.append(f"torch {flags[0].removeprefix('--variant=')}")
        if calls[-1] == f"torch {torch.breaks}" and calls.count(calls[-1]) == torch.turn:
            raise subprocess.CalledProcessError(1, "torch")
        return {"windows": [10.0]}

    torch.difference, torch.breaks, torch.turn = 0.0, None, 1
    monkeypatch.setattr(bench, "_ours", ours)
    monkeypatch.setattr(bench, "_torch", torch)
    return calls, torch


def test_outputs_are_compared_first_then_both_take_turns(sides, tmp_path, capsys):
    flags = ["--vs=torch", "--only_vs", "--variants=eager,official", "--train_batches=2"]
    path = tmp_path / "bench.json"
    assert bench.main([*flags, "--eval_batches=", f"--json={path}"]) == 0
    calls, _ = sides
    assert calls[0].startswith("mmrjax parity:")
    assert calls[1] == "torch parity"
    turns = ["mmrjax train:2", "torch eager", "torch official"]
    assert calls[2:] == [*turns, *reversed(turns)]
    found = json.loads(path.read_text())["versus"]["train 2"]
    assert found["eager"]["ratio"] == 2.0
    assert found["mmrjax"]["windows"] == [20.0, 20.0]
    assert "2.00" in capsys.readouterr().out


def test_a_process_of_its_own_may_have_one_task_alone():
    arguments = bench._parse(["--worker=parity:folder", "--train_batches=", "--eval_batches=4"])
    assert (arguments.train_batches, arguments.eval_batches) == ((), (4,))


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("cache")
def test_everything_is_compiled_at_once_beforehand(sides, capsys):
    calls, _ = sides
    flags = ["--warm_up", "--vs=torch", "--train_batches=2,4", "--eval_batches=8"]
    assert bench.main(flags) == 0
    ours = {f"mmrjax {task}" for task in ("train:2", "train:4", "evaluate:8", "evaluate:1")}
    assert ours | {"torch compile"} < set(calls)
    assert "torch parity" in calls
    assert "compiled: mmrjax train:2" in capsys.readouterr().out


@pytest.mark.parametrize("difference", [0.01, float("nan")])
def test_without_parity_nothing_is_timed(sides, capsys, difference):
    calls, torch = sides
    torch.difference = difference
    assert bench.main(["--vs=torch", "--only_vs"]) == 1
    assert len(calls) == 2
    captured = capsys.readouterr()
    assert "nothing is timed" in captured.err
    assert "img/s" not in captured.out


def test_what_is_timed_in_bfloat16_is_compared_in_it_too(sides, capsys):
    calls, torch = sides
    torch.difference = 0.001  # too much in float32 alone
    flags = ["--vs=torch", "--only_vs", "--config.train.compute_dtype=bfloat16"]
    assert bench._dtypes(bench._parse(flags)) == ["float32", "bfloat16"]
    with pytest.raises(ValueError, match="something else in float32"):
        bench._parity(bench._parse(flags), ["bfloat16", "float32"])
    assert calls[2].startswith("mmrjax parity:float32:")


@pytest.mark.parametrize("turn", [1, 2])
def test_a_variant_that_fails_takes_no_other_with_it(sides, tmp_path, capsys, turn):
    _, torch = sides
    torch.breaks, torch.turn = "official", turn
    flags = ["--vs=torch", "--only_vs", "--variants=official,eager", "--train_batches=2"]
    path = tmp_path / "bench.json"
    assert bench.main([*flags, "--eval_batches=", f"--json={path}"]) == 1
    found = json.loads(path.read_text())
    assert set(found["versus"]["train 2"]) == {"mmrjax", "eager"}
    assert set(found["failed"]) == {"train 2, official"}
    assert "train 2, official was not measured" in capsys.readouterr().err


def test_what_was_measured_before_the_end_is_told_and_on_the_disk(monkeypatch, tmp_path, capsys):
    """Whoever is cut off leaves the parts that had ended."""
    path = tmp_path / "bench.json"

    def killed(*_):
        yield {"ceiling": {"matmul_gflops": 2.0, "copy_gb_per_s": 1.0}}
        assert json.loads(path.read_text())["mmrjax"]["ceiling"]["matmul_gflops"] == 2
        raise subprocess.CalledProcessError(-9, "bench")

    monkeypatch.setattr(bench, "_lines", killed)
    assert bench.main([f"--json={path}"]) == 1
    assert "ceiling" in json.loads(path.read_text())["mmrjax"]
    captured = capsys.readouterr()
    assert "matrix product 2 GFLOP/s" in captured.out
    assert "error: Command 'bench' died" in captured.err


def test_a_process_of_its_own_tells_line_by_line():
    told = "print('a word'); print('{\"a\": 1}', flush=True); print('{\"a\": 2}')"
    assert list(bench._lines(["-c", told])) == [{"a": 1}, {"a": 2}]
    with pytest.raises(subprocess.CalledProcessError):
        list(bench._lines(["-c", "raise SystemExit(3)"]))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_twin_computes_the_same(tmp_path, dtype):
    bench_torch = pytest.importorskip("mmrjax.bench.torch_side")
    bench.work(f"parity:{dtype}:{tmp_path}", arguments())
    found = bench_torch.parity(tmp_path, "resnet18")
    assert set(found) == set(bench.PARITY[dtype])
    assert all(found[name] < allowed for name, allowed in bench.PARITY[dtype].items())
    broken = dict(np.load(tmp_path / "parity.npz"))
    broken["loss"] += 0.1
    np.savez(tmp_path / "parity.npz", **broken)
    assert bench_torch.parity(tmp_path, "resnet18")["loss"] > bench.PARITY[dtype]["loss"]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("variant", "task"),
    [("official", "train"), ("contiguous", "train"), ("channels_last", "evaluate")],
)
def test_variants_run_on_a_processor(variant, task, monkeypatch, capsys):
    bench_torch = pytest.importorskip("mmrjax.bench.torch_side")
    sizes = {"batch": 2, "image_size": 32, "width": 24, "depth": 1, "heads": 2, "windows": 2}
    flags = [f"--{k}={v}" for k, v in {**sizes, "window_seconds": 0.001}.items()]
    flags += [f"--variant={variant}", f"--task={task}"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    bench_torch.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["windows"]) == 2
    assert min(found["windows"]) > 0
