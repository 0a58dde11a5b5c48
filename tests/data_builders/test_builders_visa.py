"""VisA's layout in small: its split file, its masks of class numbers, its published numbers."""

import numpy as np
import pytest

from data_builders.visa import visa_dataset_builder

HEADER = "object,split,label,image,mask\n"


def write_split(root, lines):
    (root / "split_csv/1cls.csv").write_text(HEADER + lines)


def test_split_file_decides_and_small_class_numbers_are_defect(visa, tmp_path, built):
    log = []
    records = built("visa", visa, tmp_path / "data", log=log)
    assert list(records) == ["pcb1"]  # candle is in the split file but not in the folder
    train, test = records["pcb1"]["train"], records["pcb1"]["test"]
    assert set(train) == {f"pcb1/Data/Images/Normal/00{i}.JPG" for i in (0, 1)}
    assert test["pcb1/Data/Images/Normal/002.JPG"]["label"] == "good"
    bad = test["pcb1/Data/Images/Anomaly/000.JPG"]
    expected = np.zeros((24, 32), bool)
    expected[4:9, 6:14] = True
    np.testing.assert_array_equal(bad["mask"][..., 0] == 255, expected)
    assert (bad["label"], bad["defect"], bad["has_mask"]) == ("anomaly", "anomaly", True)
    assert any("train good 2/904" in line and "test anomaly 1/100" in line for line in log)


def test_records_follow_a_changed_split_file(visa, tmp_path, built):
    built("visa", visa, tmp_path / "data")
    lines = (visa / "split_csv/1cls.csv").read_text().removeprefix(HEADER)
    row = "normal,pcb1/Data/Images/Normal/001"
    write_split(visa, lines.replace(f"train,{row}", f"test,{row}"))
    log = []
    records = built("visa", visa, tmp_path / "data", log=log)["pcb1"]
    assert (len(records["train"]), len(records["test"])) == (1, 3)
    assert sum("the raw data changed since" in line for line in log) == 1


@pytest.mark.parametrize(
    "row",
    [
        "pcb1,valid,normal,pcb1/Data/Images/Normal/000.JPG,",
        "pcb1,train,fine,pcb1/Data/Images/Normal/000.JPG,",
        "pcb1,train,normal,../secret.png,",
        "pcb1,train,normal,/etc/secret.png,",
        "pcb1,test,anomaly,pcb1/Data/Images/Normal/000.JPG,../../mask.png",
        "pcb1,train,normal,,",
        "pcb1",
    ],
)
def test_bad_rows_of_the_split_file_are_named(visa, tmp_path, built, row):
    write_split(visa, row + "\n")
    with pytest.raises(ValueError, match=r"1cls\.csv, line 2: expected object, train or test"):
        built("visa", visa, tmp_path / "data")


def test_missing_split_file_is_named(visa, tmp_path, built):
    (visa / "split_csv/1cls.csv").unlink()
    with pytest.raises(ValueError, match=r"1cls\.csv is missing; .* unpack it again"):
        built("visa", visa, tmp_path / "data")


def test_image_that_only_the_split_file_knows_is_named(visa, tmp_path, built):
    (visa / "pcb1/Data/Images/Normal/001.JPG").unlink()
    with pytest.raises(FileNotFoundError, match=r"pcb1/Data/Images/Normal/001\.JPG"):
        built("visa", visa, tmp_path / "data")


def test_published_numbers_sum_up_to_10821_images():
    counts = np.array(list(visa_dataset_builder.PUBLISHED_COUNTS.values()))
    assert counts.shape == (12, 2)
    assert counts.sum(axis=0).tolist() == [8659, 962]
    assert counts.sum() + 1200 == 10821
