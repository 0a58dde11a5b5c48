"""AeBAD: single blades (`s`) and videos of blades (`v`), tested under unseen conditions.

AeBAD_S/train/good/<sub>/*.png, test/<type>/<domain>/*.png, ground_truth/<type>/<domain>/<same name>
AeBAD_V/train/good/<video>_train/*.jpg, test/<video>/<good|anomaly>/*.jpg, no masks

Training images have no domain: their conditions differ from the test's of the same name.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_builders import common, files


class Builder(common.RecordBuilder):
    """Two configs: `s` with pixel masks, `v` with frames of videos and image labels only.

    Each works without the other.
    """

    VERSION = tfds.core.Version("1.0.0")
    FOLDERS: ClassVar[Mapping[str, str]] = {"s": "AeBAD_S", "v": "AeBAD_V"}
    CATEGORIES = tuple(FOLDERS)
    MUST_HOLD = "train/good"
    EXPECTED: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "s": {
            "train good": 521,
            "test same good": 230,
            "test same anomaly": 459,
            "test background good": 93,
            "test background anomaly": 212,
            "test illumination good": 75,
            "test illumination anomaly": 198,
            "test view good": 92,
            "test view anomaly": 280,
        },
        "v": {
            "train good": 707,
            "test video1 good": 533,
            "test video1 anomaly": 368,
            "test video2 good": 251,
            "test video2 anomaly": 650,
            "test video3 good": 381,
            "test video3 anomaly": 520,
            "defective with mask": 0,
        },
    }
    HOW_TO_GET = (
        "Get the archive that https://github.com/zhangzilongc/MMR links to (Google Drive id "
        "14wkZAFFeudlg0NMFLsiGwS0E593b-lNo) and unpack it so that the folder holds "
        "AeBAD_S/train/good, AeBAD_S/test, AeBAD_S/ground_truth and AeBAD_V/train/good, "
        "AeBAD_V/test."
    )

    def count_key(self, split: str, record: common.Example) -> str:
        """Counts by domain and label."""
        return " ".join(filter(None, (split, record["domain"], record["label"])))

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields the published split of one part."""
        part = _blades if category == "s" else _videos
        yield from part(raw_dir / self.FOLDERS[category], raw_dir)


def frame_numbers(paths: Sequence[pathlib.Path]) -> list[int]:
    """Returns each frame's place in its video: the number that ends its name, or its position.

    Args:
      paths: the frames of one folder, sorted. Position counts if a name has no number, or if the
        numbers repeat or do not fit into int32.
    """
    matches = [re.search(r"(\d+)$", path.stem) for path in paths]
    numbers = [int(match[1]) for match in matches if match]
    if len(set(numbers)) < len(paths) or any(n > np.iinfo(np.int32).max for n in numbers):
        return list(range(len(paths)))
    return numbers


def _blades(folder: pathlib.Path, raw_dir: pathlib.Path) -> common.Examples:
    """AeBAD_S: the sub-folders of train/good are used together."""
    for path in files.list_images(folder / "train" / "good"):
        yield "train", common.file_example(path, raw_dir, "good", None)
    for type_folder in files.list_folders(folder / "test"):
        for domain_folder in files.list_folders(type_folder):
            defect, domain = type_folder.name, domain_folder.name
            masks = folder / "ground_truth" / defect / domain
            for path in files.list_images(domain_folder):
                mask = None if defect == "good" else masks / path.name
                yield "test", common.file_example(path, raw_dir, defect, mask, domain=domain)


def _videos(folder: pathlib.Path, raw_dir: pathlib.Path) -> common.Examples:
    """AeBAD_V: neighbouring frames are near-duplicates, so a video is one group."""
    parts = [("train", video, video, "good") for video in files.list_folders(folder / "train/good")]
    for video in files.list_folders(folder / "test"):
        parts += [("test", video, kind, kind.name) for kind in files.list_folders(video)]
    for split, video, frames, defect in parts:
        paths = files.list_images(frames)
        for path, number in zip(paths, frame_numbers(paths), strict=True):
            other = {"group": video.name, "frame": number}
            other["domain"] = video.name if split == "test" else ""
            yield split, common.file_example(path, raw_dir, defect, None, **other)
