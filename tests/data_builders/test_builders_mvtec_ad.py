"""MVTec AD's layout in small, and its published numbers."""

import numpy as np
import pytest

from data_builders.mvtec_ad import mvtec_ad_dataset_builder


def test_split_labels_and_masks_follow_the_folders(mvtec_ad, tmp_path, built):
    records = built("mvtec_ad", mvtec_ad, tmp_path / "data")
    assert list(records) == ["bottle", "grid"]  # the other 13 categories are not there
    bottle = records["bottle"]
    assert set(bottle["train"]) == {"bottle/train/good/000.png", "bottle/train/good/001.png"}
    assert {name: r["label"] for name, r in bottle["test"].items()} == {
        "bottle/test/good/000.png": "good",
        "bottle/test/bent/000.png": "anomaly",
        "bottle/test/bent/001.png": "anomaly",
    }
    bent = bottle["test"]["bottle/test/bent/000.png"]
    expected = np.zeros((24, 32), bool)
    expected[4:9, 6:14] = True
    np.testing.assert_array_equal(bent["mask"][..., 0] == 255, expected)
    assert (bent["defect"], bent["domain"], bent["group"]) == ("bent", "", bent["id"])


def test_missing_mask_means_no_pixel_truth_and_shows_in_the_counts(mvtec_ad, tmp_path, built):
    log = []
    records = built("mvtec_ad", mvtec_ad, tmp_path / "data", log=log, categories=["bottle"])
    assert not records["bottle"]["test"]["bottle/test/bent/001.png"]["has_mask"]
    assert any("defective with mask 1/63" in line and "DIFFERS" in line for line in log)


def test_folder_above_the_layout_works_as_well(mvtec_ad, tmp_path, built):
    records = built("mvtec_ad", mvtec_ad.parent, tmp_path / "data")
    assert "bottle/train/good/000.png" in records["bottle"]["train"]


def test_layout_found_twice_is_refused(mvtec_ad, tmp_path, built, write_image):
    write_image(tmp_path / "copy/bottle/train/good/000.png")
    with pytest.raises(ValueError, match=r"holds it several times \(.*copy, .*mvtec.*\): name one"):
        built("mvtec_ad", tmp_path, tmp_path / "data")


def test_published_numbers_sum_up_to_5354_images():
    counts = np.array(list(mvtec_ad_dataset_builder.PUBLISHED_COUNTS.values()))
    assert counts.shape == (15, 3)
    assert counts.sum(axis=0).tolist() == [3629, 467, 1258]
