"""Which files of a raw folder belong to the data, and a fingerprint of them."""

import hashlib
import os
import pathlib

from data_builders import images

_IGNORED_NAMES = ("__MACOSX", "Thumbs.db")


def list_images(folder: os.PathLike, recursive: bool = True) -> list[pathlib.Path]:
    """Returns the image files of a folder, sorted by path; links to folders are followed.

    Names that start with "." (macOS writes `._x.png`), `__MACOSX` and `Thumbs.db` do not count.

    Raises:
      ValueError: a link to nothing, or a pipe, whose reading would never end.
    """
    found, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        is_new = real not in visited  # a link may lead back up
        visited.add(real)
        folders[:] = [name for name in folders if is_new and recursive and is_visible(name)]
        if is_new:
            found += [pathlib.Path(parent, n) for n in names if is_visible(n) and is_image(n)]
    if odd := [path for path in found if not path.is_file()]:
        raise ValueError(f"{odd[0]}: a link to nothing, or no ordinary file; delete it")
    return sorted(found, key=pathlib.Path.as_posix)


def list_folders(folder: os.PathLike) -> list[pathlib.Path]:
    """Returns the visible sub-folders, sorted; an empty list if there is no such folder."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and is_visible(p.name))


def is_visible(name: str) -> bool:
    """Whether a file or folder name belongs to the data, not to an operating system."""
    return not name.startswith(".") and name not in _IGNORED_NAMES


def is_image(name: str) -> bool:
    """Whether a file name ends as an image's does."""
    return name.lower().endswith(images.SUFFIXES)


def sha256(path: pathlib.Path) -> str:
    """The file's sha256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_fingerprint(folder: os.PathLike) -> str:
    """Returns a hash of the relative names, sizes and times of a folder's image files.

    The time belongs to it: uncompressed pictures of another line have the same names and sizes.
    """
    digest = hashlib.sha256()
    for path in list_images(folder):
        name = path.relative_to(folder).as_posix()
        known = path.stat()
        line = f"{name}\0{known.st_size}\0{known.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
