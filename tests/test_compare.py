"""Paired comparison of two runs by their scores.csv."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmrjax import compare
from mmrjax.runs import paired


def write(folder, scores, labels, domains=None, groups=None):
    folder.mkdir(parents=True)
    n = len(scores)
    rows = zip(
        [f"i{i}" for i in range(n)],
        labels,
        domains or [""] * n,
        groups or [f"g{i}" for i in range(n)],
        scores,
        strict=True,
    )
    lines = ["id,label,domain,group,score", *(",".join(map(str, row)) for row in rows)]
    (folder / "scores.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def runs(tmp_path):
    """Two runs of two seeds on 60 images of two domains: the first is clearly better."""
    rng = np.random.default_rng(0)
    labels = ["good", "anomaly"] * 30
    truth = np.array([label == "anomaly" for label in labels])
    domains = ["day"] * 30 + ["magnetic_tile/tile"] * 30
    for seed in (0, 1):
        noise = rng.normal(size=(2, 60))
        write(tmp_path / "a" / f"seed{seed}", 3 * truth + noise[0], labels, domains)
        write(tmp_path / "b" / f"seed{seed}", 0.2 * truth + noise[1], labels, domains)
    return tmp_path


def test_difference_is_that_of_the_mean_metrics_and_its_interval_is_paired(runs):
    a, b = (paired.read(sorted((runs / name).glob("seed*"))) for name in "ab")
    found = paired.difference(a, b)["image_auroc"]
    for side, scores in (("a", a), ("b", b)):
        mean = np.mean([roc_auc_score(scores.is_anomaly, values) for values in scores.values])
        assert found[side] == pytest.approx(mean, abs=1e-12)
    assert found["difference"] == pytest.approx(found["a"] - found["b"], abs=1e-12)
    low, high = found["ci95"]
    assert 0 < low < found["difference"] < high
    same = paired.difference(a, a)["image_auroc"]
    assert (same["difference"], same["ci95"]) == (0, [0, 0])


def test_command_prints_all_images_and_every_domain(runs, capsys):
    (runs / "a" / "seed0_old").mkdir()  # a copy is no run
    assert compare.main([str(runs / "a"), str(runs / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    firsts = [line.split()[0] for line in lines if "image_auroc" in line]
    assert firsts == ["all", "day", "magnetic_tile/tile"]
    assert lines[-1] == "seeds: 2 and 2; images: 60"


def test_what_cannot_be_compared_is_said_in_one_line(runs, tmp_path, capsys):
    write(tmp_path / "c" / "seed0", [1.0, 2.0], ["good", "anomaly"])
    write(tmp_path / "d" / "seed0", [1.0, 2.0], ["good", "good"])
    cases = (
        ("c", "nothing to pair: 60 and 2 test images, 0 in common"),
        ("d", "all good"),
        ("absent", "no such folder"),
    )
    for name, message in cases:
        first = runs / "a" if name != "d" else tmp_path / "d"
        assert compare.main([str(first), str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_seeds_with_other_images_are_refused(tmp_path):
    write(tmp_path / "a" / "seed0", [1.0, 2.0], ["good", "anomaly"])
    write(tmp_path / "a" / "seed1", [1.0, 2.0, 3.0], ["good", "anomaly", "good"])
    with pytest.raises(ValueError, match="other test images"):
        paired.read(sorted((tmp_path / "a").glob("seed*")))
