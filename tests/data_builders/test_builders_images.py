"""The bytes that a record keeps decode to the right upright 8-bit RGB pixels, whatever came in."""

import io
import struct
import zlib

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


def with_orientation(pixels: np.ndarray, kind: str, orientation: int) -> bytes:
    """An image file whose EXIF says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, kind, **({"quality": 100} if kind == "jpeg" else {}), exif=exif)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
def test_rotation_noted_in_exif_is_carried_out(rgb, tmp_path, kind, orientation):
    data = with_orientation(rgb, kind, orientation)
    kept, size_hw = images.encode_image(data, "x")
    turned = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert size_hw == turned.shape[:2] == ((30, 20) if orientation in (5, 6, 7, 8) else (20, 30))
    np.testing.assert_array_equal(decode_plainly(kept), turned)
    (tmp_path / "x").write_bytes(data)
    np.testing.assert_array_equal(images.read_grey(tmp_path / "x"), turned.max(axis=-1))


LOSSLESS = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {"lossless": True, "exact": True}),
}
ALPHA = ("none", "opaque", "holes", "soft")


@pytest.fixture(scope="module")
def score_onnx():
    """scripts/score_onnx.py, which needs onnxruntime only to score."""
    import runpy
    import sys
    import types

    absent = "onnxruntime" not in sys.modules
    if absent:
        sys.modules["onnxruntime"] = types.SimpleNamespace(InferenceSession=None)
    try:
        return runpy.run_path("scripts/score_onnx.py")
    finally:
        if absent:
            del sys.modules["onnxruntime"]


@pytest.mark.parametrize("alpha", ALPHA)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", LOSSLESS)
def test_pixels_are_the_same_everywhere(rgb, tmp_path, score_onnx, form, orientation, alpha):
    kind, options = LOSSLESS[form]
    if kind == "BMP" and (orientation > 1 or alpha != "none"):
        pytest.skip("BMP notes no rotation, and Pillow writes no alpha into it")
    levels = {"opaque": 255, "holes": rgb[..., 0] % 2 * 255, "soft": rgb[..., 1]}
    pixels = rgb if alpha == "none" else np.dstack([rgb, np.broadcast_to(levels[alpha], (20, 30))])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = options | ({} if kind == "BMP" else {"exif": exif})
    path = tmp_path / "picture.png"  # whatever it holds
    path.write_bytes(encode(np.uint8(pixels), kind, **options))
    turn = images._TURNS.get(orientation, lambda pixels: pixels)
    kept, size_hw = images.encode_image(path, "x")
    np.testing.assert_array_equal(decode_plainly(kept), turn(rgb))
    np.testing.assert_array_equal(images.read_grey(path), turn(rgb).max(axis=-1))
    about = {"interpolation": "bilinear", "resize": size_hw, "size": size_hw, "overlap": None}
    np.testing.assert_array_equal(score_onnx["load_image"](str(path), about), turn(rgb))


@pytest.mark.parametrize("bits", [8, 16])
def test_colours_of_a_tiff_multiplied_with_alpha_come_back(rgb, bits):
    alpha = np.where(np.arange(30) % 3, 255, 128)[None, :, None] * np.ones((20, 1, 1), int)
    stored = np.dstack([np.rint(rgb * (alpha / 255)), alpha]).astype(np.uint8)
    data = encode(stored, "TIFF")
    if bits == 16:
        bgra = np.uint16(stored[..., [2, 1, 0, 3]]) * 257
        data = cv2.imencode(".tiff", bgra, [cv2.IMWRITE_TIFF_COMPRESSION, 1])[1].tobytes()
    tag = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples, one short
    place = data.find(tag, int.from_bytes(data[4:8], "little"))
    if place < 0:
        pytest.skip("this OpenCV notes no kind of alpha")
    data = data[: place + 8] + struct.pack("<HH", 1, 0) + data[place + 12 :]
    kept, _ = images.encode_image(data, "x")
    assert np.abs(decode_plainly(kept).astype(int) - rgb).max() <= 1


def test_depth_is_read_from_the_file_not_from_its_name(tmp_path, score_onnx):
    deep = np.arange(2000, dtype=np.uint16).reshape(40, 50)
    for form, name in ((".png", "a.jpg"), (".tif", "b.png"), (".png", "c.tif")):
        (tmp_path / name).write_bytes(cv2.imencode(form, deep)[1].tobytes())
        assert images.largest_value(tmp_path / name) == 1999
        with pytest.raises(ValueError, match="more than 8 bits"):
            score_onnx["load_image"](str(tmp_path / name), {})
    (tmp_path / "d.tif").write_bytes(cv2.imencode(".png", np.uint8(deep // 8))[1].tobytes())
    assert images.largest_value(tmp_path / "d.tif") == 0


def test_a_hot_pixel_is_not_the_level_that_all_keep_to(tmp_path):
    levels = np.full((30, 40), 3000, np.uint16)
    levels[3, 4] = 65535
    cv2.imwrite(str(tmp_path / "a.png"), levels)
    assert images.bright_values(tmp_path / "a.png") == (3000, 65535)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG"])
def test_several_pages_are_refused(rgb, kind, tmp_path, score_onnx):
    more = {"save_all": True, "append_images": [Image.fromarray(rgb[::-1].copy())]}
    data = encode(rgb, kind, **more)
    with pytest.raises(ValueError, match="a: the file holds 2 pages or frames"):
        images.encode_image(data, "a")
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="several pages"):
        score_onnx["load_image"](str(tmp_path / "a"), {})


@pytest.mark.parametrize("seed", range(40))
def test_mutated_files_are_read_or_refused_in_a_line(rgb, seed):
    rng = np.random.default_rng(seed)
    for kind, options in LOSSLESS.values():
        data = np.frombuffer(encode(rgb, kind, **options), np.uint8).copy()
        places = rng.integers(0, min(len(data), 300 if seed % 2 else len(data)), 4)
        data[places] = rng.integers(0, 256, 4)
        message = "a: "
        try:
            images.encode_image(data.tobytes(), "a")
        except ValueError as e:
            message = str(e)
        assert message.startswith("a: ")
        assert "\n" not in message


def test_damaged_exif_does_not_matter(rgb):
    data = with_orientation(rgb, "jpeg", 6)
    place = data.index(b"Exif") + 6
    damaged = data[:place] + b"XX" + data[place + 2 :]
    assert images.encode_image(damaged, "x") == (damaged, (20, 30))


def shown_mask(tmp_path, orientation, mask, own=1):
    """`mask`, in a file with the orientation `own`, as that of a photograph [20, 30]."""
    stored = np.uint8(mask) * 255
    (tmp_path / "m.png").write_bytes(
        with_orientation(stored, "png", own) if own > 1 else encode(stored, "png")
    )
    read = images.read_grey(tmp_path / "m.png") > 0
    size_hw = (30, 20) if orientation > 4 else (20, 30)
    return images.mask_as_shown(read, tmp_path / "m.png", orientation, size_hw, "a.jpg")


def test_mask_of_a_turned_photograph_is_turned_if_its_size_is_that_of_the_stored_pixels(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[2, 5:9] = True
    upright = np.rot90(mask, -1)
    np.testing.assert_array_equal(shown_mask(tmp_path, 6, mask), upright)
    np.testing.assert_array_equal(shown_mask(tmp_path, 6, upright), upright)
    np.testing.assert_array_equal(shown_mask(tmp_path, 6, mask, own=6), upright)
    np.testing.assert_array_equal(shown_mask(tmp_path, 3, mask, own=3), np.rot90(mask, 2))
    assert shown_mask(tmp_path, 6, mask[:9]).shape == (9, 30)  # fits nothing: for the caller


def test_mask_that_fits_before_and_after_the_turn_is_refused_unless_both_are_equal(tmp_path):
    mask = np.zeros((20, 30), bool)
    assert not shown_mask(tmp_path, 3, mask).any()
    mask[2, 5:9] = True
    with pytest.raises(
        ValueError,
        match=r"a\.jpg: its EXIF flag turns it \(orientation 3\).*m\.png.*without the flag",
    ):
        shown_mask(tmp_path, 3, mask)
    np.testing.assert_array_equal(
        shown_mask(tmp_path, 3, mask | mask[::-1, ::-1]), mask | mask[::-1, ::-1]
    )


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


def png_header(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def tiff_header(data: bytes, size: int) -> bytes:
    """A TIFF whose tags of width and height are overwritten."""
    tags = struct.pack("<I", size)
    for tag in (256, 257):
        place = data.index(struct.pack("<H", tag), int.from_bytes(data[4:8], "little"))
        data = data[: place + 2] + struct.pack("<HI", 4, 1) + tags + data[place + 12 :]
    return data


@pytest.mark.parametrize("size", [(20_000, 20_000), (1_000_000, 101), (40_000, 40_000)])
def test_images_that_claim_absurd_sizes_are_refused_before_decoding(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    message = (
        rf"bomb\.png: {size[0]}x{size[1]} are \d+ million pixels, from \d+ bytes; the limit is"
    )
    with pytest.raises(ValueError, match=message):
        images.encode_image(tmp_path / "bomb.png", "bomb.png")
    with pytest.raises(ValueError, match=message):
        images.read_grey(tmp_path / "bomb.png")


def test_tiff_that_pillow_cannot_open_is_refused_by_its_tags():
    data = cv2.imencode(".tif", np.zeros((4, 6, 3), np.float32))[1].tobytes()
    with pytest.raises(ValueError, match="expected 8 or 16 bits a pixel"):
        images.encode_image(data, "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: 30000x30000 are 900 million pixels"):
        images.encode_image(tiff_header(data, 30_000), "a.tif")


def test_limit_of_pixels_can_be_raised(monkeypatch):
    large = encode(np.zeros((60, 50, 3), np.uint8), "png")
    monkeypatch.setenv("MMRJAX_MAX_MEGAPIXELS", "0.002")
    with pytest.raises(ValueError, match=r"set MMRJAX_MAX_MEGAPIXELS=\d+$"):
        images.encode_image(large, "x")
    monkeypatch.setenv("MMRJAX_MAX_MEGAPIXELS", "0.003")
    assert images.encode_image(large, "x")[1] == (60, 50)
    monkeypatch.setenv("MMRJAX_MAX_MEGAPIXELS", "10000")
    with pytest.raises(ValueError, match=r"x: OpenCV refuses the image"):
        images.encode_image(png_header(40_000, 40_000), "x")


@pytest.mark.parametrize("text", ["many", "0", "-1", "nan"])
def test_limit_that_is_no_number_is_refused(rgb, monkeypatch, text):
    monkeypatch.setenv("MMRJAX_MAX_MEGAPIXELS", text)
    with pytest.raises(ValueError, match=rf"MMRJAX_MAX_MEGAPIXELS={text}: expected a positive"):
        images.encode_image(encode(rgb, "png"), "x")


def test_rgb_pixels_are_read_upright_in_order(rgb, tmp_path):
    (tmp_path / "a.png").write_bytes(encode(rgb, "png"))
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png"), rgb)


def test_a_format_whose_size_cannot_be_read_beforehand_is_refused():
    ok, data = cv2.imencode(".hdr", np.full((8, 9, 3), 0.5, np.float32))
    assert ok
    assert cv2.imdecode(data, cv2.IMREAD_UNCHANGED) is not None  # OpenCV alone would read it
    with pytest.raises(ValueError, match=r"photo\.png: the image is damaged \(.*no known image"):
        images.decode(data.tobytes(), cv2.IMREAD_COLOR, "photo.png")
