"""Freed memory stays in the process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from mmrjax import memory

if sys.argv[1] == "keep":
    assert memory.keep_freed()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(2):
    before = faults()
    block = np.full(1 << 25, 1, np.uint8)  # 8192 pages of 4 KiB, above every mmap threshold
    block = np.full(1 << 26, 1, np.uint8)
    del block
    print(faults() - before)
"""


def page_faults(mode):
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_a_large_block_is_faulted_in_once():
    if not has_mallopt():
        pytest.skip("needs glibc")
    first, second = page_faults("keep")
    assert second < first / 10
    assert min(page_faults("as it is")) > 100 * max(second, 1)


def has_mallopt():
    """Asked in another process: it cannot be undone in this one."""
    probe = "from mmrjax.runtime import memory; print(memory.keep_freed())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"
