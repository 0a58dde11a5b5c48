"""Records in a bucket, `data_dir=gs://…`, and the copies of them that are read.

ArrayRecord reads local files alone. Records are therefore copied once into the cache,
<cache>/buckets/<bucket>/<folder>/<data set>/<category>/<version>, and checked against the sha256 of
every file in `fingerprint.json`. New records are built in the cache and then sent. The fingerprint
is sent last and deleted first: records without it do not count. Only `build` calls this module.
"""

import json
import pathlib
import shutil

from data_builders import buckets, files, store


def local_dir(address: str) -> pathlib.Path:
    """The folder with the copies of all records of an address."""
    return buckets.cache_dir() / "buckets" / address.removeprefix(buckets.SCHEME)


def categories(address: str, version: str) -> list[str]:
    """The categories of a data set whose finished records lie at an address.

    Args:
      address: gs://<data_dir>/<data set>.
      version: version of its records.

    Raises:
      ValueError, OSError: a bucket that cannot be used.
    """
    ending = f"/{version}/{store.FINGERPRINT}"
    found = [
        name.removesuffix(ending) for name in buckets.contents(address) if name.endswith(ending)
    ]
    return [name for name in found if "/" not in name]


def fetch(records: store.CategoryRecords, address: str) -> None:
    """Copies the records of a category, if there are any and these are others than those here.

    Args:
      records: the records of the category, in the cache.
      address: gs://<data_dir>/<data set>.

    Raises:
      ValueError, OSError: a bucket that cannot be used, or records that are damaged there.
    """
    address = f"{address}/{records.category}/{records.path.name}"
    stored = buckets.read(address, store.FINGERPRINT)
    if stored is None or stored == _stored(records):
        return
    with records.lock():
        if stored == _stored(records):  # another process has copied them meanwhile
            return
        records.log(f"{records.title}: copying the records of {address}")
        digests = _digests(address, stored)
        part = records.workplace / "fetched"
        shutil.rmtree(records.workplace, ignore_errors=True)
        try:
            buckets.download(address, part, digests.keys() & buckets.contents(address).keys())
            for name, digest in digests.items():
                if not (part / name).is_file() or files.sha256(part / name) != digest:
                    raise ValueError(f"{address}: {name} is damaged; delete it and build again")
            (part / store.FINGERPRINT).write_bytes(stored)
            records.replace(part)
        finally:
            shutil.rmtree(records.workplace, ignore_errors=True)


def send(records: store.CategoryRecords, address: str) -> None:
    """Copies the records of a category into the bucket, unless these are there.

    Args:
      records: the records of the category, in the cache.
      address: gs://<data_dir>/<data set>.

    Raises:
      ValueError, OSError: a bucket that cannot be used.
    """
    address = f"{address}/{records.category}/{records.path.name}"
    content = json.loads(_stored(records))
    if "files" not in content:
        names = sorted(path.name for path in records.path.iterdir())
        names.remove(store.FINGERPRINT)
        content["files"] = {name: files.sha256(records.path / name) for name in names}
        (records.path / store.FINGERPRINT).write_text(json.dumps(content, indent=1))
    if buckets.read(address, store.FINGERPRINT) == _stored(records):
        return
    records.log(f"{records.title}: sending the records to {address}")
    buckets.delete(address, [store.FINGERPRINT, *buckets.contents(address)])
    buckets.upload(records.path, address, [*content["files"], store.FINGERPRINT])


def _stored(records: store.CategoryRecords) -> bytes | None:
    """The fingerprint of finished records; None if there are none."""
    path = records.path / store.FINGERPRINT
    return path.read_bytes() if store.read_fingerprint(records.path) else None


def _digests(address: str, stored: bytes) -> dict[str, str]:
    """{name: sha256} of the files at an address; names with a folder are refused."""
    try:
        digests = dict(json.loads(stored)["files"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{address}/{store.FINGERPRINT} is damaged ({type(e).__name__}); delete it and build "
            "the records again"
        ) from e
    for name in digests:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{address}: {name!r} is no name of a file; build the records again")
    return digests
