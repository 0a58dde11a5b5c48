"""Paths, locks and small files that no reader sees half-written; words for a full disk."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator

from absl import logging

LOCAL_ONLY = (
    "expected a file or folder here; copy what is in a bucket, or mount it as one (gcsfuse). Work "
    "directories, data.data_dir, teacher.weights and student.init may be gs:// addresses"
)
# The system's words for a disk that takes no more: full, over the quota, over a file's limit.
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def is_remote(place: str | os.PathLike) -> bool:
    """Whether a path is meant as an address such as gs://bucket/name, or gs:/bucket/name."""
    return "://" in str(place) or str(place).startswith("gs:")


def cache_dir() -> pathlib.Path:
    """The folder of copies that may be fetched again: $MMRJAX_CACHE, or ~/.cache/mmrjax."""
    return pathlib.Path(os.environ.get("MMRJAX_CACHE", "~/.cache/mmrjax")).expanduser()


def check_address(address: str) -> str:
    """An address gs://<bucket>/<folder> as it is used: without a slash at its end.

    Raises:
      ValueError: it is none, or has names that mean something else in a folder.
    """
    names = address.removeprefix("gs://").rstrip("/").split("/")
    if not address.startswith("gs://") or {"", ".", ".."} & {*names}:
        raise ValueError(f"{address}: expected a folder here, or gs://<bucket>/<folder>")
    return address.rstrip("/")


def local_path(text: str) -> pathlib.Path:
    """A folder or file of a command line, as argparse's `type`.

    Raises:
      argparse.ArgumentTypeError: a bucket's address, which pathlib would turn into a folder "gs:".
    """
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text}: {LOCAL_ONLY}")
    return pathlib.Path(text).expanduser()


def write_text(path: pathlib.Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes `data` to a neighbour of `path` and renames it; makes the folder if absent.

    Raises:
      OSError: naming `path`, which is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Three seeds that run at once write one results.json; each has a file of its own until then.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the name: after a power cut there is no empty file
        os.replace(part, path)
    except BaseException as e:  # Ctrl-C too
        part.unlink(missing_ok=True)
        if isinstance(e, OSError):  # the system's own names no file
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other program holds a folder, and holds it; makes it if absent.

    The lock is on the folder itself, so that a killed program leaves nothing behind. A file system
    without locks on folders (NFS) keeps nobody out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.warning("%s: another call is at work there; waiting until it ends", folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as e:
            logging.debug("%s cannot be locked: %s", folder, e)
        yield
    finally:
        os.close(handle)


def read_json(path: pathlib.Path) -> dict | None:
    """The object in a JSON file; None if the file is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def runs(folder: pathlib.Path, name: str, above: str = "*/*") -> list[pathlib.Path]:
    """The run folders below a folder that hold a file, sorted.

    Args:
      folder: a work directory, the root of a view, or any folder above runs.
      name: name of the file, such as config.json.
      above: pattern of the folders between `folder` and a run; <method>/<category> by default.
    """
    paths = sorted(folder.glob(f"{above}/seed*/{name}"))
    return [path.parent for path in paths if is_run_name(path.parent.name)]


def is_run_name(name: str) -> bool:
    """Whether a folder seed<k> is a run; seed54_old, which somebody copied, is none."""
    return name.startswith("seed") and name.removeprefix("seed").isdecimal()


def full_disk(e: Exception) -> str:
    """The system's words for a full disk if `e` has them, "" otherwise.

    Libraries in C++ hand on the system's words, not its error number.
    """
    return next((words for words in FULL if words in str(e)), "")


def explain(e: Exception) -> str:
    """An error as a single line for a person, with what to do about a full disk."""
    line = " ".join(str(e).split())
    if full_disk(e):
        line += ": the disk is full; make room and repeat the command, it continues what is saved"
    return line


def unreadable(path: pathlib.Path, e: Exception) -> ValueError:
    """The error of a file of a work directory that is absent or damaged, with what to do."""
    return ValueError(
        f"{path} is absent or damaged ({type(e).__name__}: {e}); delete it, and the command that "
        "made it makes it again"
    )
