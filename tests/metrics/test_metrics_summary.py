"""Summary over domains, categories and seeds; the rounding of the official tables."""

import numpy as np
import pytest

from mmrjax import metrics


def of(value):
    return {"image_auroc": value, "counts": {"good": 1}, "reasons": {}, "ci95": {}}


def test_mean_is_over_named_domains_then_over_categories():
    table = {
        "d/a": {"all": of(0.1), "same": of(0.9), "view": of(0.5), "light": of(0.4)},
        "d/b": {"all": of(0.8)},
    }
    one = metrics.summarise(table, "same")["image_auroc"]
    assert one["mean"] == pytest.approx((0.6 + 0.8) / 2)
    assert one["worst"] == {"value": 0.4, "where": "d/a/light"}
    assert one["gap_to_reference"] == pytest.approx(0.45 - 0.9)
    assert one["std"] is None
    assert "left_out" not in one


def test_category_without_named_domain_is_named_alone_as_worst():
    table = {"d/a": {"all": of(0.3)}, "d/b": {"all": of(0.8), "": of(0.8)}}
    one = metrics.summarise(table)["image_auroc"]
    assert one["worst"] == {"value": 0.3, "where": "d/a"}
    assert one["gap_to_reference"] is None


def test_undefined_values_are_left_out_and_named():
    table = {"d/a": {"x": of(0.5), "y": of(None)}, "d/b": {"all": of(None)}}
    summary = metrics.summarise(table, "x")
    assert summary["image_auroc"]["mean"] == 0.5
    assert summary["image_auroc"]["left_out"] == ["d/a/y", "d/b"]
    assert summary["image_auroc"]["gap_to_reference"] is None
    assert set(summary) == {"image_auroc"}


def test_gap_is_the_mean_over_categories_that_have_the_reference():
    table = {
        "d/a": {"same": of(0.9), "view": of(0.7)},
        "d/b": {"same": of(0.8), "view": of(0.9)},
        "d/c": {"view": of(0.1)},
    }
    gap = metrics.summarise(table, "same")["image_auroc"]["gap_to_reference"]
    assert gap == pytest.approx((0.1 - 0.2) / 2)


def test_std_is_over_the_summary_mean_of_each_seed():
    def seeds(**values):
        return of({"mean": np.mean(list(values.values())), "seeds": values})

    table = {
        "d/a": {"x": seeds(s1=0.5, s2=0.7), "y": seeds(s1=0.6, s2=0.4)},
        "d/b": {"all": seeds(s1=0.9, s2=0.7)},
    }
    one = metrics.summarise(table)["image_auroc"]
    assert one["mean"] == pytest.approx((0.55 + 0.8) / 2)
    per_seed = [(0.55 + 0.9) / 2, (0.55 + 0.7) / 2]
    assert one["std"] == pytest.approx(np.std(per_seed, ddof=1))


def test_official_rounding_touches_image_auroc_and_pro_only_and_leaves_the_undefined():
    entry = {"image_auroc": 0.84449, "pro_mmr": None, "pixel_auroc": 0.90049, "image_ap": 0.12345}
    assert metrics.officially_rounded(entry) == entry | {"image_auroc": 0.844}
    assert metrics.officially_rounded({"pro_mmr": 0.6005001})["pro_mmr"] == 0.601


def test_largest_errors_are_distances_from_the_reported_value_over_all_entries():
    entries = [
        of(0.5),
        {"pixel_auroc": 0.5, "bounds": {"pixel_auroc": [0.4, 0.55]}},
        {"pixel_auroc": 0.5, "aupro_0.3": 0.2, "bounds": {"pixel_auroc": [0.5, 0.7]}},
    ]
    assert metrics.largest_errors(entries) == {"pixel_auroc": pytest.approx(0.2)}
    assert metrics.largest_errors(entries[:1]) == {}


def test_data_sets_that_one_model_has_learned_together_have_means_of_their_own():
    joined = {"a": of(0.9), "b": of(0.7)}
    domains = {f"{d}/{name}": of(v) for d, v in (("x", 0.9), ("y", 0.6)) for name in joined}
    domains["x/b"] = of(0.7)
    one = metrics.summarise({"x+y/all": {"all": of(0.5), **domains}})["image_auroc"]
    assert one["datasets"] == {"x": pytest.approx(0.8), "y": pytest.approx(0.6)}
    assert one["mean"] == pytest.approx(0.7)
    apart = metrics.summarise({"x/a": {"all": of(0.9)}, "y/a": {"all": of(0.1)}})["image_auroc"]
    assert apart["datasets"] == {"x": pytest.approx(0.9), "y": pytest.approx(0.1)}
    alone = metrics.summarise({"x/a": {"all": of(0.9)}, "x/b": {"all": of(0.1)}})["image_auroc"]
    assert "datasets" not in alone
