"""Checkpoints: Orbax behind one small wrapper that verifies what it reads.

A save is asynchronous and atomic: a killed save leaves the previous checkpoint in place. Orbax does
not notice a flipped bit. A checksum per leaf is therefore stored beside the arrays, and a checksum
of that metadata. A checkpoint that does not match is reported, and the previous checkpoint is used.
Checksums are computed in the background, like writing. The frozen teacher is never saved.

Several processes save and restore together, on storage that all of them see: all processes call
each method. A checkpoint does not depend on how its arrays were split.
"""

import contextlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mmrjax.runtime import files, mesh, processes


class Store:
    """The folders with the checkpoints of a run: in the run's folder, here or in a bucket."""

    def __init__(
        self,
        root: os.PathLike,
        send: Callable[[], None] = lambda: None,
        naming: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """Touches nothing.

        Args:
          root: the run's folder, or its address.
          send: copies the run's other files to `root`; a checkpoint is of no use without them. All
            processes call it.
          naming: a context that turns errors of the storage's client into a single line.
        """
        self.root, self.send, self.naming = epath.Path(root), send, naming

    def open(self, name: str, keep: int = 2, read_only: bool = False) -> "Checkpoints":
        """The checkpoints in the folder `name`, with the arguments of `Checkpoints`."""
        return Checkpoints(self.root / name, keep, read_only, self.send, self.naming)

    def present(self, name: str) -> bool:
        """Whether the folder `name` has a checkpoint, intact or damaged."""
        folder = self.root / name
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

    def stages(self, name: str) -> list[str]:
        """Names of the folders in the folder `name` that hold checkpoints, sorted."""
        folder = self.root / name
        inner = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(stage for stage in inner if self.present(f"{name}/{stage}"))


class Checkpoints:
    """The checkpoints of one run, each named by its step; a tree of arrays each."""

    def __init__(
        self,
        directory: os.PathLike,
        keep: int = 2,
        read_only: bool = False,
        before_save: Callable[[], None] = lambda: None,
        naming: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """Opens (or creates) a directory.

        Args:
          directory: a folder, or an address in a bucket.
          keep: the latest checkpoints that stay.
          read_only: touches nothing in the directory: a run that still trains may own it.
          before_save: called before a checkpoint is saved.
          naming: a context that turns errors of the storage's client into a single line.
        """
        is_here = not files.is_remote(directory)
        self._directory = epath.Path(pathlib.Path(directory).absolute() if is_here else directory)
        self._read_only, self._before_save, self._naming = read_only, before_save, naming
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        handlers, meta = ocp.DefaultCheckpointHandlerRegistry(), _MetaHandler()
        handlers.add("meta", ocp.args.JsonSave, meta)
        handlers.add("meta", ocp.args.JsonRestore, meta)
        with self._naming():
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, handler_registry=handlers
            )

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree) -> None:
        """Starts to save a tree of jax.Arrays; returns as soon as it is copied from the devices.

        The previous save is waited for, so that the host holds the copies of one tree only.
        """
        self.wait()
        self._before_save()
        parts, leaves = _copied(tree), _describe(tree)

        def meta() -> dict:
            sums = {path: _checksum(_joined(*leaves[path], parts.pop(path))) for path in leaves}
            known = {"checksums": sums, "leaves": leaves}
            return {**known, "crc": _crc(known)}

        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        with self._writing():
            saved = self._manager.save(step, args=args, force=True)
        if not saved:
            raise RuntimeError(f"checkpoint {step} was refused; present: {self.steps()}")

    def wait(self) -> None:
        """Waits until everything is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises the error of a save that failed in the background; of a full disk in our words."""
        try:
            with self._naming():
                yield
        except Exception as e:  # Orbax raises whatever its writers raise
            if not (reason := files.full_disk(e)):
                raise
            raise OSError(f"no checkpoint could be written to {self._directory} ({reason})") from e

    def restore(self, target) -> tuple[int, object] | None:
        """Restores the newest intact checkpoint.

        Args:
          target: a tree of arrays or shapes with shardings; or a single sharding, to restore any
            nested dict that is stored (a memory bank's size is not known before).

        Returns:
          (step, tree), or None when there is no checkpoint.

        Raises:
          ValueError: the newest checkpoint holds other leaves than `target`, naming them.
          RuntimeError: there are checkpoints, but none of them is intact.
        """
        steps = list(processes.first(self.steps))[::-1]
        for step in steps:
            tree = self._intact(step, target)
            if tree is not None:
                if not self._read_only:
                    self._set_aside(steps[: steps.index(step)])
                return step, tree
        if steps:
            raise RuntimeError(
                f"none of the checkpoints {steps} in {self._directory} can be read; delete that "
                "folder to train again from the start"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, since their steps will be saved a second time.

        They are not deleted: the damage may be an error of reading.
        """

        def move() -> None:
            for step in steps:
                aside = self._directory.with_name(f"{self._directory.name}-damaged-{step}")
                aside.rmtree(missing_ok=True)
                (self._directory / str(step)).rename(aside)

        if steps:
            processes.first(move)
            self._manager.reload()

    def _intact(self, step: int, target):
        """The tree of a checkpoint, or None if any process finds it damaged."""
        meta = self._meta(step)
        if _in_any_process(meta is None):
            return None
        if isinstance(target, jax.sharding.Sharding):
            target = _stored_dict(meta["leaves"], target)
        else:
            _check_leaves(meta["leaves"], _describe(target), self._directory / str(step))
        tree = self._read(step, target)
        if _in_any_process(tree is None):
            return None
        damaged = [k for k, crc in checksums(tree).items() if meta["checksums"].get(k) != crc]
        if damaged:
            logging.error("checkpoint %d is damaged (checksum of %s): ignored", step, damaged[:3])
        return None if _in_any_process(bool(damaged)) else tree

    def _meta(self, step: int) -> dict | None:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            meta = restored["meta"]
            if meta.pop("crc") != _crc(meta):  # a flipped bit would look like another model
                raise ValueError("checksum of its metadata")
            return meta
        except Exception as e:  # Orbax raises whatever its parsers raise on damaged files
            logging.error("checkpoint %d cannot be read (%s): ignored", step, _one_line(e))
            return None

    def _read(self, step: int, target):
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
            return restored["state"]
        except Exception as e:  # as above
            logging.error("checkpoint %d cannot be read (%s): ignored", step, _one_line(e))
            return None

    def __enter__(self):
        """Returns itself."""
        return self

    def __exit__(self, *exception):
        """Waits for a save in progress and closes."""
        with self._writing():
            self._manager.close()


class _MetaHandler(ocp.JsonCheckpointHandler):
    """Calls a function in the background and writes its result.

    Orbax commits a checkpoint afterwards, and raises errors of both like errors of its writers.
    """

    async def async_save(self, directory, item=None, args=None):
        """The future of the file; `args.item` is the function."""
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(
                self._write(directory / "metadata", args.item), name="meta"
            )
        ]

    async def _write(self, path: epath.Path, meta: Callable[[], dict]) -> None:
        if processes.is_first():
            path.write_text(json.dumps(meta()))


def checksums(tree) -> dict[str, int]:
    """{leaf path: crc32 of its bytes}, leaf by leaf; called by all processes together."""
    return {
        jax.tree_util.keystr(path): _checksum(mesh.gather(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array))


def _copied(tree) -> dict[str, list]:
    """{leaf path: [(index, values) of each part]} on the host, in the first process.

    The parts are JAX's own host copies. On a CPU Orbax shares the copy of an array that a single
    device holds, and fetches a part from each device of a split array; on a GPU it makes pinned
    copies of its own. All processes must gather parts of other processes together, hence here.
    """
    first = processes.is_first()

    def parts(leaf) -> list:
        if leaf.is_fully_replicated:
            return [(..., leaf.addressable_data(0))] * first
        if not leaf.is_fully_addressable:
            return [(..., mesh.gather(leaf))][:first]
        shards = leaf.addressable_shards
        return [(shard.index, shard.data) for shard in shards if shard.replica_id == 0]

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return jax.device_get({jax.tree_util.keystr(path): parts(leaf) for path, leaf in leaves})


def _joined(shape: list[int], dtype: str, parts: list) -> np.ndarray:
    if len(parts) == 1:
        return parts[0][1]
    array = np.empty(shape, dtype)
    for index, values in parts:
        array[index] = values
    return array


def _crc(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _describe(tree) -> dict[str, list]:
    return {
        jax.tree_util.keystr(path): [list(jnp.shape(leaf)), str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _stored_dict(leaves: dict, sharding: jax.sharding.Sharding) -> dict:
    """The nested dict of shapes behind paths such as "['memory']['bank']"."""
    tree: dict = {}
    for path, (shape, dtype) in leaves.items():
        *parents, name = re.findall(r"\['([^']+)'\]", path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
    return tree


def check_leaves(stored, wanted, where: epath.Path | pathlib.Path) -> None:
    """Raises ValueError if two trees of arrays or shapes differ, naming up to four leaves."""
    _check_leaves(_describe(stored), _describe(wanted), where)


def _check_leaves(stored: dict, wanted: dict, where: epath.Path) -> None:
    wrong = [
        f"{k}: stored {stored.get(k, 'nothing')}, expected {wanted.get(k, 'nothing')}"
        for k in sorted(stored.keys() | wanted.keys())
        if stored.get(k) != wanted.get(k)
    ]
    if wrong:
        raise ValueError(f"{where} belongs to another model: " + "; ".join(wrong[:4]))


def _in_any_process(fact: bool) -> bool:
    return processes.agree(int(fact)) == (1,)


def _one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200]
