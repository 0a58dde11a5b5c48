"""Training augmentation: Pillow's pixels, torchvision's boxes, and one image per key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmrjax.data import augment

SCALE, RATIO = (0.7, 1.0), (3 / 4, 4 / 3)


def noise(size_hw, seed=0):
    """Noise on a ramp: every frequency, and the clipping at 0 and 255 happens."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(-60, 315, size_hw[1])[None, :, None]
    array = ramp + rng.normal(0, 60, (*size_hw, 3))
    return np.clip(np.round(array), 0, 255).astype(np.uint8)


def pillow(image, box, size_hw):
    top, left, h, w = box
    crop = Image.fromarray(image).crop((left, top, left + w, top + h))
    return np.asarray(crop.resize(size_hw[::-1], Image.Resampling.BICUBIC)).astype(float)


@functools.partial(jax.jit, static_argnums=2)
def crop_resize(image, box, size_hw):
    return augment.crop_resize(image, box, size_hw)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def boxes(keys, size_hw, scale, ratio):
    draw = functools.partial(augment.random_box, scale=scale, ratio=ratio)
    return jax.vmap(draw, (0, None))(keys, jnp.asarray(size_hw))


def draw_boxes(count, size_hw, seed=0, scale=SCALE, ratio=RATIO):
    return np.asarray(boxes(jax.random.split(jax.random.key(seed), count), size_hw, scale, ratio))


def whole_image_stays(tries: int, monkeypatch) -> None:
    monkeypatch.setattr(augment, "TRIES", tries)
    jax.clear_caches()  # the number of tries is baked into what was traced before


# --- crop_resize


@pytest.mark.parametrize(
    ("box", "size_hw"),
    [
        ((0, 0, 90, 120), (32, 32)),  # the full image, shrunk
        ((0, 0, 90, 120), (224, 224)),  # the full image, enlarged
        ((7, 11, 60, 80), (32, 32)),  # inside, shrunk
        ((7, 11, 20, 16), (64, 48)),  # inside, enlarged, not square
        ((30, 20, 32, 32), (32, 32)),  # not resized
        ((10, 0, 13, 120), (32, 32)),  # one side enlarged, the other shrunk
        ((60, 90, 30, 30), (47, 31)),  # the lower right corner
        ((89, 119, 1, 1), (8, 8)),  # a single pixel
    ],
)
def test_crop_and_resize_are_pillows_within_one_grey_level(box, size_hw):
    image = noise((90, 120))
    canvas = np.zeros((128, 140, 3), np.uint8)
    canvas[:90, :120] = image
    for array in (image, canvas):
        got = np.asarray(crop_resize(array, jnp.asarray(box), size_hw))
        expected = pillow(image, box, size_hw)
        assert got.shape == (*size_hw, 3)
        assert np.abs(got - expected).max() <= 1
        assert np.abs(got - expected).mean() < 0.02  # and nearly all pixels are equal


def test_values_are_whole_grey_levels():
    got = np.asarray(crop_resize(noise((50, 60)), jnp.array([3, 4, 40, 50]), (37, 41)))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.round(got))
    assert got.min() >= 0
    assert got.max() <= 255


@pytest.mark.parametrize(
    "box", [(0, 0, 50, 60), (20, 20, 30, 40), (0, 30, 50, 30), (10, 10, 20, 20), (40, 55, 10, 5)]
)
@pytest.mark.parametrize("size_hw", [(16, 16), (80, 72)])
def test_pixels_outside_the_box_never_leak_in(box, size_hw):
    image = noise((50, 60))
    results = []
    for filling in (0, 255):
        canvas = np.full((70, 66, 3), filling, np.uint8)  # canvas and surroundings of the box
        top, left, h, w = box
        canvas[top : top + h, left : left + w] = image[top : top + h, left : left + w]
        results.append(np.asarray(crop_resize(canvas, jnp.asarray(box), size_hw)))
    np.testing.assert_array_equal(*results)


# --- random_box


@pytest.mark.parametrize("size_hw", [(100, 100), (97, 150), (200, 60), (7, 5)])
def test_boxes_lie_inside_the_image(size_hw):
    top, left, h, w = draw_boxes(2000, size_hw).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h > 0).all()
    assert (w > 0).all()
    assert (top + h <= size_hw[0]).all()
    assert (left + w <= size_hw[1]).all()


def test_boxes_have_the_area_and_aspect_ratio_asked_for():
    _, _, h, w = draw_boxes(4000, (1000, 1000)).T
    area, aspect = h * w / 1e6, w / h
    assert area.min() == pytest.approx(0.7, abs=0.005)
    assert area.max() <= 1
    assert area.mean() == pytest.approx(0.80, abs=0.01)  # specs: mean of the accepted ones
    assert aspect.min() >= 3 / 4 - 0.005
    assert aspect.max() <= 4 / 3 + 0.005
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.01)  # log-uniform: no side is favoured
    # Wide boxes must be small to fit, so neither distribution is flat; both reach their ends.
    assert (aspect > 1.25).any()
    assert (aspect < 0.80).any()


def test_offsets_are_uniform_over_all_places_that_fit():
    top, left, h, w = draw_boxes(4000, (40, 40), scale=(0.25, 0.25), ratio=(1.0, 1.0)).T
    assert set(h) == set(w) == {20}
    for offset in (top, left):
        counts = np.bincount(offset, minlength=21)
        assert len(counts) == 21  # 0 and 20 are both reached
        assert np.abs(counts - 4000 / 21).max() < 5 * np.sqrt(4000 / 21)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("size_hw", "accepted"),
    [((1000, 1000), 0.56), ((1000, 1500), 0.126), ((1500, 1000), 0.126)],
)
def test_acceptance_per_try_is_torchvisions(size_hw, accepted, monkeypatch):
    whole_image_stays(1, monkeypatch)
    top, left, h, w = draw_boxes(20_000, size_hw).T
    fallback = fallback_box(*size_hw)
    share = np.mean([tuple(box) != fallback for box in zip(top, left, h, w, strict=True)])
    jax.clear_caches()
    assert share == pytest.approx(accepted, abs=0.012)


@pytest.mark.parametrize("size_hw", [(1000, 1500), (1500, 1000)])
def test_a_quarter_of_long_images_ends_in_the_centred_box(size_hw):
    drawn = draw_boxes(20_000, size_hw)
    share = (drawn == np.array(fallback_box(*size_hw))).all(axis=1).mean()
    assert share == pytest.approx(0.26, abs=0.015)


def fallback_box(h: int, w: int) -> tuple[int, int, int, int]:
    """Torchvision's, written as its documentation says."""
    box_h, box_w = h, w
    if w / h < 3 / 4:
        box_h = round(w / (3 / 4))
    elif w / h > 4 / 3:
        box_w = round(h * (4 / 3))
    return (h - box_h) // 2, (w - box_w) // 2, box_h, box_w


@pytest.mark.parametrize(
    ("size_hw", "box"),
    [
        ((100, 300), (0, 83, 100, 133)),  # too wide: all rows, w = h * 4/3
        ((301, 100), (84, 0, 133, 100)),  # too tall: all columns, h = w / (3/4)
        ((50, 999), (0, 466, 50, 67)),
        ((1, 100), (0, 49, 1, 1)),
    ],
)
def test_images_that_no_candidate_fits_get_the_largest_centred_box(size_hw, box):
    # Less than 70 % of the area is reachable with an aspect ratio in range: every try fails.
    assert {tuple(b) for b in draw_boxes(50, size_hw).tolist()} == {box}
    assert fallback_box(*size_hw) == box


def test_image_in_range_falls_back_to_the_whole(monkeypatch):
    drawn = draw_boxes(50, (60, 70), scale=(1.5, 2.0))  # larger than the image: nothing fits
    assert {tuple(b) for b in drawn.tolist()} == {(0, 0, 60, 70)}


# --- augment


@functools.partial(jax.jit, static_argnums=3)
def augmented(keys, images, sizes, flip):
    def one(key, image, size):
        return augment.augment(key, image, size, (24, 20), SCALE, RATIO, flip)

    return jax.vmap(one)(keys, images, sizes)


def example(count):
    keys = jax.random.split(jax.random.key(3), count)
    images = np.stack([noise((40, 50), i % 5) for i in range(count)])
    return keys, images, np.tile(np.array([[36, 50]]), (count, 1))


def test_half_of_the_images_are_mirrored_and_nothing_else_changes():
    keys, images, sizes = example(400)
    plain = np.asarray(augmented(keys, images, sizes, False))
    flipped = np.asarray(augmented(keys, images, sizes, True))
    same = (plain == flipped).all(axis=(1, 2, 3))
    mirrored = (plain[:, :, ::-1] == flipped).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert mirrored.mean() == pytest.approx(0.5, abs=0.1)  # four standard deviations


def test_flips_do_not_depend_on_the_boxes():
    keys, images, sizes = example(400)
    plain, flipped = (np.asarray(augmented(keys, images, sizes, f)) for f in (False, True))
    mirrored = (plain != flipped).any(axis=(1, 2, 3))
    split = jax.vmap(jax.random.split)(keys)[:, 0]
    _, left, _, w = np.asarray(boxes(split, (36, 50), SCALE, RATIO)).T
    for value in (left, w):
        assert abs(np.corrcoef(mirrored, value)[0, 1]) < 0.2


def test_pixels_lie_between_zero_and_one_and_come_from_the_drawn_box():
    keys, images, sizes = example(6)
    got = np.asarray(augmented(keys, images, sizes, False))
    assert got.dtype == np.float32
    assert got.max() > 0.9
    assert got.min() < 0.1
    split = jax.vmap(jax.random.split)(keys)[:, 0]
    for image, box, result in zip(images, np.asarray(boxes(split, (36, 50), SCALE, RATIO)), got,
                                  strict=True):  # fmt: skip
        assert np.abs(result * 255 - pillow(image, box, (24, 20))).max() <= 1.001


def test_one_key_gives_one_image_whatever_the_batch_around_it():
    keys, images, sizes = example(8)
    whole = np.asarray(augmented(keys, images, sizes, True))
    for rows in ([5], [5, 2], [7, 6, 5, 4, 3, 2, 1, 0]):
        part = np.asarray(augmented(keys[np.array(rows)], images[rows], sizes[rows], True))
        np.testing.assert_array_equal(part, whole[rows])


def test_what_fills_the_canvas_around_an_image_does_not_matter():
    keys, images, sizes = example(8)
    other = images.copy()
    other[:, 36:] = 77
    first, second = (augmented(keys, array, sizes, True) for array in (images, other))
    np.testing.assert_array_equal(first, second)


def test_different_keys_give_different_images():
    keys, images, sizes = example(20)
    images[:] = images[0]
    got = np.asarray(augmented(keys, images, sizes, False))
    assert len({result.tobytes() for result in got}) == 20
