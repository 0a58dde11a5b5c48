"""KolektorSDD2's layout in small: every image has a mask, and the mask is the label."""

import pytest

from data_builders.kolektor_sdd2 import kolektor_sdd2_dataset_builder


def test_masks_give_the_labels_and_bad_training_images_are_kept(kolektor_sdd2, tmp_path, built):
    log = []
    records = built("kolektor_sdd2", kolektor_sdd2, tmp_path / "data", log=log)["surface"]
    labels = {name: r["label"] for split in records.values() for name, r in split.items()}
    assert labels == {
        "train/10000.png": "good",
        "train/10001.png": "good",
        "train/10002.png": "anomaly",
        "test/20000.png": "good",
        "test/20001.png": "good",
        "test/20002.png": "anomaly",
    }
    assert records["train"]["train/10002.png"]["mask"].sum() == 255 * 5 * 8  # level 1 is defect
    assert any("train good 2/2085, train anomaly 1/246" in line for line in log)


def test_image_without_mask_is_named(kolektor_sdd2, tmp_path, built):
    (kolektor_sdd2 / "test/20001_GT.png").unlink()
    with pytest.raises(ValueError, match=r"20001\.png: its mask 20001_GT\.png is missing"):
        built("kolektor_sdd2", kolektor_sdd2, tmp_path / "data")


def test_the_smaller_kolektor_sdd_is_not_taken_for_it(tmp_path, built, write_image):
    write_image(tmp_path / "KolektorSDD/kos01/Part0.jpg")
    with pytest.raises(FileNotFoundError, match=r"not the layout expected.*vicos\.si"):
        built("kolektor_sdd2", tmp_path / "KolektorSDD", tmp_path / "data")


def test_published_sums():
    counts = kolektor_sdd2_dataset_builder.Builder.EXPECTED["surface"]
    good = counts["train good"] + counts["test good"]
    anomaly = counts["train anomaly"] + counts["test anomaly"]
    assert (good, anomaly) == (2979, 356)
    assert counts["train good"] + counts["train anomaly"] == 2331
    assert good + anomaly == 3335
