"""AeBAD's two parts in small, with the macOS files of the published archive."""

import pytest

from data_builders.aebad import aebad_dataset_builder

DOMAINS = ("same", "background", "illumination", "view")


def test_blades_have_domains_in_the_test_only(aebad, tmp_path, built):
    log = []
    records = built("aebad", aebad, tmp_path / "data", log=log)["s"]
    assert {r["domain"] for r in records["train"].values()} == {""}
    assert set(records["train"]) == {
        "AeBAD_S/train/good/background/IMG_1.png", "AeBAD_S/train/good/view/IMG_1.png"
    }  # fmt: skip
    found = {(r["domain"], r["defect"], r["label"]) for r in records["test"].values()}
    assert found == {(d, "good", "good") for d in DOMAINS} | {
        (d, "groove", "anomaly") for d in DOMAINS
    }
    assert len(records["test"]) == 8
    assert any("test view anomaly 1/280" in line for line in log)


def test_a_mask_has_the_name_of_its_image(aebad, tmp_path, built):
    records = built("aebad", aebad, tmp_path / "data")["s"]["test"]
    assert records["AeBAD_S/test/groove/view/IMG_1.png"]["mask"].sum() == 255 * 5 * 8
    assert all(record["has_mask"] for record in records.values())


def test_a_video_is_one_group_with_numbered_frames_and_no_pixel_truth(aebad, tmp_path, built):
    records = built("aebad", aebad, tmp_path / "data")["v"]
    frame = records["test"]["AeBAD_V/test/video2/anomaly/frame30.jpg"]
    assert (frame["domain"], frame["group"], frame["frame"]) == ("video2", "video2", 30)
    assert (frame["label"], frame["has_mask"]) == ("anomaly", False)
    assert records["test"]["AeBAD_V/test/video1/good/frame9.jpg"]["has_mask"]
    train = records["train"]["AeBAD_V/train/good/video4_train/frame10.jpg"]
    assert (train["domain"], train["group"], train["frame"]) == ("", "video4_train", 10)


def test_one_part_works_without_the_other(aebad, tmp_path, built):
    (aebad / "AeBAD_V").rename(tmp_path / "elsewhere")
    assert list(built("aebad", aebad, tmp_path / "data")) == ["s"]
    with pytest.raises(FileNotFoundError, match=r"aebad/v: no records in .*AeBAD_V/train/good"):
        built("aebad", aebad, tmp_path / "data", categories=["v"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["f10", "f11", "f9"], [10, 11, 9]),
        (["1_a", "1_b", "2_a"], [0, 1, 2]),  # no number ends the names
        (["a1", "b1"], [0, 1]),  # numbers repeat
        (["f1", "f20231101101010"], [0, 1]),  # a time of day, too large for a frame
    ],
)
def test_frames_are_numbered_by_name_or_position(tmp_path, names, expected):
    paths = [tmp_path / f"{name}.jpg" for name in names]
    assert aebad_dataset_builder.frame_numbers(paths) == expected


def test_published_numbers_sum_up_to_1228_and_4342_images():
    totals = {"train": 0, "test": 0}
    for counts in aebad_dataset_builder.Builder.EXPECTED.values():
        for key, number in counts.items():
            if key != "defective with mask":
                totals[key.split()[0]] += number
    assert totals == {"train": 1228, "test": 4342}
