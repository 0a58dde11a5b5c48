"""Small fixture trees for the builders, and a way to read records back."""

import pathlib
import zlib

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_builders import build

DEFECT_BOX = (slice(4, 9), slice(6, 14))  # where fixture masks mark their defect


@pytest.fixture
def write_image():
    """Writes a small image; its pixels depend on its path, so no two are alike."""

    def write(path: pathlib.Path, size_hw=(24, 32), grey=False) -> pathlib.Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(zlib.crc32("/".join(path.parts[-4:]).encode()))
        shape = size_hw if grey else (*size_hw, 3)
        assert cv2.imwrite(str(path), rng.integers(0, 256, shape, np.uint8))
        return path

    return write


@pytest.fixture
def write_mask():
    """Writes a grey mask with 200 in DEFECT_BOX (or nothing) and 60 above it, as soft edges are."""

    def write(path: pathlib.Path, size_hw=(24, 32), levels=(0, 60, 200)) -> pathlib.Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.full(size_hw, levels[0], np.uint8)
        mask[:2] = levels[1]
        mask[DEFECT_BOX] = levels[2]
        assert cv2.imwrite(str(path), mask)
        return path

    return write


@pytest.fixture
def clutter():
    """Adds what operating systems leave in folders: none of it is an image of the data set."""

    def add(folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("._000.png", "Thumbs.db", ".DS_Store", "__MACOSX/000.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"Mac OS X resource fork")

    return add


@pytest.fixture
def built():
    """Builds a data set and returns {category: {split: {id: record}}}, checking every record."""

    def run(name: str, raw_dir, data_dir, log=None, **kwargs) -> dict:
        lines = [] if log is None else log
        record_dirs = build.build(name, raw_dir, data_dir, log=lines.append, **kwargs)
        return {category: read_records(path) for category, path in record_dirs.items()}

    return run


def read_records(record_dir: pathlib.Path) -> dict[str, dict[str, dict]]:
    """Returns {split: {id: record}}, and checks what holds for the records of any data set."""
    builder = tfds.builder_from_directory(record_dir)
    texts = [k for k, v in builder.info.features.items() if isinstance(v, tfds.features.Text)]
    splits = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split)
        records = [source[i] for i in range(len(source))]
        for record in records:
            record |= {name: record[name].decode() for name in texts}
            record["label"] = builder.info.features["label"].int2str(record["label"])
            check_record(record)
        splits[split] = {record["id"]: record for record in records}
        assert len(splits[split]) == len(records), "ids repeat within a split"
    ids = [name for records in splits.values() for name in records]
    assert len(set(ids)) == len(ids), "ids repeat between splits"
    return splits


def check_record(record: dict) -> None:
    name, mask = record["id"], record["mask"]
    assert record["image"].shape == (*mask.shape[:2], 3), name
    assert record["image"].dtype == mask.dtype == np.uint8, name
    assert set(np.unique(mask)) <= {0, 255}, name
    is_anomaly = record["label"] == "anomaly"
    assert mask.any() == (is_anomaly and record["has_mask"]), name
    assert record["has_mask"] or is_anomaly, name
    assert (record["defect"] == "good") == (not is_anomaly), name
    assert record["group"], name
