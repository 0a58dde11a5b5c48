"""What a run is judged by: the test, or drawn defects, and then never the test."""

import collections

import cv2
import numpy as np
import pytest

from mmrjax.data import judge
from mmrjax.data import records as records_lib
from mmrjax.data.defects import held_out
from mmrjax.data.records import ANOMALY, GOOD, Records

GROUPS, EACH = 18, 2  # groups of good training pictures, and pictures of each


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


class Pictures:
    """Grained pictures without a mask, as a source of records."""

    def __getitem__(self, row: int) -> dict[str, bytes]:
        image = np.random.default_rng(row).integers(90, 130, (48, 64, 3), np.uint8)
        return {"image": png(image), "mask": png(0 * image[..., 0])}


class Secret:
    """The test, which may not be read."""

    def __getitem__(self, row: int):
        pytest.fail("a test picture was read")


def make_records(groups: int = GROUPS, category: str = "bolt", test_label=ANOMALY) -> Records:
    """Good training pictures in groups, a labelled defect of training, and a test of 6."""
    rows = [("train", GOOD, "good", f"g{i // EACH}") for i in range(groups * EACH)]
    rows += [("train", ANOMALY, "dent", f"d{i}") for i in range(3)]
    rows += [("test", GOOD, "good", f"t{i}") for i in range(3)]
    rows += [("test", test_label, "dent", f"t{i + 3}") for i in range(3)]
    split, label, defect, group = (np.array(column) for column in zip(*rows, strict=True))
    ids = np.array([f"{i}.png" for i in range(len(rows))])
    table = {"id": ids, "split": split, "label": label, "defect": defect, "group": group}
    table |= {"domain": np.full(len(rows), ""), "has_mask": np.ones(len(rows), bool)}
    places = [(name, i) for i, name in enumerate(split.tolist())]
    sources = {"train": Pictures(), "test": Secret()}
    return Records("parts", category, table, category, sources, places)


@pytest.fixture
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.sweep.judge = "held_out_defects"
    return config


def everything(records: Records) -> list:
    """All that can be read from records."""
    columns = [column.tolist() for column in records.table.values()]
    return columns + [records.encoded(i, f) for i in range(len(records)) for f in ("image", "mask")]


def test_by_default_the_test_judges(tiny_config):
    records = make_records()
    got, track = judge.select(records, tiny_config, 0)
    assert got is records
    assert set(records.table["split"][track.test]) == {"test"}
    assert judge.note(tiny_config) == ""


def test_held_out_groups_and_their_defective_copies_are_the_test(config):
    records, track = judge.select(make_records(), config, 0)
    table = records.table
    assert sorted([*track.train, *track.test]) == list(range(len(records)))
    groups = {
        name: set(table["group"][rows])
        for name, rows in (("train", track.train), ("test", track.test))
    }
    assert not groups["train"] & groups["test"]
    assert len(groups["test"]) == GROUPS // 4
    assert "dent" not in table["defect"]
    good = track.test[table["label"][track.test] == GOOD]
    bad = track.test[table["label"][track.test] == ANOMALY]
    assert len(good) == EACH * (GROUPS // 4)
    counts = collections.Counter(table["defect"][bad].tolist())
    assert set(counts) == set(held_out.KINDS)
    assert min(counts.values()) >= judge.EACH
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(set(table["id"].tolist())) == len(records)
    assert set(table["group"][bad]) == set(table["group"][good])


def test_a_copy_differs_from_its_good_picture_within_its_mask_alone(config):
    records, track = judge.select(make_records(), config, 0)
    names = records.table["id"].tolist()
    bad = track.test[records.table["label"][track.test] == ANOMALY]
    for i in bad:
        twin = names.index(names[i].split(":")[0])
        change = np.abs(records.image(i).astype(int) - records.image(twin)).max(axis=-1)
        mask = records.mask(i) > 0
        assert change[mask].mean() > held_out.CHANGED
        if records.table["defect"][i] in held_out.SMALL:
            assert not (change > held_out.CHANGED)[~mask].any()


def test_the_pictures_are_those_of_the_table_whatever_the_seed_and_the_order(config):
    records, _ = judge.select(make_records(), config, 0)
    other, _ = judge.select(make_records(), config, 1)
    assert everything(records) == everything(other)
    backwards = [records.encoded(i, "image") for i in reversed(range(len(records)))]
    assert backwards[::-1] == [other.encoded(i, "image") for i in range(len(other))]


@pytest.mark.parametrize("protocol", ["one_class", "k_shot", "one_for_all", "track_a"])
def test_no_look_at_the_test_is_possible(config, protocol):
    config.data.protocol = protocol
    records, track = judge.select(make_records(), config, 0)
    relabelled, other = judge.select(make_records(test_label=GOOD), config, 0)
    assert everything(records) == everything(relabelled)  # `Secret` fails where it is read
    np.testing.assert_array_equal(track.train, other.train)
    np.testing.assert_array_equal(track.test, other.test)
    assert not any(name.startswith("t") for name in records.table["group"])
    assert not any(isinstance(source, Secret) for source in records._sources.values())


def test_few_shots_are_drawn_from_what_is_not_held_out(config):
    config.data.protocol, config.data.shots = "k_shot", 5
    records, track = judge.select(make_records(), config, 0)
    assert len(track.train) == 5
    assert len(track.test) > judge.EACH * len(held_out.KINDS)
    assert not set(records.table["group"][track.train]) & set(records.table["group"][track.test])


def test_track_a_holds_pictures_of_its_target_out(config):
    config.data.protocol, config.data.target = "track_a", "parts/nut"
    joined = records_lib.join([make_records(), make_records(category="nut")])
    records, track = judge.select(joined, config, 0)
    assert set(records.table["part"][track.test]) == {"parts/nut"}
    assert set(records.table["part"][track.train]) == {"parts/bolt", "parts/nut"}


def test_track_b_keeps_the_labelled_defects_of_its_training_side(config):
    config.data.protocol, config.data.labelled = "track_b", True
    records, track = judge.select(make_records(groups=40), config, 0)
    labels = records.table["label"]
    assert set(records.table["defect"][track.train[labels[track.train] == ANOMALY]]) == {"dent"}
    assert set(records.table["defect"][track.test]) == {"good", *held_out.KINDS}
    assert not set(records.table["group"][track.train]) & set(records.table["group"][track.test])


def test_what_cannot_be_judged_so_is_refused(config):
    with pytest.raises(ValueError, match=r"parts/bolt: too few groups .*, 15; .* needs 16"):
        judge.select(make_records(groups=15), config, 0)
    config.data.protocol = "image_split"
    with pytest.raises(ValueError, match="choose another protocol"):
        judge.select(make_records(), config, 0)
