"""Understands a user's directory: which images are good, which defective, where the masks lie.

The words of folders are those of `words`, in any case, language and depth. Understood are
  train/good, test/good, test/<type> [, ground_truth/<type>]   the layout of MVTec AD
  good, <type> ... [, masks/<type>]        any other folder beside `good` is a type of defect
  images side by side                      all good, unless a mask beside one says otherwise
  images and a mask for each               defective if the mask marks anything (KolektorSDD)
and whatever `Choice` says with patterns. Module `pairing` finds the masks. Without a test folder, a
fifth of the good images is tested (`hold_out`). Defective images are always tested. A file
`groups.csv` on top may say which images show the same part: columns `image` (path below the
folder), `group` and, if wanted, `domain`. These stay in one split.
"""

import collections
import csv
import dataclasses
import fnmatch
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

from data_builders import files, masks
from data_builders.folder import pairing, words
from data_builders.folder.words import BAD, GOOD, TEST, TRAIN, UNKNOWN

GROUPS = "groups.csv"
TEST_SHARE = 0.2
MASKED = 0.9  # share of the images with a mask from which on masks tell good from defective
SETTLE = "or say it with patterns: --config.data.good='{good}' --config.data.bad='{bad}'"

Finding = tuple[str, str]  # kind, as data_builders/check.py names them, and a line


@dataclasses.dataclass(frozen=True)
class Choice:
    """Patterns of paths below the folder, such as ok*/**, that a user gives; () = by the words."""

    good: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
      path: its file.
      place: the folders that say what it shows, below wrappers and the split.
      split: "train", "test", or None if the directory does not say.
      label: "good", "bad" or "", as the directory says.
      defect: "good", or the type of defect.
      masks: the files of its masks.
      group: "" if no other image shows this part.
      domain: "" if nothing names one.
    """

    path: pathlib.Path
    place: tuple[str, ...] = ()
    split: str | None = None
    label: str = ""
    defect: str = "good"
    masks: tuple[pathlib.Path, ...] = ()
    group: str = ""
    domain: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The images of a directory, the table that describes them, and what was noticed."""

    items: list[Item]
    table: list[str]
    findings: list[Finding]


def read_layout(root: pathlib.Path, choice: Choice = Choice()) -> Layout:
    """Returns the images of a directory with split, defect and masks, and how it was understood.

    Raises:
      ValueError: the directory does not say which images are good, a mask is ambiguous, or
        groups.csv cannot be read.
    """
    findings = [(OTHER_FILES, line) for line in files.list_others(root)]
    pictures, mask_places = tell_masks_apart(root, choice)
    items = [_item(root, path, place, choice) for path, place in pictures.items()]
    pairs = pairing.Pairs.of({item.path: item.place for item in items}, mask_places)
    items = _label(root, items, pairs, choice)
    kept = [item for item in items if item.label in (GOOD, BAD)]
    if not any(item.split == TEST for item in kept):  # a fifth is held out
        kept = [dataclasses.replace(item, split=None) for item in kept]
    findings += [
        (LEFT_OUT, f"{_name(root, item.path)}: {item.defect}")
        for item in items
        if item.label not in (GOOD, BAD)
    ]
    kept = _attach_masks(root, kept, pairs, findings)
    if not any(item.defect == "good" and item.split != "test" for item in kept):
        raise _unclear(root, [item.path for item in items])
    kept = _complete_splits(root, _attach_groups(root, kept))
    return Layout(kept, _describe(root, kept, findings), findings)


OTHER_FILES = "a file of no format that is read"
LEFT_OUT = "a picture that is left out"
GOOD_WITH_MASK = "a good image whose mask marks a defect"
ALIKE = "a mask of a name or folder like its picture's"
ORPHAN = "a mask that belongs to no picture"
NO_MASK = "no mask for a defective image"


def _unclear(root: pathlib.Path, paths: Iterable[pathlib.Path]) -> ValueError:
    folders = sorted({path.parent.relative_to(root).as_posix() for path in paths})
    settle = SETTLE.format(good=f"{folders[0] if folders else 'ok'}/**", bad=f"{folders[-1]}/**")
    return ValueError(
        f"{root}: cannot tell which images are good ones to train on; found images in "
        f"{folders[:8]}. Put good images into a folder named good and defective ones into "
        f"folders named after their defects, or use train/good and test/<type>, {settle} "
        "(--config.data.masks='…' names masks)"
    )


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


def tell_masks_apart(
    root: pathlib.Path, choice: Choice = Choice()
) -> tuple[pairing.Places, pairing.Places]:
    """Returns the pictures and the masks; a folder of masks does not count among the folders."""
    pictures: pairing.Places = {}
    mask_places: pairing.Places = {}
    for path in files.list_images(root):
        folders = path.parent.relative_to(root).parts
        marks = [i for i, name in enumerate(folders) if words.MASK in words.meaning(name)[0]]
        if choice.masks and _matches(root, path, choice.masks):
            mask_places[path] = folders
        elif marks and not _matches(root, path, (*choice.good, *choice.bad)):
            mask_places[path] = folders[: marks[0]] + folders[marks[0] + 1 :]
        else:
            pictures[path] = folders
    pairing.move_masks_beside(pictures, mask_places)
    wrapper = _wrapper(pictures.values())
    return (
        {path: _inner(place, wrapper) for path, place in pictures.items()},
        {path: pairing.said(_inner(place, wrapper)) for path, place in mask_places.items()},
    )


def _matches(root: pathlib.Path, path: pathlib.Path, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path below the root; ** is any number of folders, or none."""
    name = words.same(_name(root, path))
    return any(
        fnmatch.fnmatchcase(name, form)
        for pattern in patterns
        for form in {words.same(pattern), words.same(pattern).replace("**/", "")}
    )


def _name(root: pathlib.Path, path: pathlib.Path) -> str:
    return path.relative_to(root).as_posix()


def _wrapper(places: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The leading folders that all pictures share and that say nothing by their whole name."""
    shared = []
    for names in zip(*places, strict=False):  # first folder of each, second folder of each ...
        kinds, exact = words.meaning(names[0])
        if len(set(names)) > 1 or (exact and kinds & {GOOD, BAD, TRAIN, TEST, UNKNOWN}):
            break
        shared.append(names[0])
    return tuple(shared)


def _inner(place: tuple[str, ...], wrapper: tuple[str, ...]) -> tuple[str, ...]:
    """The folders without the wrapper."""
    return place[len(wrapper) :] if place[: len(wrapper)] == wrapper else place


def _item(root: pathlib.Path, path: pathlib.Path, folders: tuple[str, ...], choice: Choice) -> Item:
    """An image with what the words of its folders say, or the patterns."""
    said = [words.meaning(name) for name in folders]
    split = next((k for kinds, _ in said for k in (TRAIN, TEST) if k in kinds), None)
    exact = [kinds & {GOOD, BAD} for kinds, is_exact in said if is_exact and kinds & {GOOD, BAD}]
    inside = [kinds & {GOOD, BAD} for kinds, _ in said if kinds & {GOOD, BAD}]
    label = next(iter((exact or inside[::-1] or [{""}])[0]))
    if any(UNKNOWN in kinds for kinds, _ in said):
        label = UNKNOWN
    if choice.good or choice.bad:
        by_pattern = [
            kind
            for kind, patterns in ((GOOD, choice.good), (BAD, choice.bad))
            if _matches(root, path, patterns)
        ]
        if len(by_pattern) > 1:
            raise ValueError(f"{path}: data.good and data.bad both name it; narrow one of them")
        by_word = label if label == BAD and not choice.bad else UNKNOWN
        label = by_pattern[0] if by_pattern else by_word
    return Item(path, pairing.said(folders), split, label)


def _label(
    root: pathlib.Path, items: list[Item], pairs: pairing.Pairs, choice: Choice
) -> list[Item]:
    """Items with a label, from words, patterns or masks; `defect` of others says what is amiss."""
    is_split = any(item.split for item in items)
    has_train = any(item.split == TRAIN for item in items)
    has_good = any(item.label == GOOD for item in items)
    masked = [bool(pairs.of_picture(item.path)) for item in items if not item.label]
    by_masks = not has_good and bool(masked) and sum(masked) >= MASKED * len(masked)
    result = []
    for item in items:
        label, why = item.label, ""
        if label == UNKNOWN:
            why = "no pattern names it" if choice.good or choice.bad else "nothing says its label"
        elif is_split and not item.split:
            if has_train or not label:
                label, why = "", "it lies outside of train and test"
            elif label == GOOD:
                item = dataclasses.replace(item, split=TRAIN)
        elif not label and by_masks:
            item, label = _by_mask(root, item, pairs)
        elif not label:
            label, why = _unlabelled(root, item, items)
        result.append(_named(item, label, why))
    return result


def _by_mask(root: pathlib.Path, item: Item, pairs: pairing.Pairs) -> tuple[Item, str]:
    """An image that its mask calls good or bad; without a split, its folder is one part."""
    marks = any(masks.read(mask).understood.any() for mask in pairs.of_picture(item.path))
    if item.place and not item.split:
        item = dataclasses.replace(item, place=(), group=_name(root, item.path.parent))
    return item, BAD if marks else GOOD


def _unlabelled(root: pathlib.Path, item: Item, items: list[Item]) -> tuple[str, str]:
    """(label, reason if there is none) of an image whose folders have no word for good or bad."""
    if item.split == TRAIN:
        train = [other for other in items if other.split == TRAIN]
        if any(other.label == GOOD for other in train):
            return (BAD if item.place else GOOD), ""
        if len({other.place[:1] for other in train if not other.label}) > 1:
            raise _unclear(root, [other.path for other in train])
        return GOOD, ""
    if item.split == TEST:
        if not item.place:
            raise ValueError(
                f"{item.path}: a test image in no sub-folder; put it into test/good or test/<type>"
            )
        return BAD, ""
    if any(other.label == GOOD for other in items):
        return (BAD, "") if item.place else ("", "it lies beside the folders of good and defective")
    if item.place:
        raise _unclear(root, [other.path for other in items])
    return GOOD, ""


def _named(item: Item, label: str, why: str) -> Item:
    """The item with its label; a defective one is named after its folders."""
    if label == BAD:
        return dataclasses.replace(item, label=BAD, defect="/".join(item.place) or "anomaly")
    defect = "good" if label == GOOD else why
    return dataclasses.replace(item, label=label if label == GOOD else "", defect=defect)


def _attach_masks(
    root: pathlib.Path, items: list[Item], pairs: pairing.Pairs, findings: list[Finding]
) -> list[Item]:
    """Gives images their masks; an image in no folder whose mask is not empty is defective."""
    result = []
    for item in items:
        own = pairs.of_picture(item.path)
        findings += [
            (ALIKE, f"{_name(root, mask)} is taken for {_name(root, item.path)}")
            for mask in own
            if not pairing.is_usual(item.path, mask)
        ]
        if item.label == BAD:
            item = dataclasses.replace(item, masks=own)
            if pairs.masks and not own:
                findings.append((NO_MASK, _name(root, item.path)))
        elif any(masks.read(mask).understood.any() for mask in own):
            if item.place or item.split:
                line = f"{_name(root, item.path)}: left out; {_name(root, own[0])} marks a defect"
                findings.append((GOOD_WITH_MASK, line))
                continue
            item = dataclasses.replace(item, masks=own, label=BAD, defect="anomaly")
        result.append(item)
    findings += [(ORPHAN, _name(root, mask)) for mask in pairs.orphans()]
    return result


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


def _describe(root: pathlib.Path, items: list[Item], findings: list[Finding]) -> list[str]:
    """The table of what was understood, a line a row."""
    good = collections.Counter(item.split for item in items if item.defect == "good")
    types = collections.Counter(item.defect for item in items if item.defect != "good")
    listing = ", ".join(f"{name} {count}" for name, count in sorted(types.items())) or "none"
    paired = sum(bool(item.masks) for item in items)
    lines = [
        f"understood as {_kind(items)}: {good['train']} good to train on; to test {good['test']} "
        f"good and {types.total()} defective ({listing}), {paired} of them with a mask"
    ]
    rows = collections.defaultdict(list)
    for split, is_good, title in (
        ("train", True, "good, trained on"), ("test", True, "good, tested"),
        ("test", False, "defective, tested"),
    ):  # fmt: skip
        own = [i for i in items if i.split == split and (i.defect == "good") == is_good]
        rows[title] = sorted({_name(root, item.path.parent) for item in own})
        lines.append(f"  {title:26}{len(own):6}  from {', '.join(rows[title][:4]) or 'nowhere'}")
    for title, kind in (
        ("masks without a picture", ORPHAN), ("defective without a mask", NO_MASK),
        ("good, but its mask marks", GOOD_WITH_MASK), ("pictures left out", LEFT_OUT),
        ("files not read", OTHER_FILES),
    ):  # fmt: skip
        if found := [line for other, line in findings if other == kind]:
            more = " …" if found[3:] else ""
            lines.append(f"  {title:26}{len(found):6}  {'; '.join(found[:3])}{more}")
    return lines


def _kind(items: list[Item]) -> str:
    """The layout in words."""
    splits = {item.split for item in items} if any(item.place for item in items) else {None}
    if any(item.label == GOOD and item.place for item in items):
        return "folders of good and defective images"
    return "images taken as good" if splits == {None} else "folders"
