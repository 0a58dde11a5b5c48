"""MVTec AD: 15 categories, each `train/good`, `test/<type>` and `ground_truth/<type>`."""

import pathlib

import tensorflow_datasets as tfds

from data_builders import common, files

# category: images in train, good in test, defective in test, as published
PUBLISHED_COUNTS = {
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "hazelnut": (391, 40, 70),
    "leather": (245, 32, 92),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "tile": (230, 33, 84),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "wood": (247, 19, 60),
    "zipper": (240, 32, 119),
}


class Builder(common.RecordBuilder):
    """One config per category."""

    VERSION = tfds.core.Version("1.0.0")
    CATEGORIES = tuple(PUBLISHED_COUNTS)
    MUST_HOLD = "train/good"
    EXPECTED = common.published_counts(PUBLISHED_COUNTS)
    HOW_TO_GET = (
        "Get the archive from https://www.mvtec.com/company/research/datasets/mvtec-ad and unpack "
        "it so that the folder holds bottle/train/good, bottle/test/<type>, "
        "bottle/ground_truth/<type>, and so on for the other categories."
    )

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields the published split; a mask is `ground_truth/<type>/<stem>_mask.png`."""
        folder = raw_dir / category
        for split in ("train", "test"):
            for type_folder in files.list_folders(folder / split):
                masks = folder / "ground_truth" / type_folder.name
                for path in files.list_images(type_folder):
                    mask = masks / f"{path.stem}_mask.png" if type_folder.name != "good" else None
                    yield split, common.file_example(path, raw_dir, type_folder.name, mask)
