"""The split into training and test: functions of the records, at read time.

The protocols of one data set stand here, the cross-domain tracks over several data sets in
`tracks`. All protocols but "image_split" refuse a group with images on both sides.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from mmrjax.data import records as records_lib
from mmrjax.data.records import GOOD, Records

MIN_HELD_OUT = 4  # groups; they promise a false-positive rate of 20 %
FEW = 20  # training groups below which a run says what to expect
HOLD_OUT = 0xCA11  # separates the draw of held-out groups from the other draws of a seed


def select(
    records: Records, protocol: str, shots: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, test) record indices, each sorted.

    "one_class": the published split; only good images train.
    "k_shot": the same test, but only `shots` of the training images, drawn by `seed`. With the same
    seed, the images of fewer shots are among those of more shots.
    "one_for_all": as "one_class", for the records of all categories that `units` has joined.
    "image_split": as many training and good test images as in the published split, but drawn image
    by image. Images of one group then lie on both sides. The protocol exists to measure how much
    such a leak raises the scores.

    Raises:
      ValueError: no good training image, fewer than `shots`, no test image, or a group on both
        sides.
    """
    good = records.table["label"] == GOOD
    in_train = records.table["split"] == "train"
    train, test = np.flatnonzero(in_train & good), np.flatnonzero(~in_train)
    where = f"{records.dataset}/{records.category}"
    if not len(train):
        raise ValueError(
            f"{where}: no good image to train on among {len(records)} records; add some"
        )
    if protocol == "image_split":
        drawn = np.random.default_rng(0).permutation(np.flatnonzero(good))
        train, good_test = np.sort(drawn[: len(train)]), drawn[len(train) :]
        test = np.sort(np.concatenate([good_test, np.flatnonzero(~good & ~in_train)]))
    else:
        check_groups(records, train, test)
    if protocol == "k_shot":
        if not 0 < shots <= len(train):
            raise ValueError(
                f"{where}: data.shots={shots}, but there are {len(train)} good images to train on; "
                f"choose from 1 to {len(train)}"
            )
        train = np.sort(np.random.default_rng(seed).permutation(train)[:shots])
    if not len(test):
        raise ValueError(f"{where}: no test image among {len(records)} records; add some")
    return train, test


def hold_out(train: Records, fraction: float, seed: int = 0) -> tuple[Records, Records]:
    """Keeps good images from training, to calibrate a threshold with.

    Args:
      train: the training images, all good.
      fraction: share of their groups; 0 holds nothing out.
      seed: seeds the draw.

    Returns:
      (train, held out), in their order. Groups stay together. Fewer than MIN_HELD_OUT groups
      promise nothing that is of use: then none is held out.
    """
    groups = np.unique(train.table["group"])
    count = int(fraction * len(groups))
    if count < MIN_HELD_OUT:
        return train, train.take([])
    drawn = np.random.default_rng((seed, HOLD_OUT)).permutation(groups)[:count]
    is_held_out = np.isin(train.table["group"], drawn)
    return train.take(np.flatnonzero(~is_held_out)), train.take(np.flatnonzero(is_held_out))


def apart(records: Records, held_out: Records) -> Records:
    """The records whose group has no image among those held out."""
    shared = np.isin(records.table["group"], held_out.table["group"])
    return records.take(np.flatnonzero(~shared))


def few(train: Records) -> str:
    """A warning, in words, if the good training images are few; "" if there are enough."""
    parts = len(np.unique(train.table["group"]))
    if parts >= FEW:
        return ""
    images = "1 good image" if len(train) == 1 else f"{len(train)} good images"
    of_parts = "" if parts == len(train) else f" of {parts} part{'s' * (parts > 1)}"
    return (
        f"trained on {images}{of_parts} only: other ones would give other scores, and a good part "
        f"unlike them looks defective; take {FEW} or more, of every light, pose and lot that occurs"
    )


def units(parts: Iterable[Records], protocol: str) -> Iterator[Records]:
    """Yields the records of each model: one category, or with "one_for_all" all of them joined.

    In joined records the domain of a record begins with its category, so that results are reported
    and averaged by category.
    """
    if protocol != "one_for_all":
        yield from parts
        return
    joined = records_lib.join(list(parts))
    categories = [part.split("/", 1)[1] for part in joined.table["part"]]
    pairs = zip(categories, joined.table["domain"], strict=True)
    domains = np.array([f"{category} {domain}".strip() for category, domain in pairs])
    yield dataclasses.replace(joined, table={**joined.table, "domain": domains})


def check_groups(records: Records, train: np.ndarray, test: np.ndarray) -> None:
    """Raises ValueError if images of one group are among both the indices `train` and `test`."""
    groups = records.table["group"]
    if shared := sorted(set(groups[train]) & set(groups[test])):
        names = [str(group) for group in shared[:3]]
        raise ValueError(f"groups in both splits, scores would leak: {names}")
