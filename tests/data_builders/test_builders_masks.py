"""Masks of unknown making are understood by their levels, or doubted with the reason."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from data_builders import masks


@pytest.fixture
def spot() -> np.ndarray:
    """A round defect in a picture [64, 80], bool."""
    y, x = np.mgrid[:64, :80]
    return (y - 25) ** 2 + (x - 50) ** 2 <= 81


def reading(tmp_path, pixels, kind="PNG", **options) -> masks.Mask:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(tmp_path / "m", kind, **options)
    return masks.read(tmp_path / "m")


def grey(spot, on=255, off=0, kind=np.uint8) -> np.ndarray:
    return np.where(spot, kind(on), kind(off))


def with_alpha(spot, colour) -> np.ndarray:
    return np.dstack([np.broadcast_to(np.uint8(colour), (*spot.shape, 3)), grey(spot)])


def palette(spot, colours) -> Image.Image:
    image = Image.fromarray(np.uint8(spot), "P")
    image.putpalette([level for colour in colours for level in colour])
    return image


FORMS = {
    "usual": lambda s: grey(s),
    "ones": lambda s: grey(s, 1),
    "sixteen bits": lambda s: grey(s, 65535, kind=np.uint16),
    "colour on black": lambda s: np.dstack([grey(s, 200), grey(s, 0), grey(s, 0)]),
    "red on white": lambda s: np.dstack([grey(s, 255, 255), grey(s, 0, 255), grey(s, 0, 255)]),
    "inverted": lambda s: grey(~s),
    "inverted ones": lambda s: grey(~s, 1),
    "grey background": lambda s: grey(s, 2, 1),
    "alpha on white": lambda s: with_alpha(s, (255, 255, 255)),
    "alpha on black": lambda s: with_alpha(s, (0, 0, 0)),
    "alpha and colour": lambda s: np.dstack([grey(s)] * 4),
    "palette": lambda s: palette(s, [[0, 0, 0], [128, 0, 0]]),
    "palette without black": lambda s: palette(s, [[0, 255, 0], [255, 0, 0]]),
    "palette, background not first": lambda s: palette(~s, [[255, 255, 255], [0, 0, 0]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_defect_is_what_is_marked(spot, tmp_path, form):
    found = reading(tmp_path, FORMS[form](spot))
    assert found.doubt == ""
    np.testing.assert_array_equal(found.marked, spot)


@pytest.mark.parametrize("is_inverted", [False, True])
@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_masks_differ_at_the_edge_alone(spot, tmp_path, kind, quality, is_inverted):
    found = reading(tmp_path, grey(spot ^ is_inverted), kind, quality=quality)
    edge = cv2.dilate(np.uint8(spot), np.ones((3, 3))) != cv2.erode(np.uint8(spot), np.ones((3, 3)))
    assert not ((found.marked != spot) & ~edge).any()


@pytest.mark.parametrize("count", [3, 7, 20, 60])
def test_every_numbered_defect_counts(tmp_path, count):
    numbers = np.zeros((80, 120), np.uint8)
    for i in range(count):
        numbers[8 * (i // 12) : 8 * (i // 12) + 4, 10 * (i % 12) : 10 * (i % 12) + 5] = i + 1
    np.testing.assert_array_equal(reading(tmp_path, numbers).marked, numbers > 0)
    spread = numbers * (250 // count)
    np.testing.assert_array_equal(reading(tmp_path, spread).marked, numbers > 0)


def test_soft_edges_are_cut_in_the_middle(spot, tmp_path):
    soft = cv2.GaussianBlur(grey(spot), (7, 7), 2)
    found = reading(tmp_path, soft)
    np.testing.assert_array_equal(found.marked, soft > 127)
    assert "cut at half" in found.note


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_empty_masks_are_empty(spot, tmp_path, kind):
    assert not reading(tmp_path, np.zeros((64, 80), np.uint8), kind).marked.any()


def test_what_can_be_meant_in_two_ways_is_doubted_and_marks_nothing(spot, tmp_path):
    at_the_edge = np.zeros((64, 80), bool)
    at_the_edge[:20, :30] = True
    inverted = reading(tmp_path, grey(~at_the_edge))
    assert "it marks 88 % of its picture" in inverted.doubt
    assert not inverted.marked.any()
    assert inverted.understood.any()
    white = reading(tmp_path, np.full((64, 80), 255, np.uint8))
    assert "100 %" in white.doubt
    both = np.dstack([grey(spot)] * 3 + [grey(np.roll(spot, 20, 1))])
    assert "different pixels" in reading(tmp_path, both).doubt
    assert masks.sketch(at_the_edge).splitlines()[0].startswith("########")


def test_floats_are_refused():
    with pytest.raises(ValueError, match="the mask: expected integer grey levels, found float32"):
        masks.understand(np.zeros((3, 3), np.float32))


def test_png_in_memory_and_on_disk_are_one(spot, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(grey(spot)).save(buffer, "PNG")
    (tmp_path / "m.jpg").write_bytes(buffer.getvalue())  # named as a lossy format
    np.testing.assert_array_equal(masks.read(tmp_path / "m.jpg").marked, spot)
