"""A directory of the user's own, in any of the layouts that `layout` understands.

Its name is the category. Several directories in MVTec's layout inside it are a category each.
"""

import hashlib
import pathlib
import re

import numpy as np
import tensorflow_datasets as tfds

from data_builders import common, files, images
from data_builders.folder import layout

_BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras that store 16 bits


class Builder(common.RecordBuilder):
    """Categories are not fixed: each is the slug of a folder's name."""

    VERSION = tfds.core.Version("1.0.0")
    HOW_TO_GET = (
        "Give a folder that holds train/good, test/good and test/<type> (masks in "
        "ground_truth/<type>), or good and one folder per type of defect (masks in masks/<type>), "
        "or good images only; png, jpg, bmp, tif or webp."
    )

    @classmethod
    def category_folders(cls, root: pathlib.Path) -> dict[str, pathlib.Path]:
        """The folder itself, or its sub-folders if several have train folders of their own."""
        several = [folder for folder in files.list_folders(root) if _has_train_folder(folder)]
        if len(several) < 2 or _has_train_folder(root):
            return {slug(root): root} if files.list_images(root) else {}
        categories = {slug(folder): folder for folder in several}
        if len(categories) < len(several):
            raise ValueError(f"{root}: sub-folders must differ by letters or digits in their names")
        return categories

    @classmethod
    def select_categories(
        cls, raw_dir: pathlib.Path | None, in_raw: set[str], built: set[str]
    ) -> list[str]:
        """The categories in the raw folder, else the built one of its name, else the only one."""
        if in_raw:
            return sorted(in_raw)
        if raw_dir is None:
            return sorted(built) if len(built) == 1 else []  # of several, nobody said which
        return [slug(raw_dir)] if slug(raw_dir) in built else []

    @classmethod
    def config(cls, category: str) -> tfds.core.BuilderConfig:
        """Returns a TFDS config for a name not known beforehand."""
        return tfds.core.BuilderConfig(name=category)

    def _create_builder_config(self, builder_config, version):
        # TFDS warns of configs that the class does not list; here none can be listed.
        return builder_config

    def binarise(self, grey: np.ndarray) -> np.ndarray:
        """Masks of unknown making: label numbers or soft edges."""
        return images.labels_or_soft(grey)

    @classmethod
    def fingerprint(cls, root: pathlib.Path, category: str) -> str:
        """Returns a text that changes when an image or groups.csv does."""
        groups = cls.category_folders(root)[category] / layout.GROUPS
        own = hashlib.sha256(groups.read_bytes()).hexdigest() if groups.is_file() else ""
        return super().fingerprint(root, category) + own

    def count_key(self, split: str, record: common.Example) -> str:
        """Counts by type of defect."""
        return f"{split} {record['defect']}"

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields what `layout` understood, and logs it in one line."""
        items, description = layout.read_layout(self.category_folders(raw_dir)[category])
        self.log(description)
        largest = max(images.largest_value(item.path) for item in items)
        self.full_scale = full_scale(largest)
        if largest:  # the same is needed wherever such images are scored later
            self.log(f"white of 16-bit images: {self.full_scale} (predict: --full_scale)")
        for item in items:
            other = {"domain": item.domain} | ({"group": item.group} if item.group else {})
            yield (
                item.split,
                common.file_example(item.path, raw_dir, item.defect, item.mask, **other),
            )


def slug(folder: pathlib.Path) -> str:
    """Returns a folder's name in lower case with `_` for all but letters and digits."""
    name = folder.resolve().name.lower()
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "folder"


def full_scale(largest: int) -> int:
    """Returns the white level of 16-bit images whose largest value is known, such as 4095.

    One level for the whole directory: images keep their brightness relative to each other.
    """
    return next(2**bits - 1 for bits in _BIT_DEPTHS if largest < 2**bits)


def _has_train_folder(folder: pathlib.Path) -> bool:
    return any(f.name.lower() in layout.TRAIN_NAMES for f in files.list_folders(folder))
