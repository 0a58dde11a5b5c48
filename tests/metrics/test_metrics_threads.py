"""Order and cover: threads change nothing but the time."""

import numpy as np
import pytest

from mmrjax.metrics import threads


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_items(count):
    assert threads.each(lambda x: x * x, range(count)) == [x * x for x in range(count)]


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        threads.each(lambda x: 1 // x, [1, 0])


@pytest.mark.parametrize("size", [0, 7, 1000, 4096])
def test_slices_cover_everything_once_and_none_is_shorter_than_asked(size, monkeypatch):
    monkeypatch.setattr(threads, "_COUNT", 4)
    found = threads.slices(size, smallest=500)
    np.testing.assert_array_equal(np.concatenate([np.arange(size)[s] for s in found]),
                                  np.arange(size))  # fmt: skip
    assert len(found) == (1 if size < 1000 else min(4, size // 500))
