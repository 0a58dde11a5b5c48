"""What a work directory holds decides whether a call may go on with it, and what is finished."""

import json

import pytest

from mmrjax.evaluate import results as evaluate
from mmrjax.runs import aggregate, restore, workdir
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import files


@pytest.fixture
def config():
    return config_lib.load("configs/folder.py")


@pytest.fixture
def run(tmp_path, config):
    """A run that has a checkpoint and a whole evaluation."""
    folder = tmp_path / "mmr" / "parts" / "seed1"
    workdir.settle(config, "mmr", folder, "abc", "train")
    (folder / "checkpoints" / "train" / "6").mkdir(parents=True)
    (folder / "maps").mkdir()
    for name in evaluate.FILES:
        (folder / name).write_text("{}")
    results = {"facts": {"eval": evaluate.eval_fields(config)}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize("name", evaluate.FILES)
def test_an_evaluation_that_lacks_a_file_is_not_finished(run, config, name):
    assert workdir.is_finished(run, config)
    (run / name).unlink()
    assert not workdir.is_finished(run, config)


@pytest.mark.parametrize(("calibration", "needed"), [
    (None, False),  # nothing held out
    ({"threshold": None, "reason": "too few good images"}, False),
    ({"threshold": 0.5, "images": 24}, True),
    ({"threshold": None, "images": 5, "reason": "that needs 19"}, True),  # serves other rates
])  # fmt: skip
def test_a_lost_calibration_is_made_again_where_there_was_one(run, config, calibration, needed):
    results = {"facts": {"eval": evaluate.eval_fields(config)}, "calibration": calibration}
    (run / "results.json").write_text(json.dumps(results))
    assert workdir.is_finished(run, config) != needed
    (run / evaluate.CALIBRATION).write_text("{}")
    assert workdir.is_finished(run, config)


def test_another_measure_has_a_folder_of_its_own(tmp_path, config):
    assert workdir.results_root(config, tmp_path) == tmp_path
    config.eval.tiny_side = 20
    assert workdir.results_root(config, tmp_path) == tmp_path / "evaluations" / "tiny20"
    assert "tiny below 20 px" in evaluate.eval_fields(config)["view"]


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_trained_run_that_lost_its_configuration_is_refused(run, config, mode, content):
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"seed1/config\.json is absent or damaged.*put it back"):
        workdir.settle(config, "mmr", run, "abc", mode)


def test_a_run_without_checkpoints_may_change_its_mind(run, config):
    (run / "checkpoints" / "train" / "6").rmdir()
    config.train.epochs = 5
    workdir.settle(config, "mmr", run, "abc", "train")
    assert json.loads((run / "config.json").read_text())["train"]["epochs"] == 5


def test_a_copied_run_is_ignored_everywhere(run, tmp_path):
    (run.with_name("seed1_old")).mkdir()
    for name in ("config.json", "results.json"):
        (run.with_name("seed1_old") / name).write_text("{}")
        assert files.runs(tmp_path, name) == [run]
    assert workdir.trained_runs(tmp_path) == [("mmr", "parts", 1)]
    assert restore.find_run(tmp_path) == run
    with pytest.raises(FileNotFoundError, match=r"runs in it: \S*seed1$"):
        restore.read_config(tmp_path)
    (run / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        restore.find_run(tmp_path)


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_a_file_in_place_of_the_work_directory_is_named(tmp_path, config, inside):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"--workdir=.*notes\.txt is a file; name another folder"):
        workdir.check(config, tmp_path / "notes.txt" / inside)


@pytest.mark.parametrize("name", ["results.json", "scores.csv"])
def test_damaged_results_of_another_run_are_named_with_what_to_do(run, tmp_path, name):
    results = {"method": "mmr", "dataset": "folder", "category": "parts", "seed": 1}
    results["metrics"] = {"folder/parts": {}}
    (run / "results.json").write_text(json.dumps({**results, "facts": {"notes": []}}))
    (run / name).write_text("{\n1\n")
    with pytest.raises(ValueError, match=rf"seed1/{name} is absent or damaged .*; delete it"):
        aggregate.aggregate(tmp_path, "", "")
