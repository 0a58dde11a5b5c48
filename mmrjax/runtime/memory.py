"""Keeps freed memory in the process, so that a step on CPU does not fault its pages in again.

XLA:CPU takes the temporary memory of a program in one block per call and frees it afterwards. glibc
gives a block of that size back to the system at once, and the next call pays for every page of it
once more: 75,000 page faults and 138 of 631 ms of processor time in the gradient of a small
encoder. Called by the programs before the first array exists; does nothing without glibc.
"""

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Tells malloc to keep and reuse large blocks; returns whether it understood."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # macOS, musl
        return False
    # No own mapping per block, nothing trimmed from the heap, and one heap: those of other threads
    # cannot grow as large as such a block and would map it after all.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
