"""Cross-domain tracks: no group on two sides, no held-out combination in training."""

import collections
import csv
import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from mmrjax.data import records as records_lib
from mmrjax.data import splits, tracks
from mmrjax.data.records import ANOMALY, GOOD, Records
from mmrjax.runtime import config as config_lib


def make_records(dataset: str, category: str, rows) -> Records:
    """Records of (split, defect, domain, group)."""
    split, defect, domain, group = (np.array(column, str) for column in zip(*rows, strict=True))
    table = {
        "id": np.array([str(i) for i in range(len(rows))], str),
        "split": split,
        "defect": defect,
        "domain": domain,
        "group": group,
        "label": np.where(defect == "good", GOOD, ANOMALY),
    }
    return Records(dataset, category, table, dataset, {}, [("", i) for i in range(len(rows))])


def blades() -> Records:
    """As AeBAD-S: every image its own group, test conditions by name."""
    kinds = [("train", "good", "")] * 20
    for domain in ("same", "background", "illumination", "view"):
        for defect, count in (("good", 10), ("groove", 10), ("fracture", 10), ("ablation", 3)):
            kinds += [("test", defect, domain)] * count
    return make_records("aebad", "s", [(*kind, f"{i}.png") for i, kind in enumerate(kinds)])


def tiles() -> Records:
    """As the magnetic tiles: a group shows one tile at six exposures, good and defective."""
    rows = []
    tile_kinds = ["good"] * 20 + ["crack"] * 10 + ["blowhole"] * 10
    for tile, kind in enumerate(tile_kinds):
        split = "train" if tile < 14 else "test"
        for e in range(1, 7):
            rows.append((split, kind, f"exp{e}", str(tile)))
        if kind != "good":
            rows += [(split, "good", f"exp{e}", str(tile)) for e in (1, 6)]
    return make_records("magnetic_tile", "tile", rows)


def rails() -> Records:
    """As RSDDs: strips of tiles, each with good and defective ones."""
    rows = []
    for strip in range(12):
        split = "train" if strip < 8 else "test"
        rows += [(split, defect, "", f"rail_{strip}.jpg") for defect in ("good", "good", "anomaly")]
    return make_records("rsdds", "i", rows)


@pytest.fixture
def joined() -> Records:
    return records_lib.join([blades(), tiles(), rails()])


def groups(records: Records, rows: np.ndarray) -> set[str]:
    return set(records.table["group"][rows].tolist())


def combinations(records: Records, rows: np.ndarray) -> set[tuple[str, str, str]]:
    part = tracks.part_of(records)
    columns = (part, records.table["defect"], records.table["domain"])
    return {tuple(str(column[i]) for column in columns) for i in rows}


# --- track A


def test_track_a_keeps_the_published_test_and_adds_training_images(joined):
    train, test = tracks.track_a(joined, "aebad/s")
    alone = splits.select(blades(), "one_class")
    np.testing.assert_array_equal(test, alone[1])  # aebad/s comes first
    np.testing.assert_array_equal(train[: len(alone[0])], alone[0])
    assert set(tracks.part_of(joined)[train]) == {"aebad/s", "magnetic_tile/tile", "rsdds/i"}
    assert (joined.table["label"][train] == GOOD).all()
    assert (joined.table["split"][train] == "train").all()


def test_track_a_lists_the_parts_there_are(joined):
    with pytest.raises(ValueError, match=r"no part 'aebad/v'; there are \['aebad/s', 'magn"):
        tracks.track_a(joined, "aebad/v")


def test_track_a_refuses_shared_groups(joined):
    joined.table["group"][-1] = joined.table["group"][tracks.part_of(joined) == "rsdds/i"][0]
    with pytest.raises(ValueError, match="groups in both splits"):
        tracks.track_a(joined, "aebad/s")


# --- track B


@pytest.mark.parametrize("seed", range(5))
def test_track_b_splits_groups_seventy_to_thirty_in_every_stratum(joined, seed):
    track = tracks.track_b(joined, seed, labelled=True)
    assert not groups(joined, track.train) & groups(joined, track.test)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([track.train, track.test])), np.arange(len(joined))
    )
    assert not len(track.unseen)
    part = tracks.part_of(joined)
    # Blades are drawn within (defect, domain): 20 of nothing, 4 x 10, 10, 10 and 3.
    blade = [i for i in track.train if part[i] == "aebad/s"]
    counts = collections.Counter(
        (joined.table["defect"][i], joined.table["domain"][i]) for i in blade
    )
    expected = {("good", ""): 14}
    for domain in ("same", "background", "illumination", "view"):
        expected |= {(d, domain): n for d, n in (("groove", 7), ("fracture", 7), ("good", 7))}
        expected[("ablation", domain)] = 2
    assert counts == expected
    # Tiles are drawn by their worst defect only: each has all exposures.
    assert len(groups(joined, [i for i in track.train if part[i] == "magnetic_tile/tile"])) == 28
    assert len(groups(joined, [i for i in track.train if part[i] == "rsdds/i"])) == 8


def test_track_b_trains_on_good_images_unless_labels_are_asked_for(joined):
    labelled, good = (tracks.track_b(joined, 0, labelled=flag) for flag in (True, False))
    assert (joined.table["label"][good.train] == GOOD).all()
    is_good = joined.table["label"][labelled.train] == GOOD
    np.testing.assert_array_equal(labelled.train[is_good], good.train)
    np.testing.assert_array_equal(labelled.test, good.test)


def test_track_b_depends_on_the_seed_and_on_each_part_alone(joined):
    draws = {tuple(tracks.track_b(joined, seed).train) for seed in range(3)}
    assert len(draws) == 3
    alone = tracks.track_b(blades(), 1)
    together = tracks.track_b(joined, 1)
    is_blade = tracks.part_of(joined)[together.train] == "aebad/s"
    np.testing.assert_array_equal(alone.train, together.train[is_blade])


def test_track_b_refuses_a_defect_that_cannot_be_learned(joined):
    joined.table["defect"][-1] = "rust"  # one group only: floor(0.7) is none
    with pytest.raises(ValueError, match=r"the training side has no image of: rsdds/i rust"):
        tracks.track_b(joined, 0)


# --- held-out combinations


PUBLISHED = tracks.combinations(config_lib.load("configs/cross_domain.py").data.held_out)
HELD_OUT = tuple(held for held in PUBLISHED if held[0] in ("aebad/s", "magnetic_tile/tile"))


@pytest.mark.parametrize("seed", range(5))
def test_held_out_combinations_never_train(joined, seed):
    track = tracks.track_b(joined, seed, HELD_OUT, labelled=True)
    assert not combinations(joined, track.train) & set(HELD_OUT)
    assert not groups(joined, track.train) & groups(joined, track.test)
    assert set(HELD_OUT) == combinations(joined, track.unseen)
    assert set(track.unseen) <= set(track.test)
    seen = np.setdiff1d(track.test, track.unseen)
    assert not combinations(joined, seen) & set(HELD_OUT)


def test_held_out_images_of_training_tiles_are_left_out_and_those_of_test_tiles_stay(joined):
    plain = tracks.track_b(joined, 0, labelled=True)
    track = tracks.track_b(joined, 0, HELD_OUT, labelled=True)
    part = tracks.part_of(joined)
    dropped = np.setdiff1d(np.setdiff1d(np.arange(len(joined)), track.train), track.test)
    # 7 cracked tiles at two exposures and 7 with blowholes at one; their other images still train.
    assert set(part[dropped]) == {"magnetic_tile/tile"}
    assert len(dropped) == 7 * 2 + 7
    assert groups(joined, dropped) <= groups(joined, track.train)
    # A blade is a group of its own: all of a held-out combination are tested.
    moved = np.setdiff1d(track.test, plain.test)
    assert set(part[moved]) == {"aebad/s"}
    assert len(moved) == 7 + 7


def test_pairs_of_absent_parts_are_passed_over_and_mistaken_ones_are_not(joined):
    assert not len(tracks.track_b(joined, 0, [("rsdds/ii", "", "dark")]).unseen)
    with pytest.raises(
        ValueError, match=r"rsdds/i, defect any, condition dark, .*conditions \(none"
    ):
        tracks.track_b(joined, 0, [("rsdds/i", "", "dark")])
    with pytest.raises(
        ValueError, match=r"aebad/s, defect rust, condition any, .* has the defects ablation, fr"
    ):
        tracks.track_b(joined, 0, [("aebad/s", "rust", "")])


def test_the_darkest_third_of_the_strips_is_dark_and_can_be_held_out(joined, monkeypatch):
    def image(self, i, max_side=0):
        """Strip k has its brightest channel at 10 k on average; its tiles differ."""
        strip = int(self.table["group"][i].split("_")[-1].split(".")[0])
        pixels = np.full((4, 5, 3), 10 * strip, np.uint8)
        pixels[..., 1:] //= 2
        return pixels

    monkeypatch.setattr(Records, "image", image)
    marked = tracks.mark_dark(joined, ["rsdds/i"])
    dark = marked.table["domain"] == "dark"
    assert groups(joined, dark) == {f"rsdds/i/rail_{k}.jpg" for k in range(4)}  # of 12
    assert (joined.table["domain"] != "dark").all()  # the given records stay as they are
    track = tracks.track_b(marked, 0, PUBLISHED, labelled=True)
    assert not (marked.table["domain"][track.train] == "dark").any()
    assert set(np.flatnonzero(dark)) <= set(track.unseen)


# --- the real tiles


def test_real_tiles_split_into_the_specified_numbers_of_groups(shared):
    with (shared / "data" / "magnetic_tile" / "split.csv").open() as file:
        rows = [
            (r["split"], "good" if r["class"] == "MT_Free" else r["class"][3:].lower(),
             f"exp{r['exposure']}", r["group"])
            for r in csv.DictReader(file)
        ]  # fmt: skip
    records = make_records("magnetic_tile", "tile", rows)
    track = tracks.track_b(records, 0, HELD_OUT, labelled=True)
    order = ("good", "uneven", "blowhole", "break", "crack", "fray")
    worst = collections.defaultdict(int)
    for group, defect in zip(records.table["group"], records.table["defect"], strict=True):
        worst[str(group)] = max(worst[str(group)], order.index(defect))
    sides = [
        collections.Counter(order[worst[group]] for group in groups(records, side))
        for side in (tracks.track_b(records, 0, labelled=True).train, track.test)
    ]
    assert sides[0] == {"good": 93, "blowhole": 12, "uneven": 11, "break": 9, "crack": 7, "fray": 5}
    assert sides[1] == {"good": 40, "blowhole": 6, "uneven": 6, "break": 5, "crack": 3, "fray": 3}
    assert dataclasses.astuple(track)[2].size > 0


# --- against a slow oracle, on random data sets


def random_parts(seed: int) -> list[Records]:
    """Two data sets with random groups: images of one or several defects and conditions each."""
    rng = np.random.default_rng(seed)
    parts = []
    for name, one_condition in (("folder/a", True), ("visa/b", False)):
        rows = []
        for group in range(int(rng.integers(24, 40))):
            condition = ("", "lit", "dim")[rng.integers(3)]
            for _ in range(rng.integers(1, 4)):
                defect = ("good", "good", "dent", "rust")[rng.integers(4)]
                where = condition if one_condition else ("", "lit", "dim")[rng.integers(3)]
                rows.append(("train", defect, where, f"{group}"))
        parts.append(make_records(*name.split("/"), rows))
    return parts


def slow_split(records: Records, trained: set[str], held_out) -> tuple[list, list, list]:
    """Image by image, given the groups that were drawn for training."""
    train, test, unseen = [], [], []
    columns = ("part", "defect", "condition", "group")
    for i, row in enumerate(zip(*(records.table[name] for name in columns), strict=True)):

        def is_held_out(other):
            return any(
                other[0] == part and defect in ("", other[1]) and condition in ("", other[2])
                for part, defect, condition in held_out
            )

        siblings = [
            other
            for other in zip(*(records.table[name] for name in columns), strict=True)
            if other[3] == row[3]
        ]
        if not is_held_out(row) and row[3] in trained:
            train.append(i)
        elif not (is_held_out(row) and row[3] in trained and not all(map(is_held_out, siblings))):
            test.append(i)
            if is_held_out(row):
                unseen.append(i)
    return train, test, unseen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "texts", [(), ("folder/a:dent:lit", "visa/b:rust:dim"), ("folder/a:*:dim",)]
)
def test_a_split_is_that_of_a_loop_over_images_and_keeps_the_promises(seed, texts):
    records = tracks.joined(random_parts(seed), texts)
    held_out = tracks.combinations(texts)
    data = ConfigDict({
        "protocol": "track_b", "held_out": texts, "labelled": True, "split_seed": -1,
        "shots": 0, "target": "",
    })  # fmt: skip
    track = tracks.select(records, data, seed)
    again = tracks.select(records, data, seed)
    for name in ("train", "test", "unseen"):
        np.testing.assert_array_equal(getattr(track, name), getattr(again, name))
    # The groups that trained without anything held out are those of the draw.
    drawn = groups(records, tracks.track_b(records, seed, labelled=True).train)
    expected = slow_split(records, drawn, held_out)
    for found, wanted in zip(dataclasses.astuple(track), expected, strict=True):
        assert found.tolist() == wanted
    assert not groups(records, track.train) & groups(records, track.test)
    kinds = set(zip(records.table["part"], records.table["defect"], strict=True))
    assert kinds == {tuple(map(str, pair)) for pair in zip(
        records.table["part"][track.train], records.table["defect"][track.train], strict=True
    )}  # fmt: skip
    for name in ("folder/a", "visa/b"):  # 70 % of the groups, but for rounding down per stratum
        own = groups(records, np.flatnonzero(records.table["part"] == name))
        strata = 9 if name == "folder/a" else 3
        assert 0.7 * len(own) - strata <= len(own & drawn) <= 0.7 * len(own)


def test_the_fields_of_a_configuration_choose_the_protocol(joined):
    data = config_lib.load("configs/cross_domain.py:a").data
    track = tracks.select(joined, data, 54)
    for found, wanted in zip((track.train, track.test), tracks.track_a(joined, "aebad/s"),
                             strict=True):  # fmt: skip
        np.testing.assert_array_equal(found, wanted)
    assert not len(track.unseen)
    data.target = ""  # the first one
    np.testing.assert_array_equal(tracks.select(joined, data, 54).test, track.test)
    data.protocol, data.split_seed = "track_b", 3
    for seed in (0, 1):
        np.testing.assert_array_equal(
            tracks.select(joined, data, seed).test, tracks.track_b(joined, 3).test
        )
    data.protocol = "one_class"
    for found, wanted in zip((track.train, track.test), splits.select(joined, "one_class"),
                             strict=True):  # fmt: skip
        assert set(found) <= set(wanted)


def test_joined_data_sets_are_told_apart_and_keep_their_conditions():
    parts = [blades(), tiles()]
    records = tracks.joined(parts)
    np.testing.assert_array_equal(records.table["domain"], records.table["part"])
    own = np.concatenate([part.table["domain"] for part in parts])
    np.testing.assert_array_equal(tracks.condition_of(records), own)
    alone = tracks.joined(parts[:1])
    assert alone.table.keys() == parts[0].table.keys()
    for name, column in alone.table.items():
        np.testing.assert_array_equal(column, parts[0].table[name])


@pytest.mark.parametrize("text", ["aebad/s:groove", "aebad:groove:view", "a/b::view", "a/b:c:d:e"])
def test_a_combination_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="is no combination; give <dataset>/<category>:<defect>"):
        tracks.combinations([text])
    assert tracks.combinations(["a/b:*:dark"]) == [("a/b", "", "dark")]


def test_a_held_out_image_on_the_training_side_is_found(joined):
    in_train = np.ones(len(joined), bool)
    with pytest.raises(ValueError, match=r"'groove', 'illumination'\) is on the training side"):
        tracks._check_withheld(joined, in_train, [("aebad/s", "groove", "illumination")])


def test_few_images_of_one_part_leave_the_others_whole(joined):
    records = joined
    parts = tracks.part_of(records)
    target = str(np.unique(parts)[0])
    whole, test = splits.select(records, "one_class")
    train, same = tracks.few_of(records, target, 2, 5)
    np.testing.assert_array_equal(test, same)
    assert (parts[train] == target).sum() == 2
    np.testing.assert_array_equal(train[parts[train] != target], whole[parts[whole] != target])
    np.testing.assert_array_equal(train, tracks.few_of(records, target, 2, 5)[0])
    with pytest.raises(ValueError, match=r"data.shots=9999, but there are"):
        tracks.few_of(records, target, 9999, 5)
    with pytest.raises(ValueError, match=r"no part 'no/part'; there are"):
        tracks.few_of(records, "no/part", 2, 5)
