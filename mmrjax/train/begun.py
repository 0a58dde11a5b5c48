"""A begun run holds to the weights and the defects that it was begun with.

The configuration tells a file's name only, and what is in the file may have changed since.
"""

import hashlib
import json
import pathlib

import jax
import numpy as np

from mmrjax.runtime import checkpoint, files

TEACHER = "teacher.json"  # the sha256 of the weights that a run is trained with
LABELLED = "labelled.json"  # the sha256 of the labelled defects that it is trained with, and counts
CHECKPOINTS, FITTED = "checkpoints", "fitted"  # folders of a run


def has_saved(store: checkpoint.Store) -> bool:
    """Whether a run holds anything trained or fitted."""
    return store.present(FITTED) or bool(store.stages(CHECKPOINTS))


def hold_teacher(folder: pathlib.Path, store: checkpoint.Store, sha256: str | None) -> None:
    """Notes the teacher's weights when a run begins; a begun run refuses others.

    Raises:
      ValueError: the run was begun with weights of another sha256.
    """
    path, begun = folder / TEACHER, has_saved(store)
    used = (files.read_json(path) or {}).get("sha256", sha256)
    if begun and used != sha256:
        raise ValueError(
            f"{folder} was begun with teacher weights of sha256 {str(used)[:8]}…, the file has "
            f"{str(sha256)[:8]}… now; put the first ones back, or use another --workdir"
        )
    if not begun:
        files.write_text(path, json.dumps({"sha256": sha256}))


def hold_extras(folder: pathlib.Path, store: checkpoint.Store, arrays: dict, facts: dict) -> None:
    """Notes a method's extras, such as labelled defects; a begun run refuses others.

    Raises:
      ValueError: the run was begun with others.
    """
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(array).tobytes())
    path, sha256 = folder / LABELLED, digest.hexdigest()
    noted = (files.read_json(path) or {}).get("sha256", sha256)
    if has_saved(store) and noted != sha256:
        raise ValueError(
            f"{folder} was begun with other labelled defects (sha256 {noted[:8]}…, now "
            f"{sha256[:8]}…); put the first ones back, or use another --workdir"
        )
    files.write_text(path, json.dumps({**facts, "sha256": sha256}))
