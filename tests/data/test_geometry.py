"""Evaluation geometry: Pillow's pixels, torchvision's crop, and what each mask rule leaves over."""

import io
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mmrjax.data import geometry
from mmrjax.data import records as records_lib

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def noise(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)


def square_mask(top: int, left: int, side: int, canvas: int = 1024) -> np.ndarray:
    mask = np.zeros((canvas, canvas), np.uint8)
    mask[top : top + side, left : left + side] = 255
    return mask


def kept(mask: np.ndarray, mode: str) -> int:
    return int(geometry.view_mask(mask, (256, 256), (256, 256), mode).sum())


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
@pytest.mark.parametrize(
    ("native", "resize", "size", "corner"),
    [
        ((300, 420), (256, 256), (224, 224), (16, 16)),  # the official view
        ((40, 30), (64, 48), (64, 48), (0, 0)),  # enlarged, not cropped
        ((90, 50), (48, 96), (32, 64), (8, 16)),  # neither side square
        ((50, 50), (37, 40), (32, 33), (2, 4)),  # 2.5 -> 2 and 3.5 -> 4: rounded to even
        ((50, 50), (33, 35), (32, 32), (0, 2)),  # 0.5 -> 0 and 1.5 -> 2
    ],
)
def test_view_is_pillow_resize_then_torchvision_centre_crop(
    interpolation, native, resize, size, corner
):
    image = noise(native)
    whole = Image.fromarray(image).resize((resize[1], resize[0]), FILTERS[interpolation])
    (top, left), (h, w) = corner, size
    expected = np.asarray(whole.crop((left, top, left + w, top + h)))
    got = geometry.view_image(image, resize, size, interpolation)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "native", [(1000, 1500), (301, 423), (257, 255), (97, 641), (256, 256), (31, 17), (1, 1)]
)
def test_official_view_of_any_size_is_pillows_pixel_for_pixel(native):
    image = noise(native)
    whole = Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR)
    got = geometry.view_image(image, (256, 256), (224, 224), "bilinear")
    np.testing.assert_array_equal(got, np.asarray(whole.crop((16, 16, 240, 240))))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 60, "subsampling": 0}),
        ("JPEG", {"quality": 75, "progressive": True}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_files_are_decoded_as_pillow_decodes_them(kind, options, mode):
    ramp = np.linspace(0, 200, 61)[None, :, None] + noise((43, 61)) // 5
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(buffer, kind, **options)
    source = {"test": [{"image": buffer.getvalue()}]}
    records = records_lib.Records("", "", {"id": ["a"]}, "", source, [("test", 0)])
    expected = np.asarray(Image.open(buffer).convert("RGB"))
    np.testing.assert_array_equal(records.image(0), expected)


def test_crop_starts_where_torchvision_rounds_to():
    for resize in range(20, 60):
        image = np.repeat(np.arange(resize, dtype=np.uint8)[:, None, None], 3, axis=2)
        image = np.broadcast_to(image, (resize, 20, 3)).copy()
        first = geometry.view_image(image, (resize, 20), (20, 20), "bilinear")[0, 0, 0]
        assert first == round((resize - 20) / 2.0)


def test_image_and_mask_are_seen_through_the_same_window():
    mask = np.zeros((90, 50), np.uint8)
    mask[30:60, 10:25] = 255
    image = np.repeat(mask[..., None], 3, axis=2)
    resize, size = (75, 61), (44, 40)
    seen = geometry.view_image(image, resize, size, "bilinear")[..., 0] > 127
    truth = geometry.view_mask(mask, resize, size, "standard")
    assert truth.shape == size
    assert truth.dtype == bool
    assert 0.9 < (seen & truth).sum() / (seen | truth).sum()


@pytest.mark.parametrize("native", [(300, 420), (64, 48)])
def test_standard_mask_is_nearest_and_above_half(native):
    rng = np.random.default_rng(1)
    mask = (rng.random(native) > 0.5).astype(np.uint8) * 255
    nearest = np.asarray(Image.fromarray(mask).resize((96, 80), Image.Resampling.NEAREST))
    got = geometry.view_mask(mask, (80, 96), (64, 64), "standard")
    np.testing.assert_array_equal(got, nearest[8:72, 16:80] > 127)


def test_standard_threshold_lies_between_127_and_128():
    mask = np.array([[126, 127], [128, 255]], np.uint8)
    got = geometry.view_mask(mask, (2, 2), (2, 2), "standard")
    assert got.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize(("side", "official", "standard"), [(8, 1, 4), (12, 1, 9), (40, 64, 100)])
@pytest.mark.parametrize("corner", [(401, 401), (403, 403), (401, 403), (603, 201)])
def test_official_masks_are_eroded_as_measured_with_the_official_code(
    side, official, standard, corner
):
    mask = square_mask(*corner, side)
    assert (kept(mask, "mmr"), kept(mask, "standard")) == (official, standard)


def test_square_on_the_grid_of_the_resize_keeps_all_its_pixels():
    mask = square_mask(400, 400, 8)
    assert (kept(mask, "mmr"), kept(mask, "standard")) == (4, 4)


def test_official_mask_is_never_larger_and_lies_inside_its_defect():
    mask = square_mask(401, 403, 40)
    eroded = geometry.view_mask(mask, (256, 256), (224, 224), "mmr")
    plain = geometry.view_mask(mask, (256, 256), (224, 224), "standard")
    assert eroded.any()
    assert not (eroded & ~plain).any()
    assert eroded.sum() < plain.sum()


def test_official_mask_is_divided_by_its_own_maximum_after_the_crop():
    faint = np.zeros((64, 64), np.uint8)
    faint[20, 20] = 255  # one pixel of an image twice as large: its maximum stays below 255
    assert geometry.view_mask(faint, (32, 32), (32, 32), "mmr").sum() == 1
    both = faint.copy()
    both[:8] = 255  # a strong defect that the crop takes away leaves the faint one the maximum
    assert geometry.view_mask(both, (32, 32), (16, 16), "mmr").sum() == 1
    assert geometry.view_mask(both, (32, 32), (32, 32), "mmr")[10, 10] == 0


@pytest.mark.parametrize("mode", ["standard", "mmr"])
def test_mask_without_defect_stays_empty(mode):
    assert not geometry.view_mask(np.zeros((50, 40), np.uint8), (32, 32), (24, 24), mode).any()


@pytest.mark.parametrize("mode", ["standard", "mmr"])
def test_defect_outside_the_crop_leaves_an_empty_mask(mode):
    mask = np.zeros((256, 256), np.uint8)
    mask[:10, :10] = 255
    assert not geometry.view_mask(mask, (256, 256), (224, 224), mode).any()


def make_records(count: int):
    """Stands in for records: image i is filled with 10 + i, mask i marks row i."""

    class Filled:
        table: typing.ClassVar = {}

        def __len__(self):
            return count

        def image(self, i):
            return np.full((12, 16, 3), 10 + i, np.uint8)

        def mask(self, i):
            return np.repeat(np.where(np.arange(12) == i, 255, 0)[:, None], 16, 1).astype(np.uint8)

    return Filled()


@pytest.mark.parametrize(("count", "rows"), [(7, [3, 3, 1]), (6, [3, 3]), (2, [2])])
def test_batches_have_one_shape_and_the_last_is_filled_with_zeros(count, rows):
    view = geometry.View((12, 16), (12, 16))
    got = list(geometry.batches(make_records(count), view, 3))
    assert [n for _, _, n in got] == rows
    seen = []
    for images, masks, n in got:
        assert (images.shape, images.dtype) == ((3, 12, 16, 3), np.uint8)
        assert (masks.shape, masks.dtype) == ((3, 12, 16), bool)
        assert not images[n:].any()
        assert not masks[n:].any()
        seen += [(int(image[0, 0, 0]) - 10, int(mask.any(1).argmax())) for image, mask in
                 zip(images[:n], masks[:n], strict=True)]  # fmt: skip
    assert seen == [(i, i) for i in range(count)]


def test_no_images_make_no_batches():
    assert not list(geometry.batches(make_records(0), geometry.View((12, 16), (12, 16)), 3))


def test_batches_of_records_equal_the_views_of_their_images_and_masks(built):
    records, pixels, _ = built
    view = geometry.View((40, 36), (32, 28), "bicubic", "mmr")
    images, masks, n = next(geometry.batches(records, view, 16))
    assert n == len(pixels)
    for i, name in enumerate(records.table["id"]):
        expected = geometry.view_image(pixels[name], view.resize, view.size, "bicubic")
        np.testing.assert_array_equal(images[i], expected)
        assert masks[i].any() == (name == "test/dent/000.png")


def config(**evaluation):
    data = {"resize": (256, 240), "image_size": (224, 208), "interpolation": "lanczos"}
    data |= {"tiling": False, "tile_overlap": 32}
    plain = {"resize": (), "metrics_mode": "mmr", "stress": "none"}
    return ConfigDict({"data": data, "eval": {**plain, **evaluation}})


def test_view_of_a_config_and_the_evaluation_view_that_overrides_it():
    plain = geometry.View((256, 240), (224, 208), "lanczos", "mmr")
    assert geometry.View.of(config()) == plain
    assert geometry.View.of(config(), evaluation=True) == plain
    other = config(resize=(300, 300))
    assert geometry.View.of(other) == plain  # memory banks are fitted on the training view
    assert geometry.View.of(other, evaluation=True).resize == (300, 300)
    dark = config(stress="dark")
    assert geometry.View.of(dark) == plain
    assert geometry.View.of(dark, evaluation=True).stress == "dark"


@pytest.mark.parametrize(
    ("frame", "size", "overlap"),
    [((64, 64), (64, 64), 8), ((100, 70), (32, 48), 0), ((97, 128), (40, 32), 17)],
)
def test_windows_cover_the_frame_and_overlap_as_asked(frame, size, overlap):
    view = geometry.View(frame, size, overlap=overlap)
    assert view.frame == frame
    seen = np.zeros(frame, int)
    for top, left in view.corners():
        assert top + size[0] <= frame[0]
        assert left + size[1] <= frame[1]
        seen[top : top + size[0], left : left + size[1]] += 1
    assert seen.min() >= 1
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in view.corners()})
        assert all(b - a <= size[axis] - overlap for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("shape", [(90, 120), (40, 30), (33, 257)])
@pytest.mark.parametrize("size", [(48, 48), (40, 32)])
def test_a_map_returns_to_the_pixels_it_was_made_from(shape, size):
    """A map that is a coordinate comes back as that coordinate, up to the rim of the frame."""
    view = geometry.View((48, 48), size)
    top, left = (round((48 - n) / 2) for n in size)
    y = (np.arange(size[0]) + 0.5 + top) * shape[0] / 48  # where a pixel of the frame lies
    x = (np.arange(size[1]) + 0.5 + left) * shape[1] / 48
    for axis, ramp in ((0, y[:, None] + 0 * x), (1, x + 0 * y[:, None])):
        got = geometry.unview_map(ramp.astype(np.float32), view, shape)
        assert (got.shape, got.dtype) == (shape, np.float32)
        want = np.arange(shape[axis]) + 0.5
        want = np.broadcast_to(want[:, None] if axis == 0 else want, shape)
        inside = np.isfinite(got)
        half = shape[axis] / 48 / 2  # outside the centres of the outer pixels there is no slope
        assert np.abs(got - want)[inside].max() <= half + 1e-3
        inner = inside & (want > ramp.min()) & (want < ramp.max())
        np.testing.assert_allclose(got[inner], want[inner], atol=2e-4 * shape[axis])
        rows = (
            np.abs(np.arange(shape[0]) + 0.5 - shape[0] / 2) <= shape[0] * size[0] / 48 / 2 + 1e-9
        )
        columns = (
            np.abs(np.arange(shape[1]) + 0.5 - shape[1] / 2) <= shape[1] * size[1] / 48 / 2 + 1e-9
        )
        np.testing.assert_array_equal(inside, rows[:, None] & columns)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_grey_levels_become_unit_values_bit_for_bit_as_by_division(dtype):
    pixels = np.arange(256).astype(dtype)
    on_device = jnp.asarray(pixels)
    for got, want in (
        (geometry.to_unit(pixels), pixels.astype(np.float32) / np.float32(255)),
        (geometry.to_unit(on_device), on_device / 255.0),
        (jax.jit(geometry.to_unit)(pixels), jax.jit(lambda x: x / 255.0)(pixels)),
    ):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


# --- dim light: repeatable, as dark as it says, and as noisy as photons are


@pytest.mark.parametrize("level", [40, 120, 200, 255])
def test_light_and_noise_are_those_of_photons(level):
    image = np.full((200, 200, 3), level, np.uint8)
    light = (geometry.darken(image, "a") / 255) ** 2.2
    expected = 0.4 * (level / 255) ** 2.2
    assert light.mean() == pytest.approx(expected, rel=0.03)
    assert light.var() == pytest.approx(expected / 60, rel=0.05)  # of counts: mean = variance


def test_noise_follows_from_the_id_alone():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    before = image.copy()
    one, again, other = (geometry.darken(image, name) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    np.testing.assert_array_equal(image, before)
    assert one.dtype == np.uint8
    assert one.shape == image.shape


def test_black_stays_black():
    assert not geometry.darken(np.zeros((4, 4, 3), np.uint8), "a").any()
