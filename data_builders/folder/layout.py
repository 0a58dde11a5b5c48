"""Understands a user's directory: which images are good, which defective, where the masks lie.

Understood are (names of folders in any case; folders are searched to their depth):
  train/good, test/good, test/<type> [, ground_truth/<type>]   the layout of MVTec AD
  good, <type> ... [, masks/<type>]        any other folder beside `good` is a type of defect
  images side by side                      all good, unless a mask beside one says otherwise
A mask lies in a folder of masks under the same sub-folder and name, also as `<stem>_mask` or
`<stem>_GT`, with any image suffix; or beside its image as `<stem>_mask.png` or `<stem>_GT.png`.
Without a test folder, a fifth of the good images is tested (`hold_out`). Defective images are
always tested. A file `groups.csv` on top may say which images show the same part: columns `image`
(path below the folder), `group` and, if wanted, `domain`. These stay in one split.
"""

import collections
import csv
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable

from data_builders import files, images

GOOD_NAMES = ("good", "ok", "normal")
TRAIN_NAMES = ("train", "val", "valid", "validation")
TEST_NAMES = ("test",)
GROUPS = "groups.csv"
MASK_NAMES = ("ground_truth", "ground truth", "groundtruth", "gt", "masks", "mask")
TEST_SHARE = 0.2

Places = dict[pathlib.Path, tuple[str, ...]]  # image -> the folders it lies in, below the root

_KNOWN_NAMES = (*GOOD_NAMES, *TRAIN_NAMES, *TEST_NAMES)
_MASK_STEM = re.compile(r"(.+)_(?:mask|gt)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Item:
    """One image; `place` are the folders that say what it shows, below wrappers and the split."""

    path: pathlib.Path
    place: tuple[str, ...]
    split: str | None = None  # None: the directory does not say
    defect: str = "good"
    mask: pathlib.Path | None = None
    group: str = ""  # "": no other image shows this part
    domain: str = ""


def read_layout(root: pathlib.Path) -> tuple[list[Item], str]:
    """Returns the images of a directory with split, defect and mask, and a line that describes it.

    Raises:
      ValueError: the directory does not say which images are good, a mask is ambiguous, or
        groups.csv cannot be read.
    """
    pictures, masks = tell_masks_apart(root)
    wrapper = _wrapper(pictures.values())
    items, layout = _place_in_splits(
        [Item(path, place[len(wrapper) :]) for path, place in pictures.items()]
    )
    ignored = len(pictures) - len(items)
    items = _attach_masks(items, {mask: _inner(place, wrapper) for mask, place in masks.items()})
    if not any(item.defect == "good" and item.split != "test" for item in items):
        folders = sorted({"/".join(place) or "." for place in pictures.values()})
        raise ValueError(
            f"{root}: cannot tell which images are good ones to train on; found images in "
            f"{folders[:8]}. Put good images into a folder named good and defective ones into "
            "folders named after their defects, or use train/good and test/<type>"
        )
    items = _complete_splits(root, _attach_groups(root, items))
    return items, _describe(items, layout, ignored)


def hold_out(paths: Iterable[pathlib.PurePath], root: pathlib.PurePath) -> set[pathlib.PurePath]:
    """Returns the images to test: a fifth, at least one of two, chosen by the hash of their names.

    The choice depends on the names below `root` alone, and a new image changes it little.
    """

    def rank(path: pathlib.PurePath) -> str:
        name = path.relative_to(root).as_posix()
        return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    ranked = sorted(paths, key=rank)
    count = max(1, round(TEST_SHARE * len(ranked))) if len(ranked) > 1 else 0
    return set(ranked[:count])


def tell_masks_apart(root: pathlib.Path) -> tuple[Places, Places]:
    """Returns the pictures and the masks; a folder of masks does not count among the folders."""
    pictures: Places = {}
    masks: Places = {}
    for path in files.list_images(root):
        folders = path.parent.relative_to(root).parts
        marks = [i for i, name in enumerate(folders) if name.lower() in MASK_NAMES]
        if marks:
            masks[path] = folders[: marks[0]] + folders[marks[0] + 1 :]
        else:
            pictures[path] = folders
    names = {(path.parent, path.stem) for path in pictures}
    for path in list(pictures):
        if _base_stem(path) != path.stem and (path.parent, _base_stem(path)) in names:
            masks[path] = pictures.pop(path)  # it lies beside its image
    return pictures, masks


def _wrapper(places: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The leading folders that all pictures share and that say nothing."""
    shared = []
    for names in zip(*places, strict=False):  # first folder of each, second folder of each ...
        if len(set(names)) > 1 or names[0].lower() in _KNOWN_NAMES:
            break
        shared.append(names[0])
    return tuple(shared)


def _inner(place: tuple[str, ...], wrapper: tuple[str, ...]) -> tuple[str, ...]:
    """A mask's folders without the wrapper and the name of a split, as pictures have them."""
    place = place[len(wrapper) :] if place[: len(wrapper)] == wrapper else place
    return place[1:] if place and place[0].lower() in (*TRAIN_NAMES, *TEST_NAMES) else place


def _place_in_splits(items: list[Item]) -> tuple[list[Item], str]:
    """Returns the items that the layout has a place for, with split and defect, and its name."""
    train = [_below(item) for item in items if _first(item) in TRAIN_NAMES]
    test = [_below(item) for item in items if _first(item) in TEST_NAMES]
    good = [item for item in items if _first(item) in GOOD_NAMES]
    if not (train or test):
        return _place_in_types(items, has_good_folder=bool(good))
    if loose := [item.path for item in test if not item.place]:
        raise ValueError(
            f"{loose[0]}: a test image in no sub-folder; put it into test/good or test/<type>"
        )
    if train and not any(_first(item) in GOOD_NAMES for item in train):
        train = [dataclasses.replace(item, place=("good", *item.place)) for item in train]
    if not test:
        return _name_defects(train), "a train folder"
    train = [dataclasses.replace(item, split="train") for item in train or good]
    test = [dataclasses.replace(item, split="test") for item in test]
    return _name_defects(train + test), "train and test folders"


def _place_in_types(items: list[Item], has_good_folder: bool) -> tuple[list[Item], str]:
    """The same for a directory without train and test folders."""
    if has_good_folder:
        items = [item for item in items if item.place]  # loose images have no place here
    items = _name_defects(items)
    for item in items:
        if item.defect != "good" and any(name.lower() in _KNOWN_NAMES for name in item.place):
            raise ValueError(
                f"{item.path}: cannot tell what it shows; name the folder one level deeper, or "
                "keep only good, <type> ... or train, test in it"
            )
    return items, "a folder of good images" if has_good_folder else "images taken as good"


def _first(item: Item) -> str:
    return item.place[0].lower() if item.place else ""


def _below(item: Item) -> Item:
    return dataclasses.replace(item, place=item.place[1:])


def _name_defects(items: Iterable[Item]) -> list[Item]:
    """A folder of good images, or no folder, means good; any other names the defect."""
    return [
        item
        if _first(item) in ("", *GOOD_NAMES)
        else dataclasses.replace(item, defect="/".join(item.place))
        for item in items
    ]


def _attach_masks(items: list[Item], masks: Places) -> list[Item]:
    """Gives images their masks; an image in no folder whose mask is not empty is defective."""
    by_stem = collections.defaultdict(list)
    for mask, place in masks.items():
        for stem in {mask.stem, _base_stem(mask)}:
            by_stem[stem].append((place, mask))
    owners: dict[pathlib.Path, pathlib.Path] = {}
    result = []
    for item in items:
        is_known_good = item.defect == "good" and item.place
        mask = None if is_known_good else _find_mask(item, by_stem[item.path.stem])
        if mask in owners:
            raise ValueError(
                f"{mask}: is it the mask of {owners[mask]} or of {item.path}? Put masks into "
                "sub-folders named as those of the images"
            )
        if mask is not None:
            owners[mask] = item.path
            if item.defect != "good":
                item = dataclasses.replace(item, mask=mask)
            elif images.labels_or_soft(images.read_grey(mask)).any():
                item = dataclasses.replace(item, mask=mask, defect="anomaly")
        result.append(item)
    return result


def _find_mask(
    item: Item, candidates: list[tuple[tuple[str, ...], pathlib.Path]]
) -> pathlib.Path | None:
    """The mask whose folders fit best: beside the image, all of its place, or in no folder."""
    beside = [mask for _, mask in candidates if mask.parent == item.path.parent]
    size = len(item.place)
    same = [mask for place, mask in candidates if size and place[-size:] == item.place]
    loose = [mask for place, mask in candidates if not place]
    for fitting in (beside, same, loose):
        if len(fitting) > 1:
            raise ValueError(f"{item.path}: which is its mask, {fitting[0]} or {fitting[1]}?")
        if fitting:
            return fitting[0]
    return None


def _base_stem(path: pathlib.Path) -> str:
    """The stem of the image that a mask belongs to by its name."""
    match = _MASK_STEM.fullmatch(path.stem)
    return match[1] if match else path.stem


def _attach_groups(root: pathlib.Path, items: list[Item]) -> list[Item]:
    """Gives images the group and the domain that groups.csv names, if there is one."""
    path = root / GROUPS
    if not path.is_file():
        return items
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8; save it as CSV in UTF-8") from e
    if any(None in (row.get("image"), row.get("group")) for row in rows):
        raise ValueError(
            f"{path}: expected the columns image and group, and maybe domain, separated by commas; "
            f"found {', '.join(columns)}"
        )
    named = {row["image"]: row for row in rows}
    if len(named) < len(rows):
        twice = collections.Counter(row["image"] for row in rows).most_common(1)[0][0]
        raise ValueError(f"{path} names {twice} twice; leave one row")
    known = {item.path.relative_to(root).as_posix() for item in items}
    if unknown := sorted(named.keys() - known):
        raise ValueError(f"{path} names {unknown[0]}, which is no image below {root}")
    return [
        dataclasses.replace(item, group=row["group"], domain=row.get("domain") or "")
        if (row := named.get(item.path.relative_to(root).as_posix()))
        else item
        for item in items
    ]


def _complete_splits(root: pathlib.Path, items: list[Item]) -> list[Item]:
    """Defective images are tested; good ones of no split are shared out, groups as a whole."""
    part = {item.path: item.group or item.path for item in items}
    tested = {part[item.path] for item in items if item.defect != "good" and item.split is None}
    first = {part[item.path]: item.path for item in reversed(items)
             if item.defect == "good" and item.split is None}  # fmt: skip
    held_out = hold_out(first.values(), root)
    tested |= {group for group, path in first.items() if path in held_out}

    def split(item: Item) -> str:
        if item.defect != "good" or (item.split is None and part[item.path] in tested):
            return "test"
        return item.split or "train"

    items = [dataclasses.replace(item, split=split(item)) for item in items]
    _check_groups(root, items)
    return items


def _check_groups(root: pathlib.Path, items: list[Item]) -> None:
    """Raises ValueError when a folder puts images of one group on both sides."""
    sides: dict[str, dict[str, Item]] = {}
    for item in items:
        if item.group:
            sides.setdefault(item.group, {}).setdefault(item.split, item)
    for group, found in sides.items():
        if {"train", "test"} <= found.keys():
            paths = [found[side].path.relative_to(root).as_posix() for side in ("train", "test")]
            raise ValueError(
                f"{root / GROUPS}: group {group} is trained on ({paths[0]}) and tested "
                f"({paths[1]}); move one of them, or name two groups"
            )


def _describe(items: list[Item], layout: str, ignored: int) -> str:
    good = collections.Counter(item.split for item in items if item.defect == "good")
    types = collections.Counter(item.defect for item in items if item.defect != "good")
    listing = ", ".join(f"{name} {count}" for name, count in sorted(types.items())) or "none"
    masks = sum(item.mask is not None for item in items)
    line = (
        f"understood as {layout}: {good['train']} good to train on; to test {good['test']} good "
        f"and {types.total()} defective ({listing}), {masks} of them with a mask"
    )
    return f"{line}; {ignored} images elsewhere ignored" if ignored else line
