"""BTAD: products 01, 02 and 03, each `train/ok`, `test/{ok,ko}` and `ground_truth/ko`.

Images and masks mix .bmp and .png, so a mask is found by its stem: that of 000.bmp may be 000.png.
"""

import pathlib

import tensorflow_datasets as tfds

from data_builders import common, download, files

# product: images in train, good in test, defective in test. The sums are the published ones
# (1799, 451 and 290: AMI-Net, IEEE TASE 2024, section IV-A); no paper at hand gives the parts.
COUNTS = {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)}


class Builder(common.RecordBuilder):
    """One config per product."""

    VERSION = tfds.core.Version("1.0.0")
    CATEGORIES = tuple(COUNTS)
    MUST_HOLD = "train/ok"
    EXPECTED = common.published_counts(COUNTS)
    DOWNLOAD = download.Archive(
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        "CC BY-NC-SA 4.0 (no commercial use)",
    )
    HOW_TO_GET = (
        f"Run `python -m data_builders.build btad --download`, or get {DOWNLOAD.url} and unpack it "
        "so that the folder holds 01/train/ok, 01/test/ok, 01/test/ko, 01/ground_truth/ko, and so "
        "on for 02 and 03."
    )

    def examples(self, raw_dir: pathlib.Path, category: str) -> common.Examples:
        """Yields the published split."""
        folder = raw_dir / category
        masks = _by_stem(folder / "ground_truth" / "ko")
        for split, kind in (("train", "ok"), ("test", "ok"), ("test", "ko")):
            defect = "good" if kind == "ok" else "anomaly"
            for path in files.list_images(folder / split / kind):
                mask = masks.get(path.stem) if kind == "ko" else None
                yield split, common.file_example(path, raw_dir, defect, mask)


def _by_stem(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    masks: dict[str, pathlib.Path] = {}
    for path in files.list_images(folder):
        if (other := masks.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} are masks of one image; move one away")
    return masks
