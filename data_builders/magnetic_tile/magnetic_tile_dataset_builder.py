"""Magnetic tile defects: six folders of exposures of the same tiles, split by tile.

Training images are the good images of 70 % of the defect-free tiles; everything else is the test.
`domain` is the exposure (exp1 dark .. exp6 bright; three images say exp0), `group` the tile.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_builders import common, files, images
from data_builders.magnetic_tile import tile_groups

GOOD_FOLDER = "MT_Free"
DEFECT_FOLDERS = ("MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Uneven")

_NAME = re.compile(r"exp(?P<exposure>\d+)_num_(?P<number>\d+)")


class Builder(common.RecordBuilder):
    """One category, `tile`: 578 good images to train on, 374 good and 392 defective to test."""

    VERSION = tfds.core.Version("1.0.0")
    FOLDERS: ClassVar[Mapping[str, str]] = {"tile": "."}
    CATEGORIES = tuple(FOLDERS)
    MUST_HOLD = f"{GOOD_FOLDER}/Imgs"
    EXPECTED: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "tile": {
            "train good": 578,
            "test good": 374,
            "test blowhole": 115,
            "test break": 85,
            "test crack": 57,
            "test fray": 32,
            "test uneven": 103,
            "defective with mask": 388,  # four masks of MT_Uneven are empty
        }
    }
    HOW_TO_GET = (
        "Clone https://github.com/abin24/Magnetic-tile-defect-datasets. (the dot is part of the "
        "name) and give its folder: it holds MT_Free/Imgs, MT_Crack/Imgs ..., each with "
        "exp<e>_num_<n>.jpg and a mask of the same name ending in .png."
    )

    def count_key(self, split: str, record: common.Example) -> str:
        """Counts by type of defect."""
        return f"{split} {record['defect']}"

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields all images with their tile as group; see `tile_groups` for the split."""
        paths = [
            path
            for folder in (GOOD_FOLDER, *DEFECT_FOLDERS)
            for path in files.list_images(raw_dir / folder / "Imgs", recursive=False)
            if path.suffix.lower() == ".jpg"  # the masks are .png
        ]
        names = [_parse(path) for path in paths]
        is_good = np.array([path.parent.parent.name == GOOD_FOLDER for path in paths])
        numbers = [int(name["number"]) for name in names]
        groups = tile_groups.tile_groups(numbers, map(images.read_grey, paths))
        train = tile_groups.train_groups(groups, is_good)
        for path, name, good, group in zip(paths, names, is_good, groups.tolist(), strict=True):
            defect = "good" if good else path.parent.parent.name[3:].lower()
            mask = None if good else path.with_suffix(".png")
            other = {"domain": f"exp{name['exposure']}", "group": str(group)}
            split = "train" if group in train else "test"
            yield split, common.file_example(path, raw_dir, defect, mask, **other)


def _parse(path: pathlib.Path) -> re.Match[str]:
    if match := _NAME.fullmatch(path.stem):
        return match
    raise ValueError(f"{path}: expected a name like exp1_num_108719.jpg; move the file away")
