"""A work directory in a bucket (gs://…): its files lie in a folder here while a command works.

What runs knows folders alone: it renames, appends, maps into memory and draws. So a work directory
in a bucket is copied into a temporary folder, and what has changed there is sent back before every
checkpoint, after every run and at the end. Files are sent in the order in which they were written,
so that a command that is killed leaves in the bucket what it would leave in a folder.

Checkpoints are not copied: Orbax reads and writes them where they are (`origin`), which alone works
when several hosts save one together. Of several processes the first alone copies; all of them open
the work directory, and so know where its checkpoints are. Folders are used as they are.
"""

import argparse
import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

from absl import logging
from etils import epath

from data_builders import buckets
from mmrjax.runtime import processes

# What is large and read by no command from the folder: checkpoints, and maps for the user.
LEFT_THERE = re.compile(r"(.*/)?((checkpoints|fitted)(-damaged-\d+)?/.*|maps/maps\.npy)")


class Stage:
    """A folder that stands for an address, and what is known to be the same in both."""

    def __init__(self, address: str, folder: pathlib.Path):
        """Begins with nothing."""
        self.address, self.folder = address, folder
        self._same: dict[str, tuple[int, int]] = {}

    def fetch(self, suffix: str) -> None:
        """Copies what the bucket holds and ends in `suffix`."""
        found = [
            name
            for name in buckets.contents(self.address)
            if name.endswith(suffix) and not LEFT_THERE.fullmatch(name)
        ]
        if found:
            logging.info("copying %d files of %s", len(found), self.address)
        buckets.download(self.address, self.folder, found)
        self._same = self._present()

    def send(self) -> None:
        """Copies what has changed here, the oldest first, and deletes what is gone."""
        present = self._present()
        changed = [name for name, facts in present.items() if self._same.get(name) != facts]
        changed.sort(key=lambda name: present[name][1])
        buckets.upload(self.folder, self.address, changed)
        buckets.delete(self.address, self._same.keys() - present.keys())
        self._same = present

    def _present(self) -> dict[str, tuple[int, int]]:
        """{name: (size, time of the last change)} of the folder's files."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and path.suffix != ".part":
                facts = path.stat()
                name = path.relative_to(self.folder).as_posix()
                found[name] = (facts.st_size, facts.st_mtime_ns)
        return found


_stages: list[Stage] = []
_names: dict[str, str] = {}  # of folders, for messages: also when they are gone


def place(text: str) -> str:
    """A work directory of a command line, as argparse's `type`: a folder, or an address.

    Raises:
      argparse.ArgumentTypeError: an address of another kind than gs://.
    """
    try:
        return buckets.check(text) if buckets.is_remote(text) else text
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


@contextlib.contextmanager
def opened(place: str | os.PathLike, suffix: str | None = None) -> Iterator[pathlib.Path]:
    """The folder to work in: `place` itself, or a copy of the bucket's; called by all processes.

    Args:
      place: a folder, or an address.
      suffix: where something is only read: copy files with this ending alone, and send none.

    Raises:
      ValueError, OSError: a bucket that cannot be used, saying why.
    """
    if not buckets.is_remote(place):
        yield pathlib.Path(place)
        return
    address = buckets.check(str(place))
    with tempfile.TemporaryDirectory(prefix="mmrjax-") as home:
        # With the names of the address: a run is known by those of its folders.
        folder = pathlib.Path(home).resolve() / address.removeprefix(buckets.SCHEME)
        folder.mkdir(parents=True)
        stage = Stage(address, folder)
        _stages.append(stage)
        _names[str(folder)] = address
        try:
            processes.first(lambda: stage.fetch(suffix or ""))
            yield folder
        except BaseException:  # Ctrl-C too: whatever is finished shall not be done again
            if suffix is None and processes.is_first():
                _try_to_send(stage)
            raise
        else:
            if suffix is None:
                send(folder)
        finally:
            _stages.remove(stage)


def send(path: pathlib.Path) -> None:
    """Sends what has changed to the bucket, if `path` is of one; called by all processes.

    Raises:
      ValueError, OSError: a bucket that cannot be used, saying why.
    """
    if (stage := _stage_of(path)) is not None:
        processes.first(stage.send)


def origin(path: pathlib.Path) -> epath.Path:
    """Where a file or folder of a work directory really is: itself, or its place in the bucket."""
    stage = _stage_of(path)
    if stage is None:
        return epath.Path(path)
    return epath.Path(stage.address) / path.relative_to(stage.folder).as_posix()


def named(text: str) -> str:
    """A text for a person: with the addresses in place of the folders that stood for them."""
    for folder, address in _names.items():
        text = text.replace(folder, address)
    return text


def _stage_of(path: pathlib.Path) -> Stage | None:
    return next((stage for stage in _stages if path.is_relative_to(stage.folder)), None)


def _try_to_send(stage: Stage) -> None:
    """Another error is on its way, of which this must take nothing."""
    try:
        stage.send()
    except (ValueError, OSError) as e:
        logging.error("%s", e)
