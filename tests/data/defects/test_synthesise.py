"""Synthetic defects keep the promises of MMR+'s section 7."""

import collections

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mmrjax.data.defects import places, shapes, synthesise, windows

SIZE, BATCH = 96, 24
draw = jax.jit(synthesise.synthesise, static_argnames="settings")
ALL = synthesise.DefectSettings()
HELD_OUT = synthesise.DefectSettings(kinds=synthesise.HELD_OUT)


def surfaces(n: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """Ground metal of different brightness, uint8 [n, size, size, 3]."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(25, 215, (n, 1, 1, 1))
    stripes, grain = rng.normal(0, 6, (n, 1, size, 1)), rng.normal(0, 3, (n, size, size, 1))
    return np.clip(level + stripes + grain + np.zeros(3), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images():
    return surfaces(BATCH)


@pytest.fixture(scope="module")
def part():
    """A disc in the first half of the pictures, everything in the others."""
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    inside = np.ones((BATCH, SIZE, SIZE), bool)
    inside[: BATCH // 2] = np.hypot(y, x) < 36
    return inside


@pytest.fixture(scope="module")
def drawn(images, part):
    """Three batches with all kinds of the training generator."""
    keys = jax.random.split(jax.random.key(0), (3, BATCH))
    batches = [jax.device_get(draw(key, images, part, settings=ALL)) for key in keys]
    return synthesise.Defects(*(np.concatenate(field) for field in zip(*batches, strict=True)))


def components(mask: np.ndarray) -> np.ndarray:
    """Rows x, y, w, h, area of the 8-connected components."""
    return cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2][1:]


def check_labels(images: np.ndarray, found: synthesise.Defects) -> None:
    """The mask is what changed, and the tiny mask its small components."""
    change = np.abs(found.pixels - images).mean(-1)
    closed = np.ones((3, 3), np.uint8)
    for i, mask in enumerate(found.mask):
        assert mask[change[i] > synthesise.CHANGED].all()  # from one pixel upward, also at borders
        changed = (change[i] > synthesise.CHANGED).astype(np.uint8)
        assert not mask[cv2.dilate(changed, closed) == 0].any()
        labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1]
        small = [j + 1 for j, c in enumerate(components(mask)) if max(c[2], c[3]) < 10]
        np.testing.assert_array_equal(found.tiny[i], np.isin(labels, small))
        assert mask.any() == (found.kind[i] != synthesise.NONE)


def check_tiny(images: np.ndarray, part: np.ndarray, found: synthesise.Defects) -> int:
    """Every tiny defect fits its box, shows and lies on the part; returns their number."""
    count = 0
    for i in np.flatnonzero(np.isin(found.kind, [synthesise.KINDS.index(k) for k in windows.TINY])):
        boxes = components(found.mask[i])
        assert 1 <= len(boxes) <= 3
        for x, y, w, h, area in boxes:
            assert max(w, h) <= windows.BOX
            where = np.s_[y : y + h, x : x + w]
            change = np.abs(found.pixels[i][where] - images[i][where]).mean(-1)
            assert np.sort(change.ravel())[-max(1, area // 3) :].mean() >= windows.VISIBLE
            on_part = (found.mask[i][where] & part[i][where]).sum()
            assert on_part >= 0.6 * found.mask[i][where].sum()  # 70 % of the shape itself
            count += 1
    return count


def test_labels_are_what_changed(images, drawn):
    check_labels(np.tile(images, (3, 1, 1, 1)), drawn)


def test_tiny_defects_fit_show_and_lie_on_the_part(images, part, drawn):
    assert check_tiny(np.tile(images, (3, 1, 1, 1)), np.tile(part, (3, 1, 1)), drawn) > 40


def test_every_kind_is_drawn_and_nearly_every_picture_gets_one(drawn):
    assert set(np.unique(drawn.kind)) >= {synthesise.KINDS.index(k) for k in synthesise.TRAINING}
    assert (drawn.kind == synthesise.NONE).mean() < 0.03


def test_a_large_one_that_cannot_be_seen_leaves_its_place_to_a_tiny_one():
    """Stains and the like scale what is there: on black they are nothing, a bright spot shows."""
    dark = np.full((BATCH, SIZE, SIZE, 3), 2, np.uint8)
    keys = jax.random.split(jax.random.key(4), BATCH)
    found = jax.device_get(draw(keys, dark, np.ones(dark.shape[:3], bool), settings=ALL))
    assert {synthesise.KINDS[kind] for kind in found.kind} <= {*windows.TINY, "chip"}
    assert found.mask.any((1, 2)).all()


def test_large_defects_lie_on_the_part_show_and_leave_the_rest_alone(images, part):
    counts = collections.Counter()
    for keys in jax.random.split(jax.random.key(8), (8, BATCH)):
        found = jax.device_get(draw(keys, images, part, settings=ALL))
        for i, kind in enumerate(found.kind[: BATCH // 2]):  # on the disc
            name, mask = synthesise.KINDS[kind], found.mask[i]
            if kind == synthesise.NONE or name in windows.TINY:
                continue
            on_part = (mask & part[i]).sum() / mask.sum()
            assert 0.2 <= on_part <= 0.95 if name == "fracture" else on_part >= 0.6, (name, on_part)
            change = np.abs(found.pixels[i] - images[i])
            if name != "stain":  # which fades out over tens of px
                around = cv2.dilate(mask.astype(np.uint8), np.ones((31, 31))) > 0
                assert not change[~around].any(), name
            counts[name] += 1
    assert min(counts[name] for name in ("fracture", "chip", "stain", "scratch")) > 2, counts


def test_noise_is_the_grain_of_what_breaks_the_surface(images, part, drawn):
    keys = jax.random.split(jax.random.key(0), (3, BATCH))[0]
    settings = synthesise.DefectSettings(noise_intensity=0.1)  # in place of 0.02
    found = jax.device_get(draw(keys, images, part, settings=settings))
    rougher = np.abs(found.pixels - drawn.pixels[:BATCH])
    for kind, change in zip(drawn.kind[:BATCH], rougher, strict=True):
        if synthesise.KINDS[kind] in ("stain", "scratch"):
            assert not change.any()
        elif kind != synthesise.NONE:
            assert change[change > 0].mean() > 1.5


def test_pixels_are_whole_grey_levels_and_untouched_elsewhere(images, drawn):
    np.testing.assert_array_equal(drawn.pixels, np.round(drawn.pixels))
    assert drawn.pixels.min() >= 0
    assert drawn.pixels.max() <= 255
    images = np.tile(images, (3, 1, 1, 1))
    tiny = np.isin(drawn.kind, [synthesise.KINDS.index(name) for name in windows.TINY])
    far = np.stack([cv2.dilate(m.astype(np.uint8), np.ones((17, 17))) == 0 for m in drawn.mask])
    far &= tiny[:, None, None]
    np.testing.assert_array_equal(drawn.pixels[far], images[far])
    none = drawn.kind == synthesise.NONE
    np.testing.assert_array_equal(drawn.pixels[none], images[none])


def test_a_picture_depends_on_its_own_key_alone(images, part, drawn):
    keys = jax.random.split(jax.random.key(0), (3, BATCH))[0]
    order = np.random.default_rng(1).permutation(BATCH)
    again = jax.device_get(draw(keys[order], images[order], part[order], settings=ALL))
    for ours, theirs in zip(again, drawn, strict=True):
        np.testing.assert_array_equal(ours, theirs[:BATCH][order])


def test_held_out_kinds_keep_the_same_promises(images):
    found = jax.device_get(draw(jax.random.key(3), images, None, settings=HELD_OUT))
    names = {synthesise.KINDS[k] for k in found.kind if k != synthesise.NONE}
    assert names <= set(synthesise.HELD_OUT)
    assert len(names) >= 3
    assert not set(synthesise.HELD_OUT) & set(synthesise.TRAINING)
    check_labels(images, found)


def test_nothing_is_drawn_where_there_is_no_part(images):
    nowhere = np.zeros(images.shape[:3], bool)
    keys = jax.random.split(jax.random.key(0), BATCH)
    found = jax.device_get(draw(keys, images, nowhere, settings=ALL))
    assert (found.kind == synthesise.NONE).all()
    np.testing.assert_array_equal(found.pixels, images)


@pytest.mark.parametrize("seed", range(4))
def test_small_components_equal_opencv(seed):
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(size=(80, 90)), (0, 0), 1 + seed)
    mask = noise > np.quantile(noise, 0.7)
    labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1]
    small = [i + 1 for i, c in enumerate(components(mask)) if max(c[2], c[3]) < 10]
    found = shapes.small_components(jnp.asarray(mask))
    np.testing.assert_array_equal(found, np.isin(labels, small))


def test_small_components_are_told_by_their_box_not_by_their_path():
    mask = np.zeros((24, 40), bool)
    for row in range(0, 9, 2):  # 9 x 9 px, 49 px along
        mask[2 + row, 2:11] = True
        mask[3 + row, 10 if row % 4 == 0 else 2] = row < 8
    mask[2:20, 20:38] = mask[:, :18][2:20, 0:18]
    mask[10, 29:34] = True  # its twin has a tail
    found = shapes.small_components(jnp.asarray(mask))
    np.testing.assert_array_equal(found, mask & (np.arange(40) < 15))


def test_closing_fills_gaps_and_does_not_grow_to_the_border():
    mask = np.zeros((20, 24), bool)
    mask[1:8, 1:5] = mask[10:19, 12:23] = mask[0, 20] = True  # two of them 1 px from the border
    holed = mask.copy()
    holed[4, 2] = holed[14, 15:17] = False
    np.testing.assert_array_equal(shapes.close(jnp.asarray(holed)), mask)
    rng = np.random.default_rng(0)
    some = rng.random((30, 30)) < 0.3
    far = cv2.copyMakeBorder(some.astype(np.uint8), *(4 * [5]), cv2.BORDER_CONSTANT)
    want = cv2.morphologyEx(far, cv2.MORPH_CLOSE, np.ones((3, 3)))[5:-5, 5:-5] > 0
    np.testing.assert_array_equal(shapes.close(jnp.asarray(some)), want)


def test_drawn_numbers_have_their_distributions_and_are_handed_out_once():
    draws = shapes.Draws(*shapes.draw_blocks(jax.random.key(0), 40_001, 40_000))
    normal, uniform = draws.normal(4, 5_000), draws.uniform(2, 6, 20_000)
    for values, cdf in (
        (normal, stats.norm.cdf),
        (uniform, stats.uniform(2, 4).cdf),
        (draws.normal(20_000), stats.norm.cdf),
    ):
        assert stats.kstest(np.ravel(values), cdf).pvalue > 0.01
    again = draws.uniform(2, 6, 20_000)
    assert not np.isin(again, uniform).all()
    assert abs(np.corrcoef(np.ravel(normal), again)[0, 1]) < 0.03
    assert draws.integer(3, 4) == 3
    with pytest.raises(ValueError, match="draw more"):
        draws.sign(0.5)


def test_more_numbers_than_were_drawn_are_named():
    draws = shapes.Draws(jnp.zeros(3), jnp.zeros(2))
    draws.uniform(0, 1, 2)
    with pytest.raises(ValueError, match="4 uniforms are asked for, 1 are left"):
        draws.uniform(0, 1, 2, 2)
    with pytest.raises(ValueError, match="3 normals are asked for, 2 are left"):
        draws.normal(3)


def test_numbers_of_a_block_become_integers_and_signs_by_their_share():
    shares = jnp.arange(1000) / 1000
    integers = jax.vmap(lambda u: shapes.Draws(u[None], u[None]).integer(1, 5))(shares)
    np.testing.assert_array_equal(np.unique(integers, return_counts=True), [range(1, 5), [250] * 4])
    signs = jax.vmap(lambda u: shapes.Draws(u[None], u[None]).sign(0.7))(shares)
    assert (np.asarray(signs) == -1).mean() == pytest.approx(0.7, abs=2e-3)


def test_places_are_drawn_by_weight():
    weights = jnp.asarray([[0, 0, 0], [1, 0, 3], [0, 0, 0], [0, 4, 0]], jnp.float32)
    drawn = (jnp.arange(800) + 0.5) / 800
    found = np.asarray(places.choose(drawn, weights))
    counts = np.zeros(weights.shape)
    np.add.at(counts, tuple(found.T), 1)
    np.testing.assert_array_equal(counts, 100 * weights)


def test_outlines_are_rough_as_broken_edges_are():
    blocks = shapes.draw_blocks(jax.random.key(0), 200 * 248, 200 * 248)
    radius = jax.vmap(lambda *rows: shapes.outline(shapes.Draws(*rows), 3.0))(
        *(block.reshape(200, 248) for block in blocks)
    )
    rough = np.asarray(shapes.roughness(radius))
    low, high = shapes.ROUGHNESS
    assert ((rough >= low) & (rough <= high)).all()
    circle = shapes.roughness(jnp.ones(shapes.ANGLES))
    assert float(circle) == pytest.approx(1.0, abs=1e-3)


def test_kinds_share_their_group_equally():
    shares = ALL.probabilities
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["spot"] == shares["groove"] == pytest.approx(0.3)
    large = [shares[k] for k in ("fracture", "chip", "stain", "scratch")]
    assert large == pytest.approx([0.1] * 4)
    assert set(HELD_OUT.probabilities.values()) == {0.25}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kinds": ("dent",)}, "dent"),
        ({"kinds": ()}, "choose"),
        ({"spatial_distribution": "corner"}, "uniform"),
        ({"tiny_share": 1.5}, "tiny_share"),
        ({"noise_intensity": -0.1}, "noise_intensity"),
        ({"contrast": (0.3, 0.1)}, "contrast"),
    ],
)
def test_bad_settings_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        synthesise.DefectSettings(**change)


def test_bad_arrays_are_named(images):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="64"):
        synthesise.synthesise(key, images[:, :40], None, ALL)
    with pytest.raises(ValueError, match="foreground"):
        synthesise.synthesise(key, images, np.ones((2, SIZE, SIZE), bool), ALL)
    with pytest.raises(ValueError, match="bank"):
        synthesise.synthesise(key, images, None, synthesise.DefectSettings(kinds=("real",)))
    with pytest.raises(ValueError, match="key"):
        synthesise.synthesise(jax.random.split(key, 3), images, None, ALL)


@pytest.mark.slow
def test_ten_thousand_tiny_defects_and_balanced_kinds():
    pictures = surfaces(64, 224, seed=5)
    everywhere = np.ones(pictures.shape[:3], bool)
    counts, tiny = collections.Counter(), 0
    for step in range(140):
        key = jax.random.fold_in(jax.random.key(7), step)
        found = jax.device_get(draw(key, pictures, None, settings=ALL))
        tiny += check_tiny(pictures, everywhere, found)
        counts.update(found.kind.tolist())
    assert tiny >= 10_000
    total = sum(counts.values())
    for name, share in ALL.probabilities.items():  # within five standard deviations
        spread = 5 * (share * (1 - share) / total) ** 0.5
        assert abs(counts[synthesise.KINDS.index(name)] / total - share) < spread + 0.01


# --- where they lie


def middles(images: np.ndarray, part: np.ndarray, distribution: str) -> np.ndarray:
    """(y, x) of the middles of the spots drawn on some pictures, [n, 2]."""
    settings = synthesise.DefectSettings(kinds=("spot",), spatial_distribution=distribution)
    found = draw(jax.random.key(5), images, part, settings=settings)
    boxes = np.concatenate([components(mask) for mask in np.asarray(found.mask)])
    return boxes[:, [1, 0]] + (boxes[:, [3, 2]] - 1) / 2


def depths(images: np.ndarray, part: np.ndarray, distribution: str) -> np.ndarray:
    """Px along rows, columns or diagonals from each middle to the border of the part, [n]."""
    outside = np.pad(part[0].astype(np.uint8), 1)  # the border of the picture is one
    away = cv2.distanceTransform(outside, cv2.DIST_C, 3)[1:-1, 1:-1]
    y, x = middles(images, part, distribution).astype(int).T
    return away[y, x]


def test_edge_keeps_them_near_the_border_of_the_part_or_the_picture(images, part):
    near = places.EDGE + 2  # the middle of what changed may be off the one that was drawn
    for rows in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):  # a disc, the whole picture
        edge, uniform = (depths(images[rows], part[rows], n) for n in ("edge", "uniform"))
        assert len(edge) > 10
        assert (edge <= near).all()
        assert (uniform <= near).mean() < 0.85


def test_tiny_defects_beside_the_border_of_the_picture_fit_their_box(images, part):
    settings = synthesise.DefectSettings(kinds=("spot",), spatial_distribution="edge")
    images, part = images[BATCH // 2 :], part[BATCH // 2 :]  # the whole picture
    count = 0
    for step in range(30):
        key = jax.random.fold_in(jax.random.key(7), step)
        found = jax.device_get(draw(key, images, part, settings=settings))
        count += check_tiny(images, part, found)
    assert count > 400


def test_texture_takes_them_to_where_the_picture_is_busy():
    images = np.full((BATCH, SIZE, SIZE, 3), 120, np.uint8)
    busy = np.random.default_rng(0).integers(90, 150, (BATCH, SIZE, SIZE // 2, 1))
    images[:, :, : SIZE // 2] = busy
    part, names = np.ones((BATCH, SIZE, SIZE), bool), ("texture", "uniform")
    left = {name: middles(images, part, name)[:, 1] < SIZE / 2 for name in names}
    assert min(map(len, left.values())) > 20
    assert left["texture"].mean() > 0.9
    assert 0.3 < left["uniform"].mean() < 0.7
