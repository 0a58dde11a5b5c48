"""Numbers and sentences of the report claim no more than the data."""

import re

import numpy as np
import pytest

from mmrjax import methods
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
    row = {"key": "toy/part", "metric": "image_auroc", "difference": difference, "ci95": ci95}
    assert re.search(wanted, words.comparison_sentence(row, "MMR", "PatchCore", False))


def test_detection_rate_counts_defects_above_all_but_five_percent_of_the_good():
    good = np.arange(100.0)  # five may be flagged: 95 … 99
    scores = np.concatenate([good, [93.0, 94.0, 94.5, 99.5]])
    is_anomaly = np.arange(104) >= 100
    assert words.detection_rate(scores, is_anomaly) == 0.5
    assert words.detection_rate(np.zeros(104), is_anomaly) == 0.0, "ties are not found"
    assert words.detection_rate(scores[:100], is_anomaly[:100]) is None
    assert words.detection_rate(scores[90:], is_anomaly[90:]) is None, "10 good are too few"


# Protocol and departures

TEACHER = {
    "name": "wide_resnet50_2",
    "source": "wide_resnet50_2-95faca4d.pth",
    "sha256": "95faca4d" + "0" * 56,
    "random": False,
}
STUDENT = {"init": "mae", "source": "mae_visualize_vit_base.pth", "sha256": "ab" * 32}
PAPER = {"teacher": TEACHER, "student": STUDENT}
PAPER_WEIGHTS = methods.METHODS["mmr"].paper_weights


def test_the_papers_own_weights_are_no_departure():
    assert words.departures(PAPER, PAPER_WEIGHTS) == []
    teacher_alone = methods.METHODS["patchcore"].paper_weights
    assert words.departures({"teacher": TEACHER}, teacher_alone) == []


@pytest.mark.parametrize(
    ("role", "changes", "said"),
    [
        ("teacher", {"random": True, "source": "random, seed 0"}, "has random weights (random, se"),
        ("teacher", {"sha256": "0" * 64}, "has weights other than the paper's"),
        ("teacher", {"name": "resnet18", "source": "r18.npz"}, "resnet18 has weights other than"),
        ("student", {"init": "scratch", "source": None}, "the student has random weights"),
        ("student", {"init": "x", "source": "vit.npz"}, "student has weights other .*vit.npz"),
    ],
)
def test_random_and_other_weights_are_said_plainly(role, changes, said):
    (text,) = words.departures({**PAPER, role: PAPER[role] | changes}, PAPER_WEIGHTS)
    assert all(part in text for part in said.split(".*"))


CONVERTED = {  # by mmrjax.convert from the paper's files
    "teacher": TEACHER
    | {
        "source": "wrn.safetensors",
        "sha256": "1" * 64,
        "converted_from": {name: TEACHER[name] for name in ("source", "sha256")},
    },
    "student": {
        "init": "vit.safetensors",
        "source": "vit.safetensors",
        "sha256": "2" * 64,
        "converted_from": {name: STUDENT[name] for name in ("source", "sha256")},
    },
}


def test_a_converted_copy_of_the_papers_weights_is_no_departure():
    assert words.departures(CONVERTED, PAPER_WEIGHTS) == []
    line = words.protocol(CONVERTED)["teacher"]
    assert "wrn.safetensors (converted from wide_resnet50_2-95faca4d.pth), sha256 111" in line


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"source": "resnet.pth"}])
def test_a_converted_copy_of_other_weights_is_one(change):
    teacher = CONVERTED["teacher"]
    other = {**teacher, "converted_from": teacher["converted_from"] | change}
    (text,) = words.departures({**CONVERTED, "teacher": other}, PAPER_WEIGHTS)
    assert "has weights other than the paper's" in text


def test_the_protocol_names_the_weights_files_with_their_hashes():
    lines = words.protocol({**PAPER, "versions": {"jax": "0.10.2"}})
    assert lines["teacher"] == f"{TEACHER['name']} {TEACHER['source']}, sha256 {TEACHER['sha256']}"
    assert lines["student"] == f"{STUDENT['source']}, sha256 {STUDENT['sha256']}"
    assert lines["versions"] == "jax 0.10.2"


def test_a_run_without_facts_still_has_words():
    assert words.departures({}, PAPER_WEIGHTS) == []
    assert list(words.protocol({})) == ["evaluated"]
