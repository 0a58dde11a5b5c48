"""VisA: twelve objects; the published file `split_csv/1cls.csv` says what trains and what tests.

<object>/Data/Images/{Normal,Anomaly}/NNNN.JPG, <object>/Data/Masks/Anomaly/NNNN.png
"""

import csv
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from data_builders import common, download

SPLIT_FILE = pathlib.PurePath("split_csv", "1cls.csv")
# object: good images in train and in test, as published; each has 100 defective ones to test
PUBLISHED_COUNTS = {
    "candle": (900, 100),
    "capsules": (542, 60),
    "cashew": (450, 50),
    "chewinggum": (453, 50),
    "fryum": (450, 50),
    "macaroni1": (900, 100),
    "macaroni2": (900, 100),
    "pcb1": (904, 100),
    "pcb2": (901, 100),
    "pcb3": (905, 101),
    "pcb4": (904, 101),
    "pipe_fryum": (450, 50),
}

_LABELS = {"normal": "good", "anomaly": "anomaly"}


class Builder(common.RecordBuilder):
    """One config per object."""

    VERSION = tfds.core.Version("1.0.0")
    CATEGORIES = tuple(PUBLISHED_COUNTS)
    MUST_HOLD = "Data/Images/Normal"
    EXPECTED = common.published_counts({c: (*n, 100) for c, n in PUBLISHED_COUNTS.items()})
    DOWNLOAD = download.Archive(
        "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
        "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
        "CC BY 4.0",
    )
    HOW_TO_GET = (
        f"Run `python -m data_builders.build visa --download`, or get {DOWNLOAD.url} and unpack it "
        f"so that the folder holds candle/Data/Images/Normal and {SPLIT_FILE}."
    )

    @classmethod
    def fingerprint(cls, root: pathlib.Path | None, category: str) -> str:
        """Follows the images and the split file."""
        split = (root / SPLIT_FILE).read_bytes() if (root / SPLIT_FILE).is_file() else b""
        return f"{super().fingerprint(root, category)} {hashlib.sha256(split).hexdigest()}"

    def binarise(self, grey: np.ndarray) -> np.ndarray:
        """Masks hold numbers of defect classes, small ones that look black: all but 0 is defect."""
        return grey != 0

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields the published one-class split of one object."""
        for row in _read_split(raw_dir / SPLIT_FILE):
            if row["object"] == category:
                label, path = _LABELS[row["label"]], raw_dir / row["image"]
                mask = None if label == "good" else raw_dir / row["mask"]
                yield row["split"], common.file_example(path, raw_dir, label, mask)


def _read_split(path: pathlib.Path) -> Iterator[dict[str, str]]:
    """The rows of the split file (object, split, label, image, mask), each checked."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; it belongs to VisA's archive: unpack it again")
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            paths = [pathlib.PurePosixPath(row.get(name) or "") for name in ("image", "mask")]
            is_inside = not any(p.is_absolute() or ".." in p.parts for p in paths)
            is_known = row.get("split") in ("train", "test") and row.get("label") in _LABELS
            if not (is_known and is_inside and row["image"]):
                raise ValueError(
                    f"{path}, line {number}: expected object, train or test, normal or anomaly, "
                    f"and paths below the folder; found {list(row.values())}"
                )
            yield row
