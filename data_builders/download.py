"""Fetches published files: a data set's archive, only when asked to, and pretrained weights.

An interrupted download continues at its last byte. An archive of an unexpected sha256 is not
unpacked, and no file gets its name before it is complete. The command line of `build` fetches
archives, whose content `unpack` judges; mmrjax/runs/pretrained.py fetches weights.
"""

import dataclasses
import http.client
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable

import tqdm

from data_builders import files, unpack

_BLOCK = 1 << 20  # bytes
_TIMEOUT = 60  # seconds without a byte


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published .tar, .tar.gz, .tar.xz or .zip: where it is, its sha256 in hex, its licence."""

    url: str
    sha256: str
    licence: str

    @property
    def filename(self) -> str:
        """The file's name at its publisher."""
        return self.url.rsplit("/", 1)[-1]


def fetch_and_unpack(
    archive: Archive, folder: pathlib.Path, log: Callable[[str], None]
) -> pathlib.Path:
    """Puts the archive and its content into `folder`; skips steps whose result is there already.

    Returns:
      The folder of the unpacked files, named after the archive.

    Raises:
      ValueError: another sha256 than expected, or an archive that `unpack` refuses.
      OSError: the network or the disk fails; the bytes so far are kept for the next attempt.
    """
    target = folder / archive.filename.split(".")[0]
    if target.is_dir():
        log(f"{target} is there already; nothing is downloaded")
        return target
    path = fetch(archive, folder, log)
    log(f"unpacking {path} to {target}")
    unpack.unpack(path, target)
    log(f"unpacked; {path} is no longer needed")
    return target


def fetch(archive: Archive, folder: pathlib.Path, log: Callable[[str], None]) -> pathlib.Path:
    """Returns the archive's file in `folder`, downloaded if it is not there, its sha256 checked.

    Raises:
      ValueError, OSError: as `fetch_and_unpack`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / archive.filename
    if not path.is_file():
        log(f"downloading {archive.url}, licence {archive.licence}")
        part = path.with_name(f"{path.name}.part")
        resume(archive.url, part)
        _check_hash(part, archive, "; it has been deleted: run again, or fetch it by hand")
        part.replace(path)
    else:
        _check_hash(path, archive, "; delete it and run again")
    return path


def _check_hash(path: pathlib.Path, archive: Archive, advice: str) -> None:
    """Raises ValueError on another sha256; an unfinished name is deleted, it can never be right."""
    found = files.sha256(path)
    if found == archive.sha256:
        return
    if path.suffix == ".part":
        path.unlink()
    raise ValueError(
        f"{path} from {archive.url} has sha256 {found}, expected {archive.sha256}: it is damaged "
        f"or another file{advice}"
    )


def resume(url: str, part: pathlib.Path) -> None:
    """Appends to `part` what it lacks of the file at `url`, under a progress bar.

    Raises:
      OSError: the network or the disk fails; the bytes so far are kept for the next attempt.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if getattr(response, "status", None) != http.client.PARTIAL_CONTENT:
                have = 0  # the server does not continue: from the start
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with part.open("ab" if have else "wb") as out:
                _copy(response, out, have, total, part.stem)
                if total is not None and out.tell() < total:
                    raise OSError(f"the connection ended after {out.tell()} of {total} bytes")
    except urllib.error.HTTPError as e:
        if not (have and e.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise OSError(f"{url} cannot be downloaded: {e}") from e
        # `part` holds all of it already; the hash decides.
    except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
        # An odd server's answer may have several lines.
        reason = repr(e) if isinstance(e, http.client.HTTPException) else getattr(e, "reason", e)
        raise OSError(
            f"{url} cannot be downloaded: {reason}; the same command continues where it stopped"
        ) from e


def _copy(response, out, have: int, total: int | None, name: str) -> None:
    with tqdm.tqdm(
        desc=name, initial=have, total=total, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        while block := response.read(_BLOCK):
            out.write(block)
            bar.update(len(block))
