"""Folders in a bucket, gs://…, and their copies here; needs the extra `gcs`.

Etils' epath and Orbax reach buckets through gcsfs. This module uses gcsfs directly, because gcsfs
lists a tree in a single request. This module knows neither records (see remote.py) nor runs (see
mmrjax/runs/staging.py), and both packages use it.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator

SCHEME = "gs://"
RIGHTS = (
    "log in with gcloud auth application-default login, or ask for the roles storage.objectUser "
    "and storage.legacyBucketReader on it"
)


def is_remote(place: str | os.PathLike) -> bool:
    """Whether a path is meant as an address such as gs://bucket/name, or gs:/bucket/name."""
    return "://" in str(place) or str(place).startswith("gs:")


def check(address: str) -> str:
    """An address as it is used: without a slash at its end.

    Raises:
      ValueError: it is no gs:// address, or has names that mean something else in a folder.
    """
    names = address.removeprefix(SCHEME).rstrip("/").split("/")
    if not address.startswith(SCHEME) or {"", ".", ".."} & {*names}:
        raise ValueError(f"{address}: expected a folder here, or gs://<bucket>/<folder>")
    return address.rstrip("/")


def cache_dir() -> pathlib.Path:
    """The folder of cached copies: $MMRJAX_CACHE, or ~/.cache/mmrjax."""
    return pathlib.Path(os.environ.get("MMRJAX_CACHE", "~/.cache/mmrjax")).expanduser()


def contents(address: str) -> dict[str, int]:
    """{name below the address: size} of everything there, sorted; {} if there is nothing.

    Raises:
      ValueError, OSError: as `naming`; or a name that would lead out of a folder.
    """
    with naming(address):
        system = _system()
        system.invalidate_cache()
        found = system.find(address, detail=True)
        if not found:
            _check_bucket(system, address)
    start = len(address.removeprefix(SCHEME)) + 1
    sizes = {path[start:]: about["size"] for path, about in sorted(found.items())}
    # A name that ends in a slash is how consoles draw an empty folder.
    sizes = {name: size for name, size in sizes.items() if name and not name.endswith("/")}
    for name in sizes:
        if {"", ".", ".."} & {*name.split("/")}:
            raise ValueError(f"{address}/{name}: a name that leads out of a folder; delete it")
    return sizes


def download(address: str, folder: pathlib.Path, names: Iterable[str]) -> None:
    """Copies some of the `contents` of an address into a folder.

    Raises:
      ValueError, OSError: as `naming`.
    """
    names = list(names)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if names:
        with naming(address):
            here = [str(folder / name) for name in names]
            _system().get([f"{address}/{name}" for name in names], here)


def upload(folder: pathlib.Path, address: str, names: Iterable[str]) -> None:
    """Copies files of a folder to an address, in order; no reader sees half a file there.

    Raises:
      ValueError, OSError: as `naming`.
    """
    with naming(address):
        for name in names:
            _system().put_file(str(folder / name), f"{address}/{name}")


def delete(address: str, names: Iterable[str]) -> None:
    """Deletes files below an address; absent files are no error.

    Raises:
      ValueError, OSError: as `naming`.
    """
    with naming(address):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                _system().rm_file(f"{address}/{name}")


def read(address: str, name: str) -> bytes | None:
    """The content of a file below an address; None if it is not there.

    Raises:
      ValueError, OSError: as `naming`.
    """
    with naming(address), contextlib.suppress(FileNotFoundError):
        return _system().cat_file(f"{address}/{name}")
    return None


@contextlib.contextmanager
def naming(address: str) -> Iterator[None]:
    """Turns any error of a bucket's client into a single line.

    Raises:
      ValueError: the client is not installed.
      FileNotFoundError: no such bucket.
      OSError: anything else, such as no network or no rights.
    """
    try:
        yield
    except ImportError as e:
        raise ValueError(f"{address}: {e}: pip install 'mmrjax[gcs]'") from e
    except FileNotFoundError as e:
        bucket = address.removeprefix(SCHEME).split("/")[0]
        raise FileNotFoundError(
            f"{address}: there is no bucket {bucket!r}, or you may not see it; create it with "
            f"gcloud storage buckets create {SCHEME}{bucket}, {RIGHTS}"
        ) from e
    except Exception as e:  # gcsfs, its HTTP client and its credentials raise errors of many types
        text = " ".join(str(e).split())[:300]
        raise OSError(
            f"{address} cannot be used ({type(e).__name__}: {text}); see to the network, {RIGHTS}"
        ) from e


def _system():
    """The client of this process; it raises its errors and does not log them."""
    import fsspec  # here: an extra that only users of buckets install

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gs")


def _check_bucket(system, address: str) -> None:
    """Raises FileNotFoundError if there is no such bucket, which lists as empty."""
    bucket = address.removeprefix(SCHEME).split("/")[0]
    system.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
