"""The demo trays: sixteen photographs beside each other, one defect under ten pixels."""

import collections

import numpy as np

from data_builders.demo_parts import sample
from data_builders.demo_trays import demo_trays_dataset_builder as trays


def test_the_plan_is_what_the_builder_expects():
    plan = trays.plan()
    counts = collections.Counter((split, defect == "good") for split, defect, _ in plan)
    expected = trays.Builder.EXPECTED["tray"]
    assert counts["train", True] == expected["train good"]
    assert counts["test", True] == expected["test good"]
    assert counts["test", False] == expected["test anomaly"] == expected["defective with mask"]
    assert len(set(plan)) == len(plan) == 32


def test_a_tray_has_one_defect_under_ten_pixels_and_cells_as_they_were_drawn():
    image, mask = trays.make_tray(15, "groove")
    assert (image.shape, image.dtype) == ((1024, 1024, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((1024, 1024), bool)
    assert 3 <= sample.longest_side(mask) < 10
    (cell,) = {(y // 256, x // 256) for y, x in np.argwhere(mask)}
    number = 16 * 15 + 4 * cell[0] + cell[1]
    recipe = sample.Recipe(number, "", "same", "groove", number, "tiny")
    alone = sample.make_sample(recipe, trays.SEED)
    place = tuple(slice(256 * i, 256 * i + 256) for i in cell)
    np.testing.assert_array_equal(image[place], alone.image)
    np.testing.assert_array_equal(mask[place], alone.mask)


def test_records_hold_the_trays(monkeypatch, tmp_path, built):
    monkeypatch.setattr(trays, "SIDE", 1)
    some = [("train", "good", 0), ("test", "fracture", 3)]
    monkeypatch.setattr(trays, "plan", lambda: some)
    records = built("demo_trays", None, tmp_path)["tray"]
    assert set(records["train"]) == {"train/good/000"}
    record = records["test"]["test/fracture/003"]
    assert (record["label"], record["defect"], record["domain"]) == ("anomaly", "fracture", "")
    assert record["image"].shape == (256, 256, 3)
    assert 3 <= sample.longest_side(record["mask"][..., 0] > 0) < 10
