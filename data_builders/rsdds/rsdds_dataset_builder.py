"""RSDDs: rail surfaces of express (`i`) and heavy-haul (`ii`) lines, cut into square tiles.

RSDDs dataset/Type-{I,II} RSDDs dataset/{Rail surface images,GroundTruth}/rail_<k>.jpg

The published images are strips, some 160 x 1000 (I) and 55 x 1250 (II) pixels; every one has a
defect, so good images exist only as parts of strips. A tile is as wide as its strip and keeps the
native size; tiles overlap by half, and the last tile ends with the strip. A tile is good only if no
defect lies in it or within MARGIN pixels. Its `group` is the strip, and whole strips are split.
"""

import pathlib
from collections.abc import Mapping
from typing import ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

from data_builders import common, files, images

MARGIN = 2  # px; the masks are JPEG files, whose edges are not exact

_IMAGES, _MASKS = "Rail surface images", "GroundTruth"


class Builder(common.RecordBuilder):
    """Two configs: `i` (67 strips) and `ii` (128 strips)."""

    VERSION = tfds.core.Version("1.0.0")
    FOLDERS: ClassVar[Mapping[str, str]] = {
        "i": "Type-I RSDDs dataset",
        "ii": "Type-II RSDDs dataset",
    }
    CATEGORIES = tuple(FOLDERS)
    MUST_HOLD = _IMAGES
    EXPECTED: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "i": {"train strips": 46, "test strips": 21},
        "ii": {"train strips": 89, "test strips": 39},
    }
    HOW_TO_GET = (
        "Get it from http://icn.bjtu.edu.cn/Visint/resources/RSDDs.aspx or "
        "https://doi.org/10.21227/qtv6-n081 and unpack it so that the folder holds 'Type-I RSDDs "
        "dataset' and 'Type-II RSDDs dataset', each with 'Rail surface images' and 'GroundTruth'."
    )

    def file_examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields whole strips; 70 % of them, drawn by seed 0, train."""
        folder = raw_dir / self.FOLDERS[category]
        strips = files.list_images(folder / _IMAGES)
        drawn = np.random.default_rng(0).permutation(len(strips))
        train = set(drawn[: len(strips) * 7 // 10].tolist())
        for i, path in enumerate(strips):
            split = "train" if i in train else "test"
            self.counts[f"{split} strips"] += 1
            mask = folder / _MASKS / path.name
            if not mask.is_file():
                raise ValueError(f"{path}: its mask {mask} is missing; every strip has one")
            yield split, common.file_example(path, raw_dir, "anomaly", mask)

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields the tiles of each strip, from top to bottom; `id` ends with the first row."""
        for split, strip in self.file_examples(raw_dir, category):
            pixels = images.read_rgb(strip["image"])
            mask = self.read_mask(strip["mask"], strip["image"], pixels.shape[:2], strip["id"])
            near = cv2.dilate(mask.astype(np.uint8), np.ones((2 * MARGIN + 1,) * 2, np.uint8))
            for rows in tile_rows(*mask.shape):
                yield (
                    split,
                    {
                        "id": f"{strip['id']}:{rows.start}",
                        "image": pixels[rows],
                        "mask": mask[rows],
                        "label": "anomaly" if near[rows].any() else "good",
                        "group": strip["id"],
                    },
                )


def tile_rows(height: int, width: int) -> list[slice]:
    """Returns the rows of each square tile of a strip, stepping by half; the last ends with it."""
    last = max(height - width, 0)
    return [slice(top, top + width) for top in (*range(0, last, max(width // 2, 1)), last)]
