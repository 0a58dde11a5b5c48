"""Conformal thresholds: the promised rate holds for single images and groups, or is refused."""

import numpy as np
import pytest

from mmrjax.evaluate import calibrate, guarantees


def calibration(scores, groups=None, peaks=None):
    ids = [f"id{i}" for i in range(len(scores))]
    peaks = scores if peaks is None else peaks
    return calibrate.Calibration.of(ids, groups or ids, scores, peaks, np.full(len(scores), 0.25))


def test_the_threshold_is_the_conformal_quantile():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))  # 99 of them
    for target, expected in ((0.01, 99), (0.05, 95), (0.1, 90), (0.5, 50)):
        # ceil((n + 1)(1 - a))-th smallest (Vovk et al. 2005)
        assert calibration(scores).threshold(target) == expected


@pytest.mark.parametrize("target", [0.05, 0.13, 0.3])
def test_good_images_exceed_the_threshold_at_no_more_than_the_target(target):
    rng = np.random.default_rng(1)
    n, trials = 39, 4000
    flagged = 0
    for _ in range(trials):
        scores = rng.lognormal(size=n + 1)
        flagged += scores[n] > calibration(scores[:n]).threshold(target)
    exact = np.floor(target * (n + 1)) / (n + 1)  # continuous scores: the promise is exact
    assert flagged / trials == pytest.approx(exact, abs=4 * np.sqrt(exact / trials))
    assert calibrate.promised_rate(scores[:n], range(n), calibration(scores[:n]).threshold(
        target)) == pytest.approx(exact)  # fmt: skip


def test_the_promise_holds_for_groups_where_counting_images_breaks_it():
    """Few parts photographed often, others once: images of one part score alike."""
    rng = np.random.default_rng(2)
    target, trials = 0.2, 3000
    flagged = {"groups": 0, "images": 0}
    for _ in range(trials):
        sizes = np.where(rng.random(10) < 0.5, 1, 30)
        level = rng.normal(size=10) + 2 * (sizes == 1)  # rarely photographed parts score higher
        groups = np.repeat(np.arange(9), sizes[:9])
        scores = level[groups] + 0.01 * rng.normal(size=len(groups))
        new = level[9]
        by_group = calibrate.threshold(scores, [str(g) for g in groups], target)
        by_image = calibrate.threshold(scores, [str(i) for i in range(len(scores))], target)
        flagged["groups"] += new > by_group
        flagged["images"] += new > by_image
    assert flagged["groups"] / trials <= target + 0.02
    assert flagged["images"] / trials > target + 0.05


def test_a_p_value_is_at_most_the_rate_exactly_where_its_threshold_is_exceeded():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 12, 40).astype(float)  # with ties
    groups = [f"g{i}" for i in rng.integers(0, 25, 40)]
    own = calibration(scores, groups)
    new = np.linspace(-1, 13, 57)
    p = own.p_values(new)
    assert p.min() == pytest.approx(own.smallest_rate)
    assert p.max() == 1
    assert (np.diff(p) <= 1e-12).all()
    for target in (0.05, 0.1, 0.25, 0.7):
        np.testing.assert_array_equal(p <= target + 1e-9, new > own.threshold(target))


def test_too_few_images_are_refused_with_what_they_allow_and_what_is_needed():
    own = calibration(np.arange(18.0))
    with pytest.raises(calibrate.TooFew, match=r"18 held-out .* from 5\.26 % on, not 5 %: .* 19$"):
        own.threshold(0.05)
    assert calibration(np.arange(19.0)).threshold(0.05) == 18
    assert [guarantees.parts_needed(a) for a in (0.01, 0.05, 0.3, 0.5, 0.9)] == [99, 19, 3, 1, 1]
    grouped = calibration(np.arange(18.0), ["a", "b"] * 9)
    with pytest.raises(calibrate.TooFew, match=r"2 .*\(groups, of 18 images\) .* from 33\.3 %"):
        grouped.threshold(0.05)
    assert "from 5.26 % on" in own.report(0.05)["reason"]
    with pytest.raises(ValueError, match="between 0 and 1"):
        own.threshold(5)


def test_the_scale_has_the_usual_good_pixel_at_its_low_end_and_the_threshold_in_the_middle():
    own = calibration(np.arange(1.0, 20.0), peaks=np.arange(2.0, 21.0))
    low, high = own.scale(0.05)
    assert low == 0.25
    assert (low + high) / 2 == own.pixel_threshold(0.05) == 20
    assert own.scale(0.01) == (low, 2 * 20 - low)  # refused: the largest peak stands for it


def test_a_file_holds_it_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(4)
    own = calibration(rng.random(7).astype(np.float32), ["a", "b", "a", "c", "d", "d", "e"])
    own.write(tmp_path / "calibration.json")
    again = calibrate.read(tmp_path / "calibration.json")
    np.testing.assert_array_equal(again.scores, own.scores)
    assert (again.groups, again.ids, again.floor) == (own.groups, own.ids, own.floor)
    assert calibrate.read(tmp_path / "absent.json") is None
    (tmp_path / "calibration.json").write_text('{"images": [{"id": "a"}]}')
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        calibrate.read(tmp_path / "calibration.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"score": 1.0', '"score": NaN'),
        ('"score": 1.0', '"score": Infinity'),
        ('"score": 1.0', '"score": null'),
        ('"score": 1.0', '"score": 1e999'),
        ('"schema": 1', '"schema": 99'),
        ('"schema": 1', '"schema": "1"'),
        ('"floor": 0.5', '"floor": NaN'),
    ],
)
def test_a_file_without_finite_scores_or_of_another_schema_is_refused(tmp_path, old, new):
    path, names = tmp_path / "calibration.json", ["a", "b"]
    made = calibrate.Calibration.of(names, names, [1.0, 2.0], [1.0, 2.0], [0.5, 0.5], "x")
    made.write(path)
    calibrate.read(path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        calibrate.read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        calibrate.read(path)


def test_rates_are_counted_per_domain_with_exact_intervals():
    scores = np.array([1, 2, 3, 4, 5, 6.0])
    is_anomaly = np.array([0, 0, 1, 0, 1, 1], bool)
    rows = {"all": np.ones(6, bool), "view": np.arange(6) >= 3, "bad": is_anomaly}
    found = calibrate.rates_at(3.0, scores, is_anomaly, rows)
    assert (found["all"]["good_flagged"], found["all"]["good"]) == (1, 3)
    assert (found["all"]["anomaly_flagged"], found["all"]["found"]) == (2, 2 / 3)
    assert found["view"]["fpr"] == 1
    assert found["view"]["fpr_ci95"] == pytest.approx([0.025, 1])  # 0.025^(1/1), by hand
    assert found["bad"]["fpr"] is None
