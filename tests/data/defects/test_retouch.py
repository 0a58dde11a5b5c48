"""The operations on textures, each against Pillow, NumPy or a closed form."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mmrjax.data.defects import retouch


@pytest.fixture(scope="module")
def texture():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(0, 6, (40, 56, 3)), axis=1) + 120
    return np.clip(smooth, 0, 255).astype(np.uint8)


def planar(texture) -> jnp.ndarray:
    return jnp.asarray(texture.transpose(2, 0, 1), jnp.float32)


def table(name, drawn=None, share=None):
    drawn = np.full(retouch.AMOUNTS, 0.5, np.float32) if drawn is None else drawn
    share = jnp.broadcast_to(jnp.arange(1, 257) / 256, (3, 256)) if share is None else share
    return np.asarray(retouch.tables(jnp.asarray(drawn), share))[retouch.OPERATIONS.index(name)]


def test_tables_of_plain_operations():
    x = np.arange(256)
    drawn = np.full(retouch.AMOUNTS, 0.5, np.float32)
    np.testing.assert_allclose(
        table("gamma", drawn)[1], 255 * (x / 255) ** 1.25, rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(table("brightness", drawn)[0], x, atol=1e-3)
    np.testing.assert_array_equal(table("invert")[2], 255 - x)
    drawn[5:7] = 0.2, 0.5  # done, above 80
    np.testing.assert_array_equal(table("solarize", drawn)[0], np.where(x >= 80, 255 - x, x))
    drawn[5] = 0.7  # left undone
    np.testing.assert_array_equal(table("solarize", drawn)[0], x)
    drawn[7] = 0.99  # one bit
    assert set(table("posterize", drawn)[0]) == {0, 128}
    drawn[7] = 0
    np.testing.assert_array_equal(table("posterize", drawn)[0], x)


def shares(texture):
    count = np.stack([np.bincount(texture[..., c].ravel(), minlength=256) for c in range(3)])
    return jnp.asarray(np.cumsum(count, axis=1) / texture[..., 0].size, jnp.float32)


def test_equalize_flattens_and_autocontrast_stretches_as_pillow_does(texture):
    share = shares(texture)
    drawn = np.full(retouch.AMOUNTS, 0.5, np.float32)
    at = texture.reshape(-1, 3).astype(int)
    flat = table("equalize", drawn, share)[np.arange(3), at]
    rank = np.array([(texture <= level).mean((0, 1)) for level in range(256)])  # [256, 3]
    np.testing.assert_allclose(flat, 255 * rank[at, np.arange(3)], atol=1e-3)
    stretched = table("autocontrast", drawn, share)[np.arange(3), at]  # 10 % off either end
    want = np.asarray(ImageOps.autocontrast(Image.fromarray(texture), 10)).reshape(-1, 3)
    assert np.abs(stretched - want).max() < 4


def test_sharpening_is_pillows(texture):
    for factor in (0.0, 1.0, 2.5):
        got = np.asarray(retouch.sharpen(planar(texture), factor)).transpose(1, 2, 0)
        want = np.asarray(ImageEnhance.Sharpness(Image.fromarray(texture)).enhance(factor))
        assert np.abs(got - want.astype(float)).max() <= 2


def test_hue_and_saturation_are_those_of_hsv(texture):
    got = np.asarray(retouch.shift_hue(planar(texture), jnp.asarray([0.1, -0.2])))
    for y, x in ((0, 0), (3, 40), (20, 9), (39, 55)):
        h, s, v = colorsys.rgb_to_hsv(*(texture[y, x] / 255))
        want = 255 * np.array(colorsys.hsv_to_rgb((h + 0.1) % 1, np.clip(s - 0.2, 0, 1), v))
        np.testing.assert_allclose(got[:, y, x], want, atol=0.1)
    same = retouch.shift_hue(planar(texture), jnp.zeros(2))
    np.testing.assert_allclose(same, planar(texture), atol=0.01)


def test_rotation_by_a_right_angle_and_by_none():
    pixels = jax.random.uniform(jax.random.key(0), (16, 16, 3))
    np.testing.assert_array_equal(retouch.rotate(pixels, jnp.float32(0)), pixels)
    turned = retouch.rotate(pixels, jnp.float32(np.pi / 2))
    np.testing.assert_allclose(turned, jnp.rot90(pixels, -1), atol=1e-4)
    corner = retouch.rotate(jnp.ones((16, 16, 3)), jnp.float32(np.pi / 4))[0, 0]
    np.testing.assert_array_equal(corner, 0)


def test_a_retouched_texture_is_in_range_and_differs_from_key_to_key(texture):
    look = jax.jit(jax.vmap(retouch.retouch, (0, None)))
    found = np.asarray(look(jax.random.split(jax.random.key(0), 16), jnp.asarray(texture)))
    assert found.shape == (16, *texture.shape)
    assert found.min() >= 0
    assert found.max() <= 1
    assert len({x.tobytes() for x in found}) == 16


def test_tables_follow_each_other_in_the_order_drawn(texture):
    level = jnp.asarray(texture.transpose(2, 0, 1), jnp.int32)
    names = [retouch.OPERATIONS.index(name) for name in ("invert", "solarize", "hue")]
    amounts = np.full((3, retouch.AMOUNTS), 0.5, np.float32)
    amounts[:, 5:7] = 0.2, 0.5
    got = retouch.joined_table(jnp.asarray(amounts), jnp.asarray(names), level)
    x = 255 - np.arange(256)
    np.testing.assert_array_equal(got[0], np.where(x >= 80, 255 - x, x))
