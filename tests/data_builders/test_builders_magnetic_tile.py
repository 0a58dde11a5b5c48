"""The tiles: groups and split derived from names and images equal the published list."""

import csv
import shutil

import cv2
import numpy as np
import pytest

from data_builders.magnetic_tile import tile_groups


@pytest.fixture
def raw_dir(tmp_path, write_image, write_mask, clutter):
    """The published layout: three clean tiles, and one with a defect, at two exposures each."""
    root = tmp_path / "raw tiles"
    for tile, folder in enumerate(("MT_Free", "MT_Free", "MT_Free", "MT_Uneven")):
        for exposure in (1, 2):
            path = root / folder / "Imgs" / f"exp{exposure}_num_{1000 * tile + 50 * exposure}.jpg"
            write_image(path, size_hw=(40, 30 + exposure), grey=True)
            levels = (0, 60, 200 if folder == "MT_Uneven" and exposure == 1 else 60)
            write_mask(path.with_suffix(".png"), (40, 30 + exposure), levels)
        clutter(root / folder / "Imgs")
    (root / "MT_Free/Imgs/._exp1_num_50.jpg").write_bytes(b"Mac OS X")
    return root


def test_numbers_further_apart_than_200_start_a_new_tile():
    assert tile_groups.runs_of_numbers([900, 100, 130, 912, 115]).tolist() == [1, 0, 0, 1, 0]
    assert tile_groups.runs_of_numbers([100, 300, 501]).tolist() == [0, 0, 1]


def test_tiles_photographed_twice_are_one_group_at_any_exposure_and_size():
    rng = np.random.default_rng(0)
    first, second, third = (
        cv2.GaussianBlur(rng.integers(0, 256, (150, 120), np.uint8), (0, 0), 3) for _ in range(3)
    )
    darker = cv2.resize(first // 2, (110, 140))
    groups = tile_groups.tile_groups([5000, 100, 1000, 110], [darker, first, second, third])
    assert groups.tolist() == [0, 0, 1, 0]
    groups = tile_groups.tile_groups([5000, 100, 1000, 110], [second // 2, first, second, third])
    assert groups.tolist() == [1, 0, 1, 0]


def test_training_draws_seventy_percent_of_the_tiles_without_defects():
    groups = np.repeat(np.arange(20), 3)
    is_good = groups != 4
    is_good[0] = False
    train = tile_groups.train_groups(groups, is_good)
    assert len(train) == round(0.7 * 18)
    assert not train & {0, 4}


def test_fixture_becomes_records_with_exposure_and_tile(raw_dir, tmp_path, built):
    log = []
    records = built("magnetic_tile", raw_dir, tmp_path / "data", log=log)["tile"]
    train, test = records["train"], records["test"]
    assert (len(train), len(test)) == (4, 4)
    assert {r["group"] for r in train.values()}.isdisjoint(r["group"] for r in test.values())
    anomaly = test["MT_Uneven/Imgs/exp1_num_3050.jpg"]
    assert (anomaly["defect"], anomaly["domain"], anomaly["group"]) == ("uneven", "exp1", "3")
    assert anomaly["mask"].sum() == 255 * 5 * 8  # the level 60 is no defect
    empty = test["MT_Uneven/Imgs/exp2_num_3100.jpg"]
    assert (empty["label"], empty["has_mask"]) == ("anomaly", False)
    assert any("train good 4/578" in line and "DIFFERS" in line for line in log)


def test_stray_name_is_refused(raw_dir, tmp_path, built):
    shutil.copy(raw_dir / "MT_Free/Imgs/exp1_num_50.jpg", raw_dir / "MT_Free/Imgs/copy.jpg")
    with pytest.raises(ValueError, match=r"copy\.jpg: expected a name like"):
        built("magnetic_tile", raw_dir, tmp_path / "data")


def test_real_tiles_have_the_published_groups_and_split_row_by_row(shared, tmp_path, built):
    raw_dir = shared / "data" / "magnetic_tile"
    log = []
    records = built("magnetic_tile", raw_dir, tmp_path, log=log)["tile"]
    found = {
        (name, record["domain"], record["group"], split, record["defect"])
        for split, part in records.items()
        for name, record in part.items()
    }
    with (raw_dir / "split.csv").open() as file:
        expected = {
            (row["file"], f"exp{row['exposure']}", row["group"], row["split"], _defect(row))
            for row in csv.DictReader(file)
        }
    assert found == expected
    assert len(found) == 1344
    without_truth = {name for name, r in records["test"].items() if not r["has_mask"]}
    assert without_truth == {
        f"MT_Uneven/Imgs/{name}.jpg"
        for name in ("exp3_num_45042", "exp4_num_124690", "exp4_num_352527", "exp4_num_45057")
    }
    assert any("defective with mask 388/388" in line for line in log)
    assert not any("DIFFERS" in line for line in log)


def _defect(row: dict) -> str:
    return "good" if row["class"] == "MT_Free" else row["class"].removeprefix("MT_").lower()
