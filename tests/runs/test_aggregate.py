"""The aggregate of a work directory: official rounding, stated modes and errors."""

import json

import pytest

from mmrjax import metrics
from mmrjax.runs import aggregate


def write_run(root, seed, mode, domains, category="part"):
    folder = root / "mmr" / category / f"seed{seed}"
    folder.mkdir(parents=True)
    entries = {
        domain: {
            **dict.fromkeys(metrics.METRICS),
            **values,
            "counts": {"good": 3},
            "reasons": {},
            "ci95": {},
        }
        for domain, values in domains.items()
    }
    content = {
        "dataset": "toy",
        "category": category,
        "method": "mmr",
        "seed": seed,
        "metrics": {f"toy/{category}": entries},
        "facts": {"notes": [], "eval": {"metrics_mode": mode}},
    }
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "scores.csv").write_text("id,label,domain,group,score\na,good,,a,0.5\n")


# Table of the official code: round(0.84449, 3) = 0.844 and round(0.80051, 3) = 0.801 are averaged.
DOMAINS = {
    "same": {"image_auroc": 0.84449, "pro_mmr": 0.70049, "pixel_auroc": 0.90049},
    "view": {"image_auroc": 0.80051, "pro_mmr": 0.60049, "pixel_auroc": 0.80049},
}


def test_mode_mmr_rounds_image_auroc_and_pro_before_averaging_and_nothing_else(tmp_path):
    write_run(tmp_path, 1, "mmr", DOMAINS)
    (content,) = aggregate.aggregate(tmp_path, "", "same")["methods"].values()
    summary = content["summary"]
    assert summary["image_auroc"]["mean"] == pytest.approx((0.844 + 0.801) / 2, abs=1e-12)
    assert summary["pro_mmr"]["mean"] == pytest.approx((0.7 + 0.6) / 2, abs=1e-12)
    assert summary["pixel_auroc"]["mean"] == pytest.approx((0.90049 + 0.80049) / 2, abs=1e-12)
    assert summary["image_auroc"]["gap_to_reference"] == pytest.approx(0.801 - 0.844, abs=1e-12)
    (note,) = content["notes"]
    assert "rounded to 3 decimals" in note
    run = json.loads((tmp_path / "mmr/part/seed1/results.json").read_text())
    assert run["metrics"]["toy/part"]["same"]["image_auroc"] == 0.84449  # the run keeps all digits


def test_every_seed_is_rounded_on_its_own(tmp_path):
    for seed, value in ((1, 0.5004), (2, 0.5004), (3, 0.5004)):
        write_run(tmp_path, seed, "mmr", {"all": {"image_auroc": value}})
    (content,) = aggregate.aggregate(tmp_path, "", "")["methods"].values()
    one = content["metrics"]["toy/part"]["all"]["image_auroc"]
    assert (one["mean"], one["seeds"]) == (0.5, {"1": 0.5, "2": 0.5, "3": 0.5})


def test_standard_mode_rounds_nothing_and_has_no_note(tmp_path):
    write_run(tmp_path, 1, "standard", DOMAINS)
    (content,) = aggregate.aggregate(tmp_path, "", "")["methods"].values()
    assert content["summary"]["image_auroc"]["mean"] == pytest.approx((0.84449 + 0.80051) / 2)
    assert content["notes"] == []


def test_errors_of_the_streaming_form_are_stated_rounded_up(tmp_path):
    for seed, low in ((1, 0.8999), (2, 0.89891)):
        bounds = {"pixel_auroc": [low, 0.9002]}
        write_run(tmp_path, seed, "standard", {"all": {"pixel_auroc": 0.9, "bounds": bounds}})
    (content,) = aggregate.aggregate(tmp_path, "", "")["methods"].values()
    assert content["notes"][0].endswith("largest possible error in points: pixel_auroc 0.11")
    errors = content["metrics"]["toy/part"]["all"]["error_at_most"]
    assert errors == {"pixel_auroc": pytest.approx(0.00109)}
