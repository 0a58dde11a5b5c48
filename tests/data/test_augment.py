"""Training augmentation: Pillow's pixels, torchvision's boxes, and one image per key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmrjax.data import augment, geometry

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


def box_drawer():
    """Draws 8000 boxes for any size; traced anew, since `augment.TRIES` is baked in."""

    @jax.jit
    def draw(keys, size, scale, ratio):
        return jax.vmap(lambda key: augment.random_box(key, size, scale, ratio))(keys)

    return draw


@pytest.fixture(scope="module")
def draw():
    """(image size, scale, ratio) -> boxes int [8000, 4]."""
    drawer = box_drawer()
    keys = jax.random.split(jax.random.key(0), 8000)

    def run(size_hw, scale=SCALE, ratio=RATIO) -> np.ndarray:
        floats = np.array(scale, np.float32), np.array(ratio, np.float32)
        return np.asarray(drawer(keys, np.array(size_hw, np.int32), *floats))

    return run


# --- crop_resize


@pytest.mark.parametrize(
    ("box", "size_hw"),
    [
        ((0, 0, 90, 120), (32, 32)),  # the full image, shrunk
        ((0, 0, 90, 120), (160, 200)),  # the full image, enlarged
        ((7, 11, 60, 80), (32, 32)),  # inside, shrunk
        ((7, 11, 20, 16), (64, 48)),  # inside, enlarged, not square
        ((30, 20, 32, 32), (32, 32)),  # not resized
        ((10, 0, 13, 120), (32, 32)),  # one side enlarged, the other shrunk
        ((60, 90, 30, 30), (64, 48)),  # the lower right corner, at the border of the canvas
        ((89, 119, 1, 1), (32, 32)),  # a single pixel
    ],
)
def test_crop_and_resize_are_pillows_within_one_grey_level(box, size_hw):
    image = noise((90, 120))
    canvas = np.full((100, 130, 3), 255, np.uint8)
    canvas[:90, :120] = image
    got = np.asarray(crop_resize(canvas, jnp.asarray(box), size_hw))
    expected = pillow(image, box, size_hw)
    assert (got.shape, got.dtype) == ((*size_hw, 3), np.float32)
    assert np.abs(got - expected).max() <= 1
    assert np.abs(got - expected).mean() < 0.02  # and nearly all pixels are equal
    np.testing.assert_array_equal(got, np.round(got))


@pytest.mark.parametrize("box", [(0, 0, 731, 1013), (102, 61, 611, 803), (13, 700, 233, 211)])
def test_crops_of_a_photograph_are_pillows_at_the_official_size(agree, box):
    image = noise((731, 1013))
    got = np.asarray(crop_resize(image, jnp.asarray(box), (224, 224)))
    want = pillow(image, box, (224, 224))
    agree(f"training crop of {box[2]} x {box[3]} px, grey levels of 255", got, want, 1.0)
    assert (got != want).mean() < 1e-3


@pytest.mark.parametrize(
    "box", [(0, 0, 50, 60), (20, 20, 30, 40), (10, 10, 20, 20), (40, 55, 10, 5)]
)
@pytest.mark.parametrize("size_hw", [(16, 16), (64, 72)])
def test_pixels_outside_the_box_never_leak_in(box, size_hw):
    image = noise((50, 60))
    results = []
    for filling in (0, 255):
        canvas = np.full((70, 66, 3), filling, np.uint8)  # canvas and surroundings of the box
        top, left, h, w = box
        canvas[top : top + h, left : left + w] = image[top : top + h, left : left + w]
        results.append(np.asarray(crop_resize(canvas, jnp.asarray(box), size_hw)))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("interpolation", sorted(augment.KERNELS))
@pytest.mark.parametrize(
    ("native", "resize", "size_hw"),
    [
        ((90, 120), (40, 40), (32, 32)),  # shrunk, then cropped
        ((41, 30), (64, 48), (64, 48)),  # enlarged, not cropped
        ((100, 130), (37, 140), (32, 33)),  # offsets 2.5 and 53.5; fills the canvas
    ],
)
def test_view_is_that_of_evaluation_within_one_grey_level(interpolation, native, resize, size_hw):
    image = noise(native)
    canvas = np.full((100, 130, 3), 255, np.uint8)
    canvas[: native[0], : native[1]] = image
    see = jax.jit(augment.evaluation_view, static_argnums=(2, 3, 4))
    got = np.asarray(see(canvas, jnp.asarray(native), resize, size_hw, interpolation))
    want = geometry.view_image(image, resize, size_hw, interpolation).astype(float)
    assert np.abs(got - want).max() <= 1
    assert np.abs(got - want).mean() < 0.05  # bilinear sums lie on exact halves now and then


# --- random_box


def fallback_box(h: int, w: int) -> tuple[int, int, int, int]:
    """Torchvision's, written as its documentation says."""
    box_h, box_w = h, w
    if w / h < 3 / 4:
        box_h = round(w / (3 / 4))
    elif w / h > 4 / 3:
        box_w = round(h * (4 / 3))
    return (h - box_h) // 2, (w - box_w) // 2, box_h, box_w


@pytest.mark.parametrize("size_hw", [(100, 100), (97, 150), (200, 60), (7, 5), (1, 1)])
def test_boxes_lie_inside_the_image(draw, size_hw):
    top, left, h, w = draw(size_hw).T
    for offset, length, side in ((top, h, size_hw[0]), (left, w, size_hw[1])):
        assert (offset >= 0).all()
        assert (length > 0).all()
        assert (offset + length <= side).all()


def test_boxes_have_the_area_and_aspect_ratio_asked_for(draw):
    _, _, h, w = draw((1000, 1000)).T
    area, aspect = h * w / 1e6, w / h
    assert area.min() == pytest.approx(0.7, abs=0.005)
    assert area.max() <= 1
    assert area.mean() == pytest.approx(0.80, abs=0.01)  # specs: mean of the accepted ones
    assert aspect.min() >= 3 / 4 - 0.005
    assert aspect.max() <= 4 / 3 + 0.005
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.01)  # log-uniform: no side is favoured
    assert (aspect > 1.25).any()  # both ends are reached, though long boxes seldom fit
    assert (aspect < 0.80).any()
    assert len(np.unique(draw((1000, 1000)), axis=0)) > 7900  # every key has its own box


def test_offsets_are_uniform_over_all_places_that_fit(draw):
    top, left, h, w = draw((40, 40), scale=(0.25, 0.25), ratio=(1.0, 1.0)).T
    assert set(h) == set(w) == {20}
    for offset in (top, left):
        counts = np.bincount(offset, minlength=21)
        assert len(counts) == 21  # 0 and 20 are both reached
        assert np.abs(counts - 8000 / 21).max() < 4 * np.sqrt(8000 / 21)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05


def test_acceptance_per_try_is_torchvisions(monkeypatch):
    monkeypatch.setattr(augment, "TRIES", 1)
    one_try, keys = box_drawer(), jax.random.split(jax.random.key(1), 8000)
    # Specs: 56 % and 12.6 %; a NumPy simulation of four million draws gives 0.566 and 0.1265.
    for size_hw, accepted in (((1000, 1000), 0.566), ((1000, 1500), 0.126), ((1500, 1000), 0.126)):
        drawn = np.asarray(one_try(keys, np.array(size_hw), np.array(SCALE), np.array(RATIO)))
        share = (drawn != np.array(fallback_box(*size_hw))).any(axis=1).mean()
        assert share == pytest.approx(accepted, abs=0.016), size_hw  # 3 deviations


@pytest.mark.parametrize("size_hw", [(1000, 1500), (1500, 1000)])
def test_a_quarter_of_long_images_ends_in_the_centred_box(draw, size_hw):
    share = (draw(size_hw) == np.array(fallback_box(*size_hw))).all(axis=1).mean()
    assert share == pytest.approx(0.26, abs=0.015)


@pytest.mark.parametrize(
    ("size_hw", "box"),
    [
        ((100, 300), (0, 83, 100, 133)),  # too wide: all rows, w = h * 4/3
        ((301, 100), (84, 0, 133, 100)),  # too tall: all columns, h = w / (3/4)
        ((50, 999), (0, 466, 50, 67)),
    ],
)
def test_images_that_no_candidate_fits_get_the_largest_centred_box(draw, size_hw, box):
    # No box of 70 % of the area has an aspect ratio in range: every try fails.
    assert {tuple(b) for b in draw(size_hw).tolist()} == {box}
    assert fallback_box(*size_hw) == box


def test_image_of_a_usual_shape_falls_back_to_the_whole(draw):
    drawn = draw((60, 70), scale=(1.5, 2.0))  # larger than the image: nothing fits
    assert {tuple(b) for b in drawn.tolist()} == {(0, 0, 60, 70)}


# --- augment

COUNT, SIZE, OUT = 256, (36, 44), (24, 20)


@jax.jit
@jax.vmap
def augmented(key, image):
    """(plain, with flips, box) of one example; together, since compiling takes most of the time."""
    size = jnp.asarray(SIZE)
    plain, flipped = (
        augment.augment(
            key, image, jnp.concatenate([jnp.zeros(2, jnp.int32), size]), OUT, SCALE, RATIO, flip
        )
        for flip in (False, True)
    )
    return plain, flipped, augment.random_box(jax.random.split(key)[0], size, SCALE, RATIO)


@pytest.fixture(scope="module")
def case():
    """(keys, images on their canvas, plain results, results with flip, boxes) of 256 examples."""
    keys = jax.random.split(jax.random.key(3), COUNT)
    images = np.stack([noise((40, 50), i % 4) for i in range(COUNT)])
    return keys, images, *map(np.asarray, augmented(keys, images))


def test_half_of_the_images_are_mirrored_and_nothing_else_changes(case):
    _, _, plain, flipped, _ = case
    same = (plain == flipped).all(axis=(1, 2, 3))
    mirrored = (plain[:, :, ::-1] == flipped).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert mirrored.mean() == pytest.approx(0.5, abs=0.1)  # three standard deviations


def test_results_are_crops_of_their_own_image_in_unit_range(case):
    _, images, plain, _, boxes = case
    assert plain.dtype == np.float32
    assert plain.min() == 0
    assert plain.max() == 1
    for image, box, result in zip(images, boxes, plain, strict=True):
        assert np.abs(result * 255 - pillow(image, box, OUT)).max() <= 1.001


def test_different_keys_give_different_crops_of_one_image(case):
    plain = case[2]
    assert len({result.tobytes() for result in plain[::4]}) > COUNT / 4 * 0.9


def test_one_key_gives_one_image_whatever_the_batch_around_it(case):
    keys, images, _, flipped, _ = case
    order = np.random.default_rng(0).permutation(COUNT)
    np.testing.assert_array_equal(augmented(keys[order], images[order])[1], flipped[order])
    alone = augmented(keys[5:6], images[5:6])[1]
    np.testing.assert_array_equal(alone[0], flipped[5])


def test_what_fills_the_canvas_around_an_image_does_not_matter(case):
    keys, images, _, flipped, _ = case
    other = images.copy()
    other[:, SIZE[0] :] = 77
    other[:, :, SIZE[1] :] = 200
    np.testing.assert_array_equal(augmented(keys, other)[1], flipped)


def test_a_window_lies_anywhere_in_the_image_and_has_the_scale_of_a_tile():
    size, keys = np.int32([90, 200]), jax.random.split(jax.random.key(0), 500)
    draw = jax.vmap(lambda key: augment.random_window(key, size, (32, 64), (96, 256)))
    top, left, height, width = np.asarray(draw(keys)).T
    assert set(height) == {30}
    assert set(width) == {50}
    assert (top.min(), top.max()) == (0, 60)
    assert (left.min(), left.max()) == (0, 150)


def test_a_box_in_a_window_stays_in_it():
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:50, 30:70] = 200  # the window
    draw = lambda key: augment.augment(  # noqa: E731
        key, image, np.int32([20, 30, 30, 40]), (16, 16), (0.3, 1.0), (0.7, 1.4), True
    )
    out = jax.vmap(draw)(jax.random.split(jax.random.key(1), 50))
    np.testing.assert_allclose(out, 200 / 255, atol=1e-6)


def test_three_products_in_bfloat16_are_as_exact_as_one_in_float32():
    pixels = np.random.default_rng(0).integers(0, 256, (640, 90), np.uint8)
    x = np.abs(np.arange(640)[None] + 0.5 - (np.arange(224)[:, None] + 0.5) * 640 / 224)
    taps = np.array(augment.KERNELS["bicubic"](jnp.asarray(x * 224 / 640, jnp.float32)))
    taps /= taps.sum(1, keepdims=True)
    expected = taps.astype(np.float64) @ pixels
    found = jax.jit(functools.partial(augment.apply_taps, "xw,wc->xc", split=True))(taps, pixels)
    single = jax.jit(functools.partial(augment.apply_taps, "xw,wc->xc", split=False))(taps, pixels)
    assert np.abs(found - expected).max() < 2 * np.abs(single - expected).max() < 1e-3


@pytest.mark.parametrize("interpolation", augment.KERNELS)
@pytest.mark.parametrize("canvas", [(90, 70), (20, 33)])
def test_bands_read_every_pixel_that_counts(interpolation, canvas, monkeypatch):
    """A band that is too short or lies wrong would miss taps: compared with all of the canvas."""
    image, size = noise(canvas), jnp.asarray([canvas[0] - 7, canvas[1]])
    boxes = jax.vmap(lambda key: augment.random_box(key, size, (0.2, 1.0), (0.5, 2.0)))(
        jax.random.split(jax.random.key(0), 20)
    )

    def both():
        seen = augment.evaluation_view(image, size, (44, 50), (40, 48), interpolation)
        crop = jax.vmap(lambda box: augment.crop_resize(image, box, (36, 28)))(boxes)
        return np.asarray(seen), np.asarray(crop)

    banded = both()
    monkeypatch.setattr(augment, "_bands", lambda canvas, n, kept, support: (kept, canvas))
    for found, whole in zip(banded, both(), strict=True):
        assert np.abs(found - whole).max() <= 1
        assert (found != whole).mean() < 1e-3


def test_an_accelerator_reads_the_canvas_without_gathering(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    boxes = jnp.asarray([[3, 4, 50, 40], [0, 9, 60, 40]])
    images = np.stack([noise((70, 60))] * 2)
    crop = jax.jit(jax.vmap(lambda image, box: augment.crop_resize(image, box, (32, 32))))
    assert "gather" not in crop.lower(images, boxes).as_text()
