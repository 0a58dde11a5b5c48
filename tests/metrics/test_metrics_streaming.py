"""The streaming form against the exact one: bounds hold, integers stay whole, memory stays flat."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, sparse

from mmrjax import metrics
from mmrjax.metrics import exact, ranking, streaming
from mmrjax.runtime import mesh as mesh_lib

BOUNDED = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3")


def make_set(kind, n=24, size=32):
    """Keyword arguments of `metrics.measure`: smooth maps, every second image with defects."""
    rng = np.random.default_rng(4)
    is_anomaly = np.arange(n) % 2 == 0
    masks = np.zeros((n, size, size), bool)
    for i in np.flatnonzero(is_anomaly):
        for y, x in rng.integers(0, size - 8, (2, 2)):
            masks[i, y : y + 6, x : x + 4] = True
    smooth = ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2))
    maps = np.exp(smooth + 0.2 * masks)
    if kind == "tied":
        maps = np.round(maps, 1)
    elif kind == "constant":
        maps = np.ones(maps.shape)
    elif kind == "one_bucket":  # all differences are finer than a bucket
        maps = 1 + maps / maps.max() * 0.005
    elif kind == "powers_of_two":  # no two different scores share a bucket
        maps = 2.0 ** np.round(3 * np.log(maps))
    elif kind == "signed":
        maps = np.where(maps > 1.1, maps - 1.1, np.round(maps, 1) - 1.1)
    maps = maps.astype(np.float32)
    table = {"masks": masks, "is_anomaly": is_anomaly, "has_mask": np.ones(n, bool)}
    return {"scores": maps.max(axis=(1, 2)), "maps": maps} | table


def count(maps, masks, batch=8, devices=1):
    histograms = streaming.MapHistograms(mesh_lib.make_mesh(devices))
    for start in range(0, len(maps), batch):
        some = maps[start : start + batch]
        padding = np.full((batch - len(some), *maps.shape[1:]), np.nan, np.float32)
        histograms.add(np.concatenate([some, padding]), masks[start : start + batch])
    return histograms.counted()


def stream(case, counted=None, **options):
    masks = case["masks"] & (case["is_anomaly"] & case["has_mask"])[:, None, None]
    counted = counted or count(case["maps"], masks)
    rest = (case["is_anomaly"], case["has_mask"])
    return streaming.measure(case["scores"], counted, *rest, **options).report()


KINDS = ("smooth", "tied", "constant", "one_bucket", "powers_of_two", "signed")


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_the_exact_value_and_the_reported_one(kind):
    case = make_set(kind)
    exact, found = metrics.measure(**case, bootstrap=0).report(), stream(case, bootstrap=0)
    assert set(found["bounds"]) == set(BOUNDED)
    for name in BOUNDED:
        low, high = found["bounds"][name]
        for value in (exact[name], found[name]):
            assert 0 <= low <= value + 1e-12, name
            assert value - 1e-12 <= high <= 1 + 1e-12, name
        if kind == "powers_of_two":  # nothing is lost
            assert found[name] == pytest.approx(exact[name], abs=1e-12)
    for name in ("pro_mmr", *metrics.IMAGE_METRICS):
        assert found[name] == exact[name]
    assert found["counts"] == exact["counts"]
    assert found["reasons"] == exact["reasons"]


def test_bounds_are_narrow_where_buckets_are_and_wide_where_they_say_nothing():
    def widths(kind):
        bounds = stream(make_set(kind), bootstrap=0)["bounds"]
        return np.array([bounds[name][1] - bounds[name][0] for name in BOUNDED])

    assert (widths("smooth") < 0.02).all()
    assert (widths("one_bucket") > 0.9).all()


def test_bounds_are_reached_by_the_worst_and_the_best_order_within_a_bucket():
    rng = np.random.default_rng(2)
    group = rng.integers(0, 12, 400)
    positive = rng.random(400) < 0.3 + 0.03 * group
    table = ranking.from_counts(
        *(np.bincount(group[some], minlength=12)[::-1] for some in (positive, ~positive))
    )
    orders = {0: group - 0.5 * positive, 1: group + 0.5 * positive}
    for end, scores in orders.items():
        area, _, f1 = area_precision_f1(scores, positive)
        assert ranking.area_bounds(table)[end] == pytest.approx(area)
        assert ranking.f1_bounds(table)[end] == f1
        _, precision, _ = area_precision_f1(scores if end else scores_one_by_one(scores), positive)
        assert ranking.precision_bounds(table)[end] == pytest.approx(precision)


def area_precision_f1(scores, positive):
    """As `measure` has them."""
    ranked = ranking.rank(scores[positive], np.sort(scores[~positive]))
    return ranking.area_precision_f1(ranked)


def scores_one_by_one(scores):
    """The same order without ties."""
    return np.argsort(np.argsort(scores, kind="stable"), kind="stable")


def test_maps_without_truth_count_for_image_metrics_only():
    case = make_set("powers_of_two")
    case["has_mask"][:6] = False
    case["masks"][1] = True  # of a good image: not read
    exact, found = metrics.measure(**case, bootstrap=0).report(), stream(case, bootstrap=0)
    assert found["counts"] == exact["counts"]
    for name in metrics.METRICS:
        assert found[name] == pytest.approx(exact[name], abs=1e-12), name


def test_intervals_agree_with_those_of_the_exact_form():
    case = make_set("smooth")
    groups = np.arange(24) // 2
    exact = metrics.measure(**case, groups=groups, bootstrap=200).report()["ci95"]
    found = stream(case, groups=groups, bootstrap=200)["ci95"]
    for name in metrics.METRICS:
        assert found[name] == pytest.approx(exact[name], abs=1e-2), name


def test_one_and_eight_devices_and_any_batch_count_the_same():
    case = make_set("smooth")
    masks = case["masks"]
    one, eight = count(case["maps"], masks, 24), count(case["maps"], masks, 16, devices=8)
    for a, b in zip(one, eight, strict=True):
        a, b = (x.toarray() if sparse.issparse(x) else x for x in (a, b))
        np.testing.assert_array_equal(a, b)
    assert one.normal.sum() + one.defect.sum() == masks.size
    np.testing.assert_array_equal(one.defect.sum(axis=1), one.area)


def test_selected_images_are_counted_as_if_they_were_alone():
    case = make_set("smooth")
    rows = np.arange(24) % 3 != 0
    part = {name: column[rows] for name, column in case.items()}
    chosen = count(case["maps"], case["masks"]).select(rows)
    assert stream(part, chosen, bootstrap=20) == stream(part, bootstrap=20)


def test_more_regions_than_histograms_per_call_and_more_buckets_than_expected():
    size = 64
    masks = np.zeros((1, size, size), bool)
    masks[0, ::4, ::4] = True  # 256 regions of one pixel: three calls
    rng = np.random.default_rng(3)
    maps = np.exp(20 * rng.normal(size=masks.shape)).astype(np.float32)
    counted = count(maps, masks, batch=1)
    assert counted.defect.shape == (256, streaming.BUCKETS)
    assert len(np.unique(counted.normal.indices)) > 1024
    low, high = counted.bounds()["aupro_0.3"]
    _, region = exact.gather(maps, metrics.regions(masks)).tables()
    assert low <= ranking.area(region, 0.3) <= high < low + 0.02


def test_batches_of_different_sizes_count_together():
    histograms = streaming.MapHistograms(mesh_lib.make_mesh(1))
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 2:4, 2:4] = True
    histograms.add(np.where(masks, 2.0, 1.0).astype(np.float32), masks)
    histograms.add(np.full((1, 16, 4), 1.5, np.float32), np.zeros((1, 16, 4), bool))
    pixel, _ = histograms.counted().tables()
    assert (pixel.positive.sum(), pixel.negatives) == (4, 60 + 64)
    assert ranking.area(pixel) == 1


def test_counts_beyond_float32_and_int32_stay_whole():
    huge = np.full(4, (1 << 31) - 1, np.int32)  # pixels of four images in one bucket
    normal = sparse.csr_array((huge, [5] * 4, range(5)), shape=(4, streaming.BUCKETS))
    defect = sparse.csr_array((np.int32([1]), [9], [0, 1]), shape=(1, streaming.BUCKETS))
    one = np.ones(1, int)
    pixel, _ = streaming.Counted(
        normal, defect, 0 * one, one, np.full(4, np.nan), np.ones(4), one, one
    ).tables()
    assert pixel.negatives == 4 * ((1 << 31) - 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_maps_are_refused_with_their_number_but_padding_may_hold_anything(bad):
    case = make_set("smooth")
    case["maps"][[9, 13], 0, 0] = bad
    with pytest.raises(ValueError, match=r"2 of 16 anomaly maps .*first: 9.*learning rate"):
        count(case["maps"], case["masks"])


def test_arrays_that_do_not_fit_are_refused():
    case = make_set("smooth")
    histograms = streaming.MapHistograms(mesh_lib.make_mesh(1))
    with pytest.raises(ValueError, match="no map"):
        histograms.counted()
    with pytest.raises(ValueError, match="one shape"):
        histograms.add(case["maps"][:, 1:], case["masks"])
    rest = (case["is_anomaly"][1:], case["has_mask"][1:])
    with pytest.raises(ValueError, match="23 scores, 24 maps"):
        streaming.measure(case["scores"][1:], count(case["maps"], case["masks"]), *rest)


def test_quantiles_are_those_of_all_pixels_to_the_width_of_a_bucket():
    case = make_set("smooth")
    found = count(case["maps"], case["masks"]).quantiles([0.05, 0.5, 0.995])
    expected = np.quantile(case["maps"], [0.05, 0.5, 0.995])
    np.testing.assert_allclose(found, expected, rtol=1 / 128)


# Buckets

EXTREME = [-np.inf, -3.4e38, -1.0, -1e-38, -0.0, 0.0, 1e-38, 0.5, 1.0, 3.4e38, np.inf]


def bucket(scores):
    return np.asarray(streaming.bucket(jnp.asarray(scores, jnp.float32)))


def oracle(maps, row):
    """Counts with NumPy, one histogram after the other."""
    values = bucket(maps)
    return np.stack([np.bincount(values[row == i], minlength=1 << 16) for i in range(128)])


def make_batch(b=8, size=12):
    rng = np.random.default_rng(5)
    maps = rng.normal(size=(b, size, size)).astype(np.float32)
    row = rng.integers(-1, 131, maps.shape).astype(np.int32)  # some belong to no histogram
    row[:, :, :4] = 0  # the same histogram gets pixels on every device
    return maps, row


def count_rows(maps, row, devices, width=1 << 12):
    mesh = mesh_lib.make_mesh(devices)
    maps, row = mesh_lib.put_batch((maps, row), mesh)
    columns, counts, occupied = streaming.bucket_counts(maps, row, mesh, width)
    assert counts.dtype == jnp.int32
    wide = np.zeros((streaming.ROWS, streaming.BUCKETS + 1), np.int64)
    np.add.at(wide, (slice(None), np.asarray(columns)), np.asarray(counts))
    return wide[:, :-1], int(occupied)


def test_buckets_rise_with_the_scores_and_equal_scores_share_one():
    assert (np.diff(bucket(EXTREME)) >= 0).all()
    rng = np.random.default_rng(1)
    scores = np.sort(rng.normal(size=4000) * 10.0 ** rng.integers(-30, 30, 4000))
    assert (np.diff(bucket(scores)) >= 0).all()
    assert bucket([-0.0]) == bucket([0.0])
    assert len(set(bucket([1.0, 1.003, 1.005]).tolist())) == 1
    assert len(set(bucket([1.0, 1.01, 1.02]).tolist())) == 3  # 128 per doubling


def test_finite_scores_and_only_they_lie_in_the_finite_buckets():
    assert all(b in streaming.FINITE for b in bucket(EXTREME[1:-1]).tolist())
    assert not any(
        b in streaming.FINITE for b in bucket([np.inf, -np.inf, np.nan, -np.nan]).tolist()
    )


def test_edges_are_the_smallest_scores_of_their_buckets():
    edges, numbers = streaming.bucket_edges(), np.array(streaming.FINITE)
    exact = (np.abs(edges) >= np.finfo(np.float32).tiny) | (edges == 0)  # below: flushed to zero
    np.testing.assert_array_equal(
        bucket(edges)[exact & (edges >= 0)], numbers[exact & (edges >= 0)]
    )
    below = np.nextafter(edges[exact & (edges > 0)], np.float32(-np.inf))
    assert (bucket(below) < numbers[exact & (edges > 0)]).all()


@pytest.mark.parametrize("devices", [1, 8])
def test_counts_equal_numpy_on_any_number_of_devices(devices):
    maps, row = make_batch()
    counts, occupied = count_rows(maps, row, devices)
    expected = oracle(maps, row)
    np.testing.assert_array_equal(counts, expected)
    assert occupied == (expected.sum(axis=0) > 0).sum()


def test_a_width_that_is_too_small_is_told():
    maps, row = make_batch()
    _, occupied = count_rows(maps, row, 1, width=16)
    assert occupied == count_rows(maps, row, 1)[1] > 16


def test_only_sums_of_counts_cross_devices():
    mesh = mesh_lib.make_mesh(8)
    maps, row = mesh_lib.put_batch(make_batch(), mesh)
    text = streaming.bucket_counts.lower(maps, row, mesh, 64).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_a_batch_that_could_overflow_int32_is_refused():
    mesh = mesh_lib.make_mesh(1)
    maps = jax.ShapeDtypeStruct((1 << 11, 1024, 1024), jnp.float32)
    row = jax.ShapeDtypeStruct(maps.shape, jnp.int32)
    with pytest.raises(ValueError, match=r"too many for int32.*eval\.batch_size"):
        streaming.bucket_counts.lower(maps, row, mesh, 64)


# Memory

MEMORY = """
import numpy as np
from scipy import ndimage
from mmrjax.runtime import mesh
from mmrjax.metrics import streaming

def mebibytes(field):  # not ru_maxrss: it remembers the parent of a forked process
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) / 1024

rng = np.random.default_rng(0)
noise = ndimage.gaussian_filter(rng.normal(size=(32, 224, 224)), (0, 4, 4)).astype(np.float32)
masks = np.zeros(noise.shape, bool)
masks[::2, 50:80, 60:100] = masks[::2, 150:160, 20:30] = True
histograms = streaming.MapHistograms(mesh.make_mesh())
streaming.MapHistograms(mesh.make_mesh()).add(np.exp(noise), masks)  # compiles
n, before = 0, mebibytes("VmRSS")
while n < 1639:
    k = min(32, 1639 - n)
    histograms.add(np.exp(noise + rng.normal(size=(32, 1, 1)).astype(np.float32)), masks[:k])
    n += k
truth = np.resize(masks.any(axis=(1, 2)), n)
found = streaming.measure(rng.random(n), histograms.counted(), truth, np.ones(n, bool)).report()
assert found["ci95"]["aupro_0.3"][0] < found["aupro_0.3"] < found["ci95"]["aupro_0.3"][1]
print(mebibytes("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_of_1639_maps_grows_by_less_than_300_mib():
    """Their float32 maps alone would be 314 MiB. Peak against what a process holds before."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("no /proc here to read the memory of a process from")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 300
