"""Unpacks an archive that may be hostile: files and folders only, all inside the target.

Refused, with nothing left behind: absolute names and `..`, links, devices and pipes, entries that
overwrite one another, encryption, and more bytes than a limit, to which a small file counts as a
disk block. Python's own extraction is not used: what it lets through has changed with its versions.
"""

import dataclasses
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

_BLOCK = 1 << 20  # bytes
_LEAST = 4096  # bytes that a file takes on a disk, and so counts for
_GIB = 1 << 30

_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # an unknown kind of compression
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str
    kind: str  # "file", "folder", or what it is instead
    open: Callable[[], IO[bytes]]


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
    left = int(limit * _GIB)
    try:
        for entry in _entries(path):
            left -= max(_write(entry, workplace, left, path), _LEAST)
            if left < 0:
                raise ValueError(
                    f"{path}: unpacks to more than {limit:g} GiB; if it is meant to be so large, "
                    f"set MMRJAX_MAX_UNPACKED_GIB={2 * limit:g}"
                )
        workplace.rename(target)
    except _DAMAGE as e:
        raise ValueError(f"{path}: the archive is damaged ({e}); delete it and run again") from e
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _write(entry: _Entry, folder: pathlib.Path, left: int, path: pathlib.Path) -> int:
    """Writes one entry below `folder`; returns its bytes, of which it stops after `left`."""
    name = pathlib.PurePosixPath(entry.name)
    if name.is_absolute() or ".." in name.parts or "\0" in entry.name:
        raise ValueError(f"{path}: {entry.name!r} lies outside the folder; the archive is refused")
    if entry.kind not in ("file", "folder"):
        raise ValueError(f"{path}: {entry.name!r} is {entry.kind}; the archive is refused")
    place = folder / name
    try:
        if entry.kind == "folder":
            place.mkdir(parents=True, exist_ok=True)
            return 0
        place.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with entry.open() as source, place.open("xb") as out:
            while size <= left and (block := source.read(_BLOCK)):
                size += out.write(block)
        return size
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as e:
        raise ValueError(f"{path}: {entry.name!r} occurs twice; the archive is refused") from e


def _entries(path: pathlib.Path) -> Iterator[_Entry]:
    if zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):
        yield from _zip_entries(path)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            kinds = {
                "file": member.isreg(),
                "folder": member.isdir(),
                "a symbolic link": member.issym(),
                "a hard link": member.islnk(),
            }
            kind = next((name for name, is_it in kinds.items() if is_it), "a device or a pipe")
            yield _Entry(member.name, kind, lambda member=member: archive.extractfile(member))


def _zip_entries(path: pathlib.Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            mode = stat.S_IFMT(info.external_attr >> 16)
            kind = "folder" if info.is_dir() else "file"
            if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                kind = "a link, a device or a pipe"
            if info.flag_bits & 1:
                kind = "encrypted"
            yield _Entry(info.filename, kind, lambda info=info: archive.open(info))
