"""Runs on three, ten and fifty good images end, and say in words what so few are worth."""

import json

import cv2
import numpy as np
import pytest

from mmrjax import main
from mmrjax.data import records as records_lib
from mmrjax.data import splits
from mmrjax.export import __main__ as export
from mmrjax.predict import __main__ as predict
from mmrjax.runs import detector as detector_lib


@pytest.fixture
def raw(tmp_path):
    """(number of good images) -> a folder of them; a fifth is kept for testing."""

    def draw(count):
        rng = np.random.default_rng(0)
        folder = tmp_path / "parts"
        folder.mkdir()
        for i in range(count):
            image = np.linspace(60, 160, 64)[None, :, None] + rng.normal(0, 8, (64, 64, 3))
            cv2.imwrite(str(folder / f"{i:02d}.png"), np.clip(image, 0, 255).astype(np.uint8))
        return folder

    return draw


@pytest.mark.parametrize(
    ("count", "train", "held_out", "promise"),
    [
        (3, 2, 0, "provisional: 2 good parts promise nothing below 33.3 % (asked for: 5 %)"),
        pytest.param(
            10,
            8,
            0,
            "provisional: 8 good parts promise nothing below 11.1 % (asked for: 5 %)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            50,
            40,
            4,
            "at most 4.88 % of good parts are rejected, proven (full conformal)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_folder_of_good_images_is_enough(
    count, train, held_out, promise, raw, tiny_fields, tmp_path, caplog, capsys
):
    args = [
        "--config=configs/folder.py",
        f"--workdir={tmp_path / 'run'}",
        *tiny_fields(raw(count), tmp_path / "records"),
        "--config.train.epochs=1",
        "--config.patchcore.coreset_of=image",  # as configs/folder.py has it
    ]
    assert main.main(args) == 0
    said = " ".join(record.getMessage() for record in caplog.records)
    page = (tmp_path / "run" / "report.html").read_text()
    for method in ("mmr", "patchcore"):
        run = tmp_path / "run" / method / "parts" / "seed54"
        results = json.loads((run / "results.json").read_text())
        assert results["metrics"]["folder/parts"]["all"]["counts"]["good"] == count // 5 + (
            count == 3
        )
        notes = results["facts"]["notes"]
        if train < splits.FEW:
            assert notes[0].startswith(f"trained on {train} good images only: other ones")
            assert notes[0] in said
            assert notes[0] in (tmp_path / "run" / "report.html").read_text()
        else:
            assert notes == []
        calibrated = results["calibration"]
        if method == "patchcore":  # each image scored without itself: all of them count
            assert calibrated["images"] == train
            assert calibrated["promise"] == promise
            assert promise in page
            continue
        assert calibrated["threshold"] is None  # 5 % needs nineteen held-out images
        assert "which takes 190 good parts at calibration.fraction=0.1" in calibrated["reason"]
        kept = run / "calibration.json"
        assert kept.exists() == bool(held_out)
    verdicts_and_export_name_the_promise(tmp_path, run, promise, capsys)


def verdicts_and_export_name_the_promise(tmp_path, run, promise, capsys):
    command = [f"--workdir={run}", f"--input={tmp_path / 'parts'}", "--no_pictures"]
    assert predict.main([*command, f"--output={tmp_path / 'out'}"]) == 0
    assert promise in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert {row["verdict"] for row in found} <= {"good", "anomaly"}
    about = export.description(detector_lib.load(run), {"map": np.zeros((1, 2, 2)), "score": 0}, 0)
    assert about["calibration"]["promise"] == promise
    assert about["threshold"] == found[0]["threshold"]
    again = [*command, f"--output={tmp_path / 'again'}"]
    assert predict.main([*again, f"--calibration={run / 'calibration.json'}"]) == 0
    assert predict.main([*again, "--target_fpr=0.001"]) == 1
    assert "good images can promise false-positive rates from" in capsys.readouterr().err


def test_photographs_of_one_part_count_once():
    table = {"group": np.array(["a", "a", "b", "b", "b"])}
    records = records_lib.Records("folder", "parts", table, "0", {}, [("train", 0)] * 5)
    assert "5 good images of 2 parts only" in splits.few(records)
    assert "1 good image only" in splits.few(records.take([0]))
    table = {"group": np.arange(splits.FEW).astype(str)}
    many = records_lib.Records("folder", "parts", table, "0", {}, [("train", 0)] * splits.FEW)
    assert splits.few(many) == ""
