"""Cross-domain protocols over several data sets, joined by `records.join` (MMR+ spec, section 8).

Track A keeps a published test and lets the other data sets add training images. Track B splits each
data set 70 to 30 by group, and can withhold combinations of defect and condition from training. The
field data.protocol selects a track, see `select`.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import records as records_lib
from mmrjax.data import splits
from mmrjax.data.records import GOOD, Records

ANY = "*"  # any defect or any condition, in a held-out combination
DARK = "dark"  # the condition that `mark_dark` gives

# A group that shows several defects counts for the last in this list; unlisted defects come last.
_SEVERITY = ("good", "uneven", "blowhole", "break", "crack", "fray")


@dataclasses.dataclass(frozen=True)
class Track:
    """Record indices, each sorted.

    Attributes:
      train: training images; with labels, some of them are defective.
      test: test images.
      unseen: the test images of a held-out combination.
    """

    train: np.ndarray
    test: np.ndarray
    unseen: np.ndarray


def select(records: Records, data: ConfigDict, seed: int) -> Track:
    """Selects the training and the test images of a configuration.

    Args:
      records: the records of a category, or joined records.
      data: the group `data` of the configuration: protocol, shots, target, held_out, labelled and
        split_seed.
      seed: the seed of the run; it draws the images of k_shot and, unless split_seed does, track B.

    Raises:
      ValueError: as `splits.select`, `track_a` and `track_b`.
    """
    if data.protocol == "track_b":
        drawn = seed if data.split_seed < 0 else data.split_seed
        return track_b(records, drawn, combinations(data.held_out), data.labelled)
    if data.protocol == "track_a":
        target = data.target or part_of(records)[0]
        train, test = track_a(records, target)
    elif data.protocol == "k_shot" and data.target:
        train, test = few_of(records, data.target, data.shots, seed)
    else:
        train, test = splits.select(records, data.protocol, data.shots, seed)
    return Track(train, test, test[:0])


def combinations(texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """(part, defect, condition) of each text "<dataset>/<category>:<defect>:<condition>".

    `*` in place of a defect or a condition stands for any and becomes "".

    Raises:
      ValueError: a text is of another form.
    """
    found = []
    for text in texts:
        parts = text.split(":")
        if len(parts) != 3 or not all(parts) or "/" not in parts[0]:
            raise ValueError(
                f"data.held_out: {text!r} is no combination; give <dataset>/<category>:<defect>:"
                "<condition>, such as rsdds/i:*:dark, where * is any"
            )
        found.append((parts[0], *("" if part == ANY else part for part in parts[1:])))
    return found


def joined(parts: Sequence[Records], held_out: Sequence[str] = ()) -> Records:
    """Joins several categories or data sets whose results are reported by data set.

    The former `domain` of the table becomes its column `condition`, and `domain` becomes the part,
    "<dataset>/<category>". `mark_dark` gives the condition "dark" to the parts of which that
    condition is held out. A single part keeps its domains otherwise.
    """
    records = parts[0] if len(parts) == 1 else records_lib.join(parts)
    dark = sorted({part for part, _, condition in combinations(held_out) if condition == DARK})
    records = mark_dark(records, dark)
    if len(parts) == 1:
        return records
    changed = {"condition": records.table["domain"], "domain": records.table["part"]}
    return dataclasses.replace(records, table={**records.table, **changed})


def track_a(records: Records, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, test): the published test of `target`, the good training images of all parts.

    Args:
      records: joined ones.
      target: "<dataset>/<category>", such as "aebad/s".

    Raises:
      ValueError: no such part, or as `splits.select`.
    """
    train, test = splits.select(records, "one_class")
    part = part_of(records)
    if target not in part:
        raise ValueError(f"no part {target!r}; there are {sorted(set(part.tolist()))}")
    return train, test[part[test] == target]


def few_of(records: Records, target: str, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, test): all training images, but of `target` only `shots`, drawn by `seed`.

    Args:
      records: joined ones.
      target: "<dataset>/<category>".
      shots: training images of `target`.
      seed: of the draw.

    Raises:
      ValueError: no such part, or as `splits.select`.
    """
    train, test = splits.select(records, "one_class")
    part = part_of(records)
    if target not in part:
        raise ValueError(f"no part {target!r}; there are {sorted(set(part.tolist()))}")
    own = train[part[train] == target]
    if not 0 < shots <= len(own):
        raise ValueError(
            f"{target}: data.shots={shots}, but there are {len(own)} good images to train on"
        )
    drawn = np.random.default_rng(seed).permutation(own)[:shots]
    return np.sort(np.concatenate([train[part[train] != target], drawn])), test


def track_b(
    records: Records,
    seed: int,
    held_out: Sequence[tuple[str, str, str]] = (),
    labelled: bool = False,
) -> Track:
    """Splits every part 70 to 30 by group, whatever its published split.

    Groups are drawn within strata of equal defect (the most severe one in the group) and, where no
    group of the part has several domains, equal domain; a stratum of n groups trains floor(0.7 n).

    Images of a held-out combination never train. A group of such images alone is tested. In other
    groups of the training side such images are left out altogether, because the rest of the group
    trains.

    Args:
      records: joined ones, or a single part.
      seed: seeds the draw.
      held_out: (part, defect, condition) that training never sees, "" for any; a part that is not
        among the records is passed over.
      labelled: whether the defective images of the training side train too.

    Raises:
      ValueError: a held-out combination without images, or a part or a defect that the training
        side lacks.
    """
    in_train = np.zeros(len(records), bool)
    part, group = part_of(records), records.table["group"]
    for name in sorted(set(part.tolist())):
        rows = np.flatnonzero(part == name)
        in_train[rows] = np.isin(
            group[rows], _draw(records, rows, [seed, zlib.crc32(name.encode())])
        )
    withheld = _withheld(records, held_out)
    is_whole = ~np.isin(group, group[~withheld])  # the group holds nothing but withheld images
    is_dropped = withheld & in_train & ~is_whole
    in_train &= ~withheld
    in_test = ~in_train & ~is_dropped
    _check_coverage(records, in_train)
    _check_withheld(records, in_train, held_out)
    splits.check_groups(records, np.flatnonzero(in_train), np.flatnonzero(in_test))
    if not labelled:
        in_train &= records.table["label"] == GOOD
    indices = (np.flatnonzero(rows) for rows in (in_train, in_test, in_test & withheld))
    return Track(*indices)


def mark_dark(records: Records, parts: Sequence[str]) -> Records:
    """Returns the records with the domain "dark" for the darkest third of the groups of some parts.

    The rule serves data sets that name no condition. Brightness is the mean of HSV's V over all
    pixels of the group's images, which are decoded for it.
    """
    domain = records.table["domain"].astype(object)
    part, group = part_of(records), records.table["group"]
    for name in parts:
        rows = np.flatnonzero(part == name)
        groups, index = np.unique(group[rows], return_inverse=True)
        values = np.array([records.image(i).max(axis=-1).mean() for i in rows])
        brightness = np.bincount(index, values) / np.maximum(np.bincount(index), 1)
        dark = groups[np.argsort(brightness, kind="stable")[: len(groups) // 3]]
        domain[rows[np.isin(group[rows], dark)]] = DARK
    return dataclasses.replace(records, table={**records.table, "domain": domain.astype(str)})


def part_of(records: Records) -> np.ndarray:
    """The part of each record, "<dataset>/<category>" as str [n]."""
    if "part" in records.table:
        return records.table["part"]
    return np.full(len(records), f"{records.dataset}/{records.category}")


def turns(records: Records, by_part: bool, by_domain: bool) -> np.ndarray | None:
    """The part or domain whose turn in a batch each image takes, str [n]; None: no turns.

    Args:
      records: training images.
      by_part: whether the data sets of joined records take turns.
      by_domain: whether the domains of a single data set take turns.
    """
    parts = part_of(records)
    if len(np.unique(parts)) > 1 and (by_part or by_domain):
        return parts
    return records.table["domain"] if by_domain else None


def condition_of(records: Records) -> np.ndarray:
    """The shooting condition of each record, str [n]: its domain before several were joined."""
    return records.table.get("condition", records.table["domain"])


def _draw(records: Records, rows: np.ndarray, seed: list[int]) -> list[str]:
    """The training groups of the part that has the records `rows`."""
    defects: dict[str, set[str]] = {}
    domains: dict[str, set[str]] = {}
    condition = condition_of(records)
    for i in rows:
        group = str(records.table["group"][i])
        defects.setdefault(group, set()).add(str(records.table["defect"][i]))
        domains.setdefault(group, set()).add(str(condition[i]))
    one_domain = all(len(names) == 1 for names in domains.values())
    strata: dict[tuple[str, str], list[str]] = {}
    for group in sorted(defects):
        worst = max(defects[group], key=_severity)
        strata.setdefault((worst, min(domains[group]) if one_domain else ""), []).append(group)
    rng = np.random.default_rng(seed)
    drawn = []
    for _, groups in sorted(strata.items()):
        drawn += rng.permutation(groups)[: len(groups) * 7 // 10].tolist()
    return drawn


def _severity(defect: str) -> tuple[int, str]:
    rank = _SEVERITY.index(defect) if defect in _SEVERITY else len(_SEVERITY)
    return rank, defect


def _withheld(records: Records, held_out: Sequence[tuple[str, str, str]]) -> np.ndarray:
    """Whether each record is of a held-out combination, bool [n]."""
    part, condition = part_of(records), condition_of(records)
    withheld = np.zeros(len(records), bool)
    for name, defect, domain in held_out:
        found = part == name
        if not found.any():
            continue
        found &= (records.table["defect"] == defect) | (not defect)
        found &= (condition == domain) | (not domain)
        if not found.any():
            kinds, places = (
                ", ".join(sorted(set(column[part == name].tolist()) - {""}))
                for column in (records.table["defect"], condition)
            )
            raise ValueError(
                f"held out: {name}, defect {defect or 'any'}, condition {domain or 'any'}, but no "
                f"image is of it; {name} has the defects {kinds} and the conditions "
                f"{places or '(none)'}"
            )
        withheld |= found
    return withheld


def _check_coverage(records: Records, in_train: np.ndarray) -> None:
    """Raises ValueError if the training side lacks a part, or a defect of a part."""
    kinds = list(zip(part_of(records).tolist(), records.table["defect"].tolist(), strict=True))
    if lacking := set(kinds) - {kinds[i] for i in np.flatnonzero(in_train)}:
        names = ", ".join(f"{part} {defect}" for part, defect in sorted(lacking)[:5])
        raise ValueError(
            f"the training side has no image of: {names}; every kind needs two groups, and a "
            "condition that is not held out"
        )


def _check_withheld(records: Records, in_train: np.ndarray, held_out: Sequence) -> None:
    """Raises ValueError if a record of the training side is of a held-out combination."""
    columns = (part_of(records), records.table["defect"], condition_of(records))
    present = set(zip(*(column[in_train].tolist() for column in columns), strict=True))
    for part, defect, condition in held_out:
        for found in present:
            if found[0] == part and defect in ("", found[1]) and condition in ("", found[2]):
                raise ValueError(f"the held-out combination {found} is on the training side")
