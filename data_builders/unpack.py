"""Unpacks an archive that may be hostile: files and folders only, all inside the target.

Refused, with nothing left behind: absolute names and `..`, links, devices and pipes, entries that
overwrite one another, encryption, and more bytes than a limit, to which a small file counts as a
disk block. `tarfile`'s own extraction has its safe filter since Python 3.11.4 only.
"""

import lzma
import pathlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from data_builders import limits

_LEAST = 4096  # bytes that a file takes on a disk, and so counts for
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # an unknown kind of compression
)


def unpack(path: pathlib.Path, target: pathlib.Path) -> None:
    """Unpacks a tar or zip file to a new folder, which appears when all of it is there.

    Args:
      path: the archive; .tar may be compressed with gzip, bzip2 or xz.
      target: must not exist; its parent folder must.

    Raises:
      ValueError: damaged, or refused as the module's docstring says; the entry is named.
      OSError: the disk fails.
    """
    workplace = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(workplace, ignore_errors=True)  # of a killed attempt
    workplace.mkdir()
    limit = limits.max_unpacked_gib()
    left = limit * 2**30
    try:
        for name, size, kind, read in _entries(path):
            left -= max(size, _LEAST)
            if left < 0:
                raise ValueError(
                    f"{path}: unpacks to more than {limit:g} GiB; if it is meant to be so large, "
                    f"set MMRJAX_MAX_UNPACKED_GIB={2 * limit:g}"
                )
            if reason := _write(workplace, name, kind, read):
                raise ValueError(f"{path}: {name!r} {reason}; the archive is refused")
        workplace.rename(target)
    except _DAMAGE as e:
        raise ValueError(f"{path}: the archive is damaged ({e}); delete it and run again") from e
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _write(folder: pathlib.Path, name: str, kind: str, read: Callable[[], IO[bytes]]) -> str:
    """Writes an entry below `folder`; returns why it is refused, "" if it is not."""
    place = pathlib.PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\0" in name:
        return "lies outside the folder"
    if kind not in ("file", "folder"):
        return f"is {kind}"
    try:
        if kind == "folder":
            (folder / place).mkdir(parents=True, exist_ok=True)
            return ""
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        with read() as source, (folder / place).open("xb") as out:
            shutil.copyfileobj(source, out)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        return "occurs twice"
    return ""


def _entries(path: pathlib.Path) -> Iterator[tuple[str, int, str, Callable[[], IO[bytes]]]]:
    """Yields (name, most bytes to be read of it, "file", "folder" or another kind, its opener)."""
    if zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)
                kind = "folder" if info.is_dir() else "file"
                if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                    kind = "a link, a device or a pipe"
                if info.flag_bits & 1:
                    kind = "encrypted"
                yield info.filename, info.file_size, kind, lambda info=info: archive.open(info)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            kind = "file" if member.isreg() else "a link, a device or a pipe"
            kind = "folder" if member.isdir() else kind
            yield member.name, member.size, kind, lambda member=member: archive.extractfile(member)
