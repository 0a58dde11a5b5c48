"""A work directory in a bucket (gs://…): its files lie in a folder here while a command works.

The programs rename, append, lock and memory-map files, which a bucket does not offer. A work
directory in a bucket is therefore copied into a temporary folder, and changed files are sent back
before every checkpoint, after every run and at the end. The oldest file is sent first, so that a
killed command leaves in the bucket what it would leave in a folder.

Checkpoints are not copied: Orbax reads and writes them in the bucket (`Stage.store`), the only way
for several hosts to save a checkpoint together. Only the first of several processes copies files;
all of them open the work directory and so know its address. A plain folder is used as it is.
"""

import contextlib
import logging as std_logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

from absl import logging
from etils import epath

from data_builders import buckets
from mmrjax.runtime import checkpoint, files, processes

# Large files that no command reads from the folder: checkpoints, and maps for the user.
LEFT_THERE = re.compile(r"(.*/)?((checkpoints|fitted)(-damaged-\d+)?/.*|maps/maps\.npy)")


class Stage:
    """A work directory: the folder to work in, and its address if it is in a bucket."""

    def __init__(self, folder: pathlib.Path, address: str = ""):
        """Without an address, the folder itself is the work directory."""
        self.folder, self.address = folder, address
        self._same: dict[str, tuple[int, int]] = {}  # files that are equal here and there

    def store(self, run: pathlib.Path) -> checkpoint.Store:
        """The checkpoints of a run, whose folder is `run`."""
        if not self.address:
            return checkpoint.Store(run)
        root = epath.Path(self.address) / run.relative_to(self.folder).as_posix()
        return checkpoint.Store(root, self.send, lambda: buckets.naming(str(root)))

    def named(self, text: str) -> str:
        """A text for a person: with the address in place of the folder that stands for it."""
        return text.replace(str(self.folder), self.address) if self.address else text

    def fetch(self, suffix: str) -> None:
        """Copies the files of the bucket that end in `suffix`.

        Raises:
          ValueError, OSError: a bucket that cannot be used, saying why.
        """
        names = [
            name
            for name in buckets.contents(self.address)
            if name.endswith(suffix) and not LEFT_THERE.fullmatch(name)
        ]
        if names:
            logging.info("copying %d files of %s", len(names), self.address)
        buckets.download(self.address, self.folder, names)
        self._same = self._present()

    def send(self) -> None:
        """Sends changed files to the bucket, if there is one; called by all processes.

        Raises:
          ValueError, OSError: a bucket that cannot be used, saying why.
        """
        if self.address:
            processes.first(self._send)

    def _send(self) -> None:
        """Copies changed files, the oldest first, and deletes in the bucket what is gone here."""
        present = self._present()
        changed = [name for name, facts in present.items() if self._same.get(name) != facts]
        changed.sort(key=lambda name: present[name][1])
        buckets.upload(self.folder, self.address, changed)
        buckets.delete(self.address, self._same.keys() - present.keys())
        self._same = present

    def save_after_error(self) -> None:
        """Sends finished files though an error is on its way, which no other may replace."""
        if processes.is_first():
            try:
                self._send()
            except (ValueError, OSError) as e:
                logging.error("%s", e)

    def _present(self) -> dict[str, tuple[int, int]]:
        """{name: (size, time of the last change)} of the folder's files."""
        facts = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and path.suffix != ".part":
                status = path.stat()
                name = path.relative_to(self.folder).as_posix()
                facts[name] = (status.st_size, status.st_mtime_ns)
        return facts

    def name_in_record(self, record: std_logging.LogRecord) -> bool:
        """A filter of log handlers: names the address in a line, and lets every line pass."""
        record.msg, record.args = self.named(record.getMessage()), None
        return True

    def name_in_error(self, error: BaseException) -> None:
        """Names the address in an error's words."""
        error.args = tuple(self.named(a) if isinstance(a, str) else a for a in error.args)
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = self.named(error.filename)


@contextlib.contextmanager
def opened(place: str | os.PathLike, suffix: str | None = None) -> Iterator[Stage]:
    """The work directory `place`, ready to work in; called by all processes.

    Log lines and errors name the address, not the temporary folder, while it is open.

    Args:
      place: a folder, or an address.
      suffix: for reading only: copies files with this ending alone, and sends none.

    Raises:
      ValueError, OSError: a bucket that cannot be used, saying why.
    """
    if not files.is_remote(place):
        yield Stage(pathlib.Path(place))
        return
    address = files.check_address(str(place))
    with tempfile.TemporaryDirectory(prefix="mmrjax-") as home:
        # With the names of the address: the names of its folders identify a run.
        folder = pathlib.Path(home).resolve() / address.removeprefix(buckets.SCHEME)
        folder.mkdir(parents=True)
        stage, handler = Stage(folder, address), logging.get_absl_handler()
        handler.addFilter(stage.name_in_record)
        try:
            processes.first(lambda: stage.fetch(suffix or ""))
            yield stage
            if suffix is None:
                stage.send()
        except BaseException as e:  # Ctrl-C too: finished work shall not be repeated
            if suffix is None:
                stage.save_after_error()
            stage.name_in_error(e)
            raise
        finally:
            handler.removeFilter(stage.name_in_record)
