"""KolektorSDD2: train/<id>.png and test/<id>.png, each with its mask <id>_GT.png.

Every image has a mask, which is all zero for a good surface and so gives the label. The 246
defective training images become records too: protocols that train on good images leave them out.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_builders import common, files, images

_MASK_ENDING = "_GT"


class Builder(common.RecordBuilder):
    """One category, `surface`."""

    VERSION = tfds.core.Version("1.0.0")
    CATEGORIES = ("surface",)
    EXPECTED: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "surface": {
            "train good": 2085,
            "train anomaly": 246,
            "test good": 894,
            "test anomaly": 110,
            "defective with mask": 356,
        }
    }
    HOW_TO_GET = (
        "Get the archive from https://www.vicos.si/resources/kolektorsdd2/ and unpack it so that "
        "the folder holds train/<id>.png with train/<id>_GT.png, and test likewise."
    )

    @classmethod
    def category_folders(cls, root: pathlib.Path) -> dict[str, pathlib.Path]:
        """The category is there if a training image with its mask is."""
        return {"surface": root} if any((root / "train").glob(f"[!.]*{_MASK_ENDING}.png")) else {}

    def binarise(self, grey: np.ndarray) -> np.ndarray:
        """Any mask pixel above 0 is defect."""
        return grey > 0

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields the published split; the label is read when a record is written."""
        for split in ("train", "test"):
            for path in files.list_images(raw_dir / split, recursive=False):
                if not path.stem.endswith(_MASK_ENDING):
                    yield split, functools.partial(self._example, raw_dir, path)

    def _example(self, raw_dir: pathlib.Path, path: pathlib.Path) -> common.Example:
        mask = path.with_name(f"{path.stem}{_MASK_ENDING}.png")
        if not mask.is_file():
            raise ValueError(
                f"{path}: its mask {mask.name} is missing, which says whether it is good; "
                "unpack the archive again, or move the image away"
            )
        is_good = not self.binarise(images.read_grey(mask)).any()
        return common.file_example(path, raw_dir, "good" if is_good else "anomaly", mask)
