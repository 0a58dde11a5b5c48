"""Exact metrics: keys of the contract, which images count, reasons of missing values, curves."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from mmrjax import metrics
from mmrjax.metrics import exact, ranking


def make_domain(n=24, size=32):
    """Maps with a planted defect in every second image, and their maxima as scores."""
    rng = np.random.default_rng(4)
    is_anomaly = np.arange(n) % 2 == 0
    masks = np.zeros((n, size, size), bool)
    for i in np.flatnonzero(is_anomaly):
        y, x = rng.integers(0, size - 8, 2)
        masks[i, y : y + 6, x : x + 4] = True
    maps = (rng.random((n, size, size)) + 0.8 * masks).astype(np.float32)
    scores = maps.max(axis=(1, 2)) + 0.2 * rng.random(n).astype(np.float32)
    return {
        "scores": scores,
        "maps": maps,
        "masks": masks,
        "is_anomaly": is_anomaly,
        "has_mask": np.ones(n, bool),
    }


def test_result_has_exactly_the_keys_of_the_contract_and_is_json():
    result = metrics.measure(**make_domain(48), bootstrap=50).report()
    names = set(metrics.METRICS)
    assert set(result) == names | {"counts", "reasons", "ci95"}
    assert set(result["ci95"]) == names
    assert result["reasons"] == {}
    expected = {"good": 24, "anomaly": 24, "pixel_images": 48, "empty_masks": 0}
    assert result["counts"] == expected
    assert json.loads(json.dumps(result)) == result
    for name in names:
        low, high = result["ci95"][name]
        assert 0 <= low <= result[name] <= high <= 1


def test_values_are_those_of_sklearn():
    domain = make_domain()
    result = metrics.measure(**domain, bootstrap=0).report()
    pairs = {"image": ("scores", "is_anomaly"), "pixel": ("maps", "masks")}
    for prefix, (scores, truth) in pairs.items():
        columns = domain[truth].ravel(), domain[scores].ravel()
        for name, function in (("auroc", roc_auc_score), ("ap", average_precision_score)):
            assert result[f"{prefix}_{name}"] == pytest.approx(function(*columns), abs=1e-12)
    assert result["ci95"] == dict.fromkeys(metrics.METRICS)


def test_anomalies_without_pixel_truth_count_for_image_metrics_only():
    domain = make_domain()
    full = metrics.measure(**domain, bootstrap=0).report()
    domain["has_mask"][:6] = False  # three anomalies, and three good images, which always count
    domain["masks"][0] = True  # rows without truth are not read
    keep = domain["has_mask"] | ~domain["is_anomaly"]
    result = metrics.measure(**domain, bootstrap=20).report()
    assert result["image_auroc"] == full["image_auroc"]
    assert result["counts"]["pixel_images"] == 21
    kept = domain["masks"][keep].ravel(), domain["maps"][keep].ravel()
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(*kept), abs=1e-12)
    per_image = metrics.pro_mmr_per_image(domain["maps"][keep], domain["masks"][keep])
    assert result["pro_mmr"] == np.nanmean(per_image)
    assert result["ci95"]["aupro_0.3"][0] <= result["aupro_0.3"] <= result["ci95"]["aupro_0.3"][1]


def test_arrays_that_do_not_fit_are_refused():
    domain = make_domain()
    for change in (
        {"scores": domain["scores"][:-1]},
        {"maps": domain["maps"][:, :-1]},
        {"masks": domain["masks"].astype(np.uint8)},
        {"has_mask": domain["has_mask"][:-1]},
        {"is_anomaly": domain["is_anomaly"].astype(int)},
        {"groups": ["a"] * 23},
        {k: v[:0] for k, v in domain.items()},
    ):
        with pytest.raises(ValueError, match=r"must|groups has 23|no image"):
            metrics.measure(**(domain | change)).report()


def test_permuted_labels_change_values_but_no_input():
    domain = make_domain()
    kept = {k: v.copy() for k, v in domain.items()}
    for v in domain.values():
        v.flags.writeable = False
    before = metrics.measure(**domain, bootstrap=20).report()
    order = np.random.default_rng(0).permutation(24)
    permuted = domain | {k: domain[k][order] for k in ("is_anomaly", "masks")}
    assert (
        metrics.measure(**permuted, bootstrap=20).report()["image_auroc"] != before["image_auroc"]
    )
    for k, v in domain.items():
        assert v.tobytes() == kept[k].tobytes()
    assert metrics.measure(**domain, bootstrap=20).report() == before


def test_order_of_images_changes_neither_values_nor_intervals():
    domain = make_domain() | {"groups": np.array([f"part{i // 2}" for i in range(24)])}
    domain["has_mask"][:5] = False
    order = np.random.default_rng(1).permutation(24)
    shuffled = {k: v[order] for k, v in domain.items()}
    one, other = (metrics.measure(**d, bootstrap=50).report() for d in (domain, shuffled))
    for name in metrics.METRICS:
        assert one[name] == pytest.approx(other[name], abs=1e-12)
        assert one["ci95"][name] == pytest.approx(other["ci95"][name], abs=1e-12)


def test_curves_have_the_area_of_their_metric():
    domain = make_domain()
    result = metrics.measure(**domain, bootstrap=0).report()
    curves = metrics.measure(**domain, bootstrap=0).curves()
    assert json.loads(json.dumps(curves)) == curves
    roc, pro = curves["roc"], curves["pro"]
    for curve in (*roc.values(), *pro.values()):
        assert len(curve) <= 300
        assert (np.diff(curve) >= 0).all()
    assert np.trapezoid(roc["tpr"], roc["fpr"]) == pytest.approx(result["image_auroc"], abs=1e-12)
    assert (roc["fpr"][0], roc["tpr"][0], roc["fpr"][-1], roc["tpr"][-1]) == (0, 0, 1, 1)
    assert pro["fpr"][-1] == 0.3
    assert np.trapezoid(pro["pro"], pro["fpr"]) / 0.3 == pytest.approx(
        result["aupro_0.3"], abs=1e-3
    )
    assert len(metrics.measure(**domain, bootstrap=0).curves(20)["pro"]["fpr"]) == 20


def test_paired_difference_is_the_difference_of_the_metrics():
    domain = make_domain()
    worse = domain["scores"] + np.random.default_rng(8).random(24)
    found = metrics.paired_difference(domain["scores"], worse, domain["is_anomaly"], bootstrap=100)
    a, b = (
        metrics.measure(scores, None, None, domain["is_anomaly"], None, bootstrap=0).values
        for scores in (domain["scores"], worse)
    )
    assert set(found) == set(metrics.IMAGE_METRICS)
    for name, row in found.items():
        assert (row["a"], row["b"]) == (a[name], b[name])
        assert row["difference"] == a[name] - b[name]
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]


def test_paired_difference_of_a_method_with_itself_is_exactly_zero():
    domain = make_domain()
    found = metrics.paired_difference(domain["scores"], domain["scores"], domain["is_anomaly"])
    assert set(found) == set(metrics.IMAGE_METRICS)
    assert all((row["difference"], row["ci95"]) == (0.0, [0.0, 0.0]) for row in found.values())


def test_paired_interval_is_narrower_than_two_independent_ones():
    rng = np.random.default_rng(3)
    truth = np.arange(200) < 100
    hard = rng.normal(size=200) + truth  # both methods see the same hard images
    a, b = hard + 0.1 * rng.normal(size=200), hard + 0.1 * rng.normal(size=200)
    low, high = metrics.paired_difference(a, b, truth)["image_auroc"]["ci95"]
    single = metrics.measure(a, None, None, truth, None).report()["ci95"]["image_auroc"]
    assert high - low < 0.5 * (single[1] - single[0])


def test_paired_difference_averages_the_metric_over_seeds():
    rng = np.random.default_rng(5)
    truth = np.arange(60) < 30
    a, b = rng.normal(size=(3, 60)) + truth, rng.normal(size=(2, 60)) + 0.5 * truth
    one = metrics.paired_difference(a, b, truth, bootstrap=100)["image_auroc"]
    expected = np.mean([roc_auc_score(truth, s) for s in a])
    expected -= np.mean([roc_auc_score(truth, s) for s in b])
    assert one["difference"] == pytest.approx(expected, abs=1e-12)
    assert one["ci95"][0] < expected < one["ci95"][1]


def test_paired_difference_of_an_undefined_metric_is_none():
    found = metrics.paired_difference(np.arange(4.0), np.arange(4.0), np.ones(4, bool))
    assert found["image_auroc"] == dict.fromkeys(("a", "b", "difference", "ci95"))


# One sort for two metrics


def make_stack():
    rng = np.random.default_rng(8)
    masks = np.zeros((6, 20, 20), bool)
    masks[::2, 4:9, 3:12] = masks[::2, 15, 15] = True
    return np.round(rng.normal(size=masks.shape) + masks, 1).astype(np.float32), masks


@pytest.mark.parametrize("count", [1, 3])
def test_one_sort_gives_both_metrics_whatever_the_number_of_threads(count, monkeypatch):
    monkeypatch.setattr(ranking, "THREADS", count)
    monkeypatch.setattr(ranking.thread_slices, "__defaults__", (100,))
    maps, masks = make_stack()
    gathered = exact.gather(maps, metrics.regions(masks))
    assert len(gathered.sorted_normal) == count
    pixel, region = gathered.tables()
    expected = roc_auc_score(masks.ravel(), maps.ravel())
    assert ranking.area(pixel) == pytest.approx(expected, abs=1e-12)
    weight = np.zeros(maps.size)
    weight[gathered.regions.pixel] = gathered.regions.weight
    by_region = roc_auc_score(masks.ravel(), maps.ravel(), sample_weight=weight + ~masks.ravel())
    assert ranking.area(region) == pytest.approx(by_region, abs=1e-12)
