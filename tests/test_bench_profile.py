"""Kernels and operations are added up by name."""

import re
from types import SimpleNamespace

import pytest

from mmrjax import bench_profile


def event(name, operation, milliseconds):
    return SimpleNamespace(name=name, stats=[("hlo_op", operation)], duration_ns=1e6 * milliseconds)


def plane(name, line, *events):
    return SimpleNamespace(name=name, lines=[SimpleNamespace(name=line, events=events)])


def test_copies_of_a_kernel_are_one_row_and_the_largest_comes_first():
    planes = [
        plane("/device:GPU:0", "Stream #1", event("gemm", "dot.1", 2), event("gemm", "dot.22", 3)),
        plane("/device:GPU:1", "Stream #7", event("relu", "fusion.3", 4)),
        plane("/device:GPU:0", "XLA Ops", event("gemm", "dot.1", 50)),  # the same, told again
        plane("/host:CPU", "Stream #1", event("wait", "", 100)),
    ]
    found = bench_profile.by_kernel(planes)
    assert found == {"dot | gemm": (5.0, 2), "fusion | relu": (4.0, 1)}
    assert list(found) == ["dot | gemm", "fusion | relu"]


def test_operations_of_a_cpu_are_told_with_where_they_come_from():
    """A loop is not told: it would count what it holds twice."""
    hlo = """
  %dot.1 = f32[2,2]{1,0} dot(%a, %b), metadata={op_name="jit(step)/blocks/fc1" stack_frame_id=3}
  ROOT %add.7 = f32[2]{0} add(%c, %d), metadata={op_name="jit(step)/loss"}
  %while.2 = (f32[]) while(%e), metadata={op_name="jit(step)/blocks"}
"""
    planes = [
        plane("/host:CPU", "thread 1", event("x", "dot.1", 2), event("x", "while.2", 9)),
        plane("/host:CPU", "thread 2", event("x", "dot.1", 3), event("x", "add.7", 1)),
        plane("/host:CPU", "python", event("wait", "", 100)),
    ]
    found = bench_profile.by_operation(planes, bench_profile.sources_of(hlo))
    assert found == {
        "dot | jit(step)/blocks/fc1": (5.0, 2),
        "add | jit(step)/loss": (1.0, 1),
    }


@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_the_command_tells_a_convolution_and_its_layer(task, capsys, monkeypatch):
    make = bench_profile.mesh_lib.make_mesh
    monkeypatch.setattr(bench_profile.mesh_lib, "make_mesh", lambda *a, **k: make(1))
    fields = ("student.width=24", "student.depth=2", "student.heads=2")
    fields += ("data.image_size=32,32", "data.resize=32,32")
    overrides = [f"--config.{field}" for field in fields]
    assert bench_profile.main([f"--task={task}", "--batch=2", "--rows=500", *overrides]) == 0
    out = capsys.readouterr().out
    assert re.search(r"images/s: \d+", out)
    assert re.search(r"ms x +\d+\.\d  \w+ \| .*ResNet", out)


def test_an_unknown_argument_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_profile.main(["--batches=3"])
    assert "--batches=3" in capsys.readouterr().err
