"""The things that a begun run holds to; stopping and resuming are in test_resume.py."""

import json

import numpy as np
import optax
import pytest

from mmrjax import methods
from mmrjax.data.records import Records
from mmrjax.methods import optim
from mmrjax.runtime import checkpoint, logs
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


@pytest.mark.parametrize("checkpoint_there", [True, False])
def test_an_evaluation_leaves_a_save_that_is_under_way(tiny_config, tmp_path, checkpoint_there):
    """A training may be saving into the same folder, and Orbax cleans up what it opens."""
    method = methods.create("patchcore", tiny_config)
    left = tmp_path / "fitted" / "5.orbax-checkpoint-tmp-7"
    left.mkdir(parents=True)
    if checkpoint_there:
        (tmp_path / "fitted" / "4").mkdir()
    store = checkpoint.Store(tmp_path)
    training = loop.Training(method, {}, None, 0, tmp_path, store, None, evaluate_only=True)
    with training.open("fitted") as checkpoints:
        assert checkpoints.steps() == ([4] if checkpoint_there else [])
    assert left.exists()
    with training.open("never_begun") as checkpoints:
        assert checkpoints.steps() == []


def test_a_second_stage_counts_steps_and_epochs_on(tmp_path):
    path = tmp_path / loop.LOG
    with logs.TrainLog(path, 0, 4, 2, 8, first=(6, 3)) as log:
        for step in range(4):
            log.add(step, {"loss": np.ones(1)})
        log.flush()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(6, 3), (7, 3), (8, 4), (9, 4)]


def test_parameters_that_no_optimiser_steps_are_refused():
    params = {"one": np.zeros(2), "two": np.zeros(2)}
    with pytest.raises(ValueError, match=r"\['two'\] have no optimiser"):
        optim.start({"one": optax.sgd(0.1)}, params)
