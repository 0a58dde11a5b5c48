"""The shared part of all data sets: the record schema, and the TFDS builder that writes it.

A data set is one folder `data_builders/<name>/` with one class:

    class Builder(common.RecordBuilder):
        VERSION = tfds.core.Version("1.0.0")
        CATEGORIES = ("tile",)                       # one TFDS BuilderConfig each
        MUST_HOLD = "train/good"                     # so a category's folder is recognised
        EXPECTED = {"tile": {"train good": 578, ...}}  # keys as `count_key` makes them
        HOW_TO_GET = "download it from ... and unpack it so that <raw_dir>/... exists"

        def examples(self, raw_dir, category): ...   # yields (split, example)

The base class checks every example, encodes it and writes ArrayRecord shards, without TensorFlow.
Run through `data_builders.build`, which also decides what needs building. The schema is the only
contract with mmrjax, which reads the records and never imports this package.
"""

import abc
import collections
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_builders import download, files, images

SCHEMA_VERSION = 1  # raise it when the features or their meaning change: records are then rebuilt
LABELS = ("good", "anomaly")
UNREADABLE = "a picture that cannot be read"
SOURCES = ("real", "synthetic")

_REQUIRED_KEYS = {"id", "image", "label"}
_KNOWN_KEYS = _REQUIRED_KEYS | {"mask", "defect", "domain", "group", "frame", "source", "twin"}

Example = dict[str, Any]
Examples = Iterator[tuple[str, Example | Callable[[], Example]]]  # (split, example or its maker)


def record_features() -> tfds.features.FeaturesDict:
    """The schema: what every record of every data set holds."""
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(doc="unique over the data set; normally the image's path in the raw folder"),
            "dataset": text(),
            "category": text(),
            "image": tfds.features.Image(shape=(None, None, 3), doc="original bytes and size"),
            "mask": tfds.features.Image(
                shape=(None, None, 1), encoding_format="png", doc="0/255, of the image's size"
            ),
            "has_mask": tfds.features.Scalar(np.bool_, doc="False: no pixel truth is known"),
            "label": tfds.features.ClassLabel(names=LABELS),
            "defect": text(doc="type of defect; 'good' for good images"),
            "domain": text(doc="shooting condition; empty if the data set names none"),
            "group": text(doc="images of one group must stay together in a split"),
            "frame": tfds.features.Scalar(np.int32, doc="position in a video, or -1"),
            "source": tfds.features.ClassLabel(names=SOURCES),
            "twin": text(doc="id of the normal image this one was made from, or empty"),
        }
    )


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of all builders; see the module's docstring for what a subclass gives.

    An example is a dict with `id`, `image` and `label`, and optionally the other features:
      image: pathlib.Path, encoded bytes, or RGB pixels uint8 [h, w, 3]
      mask: pathlib.Path, a tuple of them, pixels [h, w] (not 0 = defect), or None. A file goes
        through `read_mask`; an absent file counts as None. Good images need no mask: their record's
        mask is all zero. A defective image whose mask is None or empty gets has_mask False.
      defect ("good", or "anomaly" for defective ones), domain (""), group (the id), frame (-1),
        source ("real"), twin (""): the default in brackets applies when the key is absent.
    """

    CATEGORIES: ClassVar[tuple[str, ...]] = ()
    FOLDERS: ClassVar[Mapping[str, str]] = {}  # category -> folder, unless of the same name
    MUST_HOLD: ClassVar[str] = ""  # a folder in each category's own, by which that is recognised
    EXPECTED: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    HOW_TO_GET: ClassVar[str] = ""
    DOWNLOAD: ClassVar[download.Archive | None] = None  # the archive, if a program may fetch it
    # Whether unreadable pictures are left out. A published data set stops: its scores are compared.
    LEAVES_OUT: ClassVar[bool] = False
    PROCEDURAL: ClassVar[bool] = False  # drawn by a program: no raw folder, `raw_dir` is None

    def __init_subclass__(cls, **kwargs):
        if not cls.BUILDER_CONFIGS:
            cls.BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in cls.CATEGORIES]
        if not cls.PROCEDURAL:
            cls.MANUAL_DOWNLOAD_INSTRUCTIONS = cls.HOW_TO_GET
        super().__init_subclass__(**kwargs)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.log: Callable[[str], None] = logging.info
        self.on_record: Callable[[int, int], None] = lambda done, total: None  # progress
        self.full_scale = 65535  # value of a 16-bit image that becomes 255
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[tuple[str, str]] = []  # kind as in `check`, and a line with the name
        self._planned: dict[str, list[Example | Callable[[], Example]]] = {}
        self._ids: set[str] = set()
        self._twins: dict[str, str] = {}

    # For subclasses to define.

    @classmethod
    def category_folders(cls, root: pathlib.Path) -> dict[str, pathlib.Path]:
        """Returns the folder of each category whose images lie under `root`; empty if none.

        A subclass replaces this if FOLDERS and MUST_HOLD cannot express its layout.
        """
        folders = {
            category: root / cls.FOLDERS.get(category, category) for category in cls.CATEGORIES
        }
        return {c: folder for c, folder in folders.items() if (folder / cls.MUST_HOLD).is_dir()}

    @abc.abstractmethod
    def examples(self, raw_dir: pathlib.Path | None, category: str) -> Examples:
        """Yields (split, example) with split "train" or "test".

        Args:
          raw_dir: the folder that holds the data set, as `find_root` found it; None if PROCEDURAL.
          category: one of CATEGORIES.

        Yields:
          The split, and the example: a dict as the class describes, or a function without
          arguments that returns it. Give a function when making the pixels takes time; it is
          called when the record is written, under the progress bar.
        """

    def file_examples(self, raw_dir: pathlib.Path, category: str) -> Examples:
        """Yields (split, example) of image files, for `check`, which names files.

        The same as `examples`, unless these are parts of files.
        """
        yield from self.examples(raw_dir, category)

    def binarise(self, grey: np.ndarray) -> np.ndarray:
        """The data set's mask rule: grey levels [h, w] of a mask file -> defect or not, bool."""
        return images.above_127(grey)

    def count_key(self, split: str, record: Example) -> str:
        """The line of the found-vs-expected table that a record counts for."""
        return f"{split} {record['label']}"

    @classmethod
    def chosen(cls, **choice: tuple[str, ...]) -> type["RecordBuilder"]:
        """Returns the builder with patterns of paths that a user gives.

        Raises:
          ValueError: the layout of this data set is fixed.
        """
        raise ValueError(
            f"{cls.name}: its layout is published; data.good, data.bad and data.masks are of "
            "--config.data.name=folder"
        )

    @classmethod
    def fingerprint(cls, root: pathlib.Path | None, category: str) -> str:
        """Returns a text that changes when the raw data does: its files, or the version."""
        if cls.PROCEDURAL:
            return f"{cls.name} {cls.VERSION}"
        return files.folder_fingerprint(cls.category_folders(root)[category])

    # The work of the base class.

    @classmethod
    def select_categories(
        cls, raw_dir: pathlib.Path | None, in_raw: set[str], built: set[str]
    ) -> list[str]:
        """Returns the categories meant when none is named: all in the raw data or built."""
        return [category for category in cls.CATEGORIES if category in in_raw | built]

    @classmethod
    def config(cls, category: str) -> tfds.core.BuilderConfig:
        """Returns the TFDS config of a category."""
        return next(config for config in cls.BUILDER_CONFIGS if config.name == category)

    @classmethod
    def find_root(cls, raw_dir: pathlib.Path) -> pathlib.Path | None:
        """Returns the folder with the published layout: `raw_dir`, or one or two levels below it.

        Raises:
          ValueError: several sub-folders hold the layout.
        """
        level = [raw_dir] if raw_dir.is_dir() else []
        for _ in range(3):
            found = [folder for folder in level if cls.category_folders(folder)]
            if len(found) > 1:
                names = ", ".join(str(folder) for folder in found)
                raise ValueError(
                    f"{cls.name}: {raw_dir} holds it several times ({names}): name one"
                )
            if found:
                return found[0]
            level = [child for folder in level for child in files.list_folders(folder)]
        return None

    def check_twins(self) -> None:
        """Raises ValueError if a record names a twin that is not in this data set."""
        for name, twin in self._twins.items():
            if twin not in self._ids:
                raise ValueError(f"{name}: its twin {twin!r} is no record of {self.name}")

    def _info(self) -> tfds.core.DatasetInfo:
        info = self.dataset_info_from_configs(features=record_features(), supervised_keys=None)
        # TFDS would ask its bucket for a description and leave an empty folder in /tmp each time.
        info.initialize_from_bucket = lambda: None
        return info

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[str, Example]]]:
        root = None
        if not self.PROCEDURAL:
            root = self.find_root(pathlib.Path(dl_manager.manual_dir))
        self._planned = {"train": [], "test": []}
        for split, example in self.examples(root, self.builder_config.name):
            self._planned[split].append(example)
        if not self._planned["train"]:
            raise ValueError(f"{self.builder_config.name}: found no good image to train on")
        return {
            split: self._generate_examples(split)
            for split, examples in self._planned.items()
            if examples  # TFDS cannot write an empty split
        }

    def _generate_examples(self, split: str) -> Iterator[tuple[str, Example]]:
        total = sum(len(examples) for examples in self._planned.values())
        written, reason = 0, ""
        for example in self._planned[split]:
            try:
                record = self.make_record(split, example() if callable(example) else example)
            except (images.Damaged, FileNotFoundError) as e:
                if not self.LEAVES_OUT:
                    raise
                reason = reason or str(e)
                self.findings.append((UNREADABLE, str(e)))
                continue
            yield record["id"], record
            written += 1
            self.on_record(len(self._ids), total)
        if reason and not written:  # TFDS cannot write an empty split
            raise ValueError(f"no picture of {split} can be read; the first: {reason}")

    def make_record(self, split: str, example: Example) -> Example:
        """Checks an example, fills in the defaults, encodes its pixels and counts it.

        Raises:
          ValueError: the example or one of its files is wrong; the message begins with its name.
        """
        name = files.printable(str(example.get("id")))
        if missing := _REQUIRED_KEYS - example.keys():
            raise ValueError(f"{name}: the example lacks {sorted(missing)}")
        if unknown := example.keys() - _KNOWN_KEYS:
            raise ValueError(f"{name}: unknown {sorted(unknown)}; known: {sorted(_KNOWN_KEYS)}")
        if name in self._ids:
            raise ValueError(f"{name}: two records have this id")
        self._ids.add(name)
        example = {**example, "id": name}
        label = example["label"]
        if label not in LABELS:
            raise ValueError(f"{name}: label {label!r} is none of {LABELS}")
        defaults = {"defect": label, "domain": "", "group": name, "frame": -1}
        record = {**defaults, "source": "real", "twin": "", **example}
        if (record["defect"] == "good") != (label == "good"):
            raise ValueError(f"{name}: defect {record['defect']!r} contradicts label {label!r}")
        if record["twin"]:
            self._twins[name] = record["twin"]
        record["image"], size_hw = images.encode_image(example["image"], name, self.full_scale)
        mask = self._mask(example.get("mask"), example["image"], size_hw, name)
        if label == "good" and mask.any():
            raise ValueError(f"{name}: a good image, but its mask marks {mask.sum()} pixels")
        record["mask"] = images.encode_mask(mask)
        record["has_mask"] = bool(label == "good" or mask.any())
        record |= {"dataset": self.name, "category": self.builder_config.name}
        self.counts[self.count_key(split, record)] += 1
        if label == "anomaly":
            self.counts["defective with mask"] += record["has_mask"]
        return record

    def read_mask(
        self, path: os.PathLike, image: Any, size_hw: tuple[int, int], name: str
    ) -> np.ndarray:
        """Returns the mask in a file as bool [h, w], by the data set's rule, as its image lies.

        Args:
          path: the mask's file.
          image: the image of the example.
          size_hw: size of the upright image.
          name: name of the example, for errors.

        Raises:
          ValueError: damaged, of another size than its image, or turned in an unknown way.
        """
        mask = self.binarise(images.read_grey(path))
        mask = images.mask_as_shown(mask, path, images.orientation(image), size_hw, name)
        check_mask_size(mask, size_hw, name)
        return mask

    def _mask(self, source: Any, image: Any, size_hw: tuple[int, int], name: str) -> np.ndarray:
        """Returns the mask [h, w] as bool; all false if the example has no mask."""
        if isinstance(source, tuple):
            parts = [self._mask(path, image, size_hw, name) for path in source]
            return np.any([np.zeros(size_hw, bool), *parts], axis=0)
        if isinstance(source, os.PathLike):
            path = pathlib.Path(source)
            source = self.read_mask(path, image, size_hw, name) if path.is_file() else None
        if source is None:
            return np.zeros(size_hw, bool)
        check_mask_size(source, size_hw, name)
        return source != 0

    # TFDS prints two lines to stdout; `build` logs a line instead.

    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def file_example(
    path: pathlib.Path,
    raw_dir: pathlib.Path,
    defect: str,
    mask: pathlib.Path | tuple[pathlib.Path, ...] | None,
    **other: Any,
) -> Example:
    """Returns the example of an image file, named after its place.

    Args:
      path: the image.
      raw_dir: folder that the name begins below.
      defect: type of defect, or "good"; the label follows from it.
      mask: its file, or several; None for good images.
      **other: features that are not the defaults.
    """
    label = "good" if defect == "good" else "anomaly"
    own = {"id": files.printable(path.relative_to(raw_dir).as_posix()), "image": path, "mask": mask}
    return {**own, "label": label, "defect": files.printable(defect), **other}


def published_counts(
    counts: Mapping[str, tuple[int, int, int]],
) -> dict[str, dict[str, int]]:
    """Returns EXPECTED of a data set whose every defective image has a mask.

    Args:
      counts: category -> images in train, good in test, defective in test.
    """
    return {
        category: {
            "train good": train,
            "test good": good,
            "test anomaly": anomaly,
            "defective with mask": anomaly,
        }
        for category, (train, good, anomaly) in counts.items()
    }


def check_mask_size(mask: np.ndarray, size_hw: tuple[int, int], name: str) -> None:
    """Raises ValueError if a mask [h, w] is not of its image's size."""
    if mask.shape != tuple(size_hw):
        raise ValueError(
            f"{name}: the mask is {_size(mask.shape)}, its image {_size(size_hw)}; "
            "they must be of one size"
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}" if len(shape) == 2 else str(shape)
