"""The demo parts: the same bytes every time, exact masks, shifts that training does not have."""

import collections

import cv2
import numpy as np
import pytest

from data_builders.demo_parts import (
    defects,
    demo_parts_dataset_builder,
    part,
    render,
    sample,
    table_top,
)
from data_builders.demo_parts import scene as scene_lib

PLAN = sample.recipes()
# One of every defect and domain, taking turns through the sizes.
DEFECTIVE = [
    next(r for r in PLAN if (r.domain, r.defect, r.number) == (domain, kind, (3 * i + j) % 10))
    for i, domain in enumerate(scene_lib.DOMAINS)
    for j, kind in enumerate(defects.KINDS)
]


@pytest.fixture(scope="module")
def drawn() -> dict[str, sample.Sample]:
    """The defective images of DEFECTIVE, by id."""
    return {recipe.name: sample.make_sample(recipe) for recipe in DEFECTIVE}


def difference(drawn: sample.Sample) -> np.ndarray:
    """Grey levels between an image and its undamaged twin, [h, w]."""
    return np.abs(drawn.image.astype(int) - drawn.twin.astype(int)).max(axis=-1)


def test_every_domain_has_thirty_good_images_and_ten_of_each_defect():
    counts = collections.Counter((r.split, r.domain, r.defect) for r in PLAN)
    expected = {("train", "", "good"): 240}
    for domain in ("same", "background", "illumination", "view"):
        expected[("test", domain, "good")] = 30
        for kind in ("groove", "fracture", "ablation", "breakdown"):
            expected[("test", domain, kind)] = 10
    assert counts == expected
    assert len({r.name for r in PLAN}) == len({r.index for r in PLAN}) == len(PLAN) == 520


def test_at_least_fifteen_percent_of_the_defects_are_planned_tiny_and_some_large():
    sizes = collections.Counter(r.size for r in PLAN if r.defect != "good")
    assert sizes["tiny"] >= 0.15 * 160
    assert sizes["large"] >= 0.10 * 160
    assert sample.SIZES["tiny"][1] == 10
    assert sample.SIZES["large"][0] == 60


def test_defects_have_the_size_that_was_planned(drawn):
    assert {recipe.size for recipe in DEFECTIVE} == set(sample.SIZES)
    for recipe in DEFECTIVE:
        rows, columns = np.nonzero(drawn[recipe.name].mask)
        side = max(np.ptp(rows), np.ptp(columns)) + 1
        low, high = sample.SIZES[recipe.size]
        assert low <= side < high, recipe.name


def test_an_image_drawn_again_alone_has_the_same_bytes(drawn):
    for recipe in (DEFECTIVE[1], DEFECTIVE[-1]):
        again = sample.make_sample(recipe)
        np.testing.assert_array_equal(again.image, drawn[recipe.name].image)
        np.testing.assert_array_equal(again.mask, drawn[recipe.name].mask)


def test_global_random_state_and_thread_count_do_not_matter(drawn):
    recipe, threads = DEFECTIVE[4], cv2.getNumThreads()
    state = np.random.get_state()
    try:
        np.random.seed(1)
        cv2.setNumThreads(1)
        again = sample.make_sample(recipe)
    finally:
        cv2.setNumThreads(threads)
        np.random.set_state(state)
    np.testing.assert_array_equal(again.image, drawn[recipe.name].image)


def test_seed_and_index_both_change_the_part():
    images = [
        sample.make_sample(recipe, seed).image.astype(int)
        for recipe, seed in ((PLAN[0], 1), (PLAN[0], 2), (PLAN[1], 1))
    ]
    assert all(np.abs(images[0] - other).mean() > 5 for other in images[1:])


def test_good_images_have_no_mask_and_are_their_own_twin():
    good = sample.make_sample(next(r for r in PLAN if r.domain == "view" and r.defect == "good"))
    assert good.image.shape == (256, 256, 3)
    assert good.image.dtype == np.uint8
    assert good.mask.shape == (256, 256)
    assert not good.mask.any()
    np.testing.assert_array_equal(good.image, good.twin)


def test_masked_pixels_differ_from_the_undamaged_twin(drawn):
    for name, result in drawn.items():
        changes = difference(result)[result.mask]
        assert changes.size >= 6, name
        assert np.mean(changes > 3) > 0.8, name
        assert np.sort(changes)[-6:].mean() > 15, f"{name} cannot be seen"


def test_pixels_outside_the_mask_equal_the_twin_but_for_a_missing_shadow(drawn):
    for recipe in DEFECTIVE:
        result = drawn[recipe.name]
        outside = difference(result)[~result.mask]
        assert outside.mean() < 0.6, recipe.name
        assert np.mean(outside > 6) < 0.02, recipe.name
        if recipe.defect in ("groove", "ablation"):  # nothing is missing, so no shadow changes
            assert np.mean(outside > 6) < 0.001, recipe.name


def test_a_mask_lies_on_the_part(drawn):
    for recipe in DEFECTIVE[:4]:  # domain `same`: the mat is far from the metal's brightness
        result = drawn[recipe.name]
        grey = cv2.GaussianBlur(result.twin.min(axis=-1), (0, 0), 1)
        assert np.mean(grey[result.mask] > 60) > 0.8, recipe.name


def test_damage_leaves_the_good_part_as_it_was_and_reports_every_change():
    blade = part.make_blade(np.random.default_rng(0))
    before = blade.surface.copy()
    for kind in defects.KINDS:
        surface, changed = defects.damage(np.random.default_rng(5), blade, kind, 60.0)
        np.testing.assert_array_equal(blade.surface.height, before.height)
        np.testing.assert_array_equal(blade.surface.colour, before.colour)
        assert changed.any(), kind
        assert np.abs(surface.height - before.height)[~changed].max() < 0.06, kind
        assert not changed[int(part.PLATFORM_Y) + 20 :].any(), f"{kind} reached the root"


def test_noise_is_equal_where_two_photographs_are_equal():
    scene = scene_lib.draw_scene(np.random.default_rng(0), "same", 0)
    levels = np.full((render.SIZE, render.SIZE, 3), 120.0, np.float32)
    changed = levels.copy()
    changed[50:60, 50:60] = 30.0
    first, second = (
        render.expose(render.Photo(x, None), scene, np.random.default_rng(3))
        for x in (levels, changed)
    )
    same = (levels == changed).all(axis=-1)
    np.testing.assert_array_equal(first[same], second[same])
    assert 0.5 < first[..., 0].std() < 4


def scenes(domain: str) -> list[scene_lib.Scene]:
    """Settings of forty pictures of a domain."""
    return [scene_lib.draw_scene(np.random.default_rng([9, i]), domain, i) for i in range(40)]


def test_shifted_domains_have_settings_that_training_lacks():
    train = scenes("same")
    assert {s.bench for s in train} == set(table_top.MATS)
    assert {s.bench for s in scenes("background")}.isdisjoint(table_top.MATS)
    azimuths = [s.key_azimuth for s in train]
    for s in scenes("illumination"):
        assert not min(azimuths) <= s.key_azimuth <= max(azimuths)
    for s in scenes("view"):
        assert s.tilt > max(t.tilt for t in train) + 3
        assert not min(t.turn for t in train) <= s.turn <= max(t.turn for t in train)


@pytest.mark.parametrize("domain", scene_lib.DOMAINS)
def test_a_domain_changes_nothing_but_its_own_settings(domain):
    own = {
        "same": set(),
        "background": {"bench"},
        "illumination": {"key", "room", "key_azimuth", "key_elevation", "key_size"},
        "view": {"tilt", "azimuth", "turn", "scale"},
    }[domain]
    for shifted, train in zip(scenes(domain), scenes("same"), strict=True):
        differing = {k for k, v in vars(train).items() if v != getattr(shifted, k)}
        assert differing <= own


def test_records_carry_domain_defect_and_mask(monkeypatch, tmp_path, built):
    some = [PLAN[0], next(r for r in PLAN if r.domain == "view"), DEFECTIVE[8]]
    monkeypatch.setattr(sample, "recipes", lambda: some)
    records = built("demo_parts", None, tmp_path)["blade"]
    assert set(records["train"]) == {"train/good/000"}
    assert records["train"]["train/good/000"]["domain"] == ""
    assert set(records["test"]) == {"test/view/good/000", DEFECTIVE[8].name}
    record = records["test"][DEFECTIVE[8].name]
    expected = {"label": "anomaly", "defect": "groove", "domain": "illumination", "twin": ""}
    expected |= {"group": DEFECTIVE[8].name, "dataset": "demo_parts", "category": "blade"}
    assert {key: record[key] for key in expected} == expected
    drawn_again = sample.make_sample(DEFECTIVE[8])
    np.testing.assert_array_equal(record["image"], drawn_again.image)
    np.testing.assert_array_equal(record["mask"][..., 0] == 255, drawn_again.mask)


def test_expected_counts_add_up_to_the_plan():
    expected = dict(demo_parts_dataset_builder.Builder.EXPECTED["blade"])
    assert expected.pop("defective with mask") == sum(r.defect != "good" for r in PLAN)
    assert sum(expected.values()) == len(PLAN)
