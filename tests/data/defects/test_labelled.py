"""Labelled pictures as rows of a batch: filled in, chosen, cropped along with their masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.data.defects import labelled, shapes

SIDE = 64
KEYS = jax.random.split(jax.random.key(0), 400)


def bank(sides=(SIDE, SIDE)):
    """Two pictures, of other greys, whose twins are 30 brighter, each with its own mask."""
    masks = np.zeros((2, *sides), bool)
    masks[0, 8:24, 10:40], masks[1, 30:60, 30:50] = True, True
    images = np.broadcast_to(np.uint8([40, 120])[:, None, None, None], (2, *sides, 3))
    images = np.where(masks[..., None], 255, images).astype(np.uint8)
    twins = np.where(images == 255, 255, images + 30)
    return {
        "images": images,
        "masks": masks,
        "twins": twins,
        "ignored": ~masks,
        "tiny": masks[::-1],
    }


def config_of(tiny_config, **train):
    config = tiny_config.copy_and_resolve_references()
    config.train.update(train)
    return config


def draw(config, pictures, chances, share=1.0, keys=KEYS):
    chances = jnp.broadcast_to(jnp.float32(chances), (len(keys), 2))
    pictures = jax.tree.map(jnp.asarray, pictures)
    return jax.tree.map(
        np.asarray,
        jax.jit(lambda k, p, c: labelled.draw(k, p, c, share, config))(keys, pictures, chances),
    )


def test_a_defect_is_filled_in_from_around_and_nothing_else_changes():
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.arange(SIDE)[None, :, None] * 2 + 60, (SIDE, SIDE, 3))
    clean = (ramp + rng.integers(-2, 3, ramp.shape)).astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[20:32, 20:40] = True
    image = np.where(mask[..., None], 255, clean).astype(np.uint8)
    image[19, 20:40] = 250  # a rim that its label has missed
    known, made = labelled.targets("inpaint", image[None], mask[None])
    assert known.tolist() == [True]
    filled = made["twins"][0]
    assert np.abs(filled.astype(int) - clean)[16:36, 16:44].max() <= 24  # of 100 and more
    far = np.ones_like(mask)
    far[20 - 3 : 32 + 3, 20 - 3 : 40 + 3] = False
    np.testing.assert_array_equal(filled[far], image[far])
    assert not made["ignored"].any()  # nowhere 10 px deep
    _, made = labelled.targets("ignore", image[None], mask[None])
    np.testing.assert_array_equal(made["ignored"][0], ~far)
    assert set(made) == {"ignored", "tiny"}


def test_what_cannot_be_known_from_around_is_ignored():
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    region = np.zeros((SIDE, SIDE), np.uint8)
    region[:, :40] = 255  # to three borders of the picture: known from the right alone
    filled, unknown = labelled.fill_in(image, region)
    assert unknown[:, : 40 - 11].all()
    assert not unknown[:, 40 - 10 :].any()
    assert (filled[:, 30:40] != image[:, 30:40]).any(-1).mean() > 0.9
    masks = np.ones((3, SIDE, SIDE), bool)  # all of it, and all that a label and its margin leave
    masks[1, :2], masks[2, :20] = False, False
    for target in ("inpaint", "ignore"):
        known, made = labelled.targets(target, np.stack([image] * 3), masks)
        assert known.tolist() == [False, False, True]
        assert all(len(array) == 1 for array in made.values())


def test_what_is_tiny_is_so_in_the_whole_picture():
    """A crop's sliver of something large is not."""
    mask = np.zeros((1, SIDE, SIDE), bool)
    mask[0, 5:14, 5:14], mask[0, 30:40, 30:33], mask[0, 50:51, 50:51] = True, True, True
    _, made = labelled.targets("ignore", np.zeros((1, SIDE, SIDE, 3), np.uint8), mask)
    want = mask.copy()
    want[0, 30:40, 30:33] = False
    np.testing.assert_array_equal(made["tiny"], want)
    np.testing.assert_array_equal(made["tiny"][0], np.asarray(shapes.small_components(mask))[0])


def test_rows_take_pictures_as_often_as_they_shall_and_may(tiny_config):
    config, pictures = config_of(tiny_config, augment="none"), bank()
    assert not draw(config, pictures, [1, 1], share=0.0).is_used.any()
    assert not draw(config, pictures, [0, 0]).is_used.any()
    assert draw(config, pictures, [1, 1]).is_used.all()
    assert draw(config, pictures, [1, 1], share=0.3).is_used.mean() == pytest.approx(0.3, abs=0.07)
    which = draw(config, pictures, [1, 3]).pixels[:, 0, 0, 0] == 120
    assert which.mean() == pytest.approx(0.75, abs=0.07)
    assert (draw(config, pictures, [0, 1]).pixels[:, 0, 0, 0] == 120).all()


def test_without_augmentation_it_is_the_picture(tiny_config):
    pictures = bank()
    rows = draw(config_of(tiny_config, augment="none"), pictures, [1, 0], keys=KEYS[:3])
    for got, name in zip(rows[1:], ("images", "twins", "masks", "tiny", "ignored"), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(pictures[name][0], got.shape))
    del pictures["twins"]  # it is its own
    rows = draw(config_of(tiny_config, augment="none"), pictures, [1, 0], keys=KEYS[:3])
    np.testing.assert_array_equal(rows.twin_pixels, rows.pixels)


@pytest.mark.parametrize("augment", ["rrc", "rrc_flip"])
def test_picture_twin_and_mask_are_cropped_and_flipped_alike(tiny_config, augment):
    config, pictures = config_of(tiny_config, augment=augment), bank()
    rows = draw(config, pictures, [1, 1], keys=KEYS[:40])
    for image, twin, mask in zip(rows.pixels, rows.twin_pixels, rows.mask, strict=True):
        ground = 40 if (image == 40).any() else 120
        assert (mask != (image[..., 0] > 0.75 * ground + 0.25 * 255)).mean() < 0.01
        assert np.abs(twin[image == ground] - (ground + 30)).max() == 0
    assert (rows.ignored == rows.mask).mean() < 0.02  # both hold the edge between them
    shares = rows.mask.mean((1, 2))
    assert len(set(shares.tolist())) > 5  # crops differ
    left = rows.mask[:, :, : SIDE // 2].sum((1, 2)) > rows.mask[:, :, SIDE // 2 :].sum((1, 2))
    first = rows.pixels[:, 0, 0, 0] == 40  # its defect lies on the left
    assert left[first].all() == (augment == "rrc")


def test_a_row_depends_on_its_own_key_alone(tiny_config):
    config, pictures = config_of(tiny_config, augment="rrc_flip"), bank()
    all_rows = draw(config, pictures, [1, 1], keys=KEYS[:6])
    some = draw(config, pictures, [1, 1], keys=KEYS[2:4])
    for a, b in zip(all_rows, some, strict=True):
        np.testing.assert_array_equal(a[2:4], b)


def test_of_tiled_pictures_a_window_is_taken(tiny_config):
    config = config_of(tiny_config, augment="none")
    config.data.update(resize=(128, 160), tiling=True, tile_overlap=8)
    pictures = bank((128, 160))
    rows = draw(config, pictures, [1, 0], keys=KEYS[:50])
    assert rows.pixels.shape == (50, 64, 64, 3)
    np.testing.assert_array_equal(rows.mask, rows.pixels[..., 0] == 255)
    counts = set(rows.mask.sum((1, 2)).tolist())
    assert {0, 16 * 30} <= counts  # beside the defect, and around it
