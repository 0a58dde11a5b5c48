"""Pictures: one fixed colour scale, outlines that leave the defect visible, an honest gallery."""

import json

import cv2
import numpy as np
import pytest

from mmrjax.report import pictures


def read_rgb(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def grey_image(size=32, value=120):
    return np.full((size, size, 3), value, np.uint8)


# Colour scale and overlay


def test_scale_is_shared_and_moves_little_with_one_hot_pixel():
    maps = np.random.default_rng(0).gamma(2.0, 0.2, (20, 32, 32)).astype(np.float32)
    low, high = pictures.fixed_scale(maps)
    hot = maps.copy()
    hot[3, 4, 5] = 1e6
    assert pictures.fixed_scale(hot) == pytest.approx((low, high), rel=0.01)
    assert (maps <= low).mean() == pytest.approx(0.5, abs=0.01)
    assert (maps > high).mean() == pytest.approx(0.005, abs=0.002)


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-9])
def test_scale_of_a_constant_map_has_a_width_and_paints_nothing(value):
    maps = np.full((2, 8, 8), value, np.float32)
    scale = pictures.fixed_scale(maps)
    assert scale[0] < scale[1]
    overlay = pictures.heat_overlay(grey_image(8), maps[0], scale)
    np.testing.assert_array_equal(overlay, grey_image(8))


def test_scale_ignores_values_that_are_not_finite():
    maps = np.linspace(0, 1, 1000, dtype=np.float32).reshape(1, 25, 40)
    bad = np.concatenate([maps, np.full_like(maps, np.nan), np.full_like(maps, np.inf)])
    assert pictures.fixed_scale(bad) == pytest.approx(pictures.fixed_scale(maps))
    with pytest.raises(ValueError, match="no finite value"):
        pictures.fixed_scale(np.full((1, 4, 4), np.nan))


def test_scale_of_a_subsample_sees_every_column(monkeypatch):
    maps = np.zeros((4, 64, 64), np.float32)
    maps[:, :, 32:] = 1.0  # a stride that divides the width would see one half only
    monkeypatch.setattr(pictures, "MAX_SAMPLED_PIXELS", 256)
    assert pictures.fixed_scale(maps + np.linspace(0, 0.1, 64))[1] > 1.0


def test_same_value_gets_the_same_colour_in_two_images_with_different_ranges():
    scale = (0.2, 2.0)
    weak, strong = np.full((32, 32), 0.3), np.full((32, 32), 0.3)
    strong[20:, :], strong[30] = 50.0, -4.0
    weak[5, 5] = strong[5, 5] = 1.1
    first = pictures.heat_overlay(grey_image(), weak, scale)
    second = pictures.heat_overlay(grey_image(), strong, scale)
    np.testing.assert_array_equal(first[:20], second[:20])
    assert (first[5, 5] != first[0, 0]).any()


def test_overlay_leaves_normal_regions_untouched_and_marks_hot_ones():
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    anomaly_map = np.zeros((32, 32))
    anomaly_map[:8] = 10.0
    overlay = pictures.heat_overlay(image, anomaly_map, (1.0, 2.0))
    np.testing.assert_array_equal(overlay[8:], image[8:])
    distance = np.abs(overlay[:8].astype(int) - pictures.COLOURS[-1])
    assert distance.max() <= 255 * (1 - pictures.MAX_OPACITY) + 1
    assert overlay[:8].std() > 0, "the picture still shines through"


def test_colours_rise_in_lightness_so_that_grey_print_keeps_the_order():
    luminance = pictures.COLOURS @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > -1.0).all()
    assert luminance[-1] - luminance[0] > 150


def test_overlay_refuses_another_geometry_and_an_empty_scale():
    with pytest.raises(ValueError, match="one size"):
        pictures.heat_overlay(grey_image(32), np.zeros((16, 16)), (0, 1))
    with pytest.raises(ValueError, match="low < high"):
        pictures.heat_overlay(grey_image(32), np.zeros((32, 32)), (1, 1))


# Outline


@pytest.mark.parametrize("size", [32, 256])
def test_outline_surrounds_the_defect_without_covering_it(size):
    image, mask = grey_image(size), np.zeros((size, size), bool)
    mask[size // 2 : size // 2 + 4, size // 2 : size // 2 + 6] = True
    drawn = pictures.outline(image, mask)
    np.testing.assert_array_equal(drawn[mask], image[mask])
    line = (drawn == pictures.OUTLINE_RGB).all(axis=-1)
    outside, _ = cv2.connectedComponents((~line).astype(np.uint8), connectivity=4)
    assert outside == 3, "a closed line: background label, outside, inside"
    assert (image == 120).all(), "the input is not changed"


def test_outline_of_a_defect_that_fills_the_frame_runs_along_the_edge():
    drawn = pictures.outline(grey_image(), np.ones((32, 32), bool))
    assert (drawn[0] == pictures.OUTLINE_RGB).all()
    np.testing.assert_array_equal(drawn[5:-5, 5:-5], grey_image()[5:-5, 5:-5])


def test_outline_of_an_empty_mask_changes_nothing():
    np.testing.assert_array_equal(
        pictures.outline(grey_image(), np.zeros((32, 32), bool)), grey_image()
    )


# Choice of the gallery


def by_kind(chosen):
    return {kind: [i for i, k in chosen if k == kind] for kind in pictures.KINDS}


def test_gallery_kinds_are_what_they_say():
    rng = np.random.default_rng(2)
    is_anomaly = np.arange(200) % 2 == 1
    scores = rng.normal(0, 1, 200) + 2 * is_anomaly
    chosen = pictures.choose_gallery(scores, is_anomaly, 6)
    kinds = by_kind(chosen)
    cut = pictures.crossing_score(scores, is_anomaly)
    assert [len(v) for v in kinds.values()] == [6, 6, 6]
    assert len({i for i, _ in chosen}) == 18, "no image twice"
    anomalies = np.flatnonzero(is_anomaly)
    assert kinds["best"][0] == anomalies[np.argmax(scores[anomalies])]
    assert kinds["worst"][0] == anomalies[np.argmin(scores[anomalies])]
    assert all((scores[i] >= cut) == is_anomaly[i] for i in kinds["best"])
    assert all((scores[i] >= cut) != is_anomaly[i] for i in kinds["worst"])
    assert sum(is_anomaly[kinds["best"]]) == 4
    assert sum(is_anomaly[kinds["worst"]]) == 3
    others = np.setdiff1d(np.arange(200), [i for i, _ in chosen])
    assert np.abs(scores[kinds["borderline"]] - cut).max() <= np.abs(scores[others] - cut).min()


def test_wrong_image_is_never_among_the_best_even_when_no_other_is_left():
    kinds = by_kind(pictures.choose_gallery([0.0, 5, 6, 7], [True, False, False, False], 2))
    assert kinds["best"] == []
    assert kinds["worst"] == [0, 3]


def test_crossing_balances_the_two_kinds_of_mistake():
    rng = np.random.default_rng(3)
    scores = np.concatenate([rng.normal(0, 1, 3000), rng.normal(2, 1, 1000)])
    is_anomaly = np.arange(4000) >= 3000
    cut = pictures.crossing_score(scores, is_anomaly)
    false_alarms, missed = (scores[:3000] > cut).mean(), (scores[3000:] < cut).mean()
    assert false_alarms == pytest.approx(missed, abs=2e-3)
    assert cut == pytest.approx(1.0, abs=0.1)


def test_crossing_of_separate_classes_lies_between_them():
    assert pictures.crossing_score([1, 2, 8, 9], [False, False, True, True]) == 5.0


@pytest.mark.parametrize("count", [0, 1, 2, 5, 50])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
def test_gallery_of_few_images_uses_each_at_most_once_and_repeats_exactly(n, count):
    rng = np.random.default_rng(n)
    scores, is_anomaly = rng.normal(size=n), rng.random(n) < 0.5
    chosen = pictures.choose_gallery(scores, is_anomaly, count)
    indices = [i for i, _ in chosen]
    assert len(set(indices)) == len(indices) <= min(n, 3 * count)
    assert chosen == pictures.choose_gallery(scores.tolist(), is_anomaly.tolist(), count)
    assert [k for _, k in chosen] == sorted((k for _, k in chosen), key=pictures.KINDS.index)
    if count >= n > 0 and 0 < is_anomaly.sum() < n:
        assert sorted(indices) == list(range(n)), "every image has a place when there is room"


@pytest.mark.parametrize("anomalous", [True, False])
def test_gallery_of_one_class_has_best_and_worst_but_no_borderline(anomalous):
    scores = np.arange(10.0)
    kinds = by_kind(pictures.choose_gallery(scores, np.full(10, anomalous), 3))
    top, bottom = [9, 8, 7], [0, 1, 2]
    assert kinds["best"] == (top if anomalous else bottom)
    assert kinds["worst"] == (bottom if anomalous else top)
    assert kinds["borderline"] == []


def test_gallery_breaks_ties_by_index():
    kinds = by_kind(pictures.choose_gallery(np.ones(8), np.arange(8) >= 4, 1))
    assert kinds == {"best": [4], "worst": [0], "borderline": [1]}


# Files


def write_example(folder, count=2):
    n, size = 12, 24
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    maps, masks = rng.random((n, size, size), np.float32), np.zeros((n, size, size), bool)
    masks[6:, 4:9, 4:9] = True
    masks[11] = False  # its defect lies outside the frame
    label = np.where(np.arange(n) < 6, "good", "anomaly")
    table = {
        "id": np.array([f"part_{i}" for i in range(n)]),
        "label": label,
        "domain": np.array(["same", "view"])[np.arange(n) % 2],
        "defect": np.where(label == "good", "good", "groove"),
        "score": maps.max(axis=(1, 2)) + (label == "anomaly"),
        "has_mask": np.arange(n) != 10,
    }
    scale = pictures.fixed_scale(maps)
    pictures.write_gallery(folder, images, maps, masks, table, scale, count)
    return json.loads((folder / "gallery.json").read_text()), images, maps, masks, table, scale


def test_gallery_files_hold_the_pictures_of_the_images_they_name(tmp_path):
    folder = tmp_path / "new" / "maps"
    gallery, images, maps, masks, table, scale = write_example(folder, count=4)
    assert gallery["scale"] == list(scale)
    assert len(gallery["items"]) == 12
    for item in gallery["items"]:
        keys = {"id", "kind", "label", "domain", "defect", "score", "image", "heat", "truth"}
        assert set(item) == keys
        i = int(item["id"].removeprefix("part_"))
        assert item["score"] == float(table["score"][i])
        np.testing.assert_array_equal(read_rgb(folder / item["image"]), images[i])
        np.testing.assert_array_equal(
            read_rgb(folder / item["heat"]), pictures.heat_overlay(images[i], maps[i], scale)
        )
        assert (item["truth"] is None) == (i < 6 or i in (10, 11))
        if item["truth"]:
            np.testing.assert_array_equal(
                read_rgb(folder / item["truth"]), pictures.outline(images[i], masks[i])
            )


def test_second_gallery_leaves_no_picture_of_the_first_and_no_other_file_is_lost(tmp_path):
    write_example(tmp_path, count=4)
    (tmp_path / "mine.png").write_bytes(b"x")
    gallery, *_ = write_example(tmp_path, count=1)
    named = {item[k] for item in gallery["items"] for k in ("image", "heat", "truth") if item[k]}
    assert {p.name for p in tmp_path.iterdir()} == named | {"gallery.json", "mine.png"}


def test_unknown_label_is_refused_before_anything_is_written(tmp_path):
    table = {"label": ["good", "bad"], "score": [0.0, 1.0]}
    with pytest.raises(ValueError, match=r"'bad'.*expected 'good' or 'anomaly'"):
        pictures.write_gallery(tmp_path, [], np.zeros(0), np.zeros(0), table, (0, 1), 1)
    assert list(tmp_path.iterdir()) == []
