"""Builds the records of a data set: what is missing or stale is built, what is fresh is reused.

    python -m data_builders.build magnetic_tile --raw_dir=~/tiles --data_dir=data

`mmrjax.main` calls `build()` before it trains. Records lie in
`<data_dir>/<name>/<category>/<version>/` with a `fingerprint.json` beside the TFDS files, which
tells finished and fresh records from anything else. A build happens in a hidden folder that is
renamed when complete; a lock makes a second process wait and then reuse the first one's records.
"""

import argparse
import contextlib
import fcntl
import importlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds
import tqdm
from absl import logging

from data_builders import common

# Data set -> module with its class `Builder`, imported when asked for.
BUILDERS: dict[str, str] = {
    name: f"data_builders.{name}.{name}_dataset_builder"
    for name in ("aebad", "demo_parts", "folder", "magnetic_tile", "mvtec_ad")
}

_FINGERPRINT = "fingerprint.json"


def build(
    name: str,
    raw_dir: str | pathlib.Path | None,
    data_dir: str | pathlib.Path,
    categories: Sequence[str] | None = None,
    log: Callable[[str], None] = logging.info,
) -> dict[str, pathlib.Path]:
    """Makes sure that the records of a data set exist and are up to date.

    Args:
      name: the data set, one of BUILDERS.
      raw_dir: the folder with the raw images; None or absent if the records exist already, and
        for data sets that a program draws.
      data_dir: where records live; created if need be.
      categories: which ones; None takes all that the raw folder holds or that are built.
      log: receives what is done, line by line.

    Returns:
      Category -> directory of its records, for `tfds.builder_from_directory`.

    Raises:
      ValueError: unknown name or category, or raw data that is damaged or contradicts itself.
      FileNotFoundError: neither raw data nor records; the message says how to get the data.
    """
    builder_cls = load_builder(name)
    data_dir = pathlib.Path(data_dir).expanduser()
    raw_dir = pathlib.Path(raw_dir).expanduser() if raw_dir else None
    root = _find_root(builder_cls, raw_dir)
    if builder_cls.PROCEDURAL:
        in_raw = set(builder_cls.CATEGORIES)
    else:
        in_raw = set(builder_cls.category_folders(root)) if root else set()
    record_dirs = {}
    for category in _wanted(builder_cls, raw_dir, data_dir / name, in_raw, categories):
        records = _Records(builder_cls, category, root, data_dir / name, log)
        if category in in_raw:
            records.make_fresh()
        else:
            records.check_usable()
            log(f"{records.title}: no raw data at hand, using the records in {records.path}")
        record_dirs[category] = records.path
    return record_dirs


def load_builder(name: str) -> type[common.RecordBuilder]:
    """Returns the builder class of a data set.

    Raises:
      ValueError: no such data set.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}; available: {sorted(BUILDERS)}")
    return importlib.import_module(BUILDERS[name]).Builder


def read_fingerprint(record_dir: pathlib.Path) -> dict | None:
    """Returns what is known of finished records (schema, fingerprint, counts, built), or None."""
    if not (record_dir / "dataset_info.json").is_file():
        return None
    try:
        stored = json.loads((record_dir / _FINGERPRINT).read_text())
    except (OSError, ValueError):
        return None
    is_complete = isinstance(stored, dict) and {"schema", "fingerprint", "built"} <= stored.keys()
    return stored if is_complete else None


def describe_counts(found: Mapping[str, int], expected: Mapping[str, int]) -> str:
    """Returns one line of counts, found/expected where the data set's publisher gives a number."""
    keys = [*expected, *sorted(found.keys() - expected.keys())]
    wrong = [key for key in expected if found.get(key, 0) != expected[key]]
    line = "found/expected: " if expected else "found: "
    line += ", ".join(
        f"{key} {found.get(key, 0)}" + (f"/{expected[key]}" if key in expected else "")
        for key in keys
    )
    return (
        f"{line}. THE DOWNLOAD DIFFERS from the published one in: {', '.join(wrong)}"
        if wrong
        else line
    )


def _find_root(
    builder_cls: type[common.RecordBuilder], raw_dir: pathlib.Path | None
) -> pathlib.Path | None:
    """The folder that has the published layout, None if there is none."""
    if builder_cls.PROCEDURAL or raw_dir is None:
        return None
    if raw_dir.is_file():
        raise ValueError(f"{builder_cls.name}: {raw_dir} is a file; unpack it and name the folder")
    return builder_cls.find_root(raw_dir)


def _wanted(
    builder_cls: type[common.RecordBuilder],
    raw_dir: pathlib.Path | None,
    home: pathlib.Path,
    in_raw: set[str],
    categories: Sequence[str] | None,
) -> list[str]:
    """The categories to deliver: those asked for, or all that are at hand."""
    built = {
        folder.name
        for folder in common.list_folders(home)
        if read_fingerprint(folder / str(builder_cls.VERSION))
    }
    if categories is None:
        at_hand = builder_cls.select_categories(raw_dir, in_raw, built)
        if not at_hand:
            raise FileNotFoundError(_missing_message(builder_cls, raw_dir, home, ""))
        return at_hand
    for category in dict.fromkeys(categories):
        if builder_cls.CATEGORIES and category not in builder_cls.CATEGORIES:
            raise ValueError(
                f"{builder_cls.name}: unknown category {category!r}; "
                f"available: {list(builder_cls.CATEGORIES)}"
            )
        if category not in in_raw | built:
            raise FileNotFoundError(_missing_message(builder_cls, raw_dir, home, f"/{category}"))
    return list(dict.fromkeys(categories))


def _missing_message(
    builder_cls: type[common.RecordBuilder],
    raw_dir: pathlib.Path | None,
    home: pathlib.Path,
    category: str,
) -> str:
    if raw_dir is None:
        found = "no raw folder is given"
    elif not raw_dir.is_dir():
        found = f"the raw folder {raw_dir} does not exist"
    else:
        names = sorted(p.name for p in raw_dir.iterdir() if common.is_visible(p.name))
        listing = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"
        found = f"the raw folder {raw_dir} has not the layout expected; it holds: {listing}"
    return (
        f"{builder_cls.name}{category}: no records in {home}, and {found}. {builder_cls.HOW_TO_GET}"
    )


class _Records:
    """The records of one category on disk, and how they come about."""

    def __init__(self, builder_cls, category, root, home, log):
        self.builder_cls = builder_cls
        self.category = category
        self.root = root
        self.home = home
        self.log = log
        self.title = f"{builder_cls.name}/{category}"
        self.path = home / category / str(builder_cls.VERSION)

    def check_usable(self) -> None:
        """Raises FileNotFoundError if records without raw data follow another schema."""
        schema = read_fingerprint(self.path)["schema"]
        if schema != common.SCHEMA_VERSION:
            raise FileNotFoundError(
                f"{self.title}: the records in {self.path} follow schema {schema}, this version "
                f"needs {common.SCHEMA_VERSION}, and there is no raw data to build them again. "
                f"{self.builder_cls.HOW_TO_GET}"
            )

    def make_fresh(self) -> None:
        """Builds the records if they are missing or stale."""
        fingerprint = self.builder_cls.fingerprint(self.root, self.category)
        if self._reason_to_build(fingerprint):
            with self._lock():
                # Another process may have built them while this one waited for the lock.
                if reason := self._reason_to_build(fingerprint):
                    self.log(f"{self.title}: {reason}")
                    self._build(fingerprint)
                    return
        self.log(f"{self.title}: up to date in {self.path}")

    def _reason_to_build(self, fingerprint: str) -> str:
        """Why records must be built; an empty text if they are fresh."""
        source = "" if self.root is None else f" from {self.root}"
        stored = read_fingerprint(self.path)
        if stored is None:
            return f"building the records{source}"
        if stored["schema"] != common.SCHEMA_VERSION:
            change = f"schema {stored['schema']} became {common.SCHEMA_VERSION}"
        elif stored["fingerprint"] != fingerprint:
            change = f"the {'raw data' if source else 'generator'} changed since {stored['built']}"
        else:
            return ""
        return f"rebuilding the records{source}: {change}"

    def _build(self, fingerprint: str) -> None:
        """Writes the records in a hidden folder and moves them to their place when complete."""
        start = time.monotonic()
        workplace = self.home / f".{self.category}.building"
        shutil.rmtree(workplace, ignore_errors=True)  # left by a killed build: the lock is ours
        try:
            builder = self._write(workplace)
            counts = dict(sorted(builder.counts.items()))
            stored = {
                "schema": common.SCHEMA_VERSION,
                "fingerprint": fingerprint,
                "built": time.strftime("%Y-%m-%d %H:%M:%S"),
                "counts": counts,
            }
            made = pathlib.Path(builder.data_path)
            (made / _FINGERPRINT).write_text(json.dumps(stored, indent=1))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.path.rename(workplace / "replaced")
            made.rename(self.path)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        expected = self.builder_cls.EXPECTED.get(self.category, {})
        self.log(f"{self.title}: {describe_counts(counts, expected)}")
        self.log(f"{self.title}: built in {time.monotonic() - start:.1f} s: {self.path}")

    def _write(self, workplace: pathlib.Path) -> common.RecordBuilder:
        """Runs the TFDS builder under a progress bar, which shows on a terminal only."""
        tfds.disable_progress_bar()  # its own bars nest and know no total
        builder = self.builder_cls(
            data_dir=workplace, config=self.builder_cls.config(self.category)
        )
        builder.log = lambda line: self.log(f"{self.title}: {line}")
        options = tfds.download.DownloadConfig(manual_dir=self.root, try_download_gcs=False)
        with tqdm.tqdm(desc=self.title, unit=" images", leave=False, disable=None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            builder.on_record = show
            builder.download_and_prepare(download_config=options, file_format="array_record")
        builder.check_twins()
        return builder

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Lets one process at a time build this category; a killed process loses the lock."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / f".{self.category}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.log(f"{self.title}: waiting for another process that builds it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_builders.build", description="Build the records of a data set."
    )
    parser.add_argument("name", help=f"data set: {', '.join(sorted(BUILDERS))}")
    parser.add_argument("--raw_dir", help="folder of the raw images (not for demo_parts)")
    parser.add_argument("--data_dir", required=True, help="folder of the records")
    parser.add_argument(
        "--category", action="append", help="only this category; may be given several times"
    )
    args = parser.parse_args(argv)
    try:
        build(args.name, args.raw_dir, args.data_dir, args.category, log=_print_line)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _print_line(line: str) -> None:
    # Through tqdm, so that a line does not cut through the progress bar.
    tqdm.tqdm.write(line)


if __name__ == "__main__":
    sys.exit(main())
