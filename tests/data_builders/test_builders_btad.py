"""BTAD's layout in small: mixed extensions, masks by stem, and its counts."""

import numpy as np
import pytest

from data_builders.btad import btad_dataset_builder


def test_masks_are_found_by_stem_whatever_the_extension(btad, tmp_path, built):
    log = []
    records = built("btad", btad.parent, tmp_path / "data", log=log)
    assert list(records) == ["01", "02", "03"]
    expected = np.zeros((24, 32), bool)
    expected[4:9, 6:14] = True
    for product, suffix in (("01", "bmp"), ("02", "png"), ("03", "bmp")):
        part = records[product]
        assert set(part["train"]) == {f"{product}/train/ok/000{i}.{suffix}" for i in (0, 1)}
        assert part["test"][f"{product}/test/ok/0000.{suffix}"]["label"] == "good"
        bad = part["test"][f"{product}/test/ko/0001.{suffix}"]
        assert (bad["label"], bad["has_mask"]) == ("anomaly", True)
        np.testing.assert_array_equal(bad["mask"][..., 0] == 255, expected)
    assert any("btad/03" in line and "train good 2/1000" in line for line in log)


def test_two_masks_of_one_image_are_refused(btad, tmp_path, built, write_mask):
    write_mask(btad / "03/ground_truth/ko/0001.png")
    with pytest.raises(ValueError, match=r"0001\.bmp and .*0001\.png are masks of one image"):
        built("btad", btad, tmp_path / "data")


def test_published_sums():
    counts = np.array(list(btad_dataset_builder.COUNTS.values()))
    assert counts.sum(axis=0).tolist() == [1799, 451, 290]
