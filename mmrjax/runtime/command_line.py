"""How a command ends: its exit status, and one line on standard error instead of a traceback.

For the programs that read or write files beside a training (main.py has more to say: signals,
several processes). MMRJAX_TRACEBACK=1 shows where an error was raised. And where programs keep what
they compile, which is for commands to say, not for a library that somebody imports.
"""

import os
import pathlib
import sys
from collections.abc import Callable

import jax

from mmrjax.runtime import files

INTERRUPTED = 130  # as shells say of a program that Ctrl-C has ended


def run(program: Callable[[], int], ending: str = "") -> int:
    """The exit status of `program`.

    Args:
      program: returns its status; ValueError, RuntimeError and OSError that it raises are errors
        of what was given, whose words are for a person; others are ours and stay as they are.
      ending: of the line, such as what an error means for the files; begins with its own comma.
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

    All of them: JAX leaves out what it compiles within a second, and the hundred small ones of a
    run take several. What the environment sets otherwise stays; JAX_ENABLE_COMPILATION_CACHE=false
    keeps none, nor does a user without a home that can be written to.
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
