"""A few threads for the NumPy calls that take the time: sorting, searching and selecting.

They release the GIL; results come in the order of the items, so nothing depends on timing.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_COUNT = min(8, os.cpu_count() or 1)  # more parts to sort mean more searches afterwards

In = TypeVar("In")
Out = TypeVar("Out")


def each(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """[function(item) for item in items], several at once."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_COUNT) as pool:
        return list(pool.map(function, items))


def slices(size: int, smallest: int = 1 << 20) -> list[slice]:
    """Slices that cover range(size), one per thread but none shorter than `smallest`."""
    count = max(1, min(_COUNT, size // smallest))
    ends = [size * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]
