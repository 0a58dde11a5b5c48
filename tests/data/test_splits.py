"""Which records train: good ones of the published split, and nothing that leaks unless asked to."""

import numpy as np
import pytest

from mmrjax.data import splits
from mmrjax.data.records import ANOMALY, GOOD, Records

# (split, label, group): anomalies in the training split as KolektorSDD2 has them.
ROWS = (
    [("train", GOOD, f"a{i}") for i in range(12)]
    + [("train", ANOMALY, f"b{i}") for i in range(3)]
    + [("test", GOOD, f"c{i}") for i in range(5)]
    + [("test", ANOMALY, f"d{i}") for i in range(4)]
)


def make_records(rows=ROWS) -> Records:
    split, label, group = zip(*rows, strict=True) if rows else ((), (), ())
    table = {
        "split": np.array(split, str),
        "label": np.array(label, int),
        "group": np.array(group, str),
        "id": np.array([str(i) for i in range(len(rows))], str),
    }
    return Records("parts", "bolt", table, "", {}, [("", i) for i in range(len(rows))])


def mixed(seed: int = 0) -> Records:
    """The same records in another order."""
    order = np.random.default_rng(seed).permutation(len(ROWS))
    return make_records([ROWS[i] for i in order])


@pytest.mark.parametrize("records", [make_records(), mixed()])
def test_one_class_trains_on_exactly_the_good_images_of_the_training_split(records):
    train, test = splits.select(records, "one_class")
    is_train = (records.table["split"] == "train") & (records.table["label"] == GOOD)
    np.testing.assert_array_equal(train, np.flatnonzero(is_train))
    np.testing.assert_array_equal(test, np.flatnonzero(records.table["split"] == "test"))
    assert len(train) == 12


@pytest.mark.parametrize("records", [make_records(), mixed()])
def test_image_split_has_the_counts_of_the_published_one(records):
    train, test = splits.select(records, "image_split")
    labels = records.table["label"]
    assert (len(train), len(test)) == (12, 9)
    assert (labels[train] == GOOD).all()
    assert (labels[test] == ANOMALY).sum() == 4
    assert (records.table["split"][test[labels[test] == ANOMALY]] == "test").all()
    assert not set(train) & set(test)
    for rows in (train, test):
        assert (np.diff(rows) > 0).all()  # sorted, none twice


def test_image_split_mixes_the_published_splits_and_is_always_the_same():
    records = make_records()
    train, test = splits.select(records, "image_split")
    assert (records.table["split"][train] == "test").any()
    again = splits.select(records, "image_split")
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(test, again[1])


def test_groups_on_both_sides_are_refused_and_named():
    rows = [*ROWS, ("test", ANOMALY, "a7"), ("test", GOOD, "a3")]
    with pytest.raises(ValueError, match=r"groups in both splits.*a3.*a7"):
        splits.select(make_records(rows), "one_class")


def test_shared_groups_are_named_as_a_person_would_write_them():
    rows = [*ROWS, ("test", ANOMALY, "a7"), ("test", GOOD, "a3")]
    with pytest.raises(ValueError, match=r"\['a3', 'a7'\]"):
        splits.select(make_records(rows), "one_class")


def test_groups_on_both_sides_are_what_image_split_is_for():
    rows = [*ROWS, ("test", GOOD, "a3")]
    train, test = splits.select(make_records(rows), "image_split")
    assert (len(train), len(test)) == (12, 10)


def test_group_of_an_unused_training_anomaly_does_not_leak():
    rows = [*ROWS, ("test", ANOMALY, "b1")]
    assert len(splits.select(make_records(rows), "one_class")[1]) == 10


@pytest.mark.parametrize("protocol", ["one_class", "image_split"])
@pytest.mark.parametrize("rows", [ROWS[12:], ROWS[12:15] + ROWS[17:]])
def test_no_good_training_image_is_an_error(protocol, rows):
    with pytest.raises(ValueError, match=rf"parts/bolt: no good image .* {len(rows)} records"):
        splits.select(make_records(rows), protocol)


@pytest.mark.parametrize("protocol", ["one_class", "image_split"])
@pytest.mark.parametrize("rows", [ROWS[:12], ROWS[:15]])
def test_no_test_image_is_an_error(protocol, rows):
    with pytest.raises(ValueError, match=rf"parts/bolt: no test image among {len(rows)} records"):
        splits.select(make_records(rows), protocol)


def test_a_built_data_set_is_split_as_its_folders_say(records):
    train, test = splits.select(records, "one_class")
    assert all(name.startswith("train/good") for name in records.table["id"][train])
    assert all(name.startswith("test/") for name in records.table["id"][test])
    assert (len(train), len(test)) == (7, 4)
