"""Both PRO definitions against threshold loops, golden values, closed forms, degenerate cases."""

import pathlib
import statistics

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from mmrjax import metrics
from mmrjax.metrics import exact, ranking
from mmrjax.metrics import pro as pro_lib

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "metrics"
CASES = ("random", "tied", "constant", "one_outlier", "plateau_over_limit", "float64")


def slow_components(mask):
    """Boolean mask of every 8-connected region."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    return [labels == i + 1 for i in range(count)]


def slow_aupro(maps, masks, limit):
    """Curve over all distinct scores, >=, then the trapezoid with interpolation at the limit."""
    parts = [
        (m, part) for m, mask in zip(maps, masks, strict=True) for part in slow_components(mask)
    ]
    x, y = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        x.append((maps[~masks] >= threshold).mean())
        y.append(np.mean([(m[part] >= threshold).mean() for m, part in parts]))
    x, y = np.array(x), np.array(y)
    inside = x <= limit
    last = inside.sum() - 1
    area = np.trapezoid(y[inside], x[inside])
    if x[last] < limit:
        share = (limit - x[last]) / (x[last + 1] - x[last])
        end = y[last] + share * (y[last + 1] - y[last])
        area += (limit - x[last]) * (y[last] + end) / 2
    return area / limit


def slow_pro_mmr(values, mask):
    """The official per-image loop in words; raises or gives NaN where the official code does."""
    values = values.astype(np.float64)
    rates, overlaps = [], []
    low, high = values.min(), values.max()
    for threshold in np.arange(low, high, (high - low) / 200):
        found = values > threshold
        overlaps.append(statistics.mean(found[p].sum() / p.sum() for p in slow_components(mask)))
        rates.append(found[~mask].sum() / (~mask).sum())
    rates, overlaps = np.array(rates), np.array(overlaps)
    overlaps, rates = overlaps[rates < 0.3], rates[rates < 0.3]
    with np.errstate(invalid="ignore"):
        return sklearn_metrics.auc(rates / rates.max(), overlaps)


def region_ranking(maps, masks):
    """The ranking behind AU-PRO, as `measure` makes it."""
    return exact.gather(maps, metrics.regions(masks)).tables()[1]


def aupro(maps, masks, limit=0.3):
    return float(ranking.area(region_ranking(maps, masks), limit))


def pro_mmr(maps, masks):
    return np.nanmean(metrics.pro_mmr_per_image(maps, masks))


def pro_curve(maps, masks, limit):
    """The curve as `Measured.curves` draws it."""
    return pro_lib.head(*ranking.polyline(region_ranking(maps, masks)), limit)


def make_masks():
    """Six images: several regions, one touching only at a corner, one at the border, two good."""
    masks = np.zeros((6, 24, 20), bool)
    masks[0, 2:7, 3:6] = masks[0, 12:14, 10:18] = masks[0, 20, 1] = True
    masks[1, :4, :9] = masks[1, -1, -5:] = True  # along the border, and in the last row
    masks[2, 5:8, 5:8] = masks[2, 8:10, 8:10] = True  # one region: they meet at a corner
    masks[3, 10, 10] = True
    return masks


def make_maps(name):
    rng = np.random.default_rng(11)
    masks = make_masks()
    maps = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 1.5, 1.5)) * 3
    maps += ndimage.gaussian_filter(masks * 1.0, (0, 1, 1))
    if name == "tied":
        maps = np.round(maps * 3) / 3
    elif name == "levels":  # every threshold of pro_mmr is itself a score: strict > matters
        maps -= maps.min(axis=(1, 2), keepdims=True)
        maps = np.round(maps / maps.max(axis=(1, 2), keepdims=True) * 200)
        maps[:, 9, 0], maps[:, 9, 1] = 200, 199  # normal, and a defect as high: their order counts
        maps[0, 2, 3] = 200
    elif name == "constant":
        maps = np.full(masks.shape, 0.5)
    elif name == "one_outlier":
        maps[4, 3, 3] = 100.0
    elif name == "plateau_over_limit":  # 60 % of all pixels tie exactly across FPR 0.3
        maps = np.where(maps > np.quantile(maps, 0.9), maps, np.quantile(maps, 0.9))
        maps[rng.random(maps.shape) < 0.3] = -1.0
    return maps if name == "float64" else maps.astype(np.float32)


@pytest.mark.parametrize("limit", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_aupro_equals_loop_over_all_thresholds(name, limit):
    maps, masks = make_maps(name), make_masks()
    expected = slow_aupro(maps, masks, limit)
    assert aupro(maps, masks, limit) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_curve_has_the_area_of_aupro_and_ends_at_the_limit(name):
    x, y = pro_curve(make_maps(name), make_masks(), 0.3)
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= 0).all()
    assert x[0] == 0
    assert x[-1] == 0.3
    expected = aupro(make_maps(name), make_masks(), 0.3)
    assert np.trapezoid(y, x) / 0.3 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["random", "tied", "levels", "one_outlier", "float64"])
def test_pro_mmr_is_bit_equal_to_the_official_loop(name):
    maps, masks = make_maps(name), make_masks()
    values = metrics.pro_mmr_per_image(maps, masks)
    expected = [slow_pro_mmr(m, mask) for m, mask in zip(maps[:4], masks[:4], strict=True)]
    np.testing.assert_array_equal(values[:4], expected)
    assert np.isnan(values[4:]).all()
    assert pro_mmr(maps, masks) == np.mean(expected)


def test_pro_mmr_is_bit_equal_with_many_regions():
    rng = np.random.default_rng(2)
    for _ in range(20):
        mask = ndimage.binary_dilation(rng.random((24, 24)) < 0.03)
        values = rng.random((24, 24)) + 0.6 * mask
        got = metrics.pro_mmr_per_image(values[None], mask[None])[0]
        assert got == slow_pro_mmr(values, mask)


def test_mean_over_regions_is_rounded_once():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, n + 1, 2000) / n for n in (3, 7, 11, 50_000, 999_983)]
    expected = [statistics.mean(column) for column in np.stack(rows, axis=1).tolist()]
    np.testing.assert_array_equal(pro_lib._exact_mean(rows), expected)
    assert (sum(rows) / len(rows) != expected).any()  # else any mean would do


def area_and_precision(scores, truth):
    ranked = ranking.rank(scores[truth], np.sort(scores[~truth]))
    return ranking.area_precision_f1(ranked)[:2]


@pytest.mark.parametrize("kind", ["cont", "tied"])
def test_golden_values_of_the_official_code(agree, kind):
    given, expected = np.load(GOLDEN / "inputs.npz"), np.load(GOLDEN / "outputs.npz")
    maps, masks = given[f"maps_{kind}"], given["masks"].astype(bool)
    peaks, labels = maps.max(axis=(1, 2)), given["labels"].astype(bool)
    per_image = metrics.pro_mmr_per_image(maps, masks)[:4]
    np.testing.assert_array_equal(per_image, expected[f"{kind}__compute_pro_per_image"])
    got = {
        "compute_pro_mean": pro_mmr(maps, masks),
        **dict(zip(("pixel_auroc", "pixel_mean_AP"), area_and_precision(maps, masks), strict=True)),
        **dict(zip(("image_auroc", "image_ap"), area_and_precision(peaks, labels), strict=True)),
        **{f"aupro_{limit}": aupro(maps, masks, limit) for limit in (0.05, 0.3, 1.0)},
    }
    for name, value in got.items():
        agree(f"{name}, {kind} maps", value, expected[f"{kind}__{name}"], 1e-9)
    found = metrics.regions(masks)
    np.testing.assert_array_equal(
        np.bincount(found.image, minlength=6), expected["n_regions_8conn"]
    )


def test_golden_image_metrics_with_ties():
    expected = np.load(GOLDEN / "outputs.npz")
    scores, labels = expected["imgties__scores"], expected["imgties__labels"].astype(bool)
    wanted = [float(expected[f"imgties__{name}"]) for name in ("auroc", "ap")]
    assert area_and_precision(scores, labels) == pytest.approx(wanted, abs=1e-12)


def test_golden_copies_equal_the_shared_originals(shared):
    for name in ("inputs.npz", "outputs.npz"):
        assert (GOLDEN / name).read_bytes() == (shared / "golden/metrics" / name).read_bytes()


def test_golden_curve_with_ties():
    given, expected = np.load(GOLDEN / "inputs.npz"), np.load(GOLDEN / "outputs.npz")
    x, y = pro_curve(given["maps_tied"], given["masks"].astype(bool), 1.0)
    for fpr, pro in zip(expected["tied__aupro_fpr"], expected["tied__aupro_pro"], strict=True):
        assert np.hypot(x - fpr, y - pro).min() < 1e-12 or pro == 1.0


def test_toy_ramp_gives_the_two_closed_forms():
    maps = np.repeat(np.arange(64)[:, None] / 64, 64, axis=1)[None]
    masks = np.zeros((1, 64, 64), bool)
    masks[0, 40:48, 10:20] = True
    assert pro_mmr(maps, masks) == pytest.approx(0.0256, abs=5e-5)
    assert aupro(maps, masks) == pytest.approx(0.0314, abs=5e-5)


def test_regions_carry_area_image_and_equal_weight():
    masks = make_masks()
    found = metrics.regions(masks)
    np.testing.assert_array_equal(found.image, [0, 0, 0, 1, 1, 2, 3])
    np.testing.assert_array_equal(np.sort(found.area), [1, 1, 5, 13, 15, 16, 36])
    assert found.weight.sum() == pytest.approx(7)
    assert np.array_equal(np.sort(found.pixel), np.flatnonzero(masks))


def test_small_region_weighs_as_much_as_a_large_one():
    masks = np.zeros((1, 32, 32), bool)
    masks[0, :10, :10] = masks[0, 20, 20] = True
    maps = np.zeros((1, 32, 32), np.float32)
    maps[0, 20, 20] = 1.0  # only the single-pixel defect is found: half of all regions
    expected = slow_aupro(maps, masks, 0.3)
    assert aupro(maps, masks) == pytest.approx(expected, abs=1e-12)
    assert aupro(maps, masks) == pytest.approx(0.5 + 0.5 * 0.15, abs=1e-12)


def test_good_images_enter_aupro_but_not_pro_mmr():
    maps, masks = make_maps("random"), make_masks()
    louder = maps.copy()
    louder[4:] += 10
    assert aupro(louder, masks) < aupro(maps, masks)
    assert pro_mmr(louder, masks) == pro_mmr(maps, masks)


def test_perfect_binary_map_scores_one_where_official_gives_nan():
    masks = make_masks()
    maps = masks.astype(np.float32)
    assert aupro(maps, masks) == 1.0
    assert pro_mmr(maps, masks) == 1.0
    assert np.isnan(slow_pro_mmr(maps[0], masks[0]))


def test_binary_map_with_half_the_defect_scores_that_half_in_pro_mmr():
    masks = make_masks()[1:2]
    maps = masks.astype(np.float32)
    maps[0, 2:] = 0  # half of the first region, nothing of the second
    assert pro_mmr(maps, masks) == pytest.approx(0.25)


def test_single_threshold_at_a_positive_rate_has_no_width():
    maps = np.full((1, 1, 101), 0.99, np.float64)
    maps[0, 0, 0] = 0.0
    maps[0, 0, 1:20] = 1.0
    masks = np.zeros((1, 1, 101), bool)
    masks[0, 0, 1:10] = True
    assert pro_mmr(maps, masks) == 0.0  # thresholds in (0.99, 1) all have one rate
    maps[0, 0, 20:] = 0.996
    assert pro_mmr(maps, masks) == 0.0  # exactly one such threshold: 0.995 < 0.996


def test_mask_of_all_ones_is_left_out_of_pro_mmr():
    maps, masks = make_maps("random")[:2], make_masks()[:2].copy()
    masks[1] = True
    values = metrics.pro_mmr_per_image(maps, masks)
    assert np.isnan(values[1])
    assert pro_mmr(maps, masks) == values[0]


def test_nan_in_a_map_is_refused_with_its_image():
    maps = make_maps("random")
    maps[5, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1 of 6 anomaly maps .*first: 5"):
        metrics.pro_mmr_per_image(maps, make_masks())


def test_shapes_and_types_are_checked():
    maps, masks = make_maps("random"), make_masks()
    with pytest.raises(ValueError, match="one shape"):
        metrics.pro_mmr_per_image(maps[:, :-1], masks)
    with pytest.raises(ValueError, match="boolean"):
        metrics.regions(masks * 0.5)
