"""BTAD's layout in small: mixed extensions, masks by stem, and its counts."""

import numpy as np
import pytest

from data_builders.btad import btad_dataset_builder


@pytest.fixture
def raw_dir(tmp_path, write_image, write_mask, clutter):
    root = tmp_path / "BTech_Dataset_transformed"
    for product, image, mask in (("01", "bmp", "png"), ("03", "bmp", "bmp"), ("02", "png", "png")):
        for name in ("train/ok/0000", "train/ok/0001", "test/ok/0000", "test/ko/0001"):
            write_image(root / product / f"{name}.{image}")
        write_mask(root / product / f"ground_truth/ko/0001.{mask}")
        for folder in ("train/ok", "test/ko", "ground_truth/ko"):
            clutter(root / product / folder)
    return root


def test_masks_are_found_by_stem_whatever_the_extension(raw_dir, tmp_path, built):
    log = []
    records = built("btad", raw_dir.parent, tmp_path / "data", log=log)
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


def test_two_masks_of_one_image_are_refused(raw_dir, tmp_path, built, write_mask):
    write_mask(raw_dir / "03/ground_truth/ko/0001.png")
    with pytest.raises(ValueError, match=r"0001\.bmp and .*0001\.png are masks of one image"):
        built("btad", raw_dir, tmp_path / "data")


def test_published_sums():
    counts = np.array(list(btad_dataset_builder.COUNTS.values()))
    assert counts.sum(axis=0).tolist() == [1799, 451, 290]
