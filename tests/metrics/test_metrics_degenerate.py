"""Every row of the table of degenerate cases in mmrjax/metrics/__init__.py, in both forms."""

import numpy as np
import pytest

from mmrjax import metrics
from mmrjax.metrics import streaming
from mmrjax.runtime import mesh as mesh_lib

IMAGE, PIXEL = metrics.IMAGE_METRICS, metrics.PIXEL_METRICS


def make_set(n=8, size=24):
    """Every second image has two defects; the map is a noisy picture of the mask."""
    rng = np.random.default_rng(6)
    is_anomaly = np.arange(n) % 2 == 0
    masks = np.zeros((n, size, size), bool)
    masks[is_anomaly, 3:9, 4:8] = masks[is_anomaly, 15:17, 10:20] = True
    maps = (1 + rng.random(masks.shape) + 0.6 * masks).astype(np.float32)
    has_mask = np.ones(n, bool)
    scores = maps.max(axis=(1, 2))
    return {
        "scores": scores,
        "maps": maps,
        "masks": masks,
        "is_anomaly": is_anomaly,
        "has_mask": has_mask,
    }


def exact(case):
    measured = metrics.measure(**case, bootstrap=20)
    result, curves = measured.report(), measured.curves()
    assert ("roc" in curves) == (result["image_auroc"] is not None)
    assert ("pro" in curves) == (result["pixel_auroc"] is not None)
    return result


def streamed(case):
    truth = case["is_anomaly"], case["has_mask"]
    histograms = streaming.MapHistograms(mesh_lib.make_mesh(1))
    for start in range(0, len(case["maps"]), 3):
        rows = slice(start, start + 3)
        masks = case["masks"][rows] & (truth[0] & truth[1])[rows, None, None]
        maps = np.full((3, *masks.shape[1:]), np.nan, np.float32)  # padding rows, never counted
        maps[: len(masks)] = case["maps"][rows]
        histograms.add(maps, masks)
    return streaming.measure(case["scores"], histograms.counted(), *truth, bootstrap=20).report()


@pytest.fixture(params=[exact, streamed])
def evaluate(request):
    return request.param


def rows(case, chosen):
    return {name: column[chosen] for name, column in case.items()}


def is_none(result, names, reason):
    assert all(result[name] is None and result["ci95"][name] is None for name in names)
    return {result["reasons"][name] for name in names} == {reason}


def test_no_anomalous_image(evaluate):
    case = make_set()
    result = evaluate(rows(case, ~case["is_anomaly"]))
    assert is_none(result, metrics.METRICS, "no anomalous image")


def test_no_good_image(evaluate):
    case = make_set()
    result = evaluate(rows(case, case["is_anomaly"]))
    assert is_none(result, IMAGE, "no good image")
    assert all(0 <= result[name] <= 1 for name in PIXEL)


def test_one_image(evaluate):
    result = evaluate(rows(make_set(), slice(1)))
    assert is_none(result, IMAGE, "no good image")
    assert all(0 <= result[name] <= 1 for name in PIXEL)
    assert not any(result["ci95"].values())


def test_no_pixel_truth(evaluate):
    result = evaluate(make_set() | {"has_mask": np.zeros(8, bool)})
    assert is_none(result, PIXEL, "no pixel ground truth")
    assert result["image_auroc"] is not None


def test_no_map():
    case = make_set() | {"maps": None, "masks": None, "has_mask": None}
    assert is_none(metrics.measure(**case).report(), PIXEL, "no anomaly map")


def test_no_defect_pixel_in_any_view(evaluate):
    case = make_set()
    result = evaluate(case | {"masks": np.zeros_like(case["masks"])})
    assert is_none(result, PIXEL, "no defect pixel in view")
    assert result["image_auroc"] is not None


def test_one_mask_empty_in_view(evaluate):
    case, kept = make_set(), np.arange(8) > 0
    alone = evaluate(rows(case, kept))
    case["masks"][0] = False
    result = evaluate(case)
    assert (result["counts"]["anomaly"], result["counts"]["empty_masks"]) == (4, 1)
    assert result["pro_mmr"] == alone["pro_mmr"]
    assert result["aupro_0.3"] == pytest.approx(alone["aupro_0.3"], abs=0.05)


def test_one_mask_all_ones(evaluate):
    case = make_set()
    expected = metrics.pro_mmr_per_image(case["maps"], case["masks"])[2::2].mean()
    case["masks"][0] = True
    result = evaluate(case)
    assert result["pro_mmr"] == expected
    assert result["reasons"] == {"tiny_recall": "fewer than 20 good images"}


def test_masks_all_ones(evaluate):
    case = make_set()
    case["masks"][case["is_anomaly"]] = True
    result = evaluate(case)
    assert is_none(result, ["pro_mmr"], "no normal pixel in any defective image")
    assert is_none(result, ["tiny_recall"], "no defect under 10 px in view")
    assert result["aupro_0.3"] is not None
    result = evaluate(rows(case, case["is_anomaly"]))
    assert is_none(result, PIXEL, "no normal pixel")


def test_mask_of_a_good_image(evaluate):
    case = make_set()
    expected = evaluate(case)
    case["masks"][1] = True
    assert evaluate(case) == expected


def test_constant_scores_and_maps(evaluate):
    case = make_set()
    case["maps"][:] = 0.7
    case["scores"][:] = 0.7
    result = evaluate(case)
    for prefix, p in (("image", 0.5), ("pixel", case["masks"].mean())):
        assert result[f"{prefix}_auroc"] == 0.5
        assert result[f"{prefix}_ap"] == pytest.approx(p)
        assert result[f"{prefix}_f1_max"] == pytest.approx(2 * p / (1 + p))
    assert result["aupro_0.3"] == pytest.approx(0.15)
    assert result["pro_mmr"] == 0


def test_perfect_binary_map_and_its_opposite(evaluate):
    case = make_set()
    case["maps"] = case["masks"].astype(np.float32)
    assert all(evaluate(case)[name] == 1 for name in PIXEL)
    result = evaluate(case | {"maps": 1 - case["maps"], "scores": 1.0 - case["is_anomaly"]})
    assert all(result[n] == 0 for n in ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr"))


def test_ties_across_the_limit(evaluate):
    case = make_set()
    case["maps"] = (case["maps"] > 1.5).astype(np.float32)  # half of the normal pixels tie at 1
    share = [case["maps"][some].mean() for some in (~case["masks"], case["masks"])]
    one_line = 0.5 * 0.3 / share[0]  # of the curve from (0, 0) to the one vertex, per found share
    regions = [case["maps"][:, 3:9, 4:8], case["maps"][:, 15:17, 10:20]]
    found = np.mean([r[case["is_anomaly"]].mean() for r in regions])
    assert evaluate(case)["aupro_0.3"] == pytest.approx(found * one_line)


def test_one_outlier_among_the_normal_pixels(evaluate):
    case = make_set()
    before = evaluate(case)
    case["maps"][0, 0, 0] = 1e6
    after = evaluate(case)
    others = metrics.pro_mmr_per_image(case["maps"], case["masks"])[2::2]
    assert after["pro_mmr"] == np.mean([0.0, *others])
    for name in ("pixel_auroc", "aupro_0.3"):
        assert after[name] == pytest.approx(before[name], abs=0.02)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(evaluate, bad):
    case = make_set()
    case["maps"][5, 1, 1] = bad
    with pytest.raises(ValueError, match=r"1 of . anomaly maps hold NaN .*first: 5.*learning rate"):
        evaluate(case)
    case = make_set()
    case["scores"][5] = bad
    with pytest.raises(ValueError, match=r"1 of 8 image scores hold NaN or infinity .first: 5"):
        evaluate(case)


def test_maps_of_different_sizes():
    case = make_set(2)
    case["maps"] = [case["maps"][0], case["maps"][1][:, 1:]]
    with pytest.raises(ValueError, match="inhomogeneous"):
        metrics.measure(**case).report()


def test_no_image():
    with pytest.raises(ValueError, match="no image"):
        metrics.measure(**rows(make_set(), slice(0))).report()


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_batches_of_the_official_code_change_nothing(batch):
    """Quirk 20: it skips a batch whose masks are all one class; PRO is still a mean over images."""
    case = make_set()
    case["masks"][6] = (
        True  # a batch of its own is skipped; in another one the official code raises
    )
    values = []
    for start in range(0, 8, batch):
        maps, masks = case["maps"][start : start + batch], case["masks"][start : start + batch]
        if masks.any() and not masks.all():
            per_image = metrics.pro_mmr_per_image(maps, masks)
            values += [value for value in per_image if not np.isnan(value)]
    assert exact(case)["pro_mmr"] == np.mean(values)
