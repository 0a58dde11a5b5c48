"""How large a thing from outside may be before it is refused; each limit can be raised.

A file of kilobytes can unpack to gigabytes, by accident or as an attack. The limits lie far above
what cameras and published data sets need.
"""

import os


def max_megapixels() -> float:
    """Millions of pixels that one image may have: 100, or $MMRJAX_MAX_MEGAPIXELS."""
    return _limit("MMRJAX_MAX_MEGAPIXELS", 100.0)


def max_unpacked_gib() -> float:
    """GiB that one archive may unpack to: 20, or $MMRJAX_MAX_UNPACKED_GIB."""
    return _limit("MMRJAX_MAX_UNPACKED_GIB", 20.0)


def _limit(variable: str, default: float) -> float:
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{variable}={text}: expected a positive number, such as {default:g}")
    return value
