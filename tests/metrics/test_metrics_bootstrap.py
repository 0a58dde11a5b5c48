"""Bootstrap samples against brute force on repeated images; behaviour of the intervals."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from mmrjax import metrics
from mmrjax.metrics import bootstrap, exact


def pixel_metrics(maps, masks):
    """{metric: value} of images with pixel truth."""
    known = masks.any(axis=(1, 2)), np.ones(len(maps), bool)
    values = metrics.measure(maps.max(axis=(1, 2)), maps, masks, *known, bootstrap=0).values
    return {name: values[name] for name in metrics.PIXEL_METRICS}


def make_stack(kind, n=16, size=48):
    rng = np.random.default_rng(9)
    masks = np.zeros((n, size, size), bool)
    for i in range(0, n, 2):
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, size - 4, 2)
            masks[i, y : y + rng.integers(1, 14), x : x + rng.integers(1, 14)] = True
    maps = rng.gamma(2.0, size=masks.shape) + rng.normal(size=(n, 1, 1)) * 0.3
    maps += masks * rng.random((n, 1, 1)) * 4
    if kind == "tied":
        maps = np.round(maps, 1)
    elif kind == "constant":
        maps = np.ones(masks.shape)
    elif kind == "one_outlier":
        maps[1, 0, 0] = 1e6
    return maps.astype(np.float32), masks


def sample(maps, masks, group, draws):
    pixels = exact.gather(maps, metrics.regions(masks))
    histograms = pixels.group_histograms(group, draws.shape[1])
    return bootstrap.pixel_samples(histograms, pixels.pro_mmr, group, draws, 0.3)


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "one_outlier"])
def test_histogram_of_the_data_themselves_is_within_a_thousandth_of_exact(kind):
    maps, masks = make_stack(kind)
    found = sample(maps, masks, np.arange(16), np.ones((1, 16)))
    assert set(found) == set(metrics.PIXEL_METRICS)
    for name, value in pixel_metrics(maps, masks).items():
        assert found[name][0] == pytest.approx(value, abs=1e-3), name


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_resample_equals_metrics_of_the_images_repeated_that_often(kind):
    maps, masks = make_stack(kind)
    group = np.arange(16) // 2  # pairs, drawn together
    draws = bootstrap.multiplicities(8, 5, seed=1)
    found = sample(maps, masks, group, draws)
    for row, weights in enumerate(draws):
        repeated = np.repeat(np.arange(16), weights[group].astype(int))
        for name, expected in pixel_metrics(maps[repeated], masks[repeated]).items():
            assert found[name][row] == pytest.approx(expected, abs=1e-3), (row, name)


def test_image_resample_is_exact():
    rng = np.random.default_rng(6)
    scores, truth = np.round(rng.normal(size=40), 1), rng.random(40) < 0.4
    group = rng.integers(0, 12, 40)
    draws = bootstrap.multiplicities(12, 300, seed=2)  # more than one block
    found = bootstrap.image_samples(scores, truth, group, draws)
    for row in (0, 1, 137, 300):
        repeated = np.repeat(np.arange(40), draws[row, group].astype(int))
        expected = sklearn_metrics.roc_auc_score(truth[repeated], scores[repeated])
        assert found["image_auroc"][row] == pytest.approx(expected, abs=1e-12)
        expected = sklearn_metrics.average_precision_score(truth[repeated], scores[repeated])
        assert found["image_ap"][row] == pytest.approx(expected, abs=1e-12)


def test_multiplicities_draw_as_many_groups_as_there_are_and_repeat_with_the_seed():
    draws = bootstrap.multiplicities(7, 50, seed=3)
    np.testing.assert_array_equal(draws[0], np.ones(7))
    np.testing.assert_array_equal(draws.sum(axis=1), np.full(51, 7))
    np.testing.assert_array_equal(draws, bootstrap.multiplicities(7, 50, seed=3))
    assert (draws != bootstrap.multiplicities(7, 50, seed=4)).any()


def test_identical_groups_give_an_interval_of_no_width_at_the_exact_value():
    maps, masks = make_stack("random")
    maps, masks = np.concatenate([maps, maps]), np.concatenate([masks, masks])
    truth, scores = masks.any(axis=(1, 2)), maps.max(axis=(1, 2))
    groups = np.arange(32) // 16
    result = metrics.measure(
        scores, maps, masks, truth, np.ones(32, bool), groups, bootstrap=20
    ).report()
    # The error of the histogram must not show.
    for name in metrics.IMAGE_METRICS + metrics.PIXEL_METRICS:
        assert result["ci95"][name] == pytest.approx([result[name]] * 2, abs=1e-12), name


def test_resamples_without_a_class_are_dropped_and_counted():
    scores, truth = np.arange(5.0), np.arange(5) == 4
    result = metrics.measure(scores, None, None, truth, None, bootstrap=400).report()
    dropped = result["counts"]["dropped_resamples"]
    assert 0.2 < dropped / 400 < 0.5  # expected (4/5)**5 = 0.33 without the only anomaly
    assert result["ci95"]["image_auroc"] == [1.0, 1.0]


def test_interval_is_none_when_most_resamples_are_undefined():
    assert bootstrap.interval(np.array([0.5, np.nan, np.nan])) is None
    assert bootstrap.interval(np.array([0.5, 0.5, np.nan])) == [0.5, 0.5]


def draw_scores(rng, n, shift=1.0):
    truth = np.arange(n) % 2 == 0
    return rng.normal(size=n) + shift * truth, truth


def interval(scores, truth, groups=None):
    result = metrics.measure(scores, None, None, truth, None, groups, bootstrap=300).report()
    return result["ci95"]["image_auroc"]


def test_interval_covers_the_true_auroc_about_as_often_as_it_says():
    rng = np.random.default_rng(12)
    true = 0.7602  # Phi(1 / sqrt(2)) for unit normals one apart
    covered = 0
    for _ in range(100):
        low, high = interval(*draw_scores(rng, 120))
        covered += low <= true <= high
    assert 87 <= covered <= 100


def test_interval_shrinks_with_the_number_of_images():
    rng = np.random.default_rng(13)
    few, many = (np.diff(interval(*draw_scores(rng, n)))[0] for n in (60, 960))
    assert 0.15 < many / few < 0.4  # 1 / sqrt(16) = 0.25


def test_groups_of_near_duplicates_widen_the_interval():
    rng = np.random.default_rng(14)
    scores, truth = draw_scores(rng, 40)
    scores = np.repeat(scores, 9) + 0.01 * rng.normal(size=360)
    truth, groups = np.repeat(truth, 9), [f"tile{i}" for i in np.repeat(np.arange(40), 9)]
    alone = np.diff(interval(scores, truth))[0]
    together = np.diff(interval(scores, truth, groups))[0]
    assert 2 < together / alone < 4  # sqrt(9) = 3


def test_pixel_intervals_widen_with_groups_of_near_duplicates_too():
    maps, masks = make_stack("random")
    again = np.repeat(np.arange(16), 6)
    truth = masks.any(axis=(1, 2))[again]
    maps, masks = maps[again], masks[again]
    arguments = (maps.max(axis=(1, 2)), maps, masks, truth, np.ones(96, bool))
    alone = metrics.measure(*arguments, bootstrap=200).report()
    together = metrics.measure(*arguments, groups=again, bootstrap=200).report()
    for name in metrics.PIXEL_METRICS:
        assert alone[name] == together[name]
        ratio = np.diff(together["ci95"][name])[0] / np.diff(alone["ci95"][name])[0]
        assert ratio > 1.5, name
