"""Which records train: good ones of the published split, and nothing that leaks unless asked to."""

import dataclasses

import numpy as np
import pytest

from mmrjax.data import records as records_lib
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
    with pytest.raises(ValueError, match=r"groups in both splits.*\['a3', 'a7'\]"):
        splits.select(make_records(rows), "one_class")


def test_groups_on_both_sides_are_what_image_split_is_for():
    rows = [*ROWS, ("test", GOOD, "a3")]
    train, test = splits.select(make_records(rows), "image_split")
    assert (len(train), len(test)) == (12, 10)


def test_group_of_an_unused_training_anomaly_does_not_leak():
    rows = [*ROWS, ("test", ANOMALY, "b1")]
    assert len(splits.select(make_records(rows), "one_class")[1]) == 10


@pytest.mark.parametrize("protocol", ["one_class", "k_shot", "one_for_all", "image_split"])
@pytest.mark.parametrize("rows", [ROWS[12:], ROWS[12:15] + ROWS[17:]])
def test_no_good_training_image_is_an_error(protocol, rows):
    with pytest.raises(ValueError, match=rf"parts/bolt: no good image .* {len(rows)} records"):
        splits.select(make_records(rows), protocol)


@pytest.mark.parametrize("protocol", ["one_class", "k_shot", "one_for_all", "image_split"])
@pytest.mark.parametrize("rows", [ROWS[:12], ROWS[:15]])
def test_no_test_image_is_an_error(protocol, rows):
    with pytest.raises(ValueError, match=rf"parts/bolt: no test image among {len(rows)} records"):
        splits.select(make_records(rows), protocol, shots=1)


def test_a_built_data_set_is_split_as_its_folders_say(records):
    train, test = splits.select(records, "one_class")
    assert all(name.startswith("train/good") for name in records.table["id"][train])
    assert all(name.startswith("test/") for name in records.table["id"][test])
    assert (len(train), len(test)) == (7, 4)


# --- few shots, and one model for all


def test_k_shot_draws_some_of_the_training_images_and_keeps_the_test():
    records = mixed()
    train, test = splits.select(records, "one_class")
    drawn, same_test = splits.select(records, "k_shot", shots=4, seed=0)
    assert len(drawn) == 4
    assert set(drawn) < set(train)
    assert (np.diff(drawn) > 0).all()
    np.testing.assert_array_equal(same_test, test)


def test_shots_depend_on_the_seed_and_fewer_are_among_more():
    records = make_records()
    draws = [splits.select(records, "k_shot", 4, seed)[0] for seed in range(6)]
    assert len({tuple(draw) for draw in draws}) > 3
    np.testing.assert_array_equal(draws[2], splits.select(records, "k_shot", 4, 2)[0])
    assert set(splits.select(records, "k_shot", 2, 2)[0]) < set(draws[2])


@pytest.mark.parametrize("shots", [0, 13])
def test_shots_that_are_not_there_are_refused_with_both_numbers(shots):
    message = rf"parts/bolt: data\.shots={shots}, but there are 12 good images .* from 1 to 12"
    with pytest.raises(ValueError, match=message):
        splits.select(make_records(), "k_shot", shots)


@pytest.mark.parametrize("protocol", ["k_shot", "one_for_all"])
def test_every_protocol_but_image_split_refuses_shared_groups(protocol):
    rows = [*ROWS, ("test", GOOD, "a3")]
    with pytest.raises(ValueError, match="groups in both splits"):
        splits.select(make_records(rows), protocol, shots=12)


def categories() -> list[Records]:
    """Two categories with the same ids and groups; the second has domains."""
    first, second = make_records(), make_records(ROWS[:14] + ROWS[15:])
    for records, domain in ((first, ""), (second, "view")):
        records.table["domain"] = np.full(len(records), domain)
    return [first, dataclasses.replace(second, category="nut", digest="other")]


def test_each_category_is_a_unit_unless_one_model_is_for_all():
    parts = categories()
    assert list(splits.units(iter(parts), "one_class")) == parts
    [joined] = splits.units(iter(parts), "one_for_all")
    assert (joined.dataset, joined.category, len(joined)) == ("parts", "all", 47)
    assert set(joined.table["domain"]) == {"bolt", "nut view"}
    assert set(joined.table["group"][:2]) == {"parts/bolt/a0", "parts/bolt/a1"}


def test_one_model_for_all_trains_and_tests_on_the_sum():
    parts = categories()
    [joined] = splits.units(parts, "one_for_all")
    train, test = splits.select(joined, "one_for_all")
    each = [splits.select(part, "one_class") for part in parts]
    assert len(train) == sum(len(rows) for rows, _ in each)
    assert len(test) == sum(len(rows) for _, rows in each)


def test_the_same_category_twice_is_refused():
    with pytest.raises(
        ValueError, match=r"different parts to join, found \['parts/bolt', 'parts/b"
    ):
        list(splits.units([make_records(), make_records()], "one_for_all"))


def test_joined_records_decode_as_their_parts(built):
    records = built[0]
    other = dataclasses.replace(records, dataset="other")
    joined = records_lib.join([records, other])
    assert joined.dataset == f"{records.dataset}+other"
    assert len(set(joined.table["id"])) == len(joined) == 2 * len(records)
    last = len(records) - 1
    for i in (0, last):
        np.testing.assert_array_equal(joined.image(i), records.image(i))
        np.testing.assert_array_equal(joined.image(len(records) + i), records.image(i))
        assert joined.table["id"][len(records) + i] == f"other/{records.table['id'][i]}"


def test_joined_digest_follows_each_part():
    first, second = categories()
    changed = dataclasses.replace(second, digest="changed")
    digests = {records_lib.join([first, part]).digest for part in (second, changed)}
    assert len(digests) == 2


def test_held_out_groups_stay_together_and_are_not_trained_on():
    rows = [("train", GOOD, f"part{i // 3}") for i in range(90)] + [("test", GOOD, "z")]
    train = make_records(rows).take(range(90))
    trained, held_out = splits.hold_out(train, 0.2, seed=3)
    groups = [set(part.table["group"].tolist()) for part in (trained, held_out)]
    assert len(groups[1]) == 6
    assert not groups[0] & groups[1]
    ids = [part.table["id"].tolist() for part in (trained, held_out)]
    assert sorted(ids[0] + ids[1]) == sorted(train.table["id"].tolist())
    for seed, is_same in ((3, True), (4, False)):
        other = splits.hold_out(train, 0.2, seed)[1].table["id"].tolist()
        assert (other == ids[1]) == is_same


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_without_a_fraction_or_with_few_images_all_are_trained_on(fraction):
    train = make_records().take(range(12))  # twelve: three of them would promise nothing
    trained, held_out = splits.hold_out(train, fraction)
    assert trained.table["id"].tolist() == train.table["id"].tolist()
    assert len(held_out) == 0
