"""The device mesh, where arrays lie on it, and which rows of them a process has to know.

A batch is split over all devices. Parameters are on every device, or with `fsdp` > 1 the large ones
are split over that many devices (fully sharded data parallelism, Zhao et al. 2023,
arXiv 2304.11277). With several processes, each puts the rows of its own devices: host arrays have
the full shape everywhere, but only `own_rows` need to be filled.
"""

import math
import os
import pathlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmrjax.runtime import processes

AXES = ("data", "fsdp")
GIB_OF_A_CORE = 4  # of the machine's memory, for the weights, moments and images of a device
# Of control groups, versions 2 and 1.
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
CPU_QUOTA_1 = ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_cores_shown = False
FSDP_ELEMENTS = 1 << 16  # smaller arrays stay whole: they cost more to gather than they save


def devices() -> list[jax.Device]:
    """All devices of all processes.

    Raises:
      RuntimeError: JAX cannot use the kind of device that is asked for.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # the latter where no plugin is installed
        asked = jax.config.jax_platforms
        reason = " ".join(str(e).partition(" (set JAX_PLATFORMS")[0].split())
        reason = reason or "no such backend is installed"
        raise RuntimeError(
            f"JAX_PLATFORMS={asked}: no such device can be used here ({reason}); unset it to take "
            "what there is, or install the driver and mmrjax with the extra cuda12, cuda13 or tpu"
        ) from e


def on_nvidia() -> bool:
    """Whether the devices are NVIDIA's GPUs."""
    device = jax.devices()[0]
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def show_cores(batch_sizes: Iterable[int] = ()) -> None:
    """Lets JAX take each core of a CPU as a device: as many as divide every batch size.

    XLA:CPU splits most operations badly over the threads of one device (docs/performance.md); as
    devices, each core computes its own images. One for every GIB_OF_A_CORE of memory at most: the
    full student with its moments is 1.6 GiB on each. Does nothing where JAX runs already, or where
    its number of CPU devices is set by JAX_NUM_CPU_DEVICES or XLA_FLAGS.
    """
    global _cores_shown
    by_flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if by_flag or jax.config.jax_num_cpu_devices >= 0:
        return
    most = max(1, int(min(cores(), _memory_gib() / GIB_OF_A_CORE)))
    shared = math.gcd(*batch_sizes)  # 0, which all divide, of none
    count = max(n for n in range(1, most + 1) if shared % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX runs already
        return
    _cores_shown = True


def cores() -> int:
    """Cores that this process may use: its affinity and quota, threads of one core counted once."""
    try:
        threads = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    count = len({_read(siblings.format(n)) or str(n) for n in threads})
    quota, period = (_read(CPU_QUOTA) or " ".join(f"{_read(path)}" for path in CPU_QUOTA_1)).split()
    if quota.isdecimal() and period.isdecimal():
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def _memory_gib() -> float:
    """What the machine has, or this process's control group is allowed."""
    limits = (_read(path) or "" for path in MEMORY_LIMITS)
    sizes = [int(limit) for limit in limits if limit.isdecimal()]
    try:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # no POSIX, or it does not say
        pass
    return min(sizes, default=math.inf) / 2**30


def _read(path: str) -> str | None:
    try:
        return pathlib.Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def make_mesh(devices: int | None = None, fsdp: int = 1, batch_sizes: Sequence[int] = ()) -> Mesh:
    """A mesh ("data", "fsdp") over all devices of all processes, or over the first `devices`.

    Of the cores that `show_cores` showed, over as many as divide `batch_sizes`: a later run in the
    same process may have others. Of other devices over all: whoever has eight GPUs is to be told
    that a batch of 12 leaves some idle.

    Raises:
      ValueError: `fsdp` does not divide the devices.
    """
    available = jax.devices()
    n = devices or len(available)
    if _cores_shown:
        n = math.gcd(n, *batch_sizes)
    if n % fsdp:
        valid = ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
        raise ValueError(f"train.fsdp={fsdp} must divide the {n} devices; try one of {valid}")
    # Auto axes: Explicit ones, jax.make_mesh's default, would put the mesh into model code.
    return jax.make_mesh(
        (n // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=available[:n]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Axis `axis` is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def fsdp_shardings(tree, mesh: Mesh):
    """Shardings of parameters or of what has their shapes, such as moments.

    The longest axis that divides is split over "fsdp"; arrays of less than FSDP_ELEMENTS stay
    whole.
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
    """Puts arrays, the same in every process, where `shardings` (a tree or a single one) says."""
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
    """The first `count` rows of arrays that `put_batch` has split, now whole on every device."""

    def cut(tree):
        return jax.tree.map(lambda x: x if len(x) == count else x[:count], tree)

    return jax.jit(cut, out_shardings=replicated(mesh))(tree)


def whole(tree, mesh: Mesh):
    """Host arrays of which every process has filled its `own_rows`, complete in every process."""
    return tree if processes.count() == 1 else gather(put_batch(tree, mesh))


def gather(tree):
    """Whole NumPy arrays in every process, wherever the parts lie; all processes must call it."""

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
    # device_put would first compare the values of all processes, rows that are not filled as well.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
