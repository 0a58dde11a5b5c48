"""The device mesh, the place of arrays on it, and the rows that a process has to know.

A batch is split over all devices. Parameters are on every device, or with `fsdp` > 1 the large ones
are split over that many devices (fully sharded data parallelism, Zhao et al. 2023,
arXiv 2304.11277). With several processes, each puts the rows of its own devices: host arrays have
the full shape everywhere, but only `own_rows` need to be filled.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmrjax.runtime import devices, processes

AXES = ("data", "fsdp")
FSDP_ELEMENTS = 1 << 16  # smaller arrays are not split: gathering costs more than it saves


def make_mesh(count: int | None = None, fsdp: int = 1, batch_sizes: Sequence[int] = ()) -> Mesh:
    """A mesh ("data", "fsdp") over all devices of all processes, or over the first `count`.

    Args:
      count: number of devices; None takes all.
      fsdp: devices that share a large parameter.
      batch_sizes: those of the run. If the devices are cores that `devices.show_cores` chose, the
        mesh takes as many as divide these sizes: the process may have chosen for an earlier run
        with others. Other devices are all taken, and `check_divisible` reports a batch that leaves
        some of them idle.

    Raises:
      ValueError: `fsdp` does not divide the devices.
    """
    available = jax.devices()
    n = count or len(available)
    if devices.are_shown_cores():
        n = math.gcd(n, *batch_sizes)
    if n % fsdp:
        valid = ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
        raise ValueError(f"train.fsdp={fsdp} must divide the {n} devices; try one of {valid}")
    # Auto axes: Explicit axes, jax.make_mesh's default, would put the mesh into model code.
    return jax.make_mesh(
        (n // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=available[:n]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose axis `axis` is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def fsdp_shardings(tree, mesh: Mesh):
    """Shardings of parameters or of what has their shapes, such as moments.

    The longest axis that divides is split over "fsdp"; arrays of less than FSDP_ELEMENTS are not
    split.
    """
    n = mesh.shape["fsdp"]

    def sharding(leaf) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % n == 0]
        if n == 1 or leaf.size < FSDP_ELEMENTS or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, tree)


def put(tree, shardings):
    """Puts arrays, equal in every process, as `shardings` (a tree or a single sharding) says."""
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: _put(x, shardings), tree)
    return jax.tree.map(_put, tree, shardings)


def replicate(tree, mesh: Mesh):
    """Puts every leaf on every device."""
    return put(tree, replicated(mesh))


def put_batch(tree, mesh: Mesh, axis: int = 0):
    """Puts arrays on the devices, split along `axis`; each process needs its `own_rows` only."""
    return put(tree, batched(mesh, axis))


def own_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a split batch this process's devices hold, bool [batch_size]."""
    own = np.zeros(batch_size, bool)
    for (rows,) in batched(mesh).addressable_devices_indices_map((batch_size,)).values():
        own[rows] = True
    return own


def spread(tree, mesh: Mesh, count: int):
    """The first `count` rows of arrays that `put_batch` has split, on every device."""

    def cut(tree):
        return jax.tree.map(lambda x: x if len(x) == count else x[:count], tree)

    return jax.jit(cut, out_shardings=replicated(mesh))(tree)


def complete(tree, mesh: Mesh):
    """Host arrays whose `own_rows` every process has filled, complete in every process."""
    return tree if processes.count() == 1 else gather(put_batch(tree, mesh))


def gather(tree):
    """NumPy arrays in every process, wherever their parts lie; all processes must call it."""

    def array(x) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(array, tree)


def check_divisible(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError when a batch cannot be split evenly, naming the nearest valid sizes."""
    n = mesh.devices.size
    if batch_size % n:
        low, high = batch_size // n * n, (batch_size // n + 1) * n
        near = f"{low} or {high}" if low else f"{high}"
        raise ValueError(f"{name}={batch_size} must be divisible by {n} devices; try {near}")


def _put(x, sharding: NamedSharding) -> jax.Array:
    on_all = isinstance(x, jax.Array) and not x.is_fully_addressable
    if on_all or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # device_put would first compare the values of all processes, also of rows that are not filled.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
