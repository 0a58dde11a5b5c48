"""Two finished runs on the same images: by how much one is better, and how sure that is.

    python -m mmrjax.compare runs/embedded/patchcore/tile runs/random/patchcore/tile

Each argument is the folder of one method and category, with one folder per seed in it; runs of
other work directories, teachers or settings may be compared as long as their test images are the
same. Printed: the image metrics of the first, of the second, and the difference with its paired
95 % interval over groups of images (seeds averaged; each resample drawn once for both).
"""

import argparse
import csv
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from mmrjax import metrics
from mmrjax.runtime import command_line, files, staging


class OtherImages(ValueError):
    """Scores that are not of the same test images."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of the same test images under several seeds.

    Attributes:
      images: (id, label, domain, group) of each.
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
        """What the bootstrap draws as one, of each image."""
        return [group for *_, group in self.images]

    def of_domain(self, domain: str) -> "Scores":
        """The images of one domain."""
        kept = [i for i, image in enumerate(self.images) if image[2] == domain]
        return Scores([self.images[i] for i in kept], self.values[:, kept])


def read(folders: Sequence[pathlib.Path]) -> Scores:
    """The scores.csv of run folders that differ in their seed alone.

    Raises:
      OtherImages: one of them is of other images.
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
    found = metrics.paired_difference(
        a.values, b.values, a.is_anomaly, a.groups, bootstrap=bootstrap
    )
    for side, scores in (("a", a), ("b", b)):
        runs = [
            metrics.measure(values, None, None, scores.is_anomaly, None, bootstrap=0).values
            for values in scores.values
        ]
        for name, row in found.items():
            row[side] = float(np.mean([run[name] for run in runs]))
    return found


def table(a: Scores, b: Scores) -> str:
    """Every image metric in percent, of all images and of each domain, as text."""
    domains = sorted({image[2] for image in a.images} - {""})
    width = max(16, *(len(domain) + 2 for domain in ("all", *domains)))
    row_format = f"{{:<{width}}}{{:<14}}{{:>8}}{{:>8}}{{:>12}}   {{}}"
    lines = [
        row_format.format("images", "metric", "first", "second", "difference", "95 % interval")
    ]
    for domain in ["all", *(domains if len(domains) > 1 else ())]:
        own = (a, b) if domain == "all" else (a.of_domain(domain), b.of_domain(domain))
        if domain != "all" and len(set(own[0].is_anomaly)) < 2:
            continue  # undefined there
        for name, row in difference(*own).items():
            numbers = [f"{100 * row[side]:.1f}" for side in ("a", "b")]
            interval = (
                "–"
                if row["ci95"] is None
                else "{:+.1f} to {:+.1f}".format(*(100 * end for end in row["ci95"]))
            )
            gap = f"{100 * row['difference']:+.1f}"
            lines.append(row_format.format(domain, name, *numbers, gap, interval))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison; 1 and one line on standard error when there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrjax.compare",
        description="Compare two finished runs on the same test images, paired.",
    )
    for name in ("first", "second"):
        parser.add_argument(name, type=staging.place, help="<workdir>/<method>/<category>")
    arguments = parser.parse_args(argv)
    return command_line.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    first, second = (_of_runs(place) for place in (arguments.first, arguments.second))
    print(table(first, second))
    print(f"seeds: {len(first.values)} and {len(second.values)}; images: {len(first.images)}")
    return 0


def _of_runs(place: str) -> Scores:
    with staging.opened(place, "/scores.csv") as folder:
        return read(_seed_folders(folder))


def _seed_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    # A copy that somebody has called seed54_old is none.
    found = [p for p in sorted(folder.glob("seed*")) if p.name.removeprefix("seed").isdecimal()]
    if not found:
        raise FileNotFoundError(
            f"no runs in {folder}; expected <workdir>/<method>/<category> with folders seed<k>"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
