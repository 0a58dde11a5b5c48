"""Fetches the published weights that a method reads and the cache lacks.

Module weights/source.py declares the published files and checks their hashes.
"""

from collections.abc import Callable

from absl import logging

from data_builders import download
from mmrjax.methods import base
from mmrjax.runtime import files
from mmrjax.weights import source


def fetch(method: base.Method) -> None:
    """Puts the published weights of a method into the cache of this machine.

    Raises:
      FileNotFoundError, ValueError: as `found`.
    """
    for find in method.weights_needed(method.config).values():
        found(find)


def found(find: Callable[[], object]) -> None:
    """Calls a look for a weight file (`Method.weights_needed`); fetches an absent published file.

    Raises:
      FileNotFoundError: no such file, or no network; the message names URL and place.
      ValueError: another hash than the published one, or weights that do not exist.
    """
    try:
        find()
    except source.NotCached as absent:
        with files.held(absent.path.parent):  # several programs may want the file
            if not absent.path.exists():
                _download(absent)
        find()


def _download(absent: source.NotCached) -> None:
    logging.info("fetching %s", absent.url)
    part = absent.path.with_name(f"{absent.path.name}.part")
    try:
        download.resume(absent.url, part)
    except OSError as e:
        raise absent.because(str(e)) from e
    part.replace(absent.path)
