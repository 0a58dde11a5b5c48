"""Demo trays: 1024 px pictures of sixteen procedural blades, with defects under 10 px.

Called by `build`; the blades are those of `demo_parts`, with a seed of their own.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_builders import common
from data_builders.demo_parts import sample

SEED = 2025
SIDE = 4  # cells in a row, and rows
KINDS = ("groove", "fracture", "ablation")  # a torn corner is never tiny
TRAIN_GOOD, TEST_GOOD, TEST_OF_A_KIND = 4, 10, 6


class Builder(common.RecordBuilder):
    """One category, `tray`, without domains."""

    VERSION = tfds.core.Version("1.0.0")
    CATEGORIES = ("tray",)
    PROCEDURAL = True
    EXPECTED: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "tray": {
            "train good": TRAIN_GOOD,
            "test good": TEST_GOOD,
            "test anomaly": TEST_OF_A_KIND * len(KINDS),
            "defective with mask": TEST_OF_A_KIND * len(KINDS),
        }
    }

    def examples(self, raw_dir: pathlib.Path | None, category: str) -> common.Examples:
        """Yields all trays, to be drawn when their record is written; each is its own group."""
        for index, (split, defect, number) in enumerate(plan()):
            yield split, functools.partial(_example, index, split, defect, number)


def plan() -> list[tuple[str, str, int]]:
    """(split, defect, number) of all trays in order."""
    trays = [("train", "good", n) for n in range(TRAIN_GOOD)]
    trays += [("test", "good", n) for n in range(TEST_GOOD)]
    return trays + [("test", kind, n) for kind in KINDS for n in range(TEST_OF_A_KIND)]


def make_tray(index: int, defect: str, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Draws a tray: picture [1024, 1024, 3] uint8 RGB, mask [1024, 1024] bool.

    Args:
      index: its place in the plan, which keys all that is drawn.
      defect: "good" or one of KINDS, on one blade.
      seed: another number gives another data set of the same make-up.
    """
    cells = SIDE * SIDE
    place = int(np.random.default_rng([seed, index]).integers(cells))
    drawn = []
    for cell in range(cells):
        own = defect if cell == place else "good"
        size = "" if own == "good" else "tiny"
        recipe = sample.Recipe(cells * index + cell, "", "same", own, cells * index + cell, size)
        drawn.append(sample.make_sample(recipe, seed))
    return tuple(_beside([getattr(one, name) for one in drawn]) for name in ("image", "mask"))


def _beside(parts: list[np.ndarray]) -> np.ndarray:
    """Sixteen arrays as one, four by four."""
    rows = [np.concatenate(parts[i : i + SIDE], axis=1) for i in range(0, len(parts), SIDE)]
    return np.concatenate(rows)


def _example(index: int, split: str, defect: str, number: int) -> common.Example:
    """Draws a tray of the plan."""
    image, mask = make_tray(index, defect)
    return {
        "id": f"{split}/{defect}/{number:03d}",
        "image": image,
        "mask": mask,
        "label": "good" if defect == "good" else "anomaly",
        "defect": defect,
    }
