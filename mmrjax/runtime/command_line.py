"""How a command ends: its exit status, and a single line on standard error, no traceback.

main.py ends in its own way, for signals and several processes. MMRJAX_TRACEBACK=1 shows the
traceback of an error. `keep_compiled` is for commands too, not for a library that somebody imports.
"""

import os
import pathlib
import sys
from collections.abc import Callable

import jax

from mmrjax.runtime import files

INTERRUPTED = 130  # the status that shells give a program ended by Ctrl-C


def run(program: Callable[[], int], ending: str = "") -> int:
    """The exit status of `program`.

    Args:
      program: returns its status. The words of a ValueError, RuntimeError or OSError are meant for
        the user; other errors are bugs and keep their traceback.
      ending: end of the line, such as the effect of an error on the files, with its own comma.
    """
    try:
        return program()
    except KeyboardInterrupt:
        print(f"interrupted{ending}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, RuntimeError, OSError) as e:
        if os.environ.get("MMRJAX_TRACEBACK"):
            raise
        print(f"error: {files.explain(e)}{ending}", file=sys.stderr)
        return 1


def keep_compiled() -> None:
    """Keeps compiled programs for the next command, in ~/.cache/mmrjax/xla.

    By default JAX keeps only programs that take a second to compile, and the hundred small programs
    of a run take several seconds. Settings in the environment win, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps no program. Nothing is kept without a home directory
    that can be written to.
    """
    try:
        cache = pathlib.Path("~/.cache/mmrjax/xla").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):
        cache = None
    wanted = {
        "jax_compilation_cache_dir": cache and str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    for name, value in wanted.items():
        if not os.environ.get(name.upper()):
            jax.config.update(name, value)
