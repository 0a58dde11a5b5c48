"""The part is told from its background, and where it cannot be, everything is part."""

import cv2
import numpy as np
import pytest

from mmrjax.data import foreground


def picture(shape: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    image = np.where(shape[..., None], [150, 140, 120], [60, 70, 80]) + rng.normal(
        0, 4, (*shape.shape, 3)
    )
    return np.clip(image, 0, 255).astype(np.uint8)


def disc(radius: float, size: int = 100) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2
    return np.hypot(y, x) < radius


def test_a_part_is_found_with_its_holes_and_without_specks():
    shape = disc(30)
    with_hole = shape & ~disc(8)
    with_hole[10:14, 10:14] = True
    found = foreground.foreground(picture(with_hole))
    overlap = (found & shape).sum() / (found | shape).sum()
    assert overlap > 0.97


def test_an_implausible_part_means_everywhere():
    assert foreground.foreground(picture(disc(8))).all()
    assert foreground.foreground(np.full((64, 64, 3), 90, np.uint8)).all()


def test_a_grey_or_float_picture_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        foreground.foreground(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="uint8"):
        foreground.foreground(cv2.cvtColor(picture(disc(30)), cv2.COLOR_RGB2GRAY))
