"""Training from Python: the same run as `mmrjax train`."""

import os
import pathlib
from collections.abc import Callable, Mapping

from mmrjax.runs import arguments, places


def train(
    folder: str | os.PathLike,
    workdir: str | os.PathLike | None,
    method: str,
    config: str,
    fields: Mapping[str, object],
    run: Callable[[list[str]], int],
) -> str:
    """Trains on a folder of good parts, or goes on with a run; the run to load.

    Args:
      folder: good parts in any layout of the data set `folder`.
      workdir: by default runs/<name of the folder>.
      method: "auto", or a name of METHODS.
      config: a configuration file or its name.
      fields: {"group.field": value} of the configuration.
      run: `mmrjax.main.main`.

    Returns:
      The only run of the work directory, or of the method in it; else the work directory.

    Raises:
      FileNotFoundError, ValueError: no such folder, field or method, with what to do.
      RuntimeError: the training stopped; the line of the reason is on standard error.
    """
    place = None if workdir is None else str(workdir)
    given = [f"{name}={_written(value)}" for name, value in fields.items()]
    if not pathlib.Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    command = arguments.training(str(folder), config, place, method, given)
    if run(command):
        raise RuntimeError(f"no detector of {folder}: the line above that begins with error: says")
    workdir = next(a.partition("=")[2] for a in command if a.startswith("--workdir="))
    found = places.runs(pathlib.Path(workdir))
    own = [one for one in found if one.parts[-3] == method] or found
    return str(own[0]) if len(own) == 1 else workdir


def _written(value: object) -> str:
    """A value as the command line has it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)
