"""Each kind of problem is found and named, and the build does with it what the report says."""

import shutil

import cv2
import numpy as np
import pytest

from data_builders import check
from data_builders.mvtec_ad import mvtec_ad_dataset_builder

GOOD = "bottle/train/good/000.png"
BENT = "bottle/test/bent/000.png"
MASK = "bottle/ground_truth/bent/000_mask.png"


@pytest.fixture
def raw_dir(tmp_path, monkeypatch, write_image, write_mask):
    """A small MVTec AD without any problem, and its counts as the expected ones."""
    root = tmp_path / "mvtec"
    for name in (GOOD, "bottle/train/good/001.png", "bottle/test/good/000.png", BENT):
        write_image(root / name)
    write_mask(root / MASK, levels=(0, 0, 255))
    counts = {"train good": 2, "test good": 1, "test anomaly": 1, "defective with mask": 1}
    monkeypatch.setitem(mvtec_ad_dataset_builder.Builder.EXPECTED, "bottle", counts)
    return root


@pytest.fixture
def found(raw_dir):
    """Runs the check; returns {kind: lines} without the empty kinds."""

    def run(name="mvtec_ad", raw=raw_dir) -> dict[str, list[str]]:
        problems = check.check(name, raw).problems
        return {kind: lines for kind, lines in problems.items() if lines}

    return run


@pytest.fixture
def record(raw_dir, tmp_path, built):
    """Builds the data set and returns the record of an id."""

    def run(name: str) -> dict:
        splits = built("mvtec_ad", raw_dir, tmp_path / "data")["bottle"]
        return {**splits["train"], **splits["test"]}[name]

    return run


def rewrite(path, change, flags=cv2.IMREAD_UNCHANGED, suffix=".png"):
    """Replaces a file by its changed pixels, encoded as `suffix` whatever its name says."""
    pixels = change(cv2.imread(str(path), flags))
    path.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())


def test_clean_data_has_no_problem(found, raw_dir, capsys):
    assert found() == {}
    assert check.main(["mvtec_ad", f"--raw_dir={raw_dir}"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "nothing to be mended"
    assert "mvtec_ad/bottle: found/expected: train good 2/2" in out


# --- handled by the build


def test_what_systems_leave_is_named_and_ignored(found, raw_dir, record, clutter):
    clutter(raw_dir / "bottle/train/good")
    (raw_dir / "._bottle").write_bytes(b"Mac OS X")
    (raw_dir / ".git").mkdir()  # hidden, but nobody left it
    names = [".DS_Store", "._000.png", "Thumbs.db", "__MACOSX"]
    assert found() == {
        "left by an operating system": [
            "._bottle", *(f"bottle/train/good/{name}" for name in names)
        ]
    }  # fmt: skip
    record(GOOD)


def test_jpeg_named_png_is_read_by_its_content(found, raw_dir, record):
    rewrite(raw_dir / GOOD, lambda pixels: pixels, suffix=".jpg")
    assert found() == {"named as another format": [f"{GOOD} holds JPEG"]}
    expected = cv2.imread(str(raw_dir / GOOD))[..., ::-1]
    np.testing.assert_array_equal(record(GOOD)["image"], expected)


def test_grey_image_gets_three_equal_channels(found, raw_dir, record):
    rewrite(raw_dir / GOOD, lambda pixels: pixels, cv2.IMREAD_GRAYSCALE)
    assert found() == {"grey image": [GOOD]}
    image = record(GOOD)["image"]
    assert (image == image[..., :1]).all()


def test_sixteen_bits_are_scaled(found, raw_dir, record):
    rewrite(raw_dir / GOOD, lambda pixels: pixels.astype(np.uint16) * 257)
    expected = cv2.imread(str(raw_dir / GOOD))[..., ::-1]
    assert found() == {"16 bits a pixel": [GOOD]}
    np.testing.assert_array_equal(record(GOOD)["image"], expected)


def test_alpha_is_dropped(found, raw_dir, record):
    expected = cv2.imread(str(raw_dir / GOOD))[..., ::-1]
    rewrite(raw_dir / GOOD, lambda pixels: np.dstack([pixels, np.full_like(pixels[..., 0], 9)]))
    assert found() == {"alpha channel": [GOOD]}
    np.testing.assert_array_equal(record(GOOD)["image"], expected)


def test_mask_of_many_levels_is_cut_by_the_rule(found, raw_dir, record, write_mask):
    write_mask(raw_dir / MASK, levels=(0, 60, 200))
    assert found() == {"mask of more than two levels": [MASK]}
    assert record(BENT)["mask"].sum() == 255 * 5 * 8  # the level 60 is no defect


def test_empty_mask_keeps_the_label_without_pixel_truth(found, raw_dir, record):
    rewrite(raw_dir / MASK, np.zeros_like)
    problems = found()
    assert problems.pop("counts differ from the published ones") == [
        "mvtec_ad/bottle: defective with mask 0 of 1"
    ]
    assert problems == {"empty mask of a defective image": [MASK]}
    assert (record(BENT)["label"], record(BENT)["has_mask"]) == ("anomaly", False)


def test_missing_mask_keeps_the_label_without_pixel_truth(found, raw_dir, record):
    (raw_dir / MASK).unlink()
    assert found()["no mask for a defective image"] == [BENT]
    assert (record(BENT)["label"], record(BENT)["has_mask"]) == ("anomaly", False)


# --- to be mended


def check_stops(found, record, message):
    """The check and the build say the same."""
    [line] = found()["the build stops"]
    assert message in line
    with pytest.raises((ValueError, OSError)) as caught:
        record(GOOD)
    assert line in str(caught.value)


@pytest.mark.parametrize("kept", [0.6, 0.0])
@pytest.mark.parametrize("name", [GOOD, MASK])
def test_truncated_and_empty_files(found, raw_dir, record, name, kept):
    data = (raw_dir / name).read_bytes()
    (raw_dir / name).write_bytes(data[: int(len(data) * kept)])
    check_stops(found, record, "the image is damaged" if kept else "the file is empty")


def test_every_damaged_file_is_named_at_once(found, raw_dir):
    for name in (GOOD, BENT):
        (raw_dir / name).write_bytes(b"?")
    lines = found()["the build stops"]
    assert [line.split(": ")[0] for line in lines] == [GOOD, BENT]


def test_mask_of_another_size(found, raw_dir, record):
    rewrite(raw_dir / MASK, lambda mask: mask[:-1])
    check_stops(found, record, f"{BENT}: the mask is 32x23, its image 32x24")


def test_absurdly_large_image(found, raw_dir, record, monkeypatch):
    monkeypatch.setenv("MMRJAX_MAX_MEGAPIXELS", "0.0001")
    with pytest.raises(ValueError, match="32x24 are 0 million pixels"):
        record(GOOD)
    assert len(found()["the build stops"]) == 4


def test_mask_too_faint_for_the_rule_would_lose_its_defect(found, raw_dir, record):
    rewrite(raw_dir / MASK, lambda mask: mask // 255)  # 0 and 1, where the rule is above 127
    assert found()["mask too faint for the data set's rule"] == [MASK]
    assert not record(BENT)["has_mask"]


def test_same_pixels_in_both_splits_whatever_the_encoding(found, raw_dir, record):
    copy = "bottle/test/good/copy.bmp"
    cv2.imwrite(str(raw_dir / copy), cv2.imread(str(raw_dir / GOOD)))
    assert found()["same pixels in train and in test"] == [f"{GOOD} and {copy}"]
    record(copy)  # the build does not notice


def test_same_pixels_within_a_split_are_no_leak(found, raw_dir):
    shutil.copy(raw_dir / GOOD, raw_dir / "bottle/train/good/copy.png")
    assert set(found()) == {"counts differ from the published ones"}


def test_counts_that_differ_are_told_with_both_numbers(found, raw_dir, capsys):
    (raw_dir / "bottle/train/good/001.png").unlink()
    assert found() == {
        "counts differ from the published ones": ["mvtec_ad/bottle: train good 1 of 2"]
    }
    assert check.main(["mvtec_ad", f"--raw_dir={raw_dir}"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 to be mended"


# --- builders that read while they plan, or that cut images into parts


def test_planning_that_stops_still_names_every_damaged_file(tmp_path, found, write_image):
    root = tmp_path / "tiles"
    for i in range(3):
        write_image(root / f"MT_Free/Imgs/exp1_num_{i}.jpg", size_hw=(40, 30), grey=True)
    for i in (1, 2):
        (root / f"MT_Free/Imgs/exp1_num_{i}.jpg").write_bytes(b"?")
    problems = found("magnetic_tile", root)
    lines = problems["the build stops"]
    assert len(lines) == 2
    assert ["num_1.jpg" in lines[0], "num_2.jpg" in lines[1]] == [True, True]
    assert "masks, kinds of images, duplicates and counts" in problems["not checked"][0]


def test_labels_read_from_masks_do_not_hide_a_missing_mask(tmp_path, found, write_image):
    for name in ("train/1.png", "train/2.png", "test/3.png"):
        write_image(tmp_path / "ksdd2" / name)
    cv2.imwrite(str(tmp_path / "ksdd2/train/1_GT.png"), np.zeros((24, 32), np.uint8))
    lines = found("kolektor_sdd2", tmp_path / "ksdd2")["the build stops"]
    assert ["2_GT.png is missing" in lines[0], "3_GT.png is missing" in lines[1]] == [True, True]


def test_strips_are_checked_as_whole_files(tmp_path, found, write_image):
    folder = tmp_path / "RSDDs dataset/Type-I RSDDs dataset"
    for number in range(1, 5):
        path = write_image(folder / f"Rail surface images/rail_{number}.jpg", (48, 16))
        mask = np.zeros((48 + (number == 2), 16), np.uint8)
        mask[8:16] = 255 * (number != 3)
        path = folder / f"GroundTruth/rail_{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), mask)
    problems = found("rsdds", tmp_path)
    assert "rail_2.jpg: the mask is 16x49" in problems["the build stops"][0]
    assert problems["empty mask of a defective image"] == [
        "Type-I RSDDs dataset/GroundTruth/rail_3.jpg"
    ]
    assert problems["counts differ from the published ones"][0] == "rsdds/i: train strips 2 of 46"


def test_user_folders_are_checked_with_their_own_layout(tiny_raw, found):
    assert set(found("folder", tiny_raw)) <= set(check.HANDLED)


# --- the command line


def test_long_lists_are_cut_unless_asked_for(raw_dir, write_image, capsys):
    for i in range(9):
        write_image(raw_dir / f"bottle/train/good/g{i}.png", grey=True)
    args = ["mvtec_ad", f"--raw_dir={raw_dir}"]
    check.main(args)
    assert "and 4 more; --list_all names them" in (out := capsys.readouterr().out)
    assert "g8.png" not in out
    check.main([*args, "--list_all"])
    assert "g8.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mvtec", "--raw_dir=."], "unknown data set 'mvtec'; available"),
        (["demo_parts", "--raw_dir=."], "a program draws it"),
        (["mvtec_ad", "--raw_dir=/nowhere"], "/nowhere does not exist. Get"),
        (["mvtec_ad", "--raw_dir={raw}", "--category=vase"], "no category 'vase'"),
    ],
)
def test_bad_input_is_answered_with_one_message(raw_dir, capsys, args, message):
    assert check.main([arg.format(raw=raw_dir) for arg in args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_real_tiles_need_no_mending(shared, found):
    problems = found("magnetic_tile", shared / "data" / "magnetic_tile")
    assert {kind: len(lines) for kind, lines in problems.items()} == {
        "grey image": 1344,
        "mask of more than two levels": 388,
        "empty mask of a defective image": 4,
    }
