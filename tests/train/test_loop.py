"""What a begun run holds fast to. That it can be stopped and resumed: test_resume.py."""

import json

import numpy as np
import pytest

from mmrjax import methods
from mmrjax.train import loop

FIRST, OTHER = "1" * 64, "2" * 64


@pytest.mark.parametrize("stage", ["checkpoints", "fitted"])
@pytest.mark.parametrize("other", [OTHER, None])
def test_a_begun_run_refuses_another_teacher(tmp_path, stage, other):
    loop._hold_teacher(tmp_path, FIRST)
    (tmp_path / stage / "6").mkdir(parents=True)
    loop._hold_teacher(tmp_path, FIRST)
    with pytest.raises(ValueError, match=r"sha256 11111111…, the file has .* another --workdir"):
        loop._hold_teacher(tmp_path, other)


def test_a_run_without_checkpoints_may_take_another_teacher(tmp_path):
    loop._hold_teacher(tmp_path, FIRST)
    loop._hold_teacher(tmp_path, OTHER)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    loop._hold_teacher(tmp_path, OTHER)


def test_a_begun_run_refuses_other_labelled_defects(tmp_path):
    first, other = ({"labelled": {"masks": np.full((2, 4, 4), x)}} for x in (True, False))
    loop._hold_labelled(tmp_path, other, {"labelled_too_large": 1})
    loop._hold_labelled(tmp_path, first, {"labelled_too_large": 0})  # nothing was trained yet
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    loop._hold_labelled(tmp_path, first, {"labelled_too_large": 0})
    with pytest.raises(ValueError, match=r"begun with other labelled defects.*another --workdir"):
        loop._hold_labelled(tmp_path, other, {"labelled_too_large": 1})
    noted = json.loads((tmp_path / loop.LABELLED).read_text())
    assert noted["labelled_too_large"] == 0


def test_a_run_older_than_the_note_goes_on(tmp_path):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    loop._hold_teacher(tmp_path, FIRST)


@pytest.mark.parametrize(("name", "words"), [("flash", "available: auto"), ("cudnn", "NVIDIA GPU")])
def test_a_kernel_of_attention_that_cannot_run_is_refused(tiny_config, name, words):
    config = tiny_config.copy_and_resolve_references()
    config.student.attention = name
    with pytest.raises(ValueError, match=words):
        methods.create("mmr", config)


@pytest.mark.parametrize("count", [2, 63, 64, 65, 100, 1000])
def test_what_is_prepared_with_is_spread_over_all_training_images(count):
    indices = 3 * np.arange(count)
    chosen = loop._evenly(indices, 64)
    assert len(np.unique(chosen)) == len(chosen) == min(count, 64)
    assert (chosen[0], chosen[-1]) == (0, indices[-1])
    assert np.ptp(np.diff(chosen)) <= 3  # neighbours are one place more or less apart
