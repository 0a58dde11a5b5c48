"""The exact form: one sort for both metrics, equal to the slow single ones; parts by threads."""

import numpy as np
import pytest

from mmrjax import metrics
from mmrjax.metrics import pixels, threads


def make_stack():
    rng = np.random.default_rng(8)
    masks = np.zeros((6, 20, 20), bool)
    masks[::2, 4:9, 3:12] = masks[::2, 15, 15] = True
    return np.round(rng.normal(size=masks.shape) + masks, 1).astype(np.float32), masks


@pytest.mark.parametrize("count", [1, 3])
def test_one_sort_gives_both_metrics_whatever_the_number_of_threads(count, monkeypatch):
    monkeypatch.setattr(threads, "_COUNT", count)
    monkeypatch.setattr(threads.slices, "__defaults__", (100,))
    maps, masks = make_stack()
    found = metrics.pixel_auroc_and_aupro(maps, masks)
    assert found == pytest.approx(
        (metrics.auroc(maps, masks), metrics.aupro(maps, masks)), abs=1e-12
    )
    assert len(pixels.gather(maps, metrics.regions(masks)).sorted_normal) == count


def test_a_single_class_is_refused():
    maps, masks = make_stack()
    for some in (masks & False, masks | True):
        with pytest.raises(ValueError, match="defect and normal pixels are needed"):
            metrics.pixel_auroc_and_aupro(maps, some)
