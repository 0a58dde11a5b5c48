"""Exact ranking metrics against pairwise and threshold-by-threshold oracles, and scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from mmrjax.metrics import ranking


def slow_auroc(scores, truth, weights):
    """Share of (positive, negative) pairs in the right order, ties one half."""
    won = total = 0.0
    for s, w in zip(scores[truth], weights[truth], strict=True):
        for t, v in zip(scores[~truth], weights[~truth], strict=True):
            won += w * v * (1.0 if s > t else 0.5 if s == t else 0.0)
            total += w * v
    return won / total


def slow_ap_and_f1(scores, truth, weights):
    """One threshold after the other, from the highest score down."""
    ap = best = recall = 0.0
    for threshold in np.unique(scores)[::-1]:
        found = scores >= threshold
        hit, all_found = weights[found & truth].sum(), weights[found].sum()
        new_recall = hit / weights[truth].sum()
        if all_found:
            ap += (new_recall - recall) * hit / all_found
            best = max(best, 2 * hit / (all_found + weights[truth].sum()))
        recall = new_recall
    return ap, best


def area_precision_f1(scores, truth):
    """As `measure` has them."""
    ranked = ranking.rank(scores[truth], np.sort(scores[~truth]))
    return ranking.area_precision_f1(ranked)


def make_case(name):
    rng = np.random.default_rng(7)
    truth = rng.random(300) < 0.3
    scores = rng.normal(size=300) + truth
    cases = {
        "continuous": scores,
        "tied": np.round(scores),
        "constant": np.full(300, 0.25),
        "one_outlier": np.where(np.arange(300) == np.flatnonzero(~truth)[0], 9.0, scores),
        "perfect": truth * 1.0,
        "inverted": -(truth * 1.0),
        "negative_zero": np.where(scores > 0.5, -0.0, 0.0),
    }
    return cases[name].astype(np.float32), truth


CASES = ("continuous", "tied", "constant", "one_outlier", "perfect", "inverted", "negative_zero")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_ranking_metrics_equal_slow_definitions(name, weighted):
    scores, truth = make_case(name)
    weights = np.random.default_rng(3).integers(0, 4, 300) if weighted else np.ones(300)
    expected = (slow_auroc(scores, truth, weights), *slow_ap_and_f1(scores, truth, weights))
    if weighted:
        found = ranking.area_precision_f1(ranking.grouped(scores, truth, weights))
    else:
        found = area_precision_f1(scores, truth)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_ranking_metrics_equal_sklearn(name):
    scores, truth = make_case(name)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(truth, scores)
    f1 = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))
    area = sklearn_metrics.roc_auc_score(truth, scores)
    expected = (area, sklearn_metrics.average_precision_score(truth, scores), f1)
    assert area_precision_f1(scores, truth) == pytest.approx(expected, abs=1e-12)


def test_neighbouring_float32_scores_are_not_merged():
    base = np.float32(0.7)
    scores = np.array([base, np.nextafter(base, np.float32(1))], np.float32)
    assert area_precision_f1(scores, np.array([False, True]))[0] == 1.0
    assert area_precision_f1(scores, np.array([True, False]))[0] == 0.0


def test_rows_of_weights_are_independent_resamples():
    scores, truth = make_case("tied")
    weights = np.random.default_rng(5).integers(0, 3, (4, 300))
    rows = ranking.grouped(scores, truth, weights)
    for i in range(4):
        again = np.repeat(scores, weights[i]), np.repeat(truth, weights[i])
        area, _, f1 = area_precision_f1(*again)
        assert ranking.area(rows)[i] == pytest.approx(area, abs=1e-12)
        assert ranking.best_f1(rows)[i] == pytest.approx(f1, abs=1e-12)


def test_resample_without_a_class_is_nan_not_a_number():
    rows = ranking.grouped(np.arange(4.0), np.arange(4) < 2, np.array([[1, 1, 0, 0], [0, 0, 1, 2]]))
    for metric in (ranking.area, ranking.precision_area, ranking.best_f1):
        assert np.isnan(metric(rows)).all()


def test_thinned_curve_keeps_ends_corners_and_shape():
    x = np.array([0, 0, 0, 0.2, 0.2, 0.6, 1.0])
    y = np.array([0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0])
    short = ranking.thin(x, y, 300)
    np.testing.assert_array_equal(short, [[0, 0, 0.2, 0.2, 1.0], [0, 0.5, 0.5, 1.0, 1.0]])
    x = np.linspace(0, 1, 5001)
    thin_x, thin_y = ranking.thin(x, np.sqrt(x), 50)
    assert len(thin_x) == 50
    assert (thin_x[0], thin_y[0], thin_x[-1], thin_y[-1]) == (0, 0, 1, 1)
    assert (np.diff(thin_x) > 0).all()
    assert np.abs(thin_y - np.sqrt(thin_x)).max() < 5e-3
    assert np.trapezoid(thin_y, thin_x) == pytest.approx(2 / 3, abs=1e-3)


def test_negatives_may_come_in_several_sorted_parts():
    scores, truth = make_case("tied")
    negatives = scores[~truth]
    parts = [np.sort(part) for part in np.array_split(negatives, 3)]
    weights = np.random.default_rng(1).random((2, truth.sum()))
    one = ranking.rank(scores[truth], np.sort(negatives), weights)
    several = ranking.rank(scores[truth], parts, weights)
    for a, b in zip(one, several, strict=True):
        np.testing.assert_array_equal(a, b)
    assert ranking.area(one).shape == (2,)


# Threads


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_items(count):
    assert ranking.map_threaded(lambda x: x * x, range(count)) == [x * x for x in range(count)]


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        ranking.map_threaded(lambda x: 1 // x, [1, 0])


@pytest.mark.parametrize("size", [0, 7, 1000, 4096])
def test_slices_cover_everything_once_and_none_is_shorter_than_asked(size, monkeypatch):
    monkeypatch.setattr(ranking, "THREADS", 4)
    found = ranking.thread_slices(size, smallest=500)
    np.testing.assert_array_equal(np.concatenate([np.arange(size)[s] for s in found]),
                                  np.arange(size))  # fmt: skip
    assert len(found) == (1 if size < 1000 else min(4, size // 500))
