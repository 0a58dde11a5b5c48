"""Kernels are added up by name; without a GPU the command says so."""

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


def test_without_a_gpu_there_is_one_line(capsys):
    assert bench_profile.main([]) == 1
    assert "on a GPU only" in capsys.readouterr().err


def test_an_unknown_argument_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_profile.main(["--batches=3"])
    assert "--batches=3" in capsys.readouterr().err
