"""Dim light: repeatable, as dark as it says, and as noisy as photons are."""

import numpy as np
import pytest

from mmrjax.data import stress


@pytest.mark.parametrize("level", [40, 120, 200, 255])
def test_light_and_noise_are_those_of_photons(level):
    image = np.full((200, 200, 3), level, np.uint8)
    light = (stress.darken(image, "a") / 255) ** 2.2
    expected = 0.4 * (level / 255) ** 2.2
    assert light.mean() == pytest.approx(expected, rel=0.03)
    assert light.var() == pytest.approx(expected / 60, rel=0.05)  # of counts: mean = variance


def test_noise_follows_from_the_id_alone():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    before = image.copy()
    one, again, other = (stress.darken(image, name) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    np.testing.assert_array_equal(image, before)
    assert one.dtype == np.uint8
    assert one.shape == image.shape


def test_black_stays_black():
    assert not stress.darken(np.zeros((4, 4, 3), np.uint8), "a").any()
