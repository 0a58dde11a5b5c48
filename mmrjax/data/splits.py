"""Which records are trained on and which are tested: functions of the records, at read time."""

import numpy as np

from mmrjax.data.records import GOOD, Records


def select(records: Records, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, test) record indices.

    "one_class": the published split; only good images train.
    "image_split": as many training and good test images as there, but drawn image by image. Images
    of one group then lie on both sides: it exists to measure how much such a leak flatters.

    Raises:
      ValueError: no good training image, or no test image.
    """
    good = records.table["label"] == GOOD
    in_train = records.table["split"] == "train"
    train, test = np.flatnonzero(in_train & good), np.flatnonzero(~in_train)
    if protocol == "image_split":
        drawn = np.random.default_rng(0).permutation(np.flatnonzero(good))
        train, good_test = np.sort(drawn[: len(train)]), drawn[len(train) :]
        test = np.sort(np.concatenate([good_test, np.flatnonzero(~good & ~in_train)]))
    elif set(records.table["group"][train]) & set(records.table["group"][test]):
        shared = sorted(set(records.table["group"][train]) & set(records.table["group"][test]))
        names = [str(group) for group in shared[:3]]
        raise ValueError(f"groups in both splits, scores would leak: {names}")
    where = f"{records.dataset}/{records.category}"
    if not len(train):
        raise ValueError(f"{where}: no good image to train on among {len(records)} records")
    if not len(test):
        raise ValueError(f"{where}: no test image among {len(records)} records")
    return train, test
