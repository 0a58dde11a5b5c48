"""Demo parts: procedural turbine blades under domain shift, with exact masks; nothing to download.

Training images are good and from one set-up; the test repeats it (domain `same`) and shifts the
background, the light or the camera. `sample` draws the images, this module writes them as records.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import ClassVar

import tensorflow_datasets as tfds

from data_builders import common
from data_builders.demo_parts import sample


class Builder(common.RecordBuilder):
    """One category, `blade`; every domain of the test has 30 good and 4 x 10 defective images."""

    VERSION = tfds.core.Version("1.0.0")
    CATEGORIES = ("blade",)
    PROCEDURAL = True
    EXPECTED: ClassVar[Mapping[str, Mapping[str, int]]] = {
        "blade": {
            "train good": 240,
            "test same good": 30,
            "test same anomaly": 40,
            "test background good": 30,
            "test background anomaly": 40,
            "test illumination good": 30,
            "test illumination anomaly": 40,
            "test view good": 30,
            "test view anomaly": 40,
            "defective with mask": 160,
        }
    }

    def count_key(self, split: str, record: common.Example) -> str:
        """Counts by domain and label."""
        return " ".join(filter(None, (split, record["domain"], record["label"])))

    def examples(self, raw_dir: pathlib.Path | None, category: str) -> common.Examples:
        """Yields all images, to be drawn when their record is written; each is its own group."""
        for recipe in sample.recipes():
            yield recipe.split, functools.partial(_example, recipe)


def _example(recipe: sample.Recipe) -> common.Example:
    """Draws the image of a recipe."""
    drawn = sample.make_sample(recipe)
    return {
        "id": recipe.name,
        "image": drawn.image,
        "mask": drawn.mask,
        "label": "good" if recipe.defect == "good" else "anomaly",
        "defect": recipe.defect,
        "domain": recipe.domain,
    }
