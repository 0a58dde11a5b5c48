"""Looks through a raw data set and names every file that is not as it should be.

    python -m data_builders.check magnetic_tile --raw_dir=~/tiles

Each kind of problem is either handled by the build, and then the report says how, or must be
mended: the build would stop at it, or scores would be wrong. Exit status 1 if anything must be
mended. Nothing is written. Whether a record can be made is not guessed: the builder makes it.
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import tqdm

from data_builders import build, common, files, images, store

# Kind of problem -> what the build does with it.
HANDLED = {
    "a file of no format that is read": "left out",
    "a picture that is left out": "not used, for the reason given",
    "a mask of a name or folder like its picture's": "paired",
    "a mask read otherwise than usual": "as the line says",
    "pixels brighter than white": "they become 255, as hot pixels should",
    "left by an operating system": "ignored",
    "named as another format": "read by its content",
    "grey image": "read as three equal channels",
    "16 bits a pixel": "scaled to 8",
    "alpha channel": "dropped",
    "mask of more than two levels": "cut by the data set's rule",
    "empty mask of a defective image": "kept as defective, without pixel truth",
    "no mask for a defective image": "kept as defective, without pixel truth",
}
# Kind of problem -> what to do about it.
TO_MEND = {
    "the build stops": "replace the file, or move it away",
    "a picture that cannot be read": "left out by the build; replace the file, or move it away",
    "a mask that can be meant otherwise": "the build keeps the image without pixel truth",
    "a mask that belongs to no picture": "name it as its picture, in a folder of the same name",
    "a good image whose mask marks a defect": "left out by the build; move the image, or the mask",
    "mask too faint for the data set's rule": "its defect would be lost; save it as 0 and 255",
    "same pixels in train and in test": "scores would be too good; remove one of the two",
    "counts differ from the published ones": "the download is incomplete, or another version",
    "not checked": "mend what stops the build, and check again",
}

_CLUTTER = ("__MACOSX", "Thumbs.db", ".DS_Store")
_SHOWN = 5  # names of a handled kind, unless all are asked for


@dataclasses.dataclass
class Report:
    """The findings of a check.

    Attributes:
      problems: kind (a key of HANDLED or TO_MEND) -> lines that begin with a file's name.
      counts: a line per category.
    """

    problems: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: {kind: [] for kind in (*HANDLED, *TO_MEND)}
    )
    counts: list[str] = dataclasses.field(default_factory=list)

    def must_mend(self) -> int:
        """Number of problems that the build does not handle."""
        return sum(len(self.problems[kind]) for kind in TO_MEND)

    def text(self, list_all: bool = False) -> str:
        """The report in lines; of handled kinds only some names, unless `list_all`."""
        lines = list(self.counts)
        for title, kinds in (("Handled by the build:", HANDLED), ("To be mended:", TO_MEND)):
            found = {kind: self.problems[kind] for kind in kinds if self.problems[kind]}
            lines += [title] if found else []
            for kind, names in found.items():
                lines.append(f"  {kind}, {len(names)} ({kinds[kind]}):")
                shown = len(names) if list_all or kinds is TO_MEND else _SHOWN
                lines += [f"    {name}" for name in names[:shown]]
                if names[shown:]:
                    lines.append(f"    and {len(names) - shown} more; --list_all names them")
        count = self.must_mend()
        lines.append(f"{count} to be mended" if count else "nothing to be mended")
        return "\n".join(lines).encode(errors="backslashreplace").decode()  # names may be any bytes


def check(name: str, raw_dir: str | os.PathLike, categories: Sequence[str] | None = None) -> Report:
    """Looks through the raw images of a data set.

    Args:
      name: the data set, one of `build.BUILDERS`.
      raw_dir: its folder, as for `build.build`.
      categories: which ones; None takes all that are there.

    Raises:
      ValueError: unknown name or category, or a data set that a program draws.
      FileNotFoundError: the layout is not there; the message says how to get it.
    """
    builder_cls = build.load_builder(name)
    if builder_cls.PROCEDURAL:
        raise ValueError(f"{name}: a program draws it; there is nothing to check")
    raw_dir = pathlib.Path(raw_dir).expanduser()
    root = build.find_root(builder_cls, raw_dir)
    folders = builder_cls.category_folders(root) if root else {}
    if not folders:
        raise FileNotFoundError(
            f"{name}: {build.describe_missing(raw_dir)}. {builder_cls.HOW_TO_GET}"
        )
    if unknown := [c for c in categories or () if c not in folders]:
        raise ValueError(f"{name}: no category {unknown[0]!r} in {root}; there: {list(folders)}")
    report = Report()
    report.problems["left by an operating system"] += _clutter(root)
    for category in categories or folders:
        _CategoryCheck(builder_cls, root, category, folders[category], report).run()
    return report


def _clutter(root: pathlib.Path) -> Iterator[str]:
    for parent, folders, names in os.walk(root):
        for name in sorted((*folders, *names)):
            if name.startswith("._") or name in _CLUTTER:
                yield pathlib.Path(parent, name).relative_to(root).as_posix()
        folders[:] = sorted(folder for folder in folders if files.is_visible(folder))


class _CategoryCheck:
    """The check of all files of a category."""

    def __init__(self, builder_cls, root, category, folder, report):
        self.builder_cls = builder_cls
        self.root = root
        self.category = category
        self.folder = folder
        self.report = report
        self.seen: dict[bytes, tuple[str, str]] = {}  # pixels -> split and name of the first

    def run(self) -> None:
        """Adds to the report."""
        title = f"{self.builder_cls.name}/{self.category}"
        with tempfile.TemporaryDirectory() as empty:  # TFDS wants a folder, and writes nothing
            config = self.builder_cls.config(self.category)
            self.builder = self.builder_cls(data_dir=empty, config=config)
        self.builder.log = lambda line: self.report.counts.append(f"{title}: {line}")
        try:
            planned = list(self.builder.file_examples(self.root, self.category))
        except (ValueError, OSError) as e:
            self._add("the build stops", str(e))
            self._read_all()
            self._add("not checked", f"{title}: masks, kinds of images, duplicates and counts")
            return
        for split, example in tqdm.tqdm(planned, title, unit=" images", leave=False, disable=None):
            self._check_example(split, example)
        for kind, line in self.builder.findings:
            self._add(kind, line)
        expected = self.builder_cls.EXPECTED.get(self.category, {})
        counts = dict(sorted(self.builder.counts.items()))
        self.report.counts.append(f"{title}: {store.describe_counts(counts, expected)}")
        for key in store.differing_counts(counts, expected):
            line = f"{title}: {key} {counts.get(key, 0)} of {expected[key]}"
            self._add("counts differ from the published ones", line)

    def _add(self, kind: str, line: str) -> None:
        self.report.problems[kind].append(line)

    def _name(self, path: pathlib.Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _read_all(self) -> None:
        """Names every damaged image; the builder stopped at the first."""
        for path in files.list_images(self.folder):
            try:
                images.decode(path.read_bytes(), cv2.IMREAD_UNCHANGED, str(path))
            except (ValueError, OSError) as e:
                if str(e) not in self.report.problems["the build stops"]:
                    self._add("the build stops", str(e))

    def _check_example(self, split: str, example) -> None:
        has_mask = None
        try:
            example = example() if callable(example) else example
            has_mask = self.builder.make_record(split, example)["has_mask"]
        except (ValueError, OSError) as e:
            is_left_out = self.builder.LEAVES_OUT and isinstance(e, images.Damaged | OSError)
            self._add(common.UNREADABLE if is_left_out else "the build stops", str(e))
            if callable(example):
                return  # not even its files are known
        self._check_image(split, example["image"])
        self._check_mask(example, has_mask)

    def _check_image(self, split: str, path: pathlib.Path) -> None:
        try:
            data = path.read_bytes()
            pixels = images.decode_upright(data, str(path))
        except (ValueError, OSError):
            return  # no record could be made of it: reported
        name = self._name(path)
        self._check_format(path, data)
        if pixels.ndim == 2:
            self._add("grey image", name)
        if pixels.dtype == np.uint16:
            self._add("16 bits a pixel", name)
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            self._add("alpha channel", name)
        first_split, first = self.seen.setdefault(_content(pixels), (split, name))
        if first_split != split:
            pair = (first, name) if first_split == "train" else (name, first)
            self._add("same pixels in train and in test", " and ".join(pair))

    def _check_mask(self, example: common.Example, has_mask: bool | None) -> None:
        """`has_mask` is the record's, None if none could be made."""
        path = example.get("mask")
        is_defective = example["label"] == "anomaly"
        if isinstance(path, tuple):
            for part in path:
                self._check_mask({**example, "mask": part}, has_mask)
            return
        if path is None or not path.is_file():
            if path is not None and is_defective:
                self._add("no mask for a defective image", self._name(example["image"]))
            return
        try:
            grey = images.read_grey(path)
        except (ValueError, OSError):
            return  # as above
        self._check_format(path, path.read_bytes())
        if np.unique(grey).size > 2 and not self.builder.LEAVES_OUT:  # who reads levels says how
            self._add("mask of more than two levels", self._name(path))
        if is_defective and has_mask is False:
            if any(path.name in line for _, line in self.builder.findings):
                return
            kind = "mask too faint for the data set's rule"
            self._add(kind if grey.any() else "empty mask of a defective image", self._name(path))

    def _check_format(self, path: pathlib.Path, data: bytes) -> None:
        found = images.format_of(data)
        if found and path.suffix.lower() not in images.SUFFIXES_OF_FORMAT[found]:
            self._add("named as another format", f"{self._name(path)} holds {found}")


def _content(pixels: np.ndarray) -> bytes:
    """A hash of the visible pixels: equal for a grey image stored with one channel or three."""
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(3, axis=2)
    digest = hashlib.blake2b(repr((pixels.shape[:2], pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels[..., :3]))
    return digest.digest()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_builders.check", description="Check the raw images of a data set."
    )
    parser.add_argument("name", help=f"data set: {', '.join(sorted(build.BUILDERS))}")
    parser.add_argument("--raw_dir", required=True, help="folder of the raw images")
    parser.add_argument(
        "--category", action="append", help="only this category; may be given several times"
    )
    parser.add_argument("--list_all", action="store_true", help="name every file of every kind")
    args = parser.parse_args(argv)
    try:
        report = check(args.name, args.raw_dir, args.category)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(report.text(args.list_all))
    return 1 if report.must_mend() else 0


if __name__ == "__main__":
    sys.exit(main())
