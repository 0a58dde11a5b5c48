"""What a begun run holds to. That it can be stopped and resumed: test_resume.py."""

import json

import numpy as np
import pytest

from mmrjax import methods
from mmrjax.data.records import Records
from mmrjax.runtime import checkpoint
from mmrjax.train import begun, loop

FIRST, OTHER = "1" * 64, "2" * 64


@pytest.mark.parametrize("stage", ["checkpoints/train", "fitted"])
@pytest.mark.parametrize("other", [OTHER, None])
def test_a_begun_run_refuses_another_teacher(tmp_path, stage, other):
    begun.hold_teacher(tmp_path, checkpoint.Store(tmp_path), FIRST)
    (tmp_path / stage / "6").mkdir(parents=True)
    begun.hold_teacher(tmp_path, checkpoint.Store(tmp_path), FIRST)
    with pytest.raises(ValueError, match=r"sha256 11111111…, the file has .* another --workdir"):
        begun.hold_teacher(tmp_path, checkpoint.Store(tmp_path), other)


def test_a_run_without_checkpoints_may_take_another_teacher(tmp_path):
    begun.hold_teacher(tmp_path, checkpoint.Store(tmp_path), FIRST)
    begun.hold_teacher(tmp_path, checkpoint.Store(tmp_path), OTHER)
    (tmp_path / "checkpoints" / "train" / "1").mkdir(parents=True)
    begun.hold_teacher(tmp_path, checkpoint.Store(tmp_path), OTHER)


def test_a_begun_run_refuses_other_labelled_defects(tmp_path):
    first, other = ({"labelled": {"masks": np.full((2, 4, 4), x)}} for x in (True, False))
    begun.hold_extras(tmp_path, checkpoint.Store(tmp_path), other, {"labelled_too_large": 1})
    begun.hold_extras(
        tmp_path, checkpoint.Store(tmp_path), first, {"labelled_too_large": 0}
    )  # nothing was trained yet
    (tmp_path / "checkpoints" / "train" / "6").mkdir(parents=True)
    begun.hold_extras(tmp_path, checkpoint.Store(tmp_path), first, {"labelled_too_large": 0})
    with pytest.raises(ValueError, match=r"begun with other labelled defects.*another --workdir"):
        begun.hold_extras(tmp_path, checkpoint.Store(tmp_path), other, {"labelled_too_large": 1})
    noted = json.loads((tmp_path / begun.LABELLED).read_text())
    assert noted["labelled_too_large"] == 0


def test_a_kernel_of_attention_that_cannot_run_is_refused(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.student.attention = "cudnn"
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        methods.create("mmr", config)
    config.student.attention = "flash"
    with pytest.raises(ValueError, match="choose one of auto, xla, cudnn"):
        methods.METHODS["mmr"].check(config)


@pytest.mark.parametrize("count", [2, 63, 64, 65, 100, 1000])
def test_what_is_prepared_with_is_spread_over_all_training_images(count):
    table = {"id": 3 * np.arange(count)}
    records = Records("toy", "part", table, "", {}, [("train", i) for i in range(count)])
    chosen = loop._evenly(records, 64).table["id"]
    assert len(np.unique(chosen)) == len(chosen) == min(count, 64)
    assert (chosen[0], chosen[-1]) == (0, table["id"][-1])
    assert np.ptp(np.diff(chosen)) <= 3  # neighbours are one place more or less apart
