"""Scores of finished runs on the same test images, and the paired difference of two of them."""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from mmrjax import metrics
from mmrjax.runtime import files


class OtherImages(ValueError):
    """Scores that are not of the same test images."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of the same test images under several seeds.

    Attributes:
      images: (id, label, domain, group) of each image.
      values: float64 [seeds, n].
    """

    images: list[tuple[str, str, str, str]]
    values: np.ndarray

    @property
    def is_anomaly(self) -> np.ndarray:
        """Bool [n]."""
        return np.array([label == "anomaly" for _, label, _, _ in self.images])

    @property
    def groups(self) -> list[str]:
        """The group of each image; the bootstrap draws the images of a group together."""
        return [group for *_, group in self.images]

    def of_domain(self, domain: str) -> "Scores":
        """The images of one domain."""
        rows = [i for i, image in enumerate(self.images) if image[2] == domain]
        return Scores([self.images[i] for i in rows], self.values[:, rows])


def read(folders: Sequence[pathlib.Path]) -> Scores:
    """The scores.csv of run folders that differ in their seed alone.

    Raises:
      OtherImages: a folder holds scores of other images than the first one.
      ValueError: a file is absent or damaged, naming it.
    """
    images, values = None, []
    for folder in folders:
        own, scores = _parsed(folder / "scores.csv")
        if images is not None and own != images:
            raise OtherImages(f"{folder} and {folders[0]} hold scores of other test images")
        images = own
        values.append(scores)
    return Scores(images or [], np.array(values))


def _parsed(path: pathlib.Path) -> tuple[list[tuple[str, str, str, str]], list[float]]:
    """(images, scores) of a scores.csv."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        images = [(row["id"], row["label"], row["domain"], row["group"]) for row in rows]
        return images, [float(row["score"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise files.unreadable(path, e) from e


def difference(a: Scores, b: Scores, bootstrap: int = 1000) -> dict[str, dict]:
    """{image metric: {"a", "b", "difference", "ci95"}} of two runs on the same images.

    Raises:
      ValueError: other test images.
    """
    if a.images != b.images:
        common = len(set(a.images) & set(b.images))
        raise ValueError(
            f"nothing to pair: {len(a.images)} and {len(b.images)} test images, {common} in common"
        )
    if len(set(a.is_anomaly)) < 2:
        raise ValueError("nothing to compare: the test images are all good or all defective")
    return metrics.paired_difference(
        a.values, b.values, a.is_anomaly, a.groups, bootstrap=bootstrap
    )
