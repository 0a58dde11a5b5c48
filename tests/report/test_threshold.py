"""The threshold panel: the promise in words, and the bound beside every position of the slider."""

import json
import types

import numpy as np
import pytest

from mmrjax.evaluate import calibrate, guarantees
from mmrjax.report import threshold


def run_with(guarantee, count=48):
    rng = np.random.default_rng(0)
    scores, names = rng.normal(size=count), [str(i) for i in range(count)]
    kept = calibrate.Calibration.of(names, names, scores, scores, scores, "", guarantee)
    test = rng.normal(size=40)
    columns = {
        "score": test,
        "label": np.where(test > 1, "anomaly", "good"),
        "domain": np.full(40, ""),
    }
    results = {"calibration": json.loads(json.dumps(kept.report(0.05)))}
    return types.SimpleNamespace(scores=columns, results=results, title="Toy", path="toy"), kept


@pytest.mark.parametrize("guarantee", [guarantees.SPLIT, guarantees.FULL, guarantees.LEFT_OUT])
def test_every_position_has_the_bound_of_its_threshold(guarantee):
    run, kept = run_with(guarantee)
    panel = threshold.panel(run)
    data = json.loads(panel["data"])
    steps = guarantees.simultaneous(kept.scores, kept.groups)
    wanted = [100 * guarantees.bound_at(steps, level) for level in data["levels"]]
    assert [float(x) for x in data["bounds"]] == pytest.approx(wanted, abs=0.051)
    assert panel["bound"] == data["bounds"][data["levels"].index(kept.threshold(0.05))]
    assert float(panel["bound"]) >= 100 * run.results["calibration"]["promised_fpr"]
    is_doubted = "as far as scores of parts left out are independent" in panel["bounded"]
    assert is_doubted == (guarantee != guarantees.SPLIT)


def test_the_sentence_says_what_is_promised_and_by_which_images():
    text = threshold.panel(run_with(guarantees.FULL)[0])["sentence"]
    assert text.startswith(
        "Set by 48 good training images, each scored without its own part: at most 4.08 % of good "
        "parts are rejected, proven (full conformal)."
    )
    text = threshold.panel(run_with(guarantees.FULL, count=5)[0])["sentence"]
    assert "provisional: 5 good parts promise nothing below 16.7 % (asked for: 5 %)" in text
    text = threshold.panel(run_with(guarantees.SPLIT)[0])["sentence"]
    assert "48 good images that were held out of training" in text
    text = threshold.panel(run_with(guarantees.SPLIT, count=5)[0])
    assert "This run has no threshold: 5 held-out good images" in text["sentence"]
    assert text["bound"] is None
