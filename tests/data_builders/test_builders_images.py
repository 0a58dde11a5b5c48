"""The bytes that a record keeps decode to the right upright 8-bit RGB pixels, whatever came in."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from data_builders import images


@pytest.fixture
def rgb() -> np.ndarray:
    """A smooth picture [20, 30, 3] with different channels."""
    y, x = np.mgrid[:20, :30]
    return np.stack([x * 8, y * 12, 255 - x * 4 - y * 4], axis=-1).astype(np.uint8)


def encode(rgb: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, kind, **options)
    return buffer.getvalue()


def decode_plainly(data: bytes) -> np.ndarray:
    """As TFDS reads records: stored pixels, EXIF ignored."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp"])
def test_ordinary_files_are_kept_byte_for_byte(rgb, kind):
    data = encode(rgb, kind)
    kept, size_hw = images.encode_image(data, "x")
    assert kept == data
    assert size_hw == (20, 30)


@pytest.mark.parametrize("kind", ["tiff", "webp"])
def test_unusual_formats_become_png_with_the_same_pixels(rgb, kind):
    kept, _ = images.encode_image(encode(rgb, kind, lossless=True), "x")
    assert kept.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decode_plainly(kept), rgb)


def test_alpha_is_dropped_and_colours_stay(rgb):
    rgba = np.dstack([rgb, np.full((20, 30), 7, np.uint8)])
    kept, _ = images.encode_image(encode(rgba, "png"), "x")
    np.testing.assert_array_equal(decode_plainly(kept), rgb)


def test_pixels_come_back_as_they_went_in(rgb):
    kept, size_hw = images.encode_image(rgb, "x")
    np.testing.assert_array_equal(decode_plainly(kept), rgb)
    assert size_hw == (20, 30)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_rotation_noted_in_exif_is_carried_out(rgb, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    data = encode(rgb, kind, exif=exif)
    kept, size_hw = images.encode_image(data, "x")
    assert size_hw == (30, 20)
    upright = np.rot90(decode_plainly(data), k=-1).astype(int)
    assert np.abs(decode_plainly(kept) - upright).mean() < 2  # JPEG colour conversion may differ


@pytest.mark.parametrize(("full_scale", "expected"), [(65535, 16), (4095, 255)])
def test_sixteen_bits_are_scaled_from_full_scale_to_255(full_scale, expected):
    pixels = np.array([[0, 4095]], np.uint16)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    kept, _ = images.encode_image(data, "x", full_scale)
    grey = cv2.imdecode(np.frombuffer(kept, np.uint8), cv2.IMREAD_UNCHANGED)
    assert grey.dtype == np.uint8
    assert grey.tolist() == [[0, expected]]


def test_float_pixels_are_refused():
    data = cv2.imencode(".tiff", np.zeros((4, 4), np.float32))[1].tobytes()
    with pytest.raises(ValueError, match=r"a\.tif: expected 8 or 16 bits a pixel, found float32"):
        images.encode_image(data, "a.tif")


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp"])
def test_cut_off_file_is_named_with_the_reason(rgb, kind):
    data = encode(rgb, kind)
    with pytest.raises(
        ValueError, match=r"dir/a\.x: the image is damaged \(.*(?i:truncated).*bytes"
    ):
        images.encode_image(data[: len(data) * 2 // 3], "dir/a.x")


def test_text_and_empty_files_are_named_with_the_reason():
    with pytest.raises(ValueError, match=r"a\.png: the image is damaged .*no known image format"):
        images.encode_image(b"version https://git-lfs.github.com/spec/v1", "a.png")
    with pytest.raises(ValueError, match=r"a\.png: the file is empty"):
        images.encode_image(b"", "a.png")


def test_class_numbers_of_sixteen_bit_masks_survive(tmp_path):
    mask = np.zeros((6, 8), np.uint16)
    mask[2, 3] = 1
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    np.testing.assert_array_equal(images.read_grey(tmp_path / "m.png"), mask)


def test_colour_masks_count_with_their_brightest_channel(tmp_path):
    mask = np.zeros((6, 8, 3), np.uint8)
    mask[2, 3] = (0, 0, 200)  # pure red would be grey level 60
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    assert images.read_grey(tmp_path / "m.png")[2, 3] == 200


@pytest.mark.parametrize(
    ("grey", "expected"),
    [
        ([0, 255], [False, True]),
        ([0, 1], [False, True]),
        ([0, 1, 2, 7], [False, True, True, True]),
        ([0, 0], [False, False]),
        (range(0, 250, 10), [v > 120 for v in range(0, 250, 10)]),
    ],
)
def test_unknown_masks_are_labels_or_soft(grey, expected):
    mask = images.labels_or_soft(np.array([list(grey)], np.uint8))
    assert mask.tolist() == [list(expected)]
