"""The benchmark of the metrics measures what it says, on a small case."""

import json

import pytest

from mmrjax import metrics
from mmrjax.bench import metrics as bench_metrics


@pytest.fixture(scope="module")
def case():
    return bench_metrics.make_case(16, size=32)


def test_both_forms_measure_the_same_domains_and_metrics(case):
    exact = bench_metrics.whole_evaluation(case.predictions, 10)
    streamed = bench_metrics.streamed_evaluation(case, 10, batch=6)
    assert set(exact) == set(streamed) == {"all", *bench_metrics.DOMAINS}
    for name in metrics.IMAGE_METRICS + metrics.PIXEL_METRICS:
        assert streamed["all"][name] == pytest.approx(exact["all"][name], abs=0.02)
        assert exact["all"]["ci95"][name] is not None
    assert set(exact["all"]["defects"]) == set(bench_metrics.DEFECTS)
    pair = bench_metrics.exact_pair(case)
    expected = [exact["all"][name] for name in ("pixel_auroc", "aupro_0.3")]
    assert pair == pytest.approx(expected, abs=1e-12)


def test_the_command_prints_json(capsys, monkeypatch):
    monkeypatch.setattr(bench_metrics, "SIZE", 32)
    monkeypatch.setattr(bench_metrics.make_case, "__defaults__", (32,))
    assert bench_metrics.main(["--pair=8", "--images=12", "--bootstrap=5", "--repeats=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["pixels_of_pair"], result["pixels"]) == (8 * 32 * 32, 12 * 32 * 32)
    for name in ("exact_pair", "whole_exact", "whole_streaming"):
        assert result[f"{name}_seconds"]["median"] > 0


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_metrics.main(["--imges=3"])
    assert "--imges" in capsys.readouterr().err
