"""Which files of a raw folder belong to the data, and a fingerprint of them."""

import hashlib
import os
import pathlib

from data_builders import images

_IGNORED_NAMES = ("__MACOSX", "Thumbs.db")
# Names that tell a folder that this project wrote: a run, its gallery, results of predictions.
OWN_OUTPUTS = (
    {"config.json", "results.json"}, {"gallery.json"}, {"scores.csv", "scores.jsonl"},
)  # fmt: skip
OWN_FOLDERS = ("overlays", "heat", "maps")
UNREAD_SUFFIXES = frozenset(
    ".gif .heic .heif .avif .jp2 .j2k .jxl .jfif .jpe .dng .raw .cr2 .nef .arw .pgm .ppm .pnm .exr "
    ".hdr .tga .ico .psd .svg .pdf .eps .ps .dcm .npy .npz .dib .pcx .fits .czi".split()
)


def list_images(folder: os.PathLike, recursive: bool = True) -> list[pathlib.Path]:
    """Returns the image files of a folder, sorted by path; links to folders are followed.

    Names that start with "." (macOS writes `._x.png`), `__MACOSX` and `Thumbs.db` do not count, nor
    does what a program of this project wrote: runs, and the results of predictions.
    """
    return [p for p in _walk(folder, recursive) if is_image(p.name) and p.is_file()]


def list_others(folder: os.PathLike) -> list[str]:
    """A line for each file that looks like a picture but is not read, with the reason."""
    found = []
    for path in _walk(folder, recursive=True):
        name = path.relative_to(folder).as_posix()
        if not path.exists():
            found += [f"{name}: a link to nothing"] if is_image(name) else []
        elif not path.is_file():
            found += [f"{name}: no ordinary file"] if is_image(name) else []
        elif path.suffix.lower() in UNREAD_SUFFIXES:
            found.append(f"{name}: {path.suffix} is not read; save it as PNG or TIFF")
    return found


def _walk(folder: os.PathLike, recursive: bool) -> list[pathlib.Path]:
    found, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        is_new = real not in visited  # a link may lead back up
        visited.add(real)
        own = any(marks <= {*names, *folders} for marks in OWN_OUTPUTS)
        if own and pathlib.Path(parent) != pathlib.Path(folder):
            is_new = False
        elif own:  # results were written among the pictures themselves
            folders[:] = [name for name in folders if name not in OWN_FOLDERS]
        folders[:] = [name for name in folders if is_new and recursive and is_visible(name)]
        if is_new:
            found += [pathlib.Path(parent, n) for n in names if is_visible(n)]
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


def printable(name: str) -> str:
    """A name as UTF-8 text on one line; other bytes and control characters become escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
