"""The records of one category on disk: whether they are fresh, and how they are written.

Records lie in `<data_dir>/<name>/<category>/<version>/` with a `fingerprint.json` beside the TFDS
files, which marks finished and fresh records. A build happens in a hidden folder
that is renamed when complete; a lock makes a second process wait and then reuse the first one's
records. Called by `build` only.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds
import tqdm

from data_builders import common

FINGERPRINT = "fingerprint.json"
LEFT_OUT = (common.UNREADABLE, "a good image whose mask marks a defect")  # kinds of findings
SHOWN = 20  # of these


def read_fingerprint(record_dir: pathlib.Path) -> dict | None:
    """Returns what is known of finished records (schema, fingerprint, counts, built), or None."""
    if not (record_dir / "dataset_info.json").is_file():
        return None
    try:
        stored = json.loads((record_dir / FINGERPRINT).read_text())
    except (OSError, ValueError):
        return None
    is_complete = isinstance(stored, dict) and {"schema", "fingerprint", "built"} <= stored.keys()
    return stored if is_complete else None


def describe_counts(found: Mapping[str, int], expected: Mapping[str, int]) -> str:
    """Returns a line of counts, as found/expected if the data set's publisher gives a number."""
    keys = [*expected, *sorted(found.keys() - expected.keys())]
    wrong = differing_counts(found, expected)
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


def differing_counts(found: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """Returns the lines of the table of counts that are not as published."""
    return [key for key in expected if found.get(key, 0) != expected[key]]


class CategoryRecords:
    """The records of a category on disk, and how they are built."""

    def __init__(self, builder_cls, category, root, home, log):
        self.builder_cls = builder_cls
        self.category = category
        self.root = root
        self.home = home
        self.log = log
        self.title = f"{builder_cls.name}/{category}"
        self.path = home / category / str(builder_cls.VERSION)
        self.workplace = home / f".{category}.building"

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
        if self._reason_to_build(fingerprint) or self.workplace.exists():
            with self.lock():
                # Another process may have built them while this one waited for the lock.
                if reason := self._reason_to_build(fingerprint):
                    self.log(f"{self.title}: {reason}")
                    self._build(fingerprint)
                    return
                # A build was killed after the records had moved: only its empty folder is left.
                shutil.rmtree(self.workplace, ignore_errors=True)
        self.log(f"{self.title}: up to date in {self.path}")
        self._tell_left_out(read_fingerprint(self.path))

    def _tell_left_out(self, stored: Mapping) -> None:
        """Names the pictures that could not be used, at every call."""
        lines = stored.get("left_out") or []
        if lines:
            self.log(f"{self.title}: {len(lines)} pictures LEFT OUT; python -m data_builders.check")
        for line in lines[:SHOWN]:
            self.log(f"{self.title}: left out: {line}")

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
        shutil.rmtree(self.workplace, ignore_errors=True)  # left by a killed build
        try:
            builder = self._write()
            counts = dict(sorted(builder.counts.items()))
            stored = {
                "schema": common.SCHEMA_VERSION,
                "fingerprint": fingerprint,
                "built": time.strftime("%Y-%m-%d %H:%M:%S"),
                "counts": counts,
                "full_scale": builder.full_scale,
                "left_out": [line for kind, line in builder.findings if kind in LEFT_OUT],
            }
            made = pathlib.Path(builder.data_path)
            (made / FINGERPRINT).write_text(json.dumps(stored, indent=1))
            self.replace(made)
        finally:
            shutil.rmtree(self.workplace, ignore_errors=True)
        self._tell_left_out(stored)
        expected = self.builder_cls.EXPECTED.get(self.category, {})
        self.log(f"{self.title}: {describe_counts(counts, expected)}")
        self.log(f"{self.title}: built in {time.monotonic() - start:.1f} s: {self.path}")

    def replace(self, made: pathlib.Path) -> None:
        """Moves a complete folder, which lies in `workplace`, to the records' place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.rename(self.workplace / "replaced")
        made.rename(self.path)

    def _write(self) -> common.RecordBuilder:
        """Runs the TFDS builder under a progress bar, which shows on a terminal only."""
        tfds.disable_progress_bar()  # its own bars nest and know no total
        builder = self.builder_cls(
            data_dir=self.workplace, config=self.builder_cls.config(self.category)
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
    def lock(self) -> Iterator[None]:
        """Lets one process at a time build this category; a killed process loses the lock."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / f".{self.category}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.log(f"{self.title}: waiting for another process that builds it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
