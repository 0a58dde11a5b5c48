"""A user's own directory is understood, or refused with what to do."""

import cv2
import numpy as np
import pytest

from data_builders import build
from data_builders.folder import folder_dataset_builder, layout


@pytest.fixture
def make(tmp_path, write_image, write_mask, clutter):
    """Makes `my parts/` of the named images; names with mask or GT become masks."""

    def build_tree(*names: str):
        root = tmp_path / "my parts"
        clutter(root)
        for name in names:
            is_mask = any(word in name for word in ("mask", "ground_truth", "_GT"))
            (write_mask if is_mask else write_image)(root / name)
        return root

    return build_tree


@pytest.fixture
def read(tmp_path, built):
    """Builds and returns {id: (split, defect, has_mask)} and the line that says the layout."""

    def run(root):
        log = []
        (records,) = built("folder", root, tmp_path / "data", log=log).values()
        found = {
            name: (split, r["defect"], r["has_mask"])
            for split, part in records.items()
            for name, r in part.items()
        }
        return found, next(line for line in log if "understood as" in line)

    return run


def test_layout_of_mvtec(make, read):
    root = make(
        "train/good/1.png", "train/good/2.png", "test/good/3.png", "test/dent/1.png",
        "test/dent/2.png", "ground_truth/dent/1_mask.png",
    )  # fmt: skip
    found, line = read(root)
    assert found == {
        "train/good/1.png": ("train", "good", True),
        "train/good/2.png": ("train", "good", True),
        "test/good/3.png": ("test", "good", True),
        "test/dent/1.png": ("test", "dent", True),
        "test/dent/2.png": ("test", "dent", False),
    }
    assert "2 good to train on; to test 1 good and 2 defective (dent 2), 1 of them with" in line


def test_good_and_folders_named_after_defects(make, read):
    good = [f"good/{i}.jpg" for i in range(10)]
    root = make(*good, "bad/1.jpg", "Big dent/1.bmp", "masks/bad/1.png", "Big dent/1_GT.png")
    found, line = read(root)
    splits = [found[name][0] for name in good]
    assert (splits.count("train"), splits.count("test")) == (8, 2)
    assert found["bad/1.jpg"] == ("test", "bad", True)
    assert found["Big dent/1.bmp"] == ("test", "Big dent", True)
    assert len(found) == 12
    assert "(Big dent 1, bad 1), 2 of them with a mask" in line


def test_flat_folder_of_good_images(make, read):
    found, line = read(make(*(f"{i}.webp" for i in range(5))))
    assert sorted(found.values()) == [("test", "good", True)] + [("train", "good", True)] * 4
    assert "images taken as good: 4 good to train on; to test 1 good and 0 defective" in line


def test_mask_beside_a_loose_image_makes_it_defective(make, read, write_mask):
    root = make("1.png", "2.png", "3.png", "1_mask.png")
    write_mask(root / "2_mask.png", levels=(0, 0, 0))
    found, _ = read(root)
    assert found["1.png"] == ("test", "anomaly", True)
    assert {found["2.png"][1], found["3.png"][1]} == {"good"}


def test_train_folder_alone_is_shared_out(make, read):
    found, _ = read(make("train/1.png", "train/2.png", "train/3.png", "readme/scan.png"))
    assert sorted(split for split, _, _ in found.values()) == ["test", "train", "train"]
    assert "readme/scan.png" not in found


def test_a_single_folder_in_train_is_good_and_several_must_be_settled(make, read, tmp_path):
    root = make("train/day/1.png", "test/good/1.png")
    assert read(root)[0]["train/day/1.png"] == ("train", "good", True)
    root = make("train/night/1.png")
    with pytest.raises(ValueError, match=r"'train/day', 'train/night'.*data\.good="):
        read(root)
    given = {"good": ("train/**",), "bad": ("test/x*/**",)}
    make("test/xy/1.png")
    log = []
    build.build("folder", root, tmp_path / "given", log=log.append, choice=given)
    assert "3 good to train on" not in log
    assert any("understood as" in line and "(xy 1)" in line for line in log)


def test_wrapping_folders_are_passed_through(make, read):
    found, _ = read(make("a/b/good/1.png", "a/b/bad/7.png", "a/b/masks/7.png"))
    assert found["a/b/good/1.png"] == ("train", "good", True)
    assert found["a/b/bad/7.png"] == ("test", "bad", True)


def test_several_directories_in_mvtec_layout_are_categories(make, tmp_path, built):
    root = make("Left Arm/train/good/1.png", "Left Arm/test/good/1.png", "nut/train/good/1.png")
    records = built("folder", root, tmp_path / "data")
    assert list(records) == ["left_arm", "nut"]
    assert set(records["left_arm"]["test"]) == {"Left Arm/test/good/1.png"}


def test_records_are_found_by_folder_name_when_the_folder_is_gone(make, tmp_path, built):
    root = make("1.png", "2.png")
    built("folder", root, tmp_path / "data")
    root.rename(tmp_path / "gone")
    assert list(built("folder", root, tmp_path / "data")) == ["my_parts"]
    with pytest.raises(FileNotFoundError, match=r"folder: no records .* does not exist"):
        built("folder", tmp_path / "other", tmp_path / "data")


def test_held_out_images_depend_on_names_only_and_are_a_fifth(tmp_path):
    paths = [tmp_path / f"good/{i}.png" for i in range(50)]
    held = layout.hold_out(paths, tmp_path)
    assert len(held) == 10
    assert layout.hold_out(reversed(paths), tmp_path) == held
    more = layout.hold_out([*paths, tmp_path / "good/new.png"], tmp_path)
    assert len(more & held) >= 9
    assert [len(layout.hold_out(paths[:n], tmp_path)) for n in (0, 1, 2, 9)] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["dent/1.png", "scratch/1.png"], r"cannot tell which images are good .*'dent', 'scratch'"),
        (["test/good/1.png", "test/bad/1.png"], "cannot tell which images are good"),
        (["train/good/1.png", "test/1.png"], r"test/1\.png: a test image in no sub-folder"),
        (["1.png", "day/2.png", "night/3.png"], r"cannot tell .*'day', 'night'.*data\.good="),
        (["good/1.png", "a/2.png", "b/2.png", "masks/2.png"], r"2\.png: is it the mask of .*a/2"),
        (["good/1.png", "a/2.png", "masks/a/2.png", "masks/a/2_mask.png"], "which is its mask"),
    ],
)
def test_unclear_directories_are_refused_with_what_to_do(make, tmp_path, built, names, message):
    with pytest.raises(ValueError, match=message):
        built("folder", make(*names), tmp_path / "data")


def test_masks_with_labels_and_soft_masks_are_binarised(make, tmp_path, built):
    root = make("good/1.png", "a/1.png", "a/2.png")
    (root / "masks/a").mkdir(parents=True)
    labels = np.zeros((24, 32), np.uint8)
    labels[3, 4:6] = 1, 2
    cv2.imwrite(str(root / "masks/a/1.png"), labels)
    cv2.imwrite(str(root / "masks/a/2.png"), np.tile(np.arange(32, dtype=np.uint8) * 8, (24, 1)))
    records = built("folder", root, tmp_path / "data")["my_parts"]["test"]
    np.testing.assert_array_equal(records["a/1.png"]["mask"][..., 0] > 0, labels > 0)
    assert (records["a/2.png"]["mask"][0, :, 0] > 0).tolist() == [x * 8 > 124 for x in range(32)]


def test_sixteen_bit_images_share_one_white_level(make, tmp_path, built):
    root = make("good/0.png")
    for name, value in (("dark", 1000), ("bright", 4000)):
        cv2.imwrite(str(root / f"good/{name}.png"), np.full((24, 32), value, np.uint16))
    log = []
    splits = built("folder", root, tmp_path / "data", log=log)["my_parts"]
    assert any("white of 16-bit images: 4095" in line for line in log)
    records = {**splits["train"], **splits["test"]}
    means = [records[f"good/{name}.png"]["image"].mean() for name in ("dark", "bright")]
    assert means == [round(1000 * 255 / 4095), round(4000 * 255 / 4095)]


@pytest.mark.parametrize(
    ("largest", "white"), [(0, 255), (255, 255), (256, 1023), (4095, 4095), (65535, 65535)]
)
def test_white_level_is_that_of_the_cameras_bit_depth(largest, white):
    assert folder_dataset_builder.full_scale(largest) == white


def test_groups_and_domains_are_taken_from_a_table_and_stay_together(make, tmp_path, built):
    names = [f"good/{i}.png" for i in range(40)]
    root = make(*names, "bad/x.png")
    rows = [f"{name},part {i // 4},{'dim' if i % 2 else 'lit'}" for i, name in enumerate(names)]
    table = root / "groups.csv"
    table.write_text("\n".join(["image,group,domain", *rows, "bad/x.png,part 3,lit"]))
    splits = built("folder", root, tmp_path / "data")["my_parts"]
    groups = {split: {r["group"] for r in records.values()} for split, records in splits.items()}
    assert not groups["train"] & groups["test"]
    assert "part 3" in groups["test"]  # with its defective image
    assert len(groups["test"]) in (2, 3)  # a fifth of ten parts, and part 3
    assert {r["domain"] for r in splits["train"].values()} == {"dim", "lit"}
    table.write_text("\n".join(["image,group", *(f"{name},0" for name in names[:4])]))
    again = built("folder", root, tmp_path / "data")["my_parts"]  # a changed table is noticed
    assert sum(r["group"] == "0" for split in again.values() for r in split.values()) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,part\ngood/1.png,3\n", "expected the columns image and group"),
        ("image;group\ngood/1.png;3\n", "separated by commas; found image;group"),
        ("image,group\ngood/9.png,3\n", r"names good/9\.png, which is no image below"),
        ("image,group\ngood/1.png,3\ngood/1.png,4\n", r"names good/1\.png twice"),
    ],
)
def test_a_wrong_table_of_groups_is_refused(make, tmp_path, built, text, message):
    root = make("good/1.png", "good/2.png")
    (root / "groups.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        built("folder", root, tmp_path / "data")


def test_a_group_on_both_sides_is_refused(make, tmp_path, built):
    root = make("train/good/1.png", "train/good/2.png", "test/good/3.png", "test/crack/4.png")
    text = "image,group\ntrain/good/1.png,A\ntest/good/3.png,A\n"
    (root / "groups.csv").write_text(text, encoding="utf-8-sig")  # as spreadsheets do
    with pytest.raises(ValueError, match=r"group A is trained on \(train/good/1\.png\) and tested"):
        built("folder", root, tmp_path / "data")
