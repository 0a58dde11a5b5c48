"""Small trees of the published layouts, and a way to read records back."""

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


# --- the published layouts in small, with what operating systems leave in them


@pytest.fixture
def aebad(tmp_path, write_image, write_mask, clutter):
    root = tmp_path / "AeBAD download"
    blades, videos = root / "AeBAD_S", root / "AeBAD_V"
    for sub in ("background", "view"):
        write_image(blades / f"train/good/{sub}/IMG_1.png")
    for domain in ("same", "background", "illumination", "view"):
        write_image(blades / f"test/good/{domain}/IMG_1.png")
        write_image(blades / f"test/groove/{domain}/IMG_1.png")
        write_mask(blades / f"ground_truth/groove/{domain}/IMG_1.png")
        clutter(blades / f"test/groove/{domain}")
        clutter(blades / f"ground_truth/groove/{domain}")
    for number in (9, 10, 11):
        write_image(videos / f"train/good/video4_train/frame{number}.jpg")
        for video in ("video1", "video2"):
            write_image(videos / f"test/{video}/good/frame{number}.jpg")
            write_image(videos / f"test/{video}/anomaly/frame{number + 20}.jpg")
    clutter(videos / "test/video1/good")
    (root / "__MACOSX/AeBAD_S/train/good").mkdir(parents=True)
    return root


@pytest.fixture
def btad(tmp_path, write_image, write_mask, clutter):
    root = tmp_path / "BTech_Dataset_transformed"
    for product, image, mask in (("01", "bmp", "png"), ("03", "bmp", "bmp"), ("02", "png", "png")):
        for name in ("train/ok/0000", "train/ok/0001", "test/ok/0000", "test/ko/0001"):
            write_image(root / product / f"{name}.{image}")
        write_mask(root / product / f"ground_truth/ko/0001.{mask}")
        for folder in ("train/ok", "test/ko", "ground_truth/ko"):
            clutter(root / product / folder)
    return root


@pytest.fixture
def kolektor_sdd2(tmp_path, write_image, write_mask, clutter):
    root = tmp_path / "KolektorSDD2"
    for split, first in (("train", 10000), ("test", 20000)):
        for i in range(3):
            size_hw = (30 + i, 22)
            write_image(root / split / f"{first + i}.png", size_hw)
            levels = (0, 0, 1) if i == 2 else (0, 0, 0)
            write_mask(root / split / f"{first + i}_GT.png", size_hw, levels)
        clutter(root / split)
        (root / split / "._10000_GT.png").write_bytes(b"Mac OS X")
    return root


@pytest.fixture
def mvtec_ad(tmp_path, write_image, write_mask, clutter):
    root = tmp_path / "mvtec anomaly detection"
    for category in ("bottle", "grid"):
        for name in ("train/good/000", "train/good/001", "test/good/000", "test/bent/000"):
            write_image(root / category / f"{name}.png")
        write_image(root / category / "test/bent/001.png")
        write_mask(root / category / "ground_truth/bent/000_mask.png")
        for folder in ("train/good", "test/bent", "ground_truth/bent", "."):
            clutter(root / category / folder)
    return root


@pytest.fixture
def rsdds(tmp_path, clutter):
    """Strips of noise [100, 16], whose masks mark eight columns of eight rows."""
    root = tmp_path / "RSDDs dataset"
    first_type, second_type = (root / f"Type-{number} RSDDs dataset" for number in ("I", "II"))
    strips = [(first_type, number, slice(32, 40)) for number in range(1, 11)]
    strips += [(second_type, number, slice(0, 8)) for number in (1, 2)]
    for folder, number, defect_rows in strips:
        mask = np.zeros((100, 16), np.uint8)
        mask[defect_rows, 8:] = 255  # on a grid of eight: JPEG blocks then keep its edges
        image = np.random.default_rng(number).integers(60, 180, (100, 16, 3), np.uint8)
        for name, pixels in (("Rail surface images", image), ("GroundTruth", mask)):
            path = folder / name / f"rail_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])
    clutter(first_type / "Rail surface images")
    return root


@pytest.fixture
def visa(tmp_path, write_image, write_mask, clutter):
    root = tmp_path / "VisA_20220922"
    lines = ["object,split,label,image,mask"]
    for name, split in (("000", "train"), ("001", "train"), ("002", "test")):
        image = f"pcb1/Data/Images/Normal/{name}.JPG"
        write_image(root / image)
        lines.append(f"pcb1,{split},normal,{image},")
    image, mask = "pcb1/Data/Images/Anomaly/000.JPG", "pcb1/Data/Masks/Anomaly/000.png"
    write_image(root / image)
    write_mask(root / mask, levels=(0, 0, 1))
    lines.append(f"pcb1,test,anomaly,{image},{mask}")
    lines.append("candle,train,normal,candle/Data/Images/Normal/000.JPG,\n")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines))
    clutter(root / "pcb1/Data/Images/Normal")
    clutter(root / "pcb1/Data/Masks/Anomaly")
    return root
