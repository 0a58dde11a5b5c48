"""A directory of the user's own, in any of the layouts that `layout` understands.

Its name is the category. Several directories in MVTec's layout inside it are a category each.
"""

import hashlib
import os
import pathlib
import re
import types
import unicodedata
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_builders import common, files, images, masks
from data_builders.folder import layout, words

DOUBT = "a mask that can be meant otherwise"
READ_AS = "a mask read otherwise than usual"
HOT = "pixels brighter than white"
LONGEST = 80  # bytes of a category's name
_BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras that store 16 bits


class Builder(common.RecordBuilder):
    """Categories are not fixed: each is the slug of a folder's name."""

    VERSION = tfds.core.Version("1.1.0")
    LEAVES_OUT = True
    CHOICE: ClassVar[layout.Choice] = layout.Choice()
    HOW_TO_GET = (
        "Give a folder that holds train/good, test/good and test/<type> (masks in "
        "ground_truth/<type>), or good and one folder per type of defect (masks in masks/<type>), "
        "or good images only; png, jpg, bmp, tif or webp."
    )

    @classmethod
    def chosen(cls, **choice: tuple[str, ...]) -> type["Builder"]:
        """Returns the builder with patterns of paths that a user gives."""
        given = layout.Choice(**{kind: tuple(found) for kind, found in choice.items()})
        own = {"__module__": cls.__module__, "CHOICE": given}
        return types.new_class(
            cls.__name__, (cls,), {"skip_registration": True}, lambda names: names.update(own)
        )

    @classmethod
    def category_folders(cls, root: pathlib.Path) -> dict[str, pathlib.Path]:
        """The folder itself, or its sub-folders if several have train folders of their own."""
        folders = files.list_folders(root)
        several = [f for f in folders if not _says(f, layout.GOOD, layout.BAD) and _is_category(f)]
        if len(several) < 2 or _has_folder(root, layout.TRAIN, layout.TEST, layout.GOOD):
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

    def read_mask(
        self, path: os.PathLike, image: Any, size_hw: tuple[int, int], name: str
    ) -> np.ndarray:
        """As in the base, of masks of unknown making; nothing is marked by one that is in doubt."""
        found = masks.read(path)
        short = "/".join(pathlib.Path(path).parts[-3:])
        if found.doubt:
            line = f"{short}: {found.doubt}; understood:\n{masks.sketch(found.understood)}"
            self.findings.append((DOUBT, line))
        elif found.note:
            self.findings.append((READ_AS, f"{short}: {found.note}"))
        turn = images.orientation(image)
        mask = images.mask_as_shown(found.marked, path, turn, size_hw, name)
        common.check_mask_size(mask, size_hw, name)
        return mask

    @classmethod
    def fingerprint(cls, root: pathlib.Path, category: str) -> str:
        """Returns a text that changes when an image or groups.csv does."""
        groups = cls.category_folders(root)[category] / layout.GROUPS
        own = hashlib.sha256(groups.read_bytes()).hexdigest() if groups.is_file() else ""
        given = "" if cls.CHOICE == layout.Choice() else repr(cls.CHOICE)
        return super().fingerprint(root, category) + own + given

    def count_key(self, split: str, record: common.Example) -> str:
        """Counts by type of defect."""
        return f"{split} {record['defect']}"

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields what `layout` understood, and logs it as a table."""
        found = layout.read_layout(self.category_folders(raw_dir)[category], self.CHOICE)
        self.findings += found.findings
        for line in found.table:
            self.log(files.printable(line))
        self._choose_white([item.path for item in found.items])
        for item in found.items:
            other = {"domain": item.domain} | ({"group": item.group} if item.group else {})
            yield (
                item.split,
                common.file_example(item.path, raw_dir, item.defect, item.masks or None, **other),
            )

    def _choose_white(self, paths: list[pathlib.Path]) -> None:
        """Sets the level of 16-bit images that becomes 255; hot pixels do not choose it."""
        usual, largest, name = 0, 0, ""
        for path in paths:
            try:
                bright, brightest = images.bright_values(path)
            except (ValueError, OSError):
                continue  # named when its record cannot be made
            usual = max(usual, bright)
            if brightest > largest:
                largest, name = brightest, path.name
        self.full_scale = full_scale(usual)
        if largest:  # the same is needed wherever such images are scored later
            self.log(f"white of 16-bit images: {self.full_scale} (predict: --full_scale)")
        if largest > self.full_scale:
            line = f"{name} has {largest}, white is {self.full_scale}"
            self.findings.append((HOT, line))
            self.log(f"a few pixels are brighter than white, as hot pixels are: {line}")


def slug(folder: pathlib.Path) -> str:
    """A folder's name in lower case with `_` for all but letters and digits of any script.

    Long names are cut, with a hash of the whole.
    """
    name = unicodedata.normalize("NFC", files.printable(folder.resolve().name)).lower()
    text = re.sub(r"[\W_]+", "_", name).strip("_") or "folder"
    if len(text.encode()) <= LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text.encode()[: LONGEST - 9].decode(errors="ignore") + "_" + digest


def full_scale(largest: int) -> int:
    """Returns the white level of 16-bit images whose largest value is known, such as 4095.

    One level for the whole directory: images keep their brightness relative to each other.
    """
    return next(2**bits - 1 for bits in _BIT_DEPTHS if largest < 2**bits)


def _says(folder: pathlib.Path, *kinds: str) -> bool:
    """Whether the name of a folder says one of these."""
    return bool(words.meaning(folder.name)[0] & set(kinds))


def _has_folder(folder: pathlib.Path, *kinds: str) -> bool:
    return any(_says(inner, *kinds) for inner in files.list_folders(folder))


def _is_category(folder: pathlib.Path, depth: int = 2) -> bool:
    """Whether a folder has a train folder, or good images in folders that say nothing."""
    inner = files.list_folders(folder)
    return _has_folder(folder, layout.TRAIN, layout.GOOD) or (
        depth > 0 and any(_is_category(f, depth - 1) for f in inner if _says(f, words.NEUTRAL))
    )
