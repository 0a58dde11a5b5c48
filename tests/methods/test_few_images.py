"""Runs on three, ten and fifty good images end, and say in words what so few are worth."""

import json

import cv2
import numpy as np
import pytest

from mmrjax import main
from mmrjax.data import records as records_lib
from mmrjax.data import splits


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
    ("count", "train", "held_out"),
    [
        (3, 2, 0),
        pytest.param(10, 8, 0, marks=pytest.mark.slow),
        pytest.param(50, 36, 4, marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_good_images_is_enough(
    count, train, held_out, raw, tiny_fields, tmp_path, caplog, capsys
):
    args = [
        "--config=configs/folder.py",
        f"--workdir={tmp_path / 'run'}",
        *tiny_fields(raw(count), tmp_path / "records"),
        "--config.train.epochs=1",
    ]
    assert main.main(args) == 0
    said = " ".join(record.getMessage() for record in caplog.records)
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
        assert calibrated["threshold"] is None  # 5 % needs nineteen held-out images
        assert "19 are needed" in calibrated["reason"] or held_out
        kept = run / "calibration.json"
        assert kept.exists() == bool(held_out)
    assert "the memory bank keeps" in said


def test_photographs_of_one_part_count_once():
    table = {"group": np.array(["a", "a", "b", "b", "b"])}
    records = records_lib.Records("folder", "parts", table, "0", {}, [("train", 0)] * 5)
    assert "5 good images of 2 parts only" in splits.few(records)
    assert "1 good image only" in splits.few(records.take([0]))
    table = {"group": np.arange(splits.FEW).astype(str)}
    many = records_lib.Records("folder", "parts", table, "0", {}, [("train", 0)] * splits.FEW)
    assert splits.few(many) == ""
