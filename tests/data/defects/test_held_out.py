"""Defects to judge settings by: they show on any picture, where their mask says, at any size."""

import cv2
import numpy as np
import pytest

from mmrjax.data.defects import held_out, synthesise


def surface(seed: int, h: int = 180, w: int = 160) -> np.ndarray:
    """A grained grey surface, uint8 [h, w, 3]."""
    grain = np.random.default_rng(seed).normal(0, 40, (h, w))
    grey = np.clip(110 + cv2.GaussianBlur(grain, (0, 0), 1.0), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def draw(kind: str, seed: int, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return held_out.draw(np.random.default_rng(seed), image, kind, surface(9, 120, 130))


def longest(mask: np.ndarray) -> int:
    """The longer side of the mask's bounding box, px."""
    return max(cv2.boundingRect(mask.astype(np.uint8))[2:])


def test_no_kind_is_one_of_training():
    assert not set(held_out.KINDS) & set(synthesise.TRAINING)


@pytest.mark.parametrize("kind", held_out.KINDS)
def test_a_defect_follows_from_its_generator(kind):
    image = surface(0)
    before = image.copy()
    for one, other in zip(draw(kind, 1, image), draw(kind, 1, image), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (draw(kind, 1, image)[0] != draw(kind, 2, image)[0]).any()
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("kind", held_out.SMALL)
def test_a_small_kind_changes_the_picture_where_its_mask_says(kind):
    image, sides = surface(0), []
    for seed in range(24):
        after, mask = draw(kind, seed, image)
        assert (after.dtype, mask.dtype, mask.shape) == (np.uint8, bool, image.shape[:2])
        change = np.abs(after.astype(int) - image).max(axis=-1)
        assert not (change > held_out.CHANGED)[~mask].any()
        assert change[mask].mean() > held_out.CHANGED
        sides.append(longest(mask))
    assert min(sides) < 10
    assert 25 < max(sides) <= 0.25 * 160 + 4


@pytest.mark.parametrize("kind", held_out.LARGE)
def test_a_large_kind_covers_its_share_of_the_picture_and_little_else_changes(kind):
    image, shares, lights = surface(2), [], []
    for seed in range(24):
        after, mask = draw(kind, seed, image)
        change = (after.astype(int) - image).mean(axis=-1)
        shares.append(mask.mean())
        lights.append(change[mask].mean())
        pieces = cv2.connectedComponentsWithStats(mask.astype(np.uint8))[2][1:]
        assert pieces[:, cv2.CC_STAT_AREA].min() >= held_out.PIECE * mask.size
        assert np.abs(change[mask]).mean() > held_out.CHANGED
        assert (np.abs(change[~mask]) > 2 * held_out.CHANGED).mean() < 0.05
    assert 0.05 <= min(shares) < 0.2 < 0.35 < max(shares) <= 0.65
    assert min(lights) < -8 < 8 < max(lights)
    assert min(np.abs(lights)) < 3  # another texture under the same light


@pytest.mark.parametrize("kind", held_out.KINDS)
@pytest.mark.parametrize("level", [0, 3, 250, 255])
def test_every_kind_shows_on_a_plain_picture_however_dark_or_bright(kind, level):
    plain = np.full((70, 60, 3), level, np.uint8)
    for seed in range(4):
        after, mask = held_out.draw(np.random.default_rng(seed), plain, kind, plain)
        assert np.abs(after[mask].astype(int) - level).mean() > held_out.CHANGED


@pytest.mark.parametrize("kind", held_out.KINDS)
def test_every_kind_shows_on_a_bright_part_before_black(kind):
    image = np.zeros((90, 120, 3), np.uint8)
    image[:, 60:] = 255
    for seed in range(8):
        after, mask = held_out.draw(np.random.default_rng(seed), image, kind, image[:, ::-1])
        assert mask.any()
        assert (after[mask] != image[mask]).any(axis=-1).mean() > 0.3


@pytest.mark.parametrize("kind", ["crack", "shade"])
def test_a_defect_takes_the_same_share_of_a_larger_picture(kind):
    small, large = surface(1, 100, 120), surface(1, 400, 480)
    for seed in range(3):
        one, four = (draw(kind, seed, image)[1] for image in (small, large))
        assert 2.5 < longest(four) / longest(one) < 5.0
