"""Numbers and sentences of the report claim no more than the data."""

import re

import numpy as np
import pytest

from mmrjax.report import tables, words


def test_percent_has_one_decimal_and_a_true_minus():
    values = [0.8725, -0.0632, -0.00001, 0, 1, None, float("nan"), True]
    wanted = ["87.2", "−6.3", "0.0", "0.0", "100.0", "–", "–", "–"]
    assert [tables.percent(v) for v in values] == wanted


@pytest.mark.parametrize(
    ("difference", "ci95", "wanted"),
    [
        (-0.051, [-0.09, -0.012], "5.1 points below PatchCore .*9.0 below to 1.2 below.*excludes"),
        (0.03, [-0.01, 0.07], "3.0 points above PatchCore .*1.0 below to 7.0 above.*contains zero"),
        (0.03, None, "3.0 points above PatchCore; no interval"),
        (None, None, "cannot be compared"),
    ],
)
def test_comparison_claims_no_more_than_its_interval(difference, ci95, wanted):
    one = {"a": "mmr", "b": "patchcore", "key": "toy/part", "metric": "image_auroc"}
    one |= {"difference": difference, "ci95": ci95}
    assert re.search(wanted, words.comparison_sentence(one, several_keys=False))


def test_detection_rate_counts_defects_above_all_but_five_percent_of_the_good():
    good = np.arange(100.0)  # five may be flagged: 95 … 99
    scores = np.concatenate([good, [93.0, 94.0, 94.5, 99.5]])
    is_anomaly = np.arange(104) >= 100
    assert words.detection_rate(scores, is_anomaly) == 0.5
    assert words.detection_rate(np.zeros(104), is_anomaly) == 0.0, "ties are not found"
    assert words.detection_rate(scores[:100], is_anomaly[:100]) is None
    assert words.detection_rate(scores[90:], is_anomaly[90:]) is None, "10 good are too few"
