"""The benchmark of blending checks parity, then times both, on a small case."""

import json
import os

import numpy as np
import pytest

from mmrjax import bench_defects
from mmrjax.data import poisson


def test_the_command_prints_json(capsys):
    cores = os.sched_getaffinity(0)
    assert bench_defects.main(["--sizes=16", "--batch=2", "--repeats=1", "--images=1"]) == 0
    assert os.sched_getaffinity(0) == cores
    found = json.loads(capsys.readouterr().out)
    assert found["generator"]["mmrjax_ms"] > 0
    result = found["16_px"]
    assert result["difference_grey_levels"] < bench_defects.LARGEST_DIFFERENCE
    assert min(result["mmrjax_ms"], result["cv2_ms"]) > 0


def test_a_wrong_blend_is_not_timed(monkeypatch):
    monkeypatch.setattr(poisson, "blend", lambda s, t, r: np.asarray(t) * r[..., None])
    monkeypatch.setattr(bench_defects.jax, "jit", lambda f: f)
    with pytest.raises(ValueError, match="direct solution"):
        bench_defects.measure(16, 2, 1)


def test_unknown_sizes_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_defects.main(["--sizes=17"])
    assert "--sizes" in capsys.readouterr().err
