"""Missed defects by kind and tiny recall, against plain loops over images and pixels."""

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmrjax import metrics
from mmrjax.metrics import misses, streaming
from mmrjax.runtime import mesh as mesh_lib


def slow_found(good, bad, rate):
    """One threshold tried after the other, from the lowest."""
    for cut in sorted(good):
        if np.sum(good > cut) <= rate * len(good) + 1e-9:
            return np.mean(bad > cut)
    raise AssertionError("the highest one has none above")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_detected_share_equals_trying_every_threshold_on_the_images_repeated(seed, rate):
    rng = np.random.default_rng(seed)
    decimals = seed % 3  # ties among and between good and bad
    good = np.round(rng.normal(size=rng.integers(3, 150)), decimals)
    bad = np.round(rng.normal(1, size=rng.integers(1, 40)), decimals)
    weights = [rng.integers(0, 3, (200, len(x))) for x in (good, bad)]  # more than one block
    for weight in weights:
        weight[0] = 1
        weight[-1, 0] = 1
    found = misses.detected_share(good, bad, rate, *weights)
    for row in (0, 1, 2, 130, 199):
        own = [np.repeat(x, w[row]) for x, w in zip((good, bad), weights, strict=True)]
        if len(own[0]) and len(own[1]):
            assert found[row] == pytest.approx(slow_found(*own, rate), abs=1e-12)


def test_a_resample_without_good_images_or_without_defects_is_undefined():
    good_weight, bad_weight = np.array([[0, 0], [1, 1], [1, 0]]), np.array([[1], [0], [1]])
    found = misses.detected_share(
        np.array([1.0, 2.0]), np.array([3.0]), 0.05, good_weight, bad_weight
    )
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1.0])


def make_scores(n_good=120):
    rng = np.random.default_rng(3)
    kinds = np.array(["good"] * n_good + ["crack"] * 20 + ["spot"] * 11)
    scores = rng.normal(size=len(kinds)) + 1.5 * (kinds == "crack") + 0.4 * (kinds == "spot")
    groups = np.arange(len(kinds)) // 3
    return scores, kinds != "good", kinds, groups


def test_every_kind_is_held_against_all_good_images():
    scores, is_anomaly, kinds, groups = make_scores()
    found = metrics.by_defect(scores, is_anomaly, kinds, groups, bootstrap=100)
    assert list(found) == ["crack", "spot"]
    for kind, entry in found.items():
        own = kinds == kind
        assert entry["images"] == own.sum()
        assert entry["groups"] == len(set(groups[own]))
        chosen = own | ~is_anomaly
        assert entry["image_auroc"] == pytest.approx(roc_auc_score(own[chosen], scores[chosen]))
        for name, rate in (("missed_at_5", 0.05), ("missed_at_1", 0.01)):
            expected = 1 - slow_found(scores[~is_anomaly], scores[own], rate)
            assert entry[name] == pytest.approx(expected)
        assert entry["missed_at_1"] >= entry["missed_at_5"]
        for name in ("image_auroc", "missed_at_5", "missed_at_1"):
            low, high = entry["ci95"][name]
            assert 0 <= low <= high <= 1
            assert low <= entry[name] <= high
        assert entry["reasons"] == {}
    again = metrics.by_defect(scores, is_anomaly, kinds, groups, bootstrap=100)
    assert again == found


def test_a_rate_that_the_good_images_cannot_show_is_undefined_with_the_reason():
    scores, is_anomaly, kinds, _ = make_scores(n_good=30)
    entry = metrics.by_defect(scores, is_anomaly, kinds, bootstrap=0)["crack"]
    assert entry["missed_at_5"] is not None
    assert entry["missed_at_1"] is None
    assert entry["reasons"] == {"missed_at_1": "fewer than 100 good images"}
    assert set(entry["ci95"].values()) == {None}
    entry = metrics.by_defect(scores[30:], is_anomaly[30:], kinds[30:])["crack"]
    assert entry["image_auroc"] is None
    assert entry["reasons"]["image_auroc"] == "no good image"
    assert metrics.by_defect(scores[:30], is_anomaly[:30], kinds[:30]) == {}


def make_maps(good=25, bad=9):
    """Defects of one side up to 14 px, some at borders, and noise that hides a few of them."""
    rng = np.random.default_rng(5)
    masks = np.zeros((good + bad, 40, 44), bool)
    for mask in masks[good:]:
        for _ in range(3):
            y, x = rng.integers(0, 40, 2)
            h, w = rng.integers(1, 15, 2)
            mask[y : y + h, x : x + w] = True
    maps = (rng.normal(size=masks.shape) + 4 * masks * rng.random((len(masks), 1, 1))).astype("f4")
    is_anomaly = np.arange(good + bad) >= good
    return maps, masks, is_anomaly


def slow_tiny(maps, masks, is_anomaly, side=10):
    peaks = np.array([one.max() for one in maps[~is_anomaly]])
    hottest = []
    for one, mask in zip(maps[is_anomaly], masks[is_anomaly], strict=True):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        for i in range(1, count):
            rows, columns = np.nonzero(labels == i)
            if max(np.ptp(rows), np.ptp(columns)) + 1 < side:
                hottest.append(one[labels == i].max())
    return slow_found(peaks, np.array(hottest), 0.05), len(hottest)


@pytest.mark.parametrize("side", [8, 10])
def test_tiny_recall_equals_a_loop_over_components_exactly_and_streamed(side):
    maps, masks, is_anomaly = make_maps()
    expected, count = slow_tiny(maps, masks, is_anomaly, side)
    assert count > 5
    assert (count < slow_tiny(maps, masks, is_anomaly)[1]) == (side < 10)
    assert 0 < expected < 1
    rest = (is_anomaly, np.ones(len(maps), bool))
    scores = maps.max(axis=(1, 2))
    groups = np.arange(len(maps)) // 2
    options = {"bootstrap": 100, "tiny_side": side}
    found = metrics.measure(scores, maps, masks, *rest, groups, **options).report()
    assert found["tiny_recall"] == pytest.approx(expected)
    low, high = found["ci95"]["tiny_recall"]
    assert low <= expected <= high
    counts = streaming.MapHistograms(mesh_lib.make_mesh(1))
    for rows in (slice(0, 12), slice(12, 34)):
        counts.add(maps[rows], masks[rows])
    streamed = streaming.measure(scores, counts.counted(), *rest, groups, **options).report()
    assert streamed["tiny_recall"] == found["tiny_recall"]
    assert streamed["ci95"]["tiny_recall"] == found["ci95"]["tiny_recall"]


def test_tiny_recall_is_undefined_without_tiny_defects_or_with_few_good_images():
    maps, masks, is_anomaly = make_maps()
    rest = (is_anomaly, np.ones(len(maps), bool))
    few = metrics.measure(is_anomaly * 1.0, maps, masks, *rest, bootstrap=0).report()
    assert few["tiny_recall"] is not None
    kept = np.arange(len(maps)) >= 6  # 19 good ones
    few = metrics.measure(
        is_anomaly[kept] * 1.0, maps[kept], masks[kept], *(x[kept] for x in rest), bootstrap=0
    ).report()
    assert few["tiny_recall"] is None
    assert few["reasons"] == {"tiny_recall": "fewer than 20 good images"}
    masks[is_anomaly] = False
    masks[is_anomaly, 2:13, 5] = True  # 11 px long
    long = metrics.measure(is_anomaly * 1.0, maps, masks, *rest, bootstrap=0).report()
    assert long["reasons"] == {"tiny_recall": "no defect under 10 px in view"}


def test_a_region_of_ten_px_is_not_tiny_and_one_of_nine_is():
    masks = np.zeros((2, 30, 30), bool)
    masks[0, 3:12, 4:6] = True  # 9 px long
    masks[0, 20, 10:20] = True  # 10 px
    masks[1, 0, 0] = masks[1, 1, 1] = True  # touching at a corner
    found = metrics.regions(masks)
    np.testing.assert_array_equal(found.sides(), [9, 10, 2])
    assert not len(metrics.regions(np.zeros_like(masks)).sides())
