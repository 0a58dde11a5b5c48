"""Which images show the same magnetic tile, and which tiles train: the split without leaks.

Each tile was photographed at up to six exposures, with consecutive numbers in the file names. A
random split would put other exposures of a training tile into the test, so whole tiles are split.
Called by the builder only. The rule's numbers are those of the published group list: 202 runs of
numbers, 200 tiles after merging, 133 of them without any defect, 93 of those for training.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

LARGEST_GAP = 200  # numbers further apart than this belong to different tiles
SAME_TILE_CORRELATION = 0.9  # the published images have none between 0.89 and 0.95
TRAIN_FRACTION = 0.7

_SIDE = 96  # pixels
_BLUR_SIGMA = 12.0  # pixels at that size


def tile_groups(numbers: Sequence[int], grey_images: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the tile of each image as int [n], counted from 0 by each tile's smallest number.

    Args:
      numbers: the numbers in the file names, n of them in any order.
      grey_images: the images in the same order, uint8 [h, w] of any sizes.
    """
    groups = runs_of_numbers(numbers)
    surfaces = np.stack([_surface(image) for image in grey_images])  # [n, side * side]
    correlation = surfaces @ surfaces.T / surfaces.shape[1]  # [n, n]
    first, second = np.nonzero(correlation > SAME_TILE_CORRELATION)
    return _merge(groups, groups[first], groups[second])


def runs_of_numbers(numbers: Sequence[int]) -> np.ndarray:
    """Returns the run that each number [n] belongs to; a gap over LARGEST_GAP starts a new run."""
    numbers = np.asarray(numbers)
    order = np.argsort(numbers, kind="stable")
    runs = np.empty(len(numbers), int)
    runs[order] = np.concatenate([[0], np.cumsum(np.diff(numbers[order]) > LARGEST_GAP)])
    return runs


def train_groups(groups: np.ndarray, is_good: np.ndarray) -> set[int]:
    """Returns the groups that train: 70 % of those that hold good images only, drawn by seed 0.

    Args:
      groups: the group of each image, int [n], counted by smallest number.
      is_good: whether each image is good, bool [n].
    """
    clean = np.setdiff1d(groups, groups[~is_good])
    drawn = np.random.default_rng(0).permutation(clean)
    return set(drawn[: round(TRAIN_FRACTION * len(clean))].tolist())


def _surface(grey: np.ndarray) -> np.ndarray:
    """The fine structure of a tile at any exposure: float32 [side * side], variance 1."""
    small = cv2.resize(grey.astype(np.float32), (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
    detail = small - cv2.GaussianBlur(small, (0, 0), _BLUR_SIGMA)
    detail -= detail.mean()
    return (detail / max(float(detail.std()), 1e-6)).ravel()


def _merge(groups: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Joins the pairs of groups (first[i], second[i]) and renumbers the groups from 0."""
    joined = np.arange(groups.max() + 1)
    for a, b in np.unique(np.stack([first, second], axis=1), axis=0):
        low, high = sorted((joined[a], joined[b]))
        joined[joined == high] = low
    return np.unique(joined[groups], return_inverse=True)[1]
