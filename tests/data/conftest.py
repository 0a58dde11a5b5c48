"""A tiny data set of images of different sizes, built into records once per module of tests."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from data_builders import build
from mmrjax.data import records as records_lib

DEFECT_BOX = (slice(4, 10), slice(6, 14))
# Sizes (h, w): no two alike, the tallest is not the widest, and some are smaller than a crop.
TRAIN_SIZES = ((24, 40), (50, 20), (33, 47), (18, 18), (64, 30), (41, 55), (29, 31))


def picture(size_hw: tuple[int, int], seed: int) -> np.ndarray:
    """A smooth coloured picture uint8 [h, w, 3] that is its own for every seed."""
    h, w = size_hw
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / max(size_hw)
    phase, speed = rng.uniform(0, 6, 3), rng.uniform(4, 12, 3)
    waves = np.sin(speed * y[..., None] + phase) * np.cos(speed[::-1] * x[..., None] - phase)
    return np.round(127.5 + 127.5 * waves).astype(np.uint8)


def write(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[records_lib.Records, dict[str, np.ndarray], pathlib.Path]:
    """(records, {id: pixels}, record directory) of 7 training, 2 good and 2 defective test images.

    The second defective image has no mask.
    """
    raw = tmp_path_factory.mktemp("raw") / "Tiny parts"
    pixels = {f"train/good/{i:03}.png": picture(s, i) for i, s in enumerate(TRAIN_SIZES)}
    pixels |= {f"test/good/{i:03}.png": picture((20, 30 + i), 20 + i) for i in range(2)}
    pixels |= {f"test/dent/{i:03}.png": picture((26, 34), 30 + i) for i in range(2)}
    for name, array in pixels.items():
        write(raw / name, array)
    mask = np.zeros((26, 34), np.uint8)
    mask[DEFECT_BOX] = 255
    write(raw / "ground_truth/dent/000_mask.png", mask)
    data_dir = tmp_path_factory.mktemp("data")
    directory = build.build("folder", raw, data_dir, log=lambda line: None)["tiny_parts"]
    return records_lib.load(directory), pixels, directory


@pytest.fixture(scope="module")
def records(built) -> records_lib.Records:
    """The records alone."""
    return built[0]


@pytest.fixture(scope="module")
def train_rows(records) -> np.ndarray:
    """Indices of the training records."""
    return np.flatnonzero(records.table["split"] == "train")
