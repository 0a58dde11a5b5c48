"""RSDDs' layout in small: strips become tiles, and a strip stays on one side of the split."""

import cv2
import numpy as np
import pytest

from data_builders.rsdds import rsdds_dataset_builder as dataset

HEIGHT, WIDTH = 100, 16  # eight-row aligned: JPEG blocks then keep a mask's edges


@pytest.fixture
def tiles(rsdds, tmp_path, built):
    """{category: {split: {id: record}}}"""
    return built("rsdds", tmp_path, tmp_path / "data")


def test_tiles_step_by_half_and_the_last_ends_with_the_strip():
    tops = [rows.start for rows in dataset.tile_rows(1000, 160)]
    assert tops == [0, 80, 160, 240, 320, 400, 480, 560, 640, 720, 800, 840]
    tops = [rows.start for rows in dataset.tile_rows(1250, 55)]
    assert tops[:3] == [0, 27, 54]
    assert tops[-2:] == [1188, 1195]
    assert [rows.start for rows in dataset.tile_rows(320, 160)] == [0, 80, 160]
    assert dataset.tile_rows(100, 160) == [slice(0, 160)]  # lower than wide: the whole strip


def test_tiles_keep_the_native_size_and_cover_their_strip(rsdds, tiles):
    path = "Type-I RSDDs dataset/Rail surface images/rail_3.jpg"
    records = {k: r for part in tiles["i"].values() for k, r in part.items() if r["group"] == path}
    tops = sorted(int(name.rsplit(":", 1)[1]) for name in records)
    assert tops == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 84]
    strip = cv2.imread(str(rsdds / path))[..., ::-1]
    for top in tops:
        image = records[f"{path}:{top}"]["image"]
        np.testing.assert_array_equal(image, strip[top : top + WIDTH])


def test_tile_is_good_only_if_the_defect_is_further_than_the_margin(tiles):
    path = "Type-I RSDDs dataset/Rail surface images/rail_3.jpg"
    records = next(part for part in tiles["i"].values() if f"{path}:0" in part)
    # The defect lies in rows 32 to 39: tiles from 16 and 40 touch it without showing any of it.
    labels = {top: records[f"{path}:{top}"]["label"] for top in (8, 16, 24, 32, 40, 48)}
    assert labels == {
        8: "good", 16: "anomaly", 24: "anomaly", 32: "anomaly", 40: "anomaly", 48: "good"
    }  # fmt: skip
    has_mask = {top: records[f"{path}:{top}"]["has_mask"] for top in (16, 24, 32, 40)}
    assert has_mask == {16: False, 24: True, 32: True, 40: False}
    assert records[f"{path}:24"]["mask"].sum() == 255 * 8 * 8


def test_whole_strips_are_split_seventy_to_thirty(tiles):
    for category, counts in (("i", (7, 3)), ("ii", (1, 1))):
        groups = [{r["group"] for r in tiles[category][s].values()} for s in ("train", "test")]
        assert tuple(map(len, groups)) == counts
        assert groups[0].isdisjoint(groups[1])
    assert [n * 7 // 10 for n in (67, 128)] == [46, 89]
    assert dataset.Builder.EXPECTED["ii"] == {"train strips": 89, "test strips": 39}


def test_strips_are_counted_against_the_published_ones(rsdds, tmp_path, built):
    log = []
    built("rsdds", rsdds, tmp_path / "data", log=log, categories=["i"])
    assert any("train strips 7/46, test strips 3/21" in line for line in log)


def test_missing_mask_and_other_size_are_named(rsdds, tmp_path, built):
    mask = rsdds / "Type-I RSDDs dataset/GroundTruth/rail_3.jpg"
    cv2.imwrite(str(mask), np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    with pytest.raises(ValueError, match=r"rail_3\.jpg: the mask is 17x100, its image 16x100"):
        built("rsdds", rsdds, tmp_path / "data")
    mask.unlink()
    with pytest.raises(ValueError, match=r"rail_3\.jpg: its mask .*GroundTruth.* is missing"):
        built("rsdds", rsdds, tmp_path / "data")
