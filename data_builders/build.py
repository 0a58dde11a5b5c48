"""Builds the records of a data set: what is missing or stale is built, what is fresh is reused.

    python -m data_builders.build magnetic_tile --raw_dir=~/tiles --data_dir=data
    python -m data_builders.build visa --download --raw_dir=~/visa --data_dir=data

`mmrjax.main` calls `build()` before it trains; it downloads nothing. The module
`store` describes how records lie on disk and are kept fresh.
"""

import argparse
import importlib
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import tqdm
from absl import logging

from data_builders import buckets, common, download, files, remote, store

SOME_LEFT_OUT = 3  # exit status

# Data set -> module with its class `Builder`, imported when asked for.
BUILDERS: dict[str, str] = {
    name: f"data_builders.{name}.{name}_dataset_builder"
    for name in (
        "aebad",
        "btad",
        "demo_parts",
        "demo_trays",
        "folder",
        "kolektor_sdd2",
        "magnetic_tile",
        "mvtec_ad",
        "rsdds",
        "visa",
    )
}


def build(
    name: str,
    raw_dir: str | pathlib.Path | None,
    data_dir: str | pathlib.Path,
    categories: Sequence[str] | None = None,
    log: Callable[[str], None] = logging.info,
    choice: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, pathlib.Path]:
    """Makes sure that the records of a data set exist and are up to date.

    Args:
      name: the data set, one of BUILDERS.
      raw_dir: the folder with the raw images; None or absent if the records exist already, and
        for data sets that a program draws.
      data_dir: the folder of the records, created if need be, or an address in a bucket, gs://…
        (see `remote`).
      categories: which ones; None takes all that the raw folder holds or that are built.
      log: receives what is done, line by line.
      choice: patterns of the paths of "good", "bad" and "masks" of a user's folder.

    Returns:
      Category -> directory of its records, for `tfds.builder_from_directory`.

    Raises:
      ValueError: unknown name or category, a data_dir that is no folder, or raw data that is
        damaged or contradicts itself.
      FileNotFoundError: neither raw data nor records; the message says how to get the data.
    """
    builder_cls = load_builder(name)
    if choice and any(choice.values()):
        builder_cls = builder_cls.chosen(**choice)
    address = f"{buckets.check(str(data_dir))}/{name}" if buckets.is_remote(data_dir) else ""
    data_dir = remote.local_dir(str(data_dir)) if address else pathlib.Path(data_dir).expanduser()
    if address:
        fetch(name, address.rpartition("/")[0], categories, log)
    root, in_raw, wanted = at_hand(name, raw_dir, data_dir, categories)
    record_dirs = {}
    for category in wanted:
        records = store.CategoryRecords(builder_cls, category, root, data_dir / name, log)
        if category in in_raw:
            records.make_fresh()
        else:
            records.check_usable()
            log(f"{records.title}: no raw data at hand, using the records in {records.path}")
        if address:
            remote.send(records, address)
        record_dirs[category] = records.path
    return record_dirs


def at_hand(
    name: str,
    raw_dir: str | pathlib.Path | None,
    data_dir: str | pathlib.Path,
    categories: Sequence[str] | None = None,
) -> tuple[pathlib.Path | None, set[str], list[str]]:
    """The categories that `build` would deliver; nothing is built.

    Returns:
      (folder of the published layout, or None; categories in it; categories to deliver).

    Raises:
      ValueError, FileNotFoundError: as `build`.
    """
    builder_cls = load_builder(name)
    data_dir = pathlib.Path(data_dir).expanduser()
    for place in (data_dir, *data_dir.parents):
        if place.is_file():
            raise ValueError(f"data_dir={data_dir}: {place} is a file; name another folder")
    raw_dir = pathlib.Path(raw_dir).expanduser() if raw_dir else None
    root = find_root(builder_cls, raw_dir)
    if builder_cls.PROCEDURAL:
        in_raw = set(builder_cls.CATEGORIES)
    else:
        in_raw = set(builder_cls.category_folders(root)) if root else set()
    return root, in_raw, _wanted(builder_cls, raw_dir, data_dir / name, in_raw, categories)


def fetch(
    name: str,
    data_dir: str,
    categories: Sequence[str] | None = None,
    log: Callable[[str], None] = logging.info,
) -> dict[str, pathlib.Path]:
    """Copies finished records of a data set from a bucket into this machine's cache.

    Args:
      name: the data set, one of BUILDERS.
      data_dir: the address of the records, gs://….
      categories: the wanted ones, if the bucket has them; None takes all.
      log: receives what is done, line by line.

    Returns:
      Category -> directory of its copy.

    Raises:
      ValueError, OSError: a bucket that cannot be used, or damaged records.
    """
    builder_cls, address = load_builder(name), f"{data_dir.rstrip('/')}/{name}"
    found = remote.categories(address, str(builder_cls.VERSION))
    record_dirs = {}
    for category in found if categories is None else [c for c in found if c in categories]:
        home = remote.local_dir(address)
        records = store.CategoryRecords(builder_cls, category, None, home, log)
        remote.fetch(records, address)
        record_dirs[category] = records.path
    return record_dirs


def load_builder(name: str) -> type[common.RecordBuilder]:
    """Returns the builder class of a data set.

    Raises:
      ValueError: no such data set.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown data set {name!r}; available: {sorted(BUILDERS)}")
    return importlib.import_module(BUILDERS[name]).Builder


def fetch_raw(
    name: str, raw_dir: str | pathlib.Path | None, log: Callable[[str], None] = logging.info
) -> None:
    """Downloads and unpacks a data set into `raw_dir`, unless it lies there.

    Raises:
      ValueError: no program can fetch this data set, or the archive is not the expected one.
      OSError: the network or the disk fails; the same call continues.
    """
    builder_cls = load_builder(name)
    if builder_cls.DOWNLOAD is None:
        raise ValueError(
            f"{name}: --download cannot fetch this data set. "
            f"{builder_cls.HOW_TO_GET or 'A program draws it: leave the flag away.'}"
        )
    if not raw_dir:
        raise ValueError("--download needs --raw_dir, the folder to put the data set into")
    raw_dir = pathlib.Path(raw_dir).expanduser()
    if root := find_root(builder_cls, raw_dir):
        log(f"{name}: lies in {root} already; nothing is downloaded")
    else:
        download.fetch_and_unpack(builder_cls.DOWNLOAD, raw_dir, log)


def find_root(
    builder_cls: type[common.RecordBuilder], raw_dir: pathlib.Path | None
) -> pathlib.Path | None:
    """Returns the folder that has the published layout, None if there is none.

    Raises:
      ValueError: `raw_dir` is a file, or holds the data set several times.
    """
    if builder_cls.PROCEDURAL or raw_dir is None:
        return None
    if raw_dir.is_file():
        raise ValueError(f"{builder_cls.name}: {raw_dir} is a file; unpack it and name the folder")
    return builder_cls.find_root(raw_dir)


def _wanted(
    builder_cls: type[common.RecordBuilder],
    raw_dir: pathlib.Path | None,
    home: pathlib.Path,
    in_raw: set[str],
    categories: Sequence[str] | None,
) -> list[str]:
    """The categories to deliver: those asked for, or all that are at hand."""
    built = {
        folder.name
        for folder in files.list_folders(home)
        if store.read_fingerprint(folder / str(builder_cls.VERSION))
    }
    if categories is None:
        at_hand = builder_cls.select_categories(raw_dir, in_raw, built)
        if not at_hand:
            if built and raw_dir is None:
                raise FileNotFoundError(
                    f"{builder_cls.name}: {home} holds the records of several: "
                    f"{', '.join(sorted(built))}; choose, as with --config.data.categories="
                    f"{min(built)} (build: --category={min(built)}), or name the raw folder"
                )
            raise FileNotFoundError(_no_records(builder_cls, raw_dir, home, ""))
        return at_hand
    for category in dict.fromkeys(categories):
        if builder_cls.CATEGORIES and category not in builder_cls.CATEGORIES:
            raise ValueError(
                f"{builder_cls.name}: unknown category {category!r}; "
                f"available: {list(builder_cls.CATEGORIES)}"
            )
        if category not in in_raw | built:
            raise FileNotFoundError(_no_records(builder_cls, raw_dir, home, f"/{category}"))
    return list(dict.fromkeys(categories))


def _no_records(
    builder_cls: type[common.RecordBuilder],
    raw_dir: pathlib.Path | None,
    home: pathlib.Path,
    category: str,
) -> str:
    found = describe_missing(raw_dir)
    return (
        f"{builder_cls.name}{category}: no records in {home}, and {found}. {builder_cls.HOW_TO_GET}"
    )


def describe_missing(raw_dir: pathlib.Path | None) -> str:
    """Returns what is there in the place of raw data in the layout expected."""
    if raw_dir is None:
        return "no raw folder is given"
    if not raw_dir.is_dir():
        return f"the raw folder {raw_dir} does not exist"
    names = sorted(p.name for p in raw_dir.iterdir() if files.is_visible(p.name))
    listing = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"
    return f"the raw folder {raw_dir} has not the layout expected; it holds: {listing}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_builders.build", description="Build the records of a data set."
    )
    parser.add_argument("name", help=f"data set: {', '.join(sorted(BUILDERS))}")
    parser.add_argument("--raw_dir", help="folder of the raw images (not for demo_parts)")
    parser.add_argument("--data_dir", required=True, help="of the records: a folder, or gs://…")
    parser.add_argument(
        "--category", action="append", help="only this category; may be given several times"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the raw images first, where a URL is known"
    )
    args = parser.parse_args(argv)
    try:
        if args.download:
            fetch_raw(args.name, args.raw_dir, log=_print_line)
        made = build(args.name, args.raw_dir, args.data_dir, args.category, log=_print_line)
    except (ValueError, OSError, RuntimeError) as e:  # the last: ArrayRecord on a full disk
        print(f"error: {e}", file=sys.stderr)
        return 1
    left_out = [(store.read_fingerprint(path) or {}).get("left_out") for path in made.values()]
    return SOME_LEFT_OUT if any(left_out) else 0


def _print_line(line: str) -> None:
    # Through tqdm, so that a line does not cut through the progress bar.
    tqdm.tqdm.write(line)


if __name__ == "__main__":
    sys.exit(main())
