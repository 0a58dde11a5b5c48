"""Reading records: what was built comes back, sorted, decoded and undamaged."""

import dataclasses
import io
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from data_builders import build
from mmrjax.data import records as records_lib

EXPECTED_ORDER = (
    ["test/dent/000.png", "test/dent/001.png", "test/good/000.png", "test/good/001.png"]
    + [f"train/good/{i:03}.png" for i in range(7)]
)  # fmt: skip


def test_records_are_sorted_by_split_and_id(records):
    assert records.table["id"].tolist() == EXPECTED_ORDER
    assert records.table["split"].tolist() == ["test"] * 4 + ["train"] * 7
    assert len(records) == 11
    assert (records.dataset, records.category) == ("folder", "tiny_parts")


def test_table_says_what_each_image_shows(records):
    good = records_lib.GOOD
    assert records.table["label"].tolist() == [1 - good, 1 - good] + [good] * 9
    assert records.table["defect"].tolist() == ["dent", "dent"] + ["good"] * 9
    assert records.table["has_mask"].tolist() == [True, False] + [True] * 9
    assert records.table["has_mask"].dtype == bool
    assert records.table["domain"].tolist() == [""] * 11
    np.testing.assert_array_equal(records.table["group"], records.table["id"])
    assert {len(column) for column in records.table.values()} == {11}


def test_images_come_back_pixel_for_pixel_in_rgb(built):
    records, pixels, _ = built
    for i, name in enumerate(records.table["id"]):
        np.testing.assert_array_equal(records.image(i), pixels[name], err_msg=name)


def test_masks_have_the_images_size_and_two_levels(built):
    records, pixels, _ = built
    for i, name in enumerate(records.table["id"]):
        mask = records.mask(i)
        assert mask.shape == pixels[name].shape[:2]
        expected = np.zeros_like(mask)
        if name == "test/dent/000.png":
            expected[4:10, 6:14] = 255
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("max_side", [16, 31, 40])
def test_longer_side_is_shrunk_to_max_side_and_the_aspect_kept(built, max_side):
    records, pixels, _ = built
    for i, name in enumerate(records.table["id"]):
        native, shrunk = pixels[name].shape[:2], records.image(i, max_side)
        if max(native) <= max_side:
            np.testing.assert_array_equal(shrunk, pixels[name])
            continue
        assert max(shrunk.shape[:2]) == max_side
        for got, side in zip(shrunk.shape[:2], native, strict=True):
            assert abs(got - side * max_side / max(native)) <= 0.5
        assert abs(shrunk.mean() - pixels[name].mean()) < 6  # the same picture


@pytest.mark.parametrize("max_side", [0, 7, 50, 64, 224, 1000])
def test_size_from_the_header_is_that_of_the_decoded_image(records, max_side):
    # The last three end in half a pixel at 224, 224 and 1000.
    for size_hw in ((100, 130), (30, 20), (3, 900), (210, 384), (180, 1280), (1305, 1392)):
        lone = with_bytes(records, np.zeros((*size_hw, 3), np.uint8))
        assert lone.size(0, max_side) == lone.image(0, max_side).shape[:2]


def test_no_max_side_means_native_size(built):
    records, pixels, _ = built
    np.testing.assert_array_equal(records.image(0, max_side=0), pixels["test/dent/000.png"])


def test_very_long_image_keeps_at_least_one_row(records):
    records = with_bytes(records, np.full((2, 100, 3), 50, np.uint8))
    assert records.image(0, max_side=10).shape == (1, 10, 3)


def test_encoded_bytes_are_those_of_the_original_file(built):
    records, pixels, _ = built
    with Image.open(io.BytesIO(records.encoded(4, "image"))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels["train/good/000.png"])


def with_bytes(records, data) -> records_lib.Records:
    """Records whose every image is `data`: pixels, or bytes as they are."""
    if isinstance(data, np.ndarray):
        data = cv2.imencode(".png", data)[1].tobytes()
    row = {"image": data, "mask": data}
    sources = {split: [row] * 11 for split in ("train", "test")}
    return dataclasses.replace(records, _sources=sources)


@pytest.mark.parametrize("damage", ["foreign", "truncated"])
def test_damaged_record_is_named_with_what_to_do(records, damage):
    whole = records.encoded(4, "image")
    damaged = with_bytes(records, whole[: len(whole) // 2] if damage == "truncated" else b"no png")
    for read, field in ((damaged.image, "image"), (damaged.mask, "mask")):
        wanted = rf"the {field} of record 'train/good/000\.png' .* damaged; delete their folder"
        with pytest.raises(ValueError, match=wanted):
            read(4)


def test_record_without_bytes_is_named_too(records):
    with pytest.raises(ValueError, match=r"train/good/000\.png.*damaged"):
        with_bytes(records, b"").image(4)


def damaged_copy(directory, tmp_path, damage):
    copy = tmp_path / "folder" / "tiny_parts" / "1.0.0"
    shutil.copytree(directory, copy)
    damage(next(copy.glob("*-train.array_record*")))
    return copy


def test_flipped_bit_in_a_record_file_is_noticed(built, tmp_path):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[1000] ^= 1  # inside the first chunk
        path.write_bytes(data)

    with pytest.raises(ValueError, match=r"tiny_parts.* are damaged .*hash mismatch"):
        records_lib.load(damaged_copy(built[2], tmp_path, flip))


def test_truncated_record_file_is_an_error_that_names_the_folder(built, tmp_path):
    def truncate(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(ValueError, match=r"tiny_parts.* are damaged .*; delete that folder"):
        records_lib.load(damaged_copy(built[2], tmp_path, truncate))


def test_grey_and_transparent_pngs_become_three_channels(records):
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    image = with_bytes(records, grey).image(0)
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))
    rgba = np.dstack([grey, grey + 50, grey + 100, np.full_like(grey, 9)])
    assert with_bytes(records, rgba).image(0).shape == (4, 6, 3)


def test_orientation_tags_are_ignored_as_masks_are_drawn_on_stored_pixels(records):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(buffer, "jpeg", exif=exif)
    turned = with_bytes(records, buffer.getvalue())
    assert turned.image(0).shape == (4, 9, 3)
    assert turned.mask(0).shape == (4, 9)


@pytest.fixture
def digest_of(tmp_path):
    """Builds a small data set, after `change(raw folder)`, and returns the records' digest."""

    def build_one(change=lambda raw: None) -> str:
        raw, data_dir = tmp_path / "raw" / "parts", tmp_path / "data"
        for folder in (raw, data_dir):
            shutil.rmtree(folder, ignore_errors=True)
        for i, name in enumerate(("train/good/0", "train/good/1", "test/good/2", "test/bad/3")):
            write(raw / f"{name}.png", np.full((9, 8, 3), 40 * i, np.uint8))
        write(raw / "ground_truth/bad/3_mask.png", np.eye(9, 8, dtype=np.uint8) * 255)
        change(raw)
        built = build.build("folder", raw, data_dir, log=lambda line: None)
        return records_lib.load(built["parts"]).digest

    return build_one


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_digest_is_that_of_the_content_whenever_and_wherever_it_was_built(digest_of):
    assert digest_of() == digest_of()


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: write(raw / "train/good/1.png", np.full((9, 8, 3), 41, np.uint8)),
        lambda raw: write(raw / "ground_truth/bad/3_mask.png", np.full((9, 8), 255, np.uint8)),
        lambda raw: (raw / "test/good/2.png").rename(raw / "test/good/4.png"),
        lambda raw: (raw / "test/good/2.png").rename(raw / "train/good/2.png"),
        lambda raw: (raw / "test/good/2.png").rename(raw / "test/bad/2.png"),
        lambda raw: (raw / "train/good/0.png").unlink(),
    ],
    ids=["pixel", "mask", "id", "split", "label", "missing"],
)
def test_digest_changes_with_any_content(digest_of, change):
    assert digest_of(change) != digest_of()


def test_place_without_records_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no records at {tmp_path}"):
        records_lib.load(tmp_path)


def test_records_of_a_single_split_can_be_read(tmp_path):
    write(tmp_path / "raw/lone/train/good/0.png", np.zeros((8, 9, 3), np.uint8))
    built = build.build("folder", tmp_path / "raw/lone", tmp_path / "data", log=lambda line: None)
    records = records_lib.load(built["lone"])
    assert records.table["split"].tolist() == ["train"]
    assert records.image(0).shape == (8, 9, 3)


def test_a_view_has_the_rows_in_their_order_and_shares_the_images(records):
    rows = [len(records) - 1, 0, 0]
    view = records.take(rows)
    assert len(view) == 3
    assert view.table["id"].tolist() == [records.table["id"][i] for i in rows]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(view.image(i), records.image(row))
        np.testing.assert_array_equal(view.mask(i), records.mask(row))
    assert len(view.take([])) == 0
    assert view.digest == records.digest
