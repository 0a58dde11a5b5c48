"""No result depends on a test label, and every report says how its numbers came about."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmrjax import main
from mmrjax.data import records as records_lib

# Otherwise as in test_main.py, so that its compiled programs serve here too.
FIELDS = ("train.seeds=1", "eval.save_maps=true", "calibration.fraction=0.5")
METHODS = {"mmr": "checkpoints/train", "patchcore": "fitted"}


def with_permuted_truth(records):
    """The same test images with the labels, masks and defects of others."""
    test = np.flatnonzero(records.table["split"] != "train")
    source = np.arange(len(records))
    source[test] = np.random.default_rng(1).permutation(test)
    changed = ("label", "has_mask", "defect")
    assert (records.table["label"][source] != records.table["label"]).sum() >= 2
    records.table |= {name: records.table[name][source] for name in changed}
    mask = records.mask
    records.mask = lambda i: mask(source[i])
    return records


@pytest.fixture(scope="module")
def runs(tiny_raw, tiny_fields, tmp_path_factory):
    """Work directories of the same command with true and with permuted test labels."""
    home = tmp_path_factory.mktemp("protocol")
    load = records_lib.load
    loads = {"true": load, "permuted": lambda path: with_permuted_truth(load(path))}
    for name, how in loads.items():
        args = [
            "--config=configs/folder.py",
            f"--workdir={home / name}",
            *tiny_fields(tiny_raw, home / "records"),
            *(f"--config.{field}" for field in FIELDS),
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records_lib, "load", how)
            assert main.main(args) == 0
    return home / "true", home / "permuted"


def folder(workdir, method):
    return workdir / method / "parts" / "seed1"


def read(path):
    return json.loads(path.read_text())


def saved(path):
    """(last step, checksum of every leaf) of a run's checkpoints."""
    with ocp.CheckpointManager(path) as manager:
        step = manager.latest_step()
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    return step, meta["checksums"]


def column(workdir, method, name):
    head, *rows = (folder(workdir, method) / "scores.csv").read_text().splitlines()
    return [row.split(",")[head.split(",").index(name)] for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_permuted_test_labels_leave_weights_maps_scores_and_thresholds_byte_for_byte(runs, method):
    true, permuted = (folder(workdir, method) for workdir in runs)
    assert saved(true / METHODS[method]) == saved(permuted / METHODS[method])
    for name in ("maps/maps.npy", "calibration.json"):
        assert (true / name).read_bytes() == (permuted / name).read_bytes()
    # repr() of float32 as Python floats: equal text is equal bits.
    assert column(runs[0], method, "score") == column(runs[1], method, "score")
    scales = [read(path / "maps/gallery.json")["scale"] for path in (true, permuted)]
    assert scales[0] == scales[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_permutation_was_real_and_only_the_metrics_saw_it(runs, method):
    assert column(runs[0], method, "id") == column(runs[1], method, "id")
    assert column(runs[0], method, "label") != column(runs[1], method, "label")
    metrics = [read(folder(workdir, method) / "results.json")["metrics"] for workdir in runs]
    assert metrics[0] != metrics[1]


def test_what_is_evaluated_is_the_last_epoch(runs):
    step, _ = saved(folder(runs[0], "mmr") / METHODS["mmr"])
    log = (folder(runs[0], "mmr") / "metrics.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["epoch"] == 3  # of four
    assert step == json.loads(log[-1])["step"] + 1


@pytest.mark.parametrize("page", ["report.md", "report.html"])
def test_the_report_states_its_protocol(runs, page):
    text = (runs[0] / page).read_text().replace("\\_", "_")
    facts = read(folder(runs[0], "mmr") / "results.json")["facts"]
    assert facts["ground_truth"]["metrics_mode"] == "standard"
    for stated in (
        "metric mode",
        facts["ground_truth"]["masks"],
        facts["ground_truth"]["labels"],
        "the last epoch",
        f"jax {facts['versions']['jax']}",
        f"mmrjax {facts['versions']['mmrjax']}",
        "the teacher resnet18 has random weights",
        "the student has random weights",
    ):
        assert stated in text, stated
    assert "seed 1;" in text or "seed <b>1</b>" in text
